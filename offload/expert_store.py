"""Experts on demand: leases by layer, loads by I/O threads.

Answers `runtime.experts.ExpertPager`. All of it runs on the engine thread but the reads.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from edgeroute.offload import expert_stats
from edgeroute.offload.counters import LayerCount
from edgeroute.offload.expert_ahead import ExpertsAhead
from edgeroute.offload.expert_copies import ExpertCopies
from edgeroute.offload.expert_pool import ExpertPool, PoolPlan, share_slots
from edgeroute.offload.expert_tier import ExpertTier, SlotParams
from edgeroute.offload.expert_turns import TurnParams, Turns, cut_turns
from edgeroute.offload.overlap_gate import OverlapGate
from edgeroute.offload.paging_log import PagingLog, writing
from edgeroute.offload.prefetch import make_predictor
from edgeroute.offload.prefetch_gate import WATCHED, GateParams, GateReport, PrefetchGate
from edgeroute.offload.pressure import Pressure
from edgeroute.offload.transfer import Ticket, Transfer
from edgeroute.runtime import machine
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.experts import Held, Leased
from edgeroute.runtime.stop_flag import StopFlag
from edgeroute.runtime.weights import Weights

GROUP_BYTES = 48 << 20
"""Experts that a long prompt loads and computes together: several reads, few slots."""
GROUPS_AHEAD = 2
MOST_OF_A_LAYER = 0.75
"""Share of its experts that a prompt must use for the next layer to be read ahead blindly."""
READING_S = 0.25
"""How often memory is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParams(SlotParams):
    """How experts are kept: bytes for slots, the eviction policy, the predictor.

    `prefetch` names a predictor; it is on only while it pays, or always if `forced`, or until it
    loses if it `begins_on`. `overlap` allows resident experts to be computed while
    others arrive, while that pays, or always with `overlap_forced`. `pages_from` is the file
    that they are read from, `sidecar` what is made of one, and `refused` why none is: for `stats`.
    """

    prefetch: str = "gate"
    forced: bool = False
    begins_on: bool = False
    overlap: bool = True
    overlap_forced: bool = False
    pages_from: Path | None = None
    sidecar: str = "none"
    refused: str | None = None


class _Load(NamedTuple):
    """Leased pages of one layer whose bytes may be on their way."""

    pool: ExpertPool
    il: int
    pages: list[int]
    slots: list[int]
    tickets: list[Ticket]
    missing: list[int]
    began: float


class ExpertStore(ExpertTier):
    """The experts of one model. Not thread-safe: the engine thread owns it.

    Lifetime: owns slots and transfer; `base` must outlive it.
    """

    def __init__(
        self, base: Weights, device: Device, pools: Sequence[PoolPlan], transfer: Transfer,
        params: ExpertParams,
    ) -> None:  # fmt: skip
        """Reserve the slots; nothing is read yet.

        Raises:
            CapacityError: the budget or the device holds too little.
            UsageError: no such policy or predictor.
        """
        self._transfer = transfer
        self._pages_from, self._sidecar = params.pages_from, params.sidecar
        self._refused = params.refused
        n_layer = 1 + max(layer.il for plan in pools for layer in plan.layers)
        predictor = make_predictor(params.prefetch, n_layer, pools[0].n_expert)
        super().__init__(base, device, pools, params)
        self.stop_flag = device.stop_flag
        """What stops a prompt that waits for reads."""
        allowed = params.prefetch != "none" and (params.forced or self.cliff.fallback is None)
        how = replace(WATCHED if params.begins_on else GateParams(),
                      step_budget_bytes=params.slots_bytes // 4)  # fmt: skip
        gate = PrefetchGate(how, allowed, begin_on=params.begins_on)
        self._ahead = ExpertsAhead(transfer, self._pool_of, predictor, gate, params.forced)
        self.overlap = OverlapGate(allowed=params.overlap, forced=params.overlap_forced)
        self.overlapped_s = 0.0
        """Seconds in which experts were computed while others of their layer were read."""
        self._measured: float | None = None
        self._loads: list[_Load] = []
        self._in_turn: deque[_Load] = deque()
        self._prefill = False
        self._began = self._next_reading = self._stalled = 0.0
        self.stalled_s = 0.0
        """Seconds that passes over the model have waited for reads so far."""
        self.pressure = Pressure(self.slots_bytes)
        self._log: PagingLog | None = None  # where the recorder writes a file
        self.copies: ExpertCopies | None = None
        """Copies of fewer bits beside the experts, where misses of little weight take those."""

    # a pass over the model

    def begin(self, *, prefill: bool) -> None:
        """Begin a pass: a token per sequence, or a ubatch of a prompt."""
        self._prefill = prefill
        self._began = time.perf_counter()
        self._stalled = self.stalled_s
        if self._began >= self._next_reading:
            self._read_pressure()
        for pool in self.pools:
            pool.table.begin_step(prefill)
        if self.recorder is not None:
            self.recorder.begin_step(prefill)
        self._ahead.begin(prefill=prefill)

    @property
    def wants_guess(self) -> bool:
        """Whether the next layer's router should be asked ahead in this pass."""
        return self._ahead.wants_guess

    def max_at_once(self, il: int) -> int:
        """Return how many experts of a layer can be held at the same time."""
        return self._pool_of[il].table.n_slots

    def chose(self, il: int, ids: Sequence[int], guess: Sequence[int] | None) -> None:
        """Learn what a layer chose; what it makes likely is prefetched behind its own loads."""
        if self.recorder is not None:
            self.recorder.record(il, ids)
        self.foresee(il, ids, guess)

    def foresee(self, il: int, ids: Sequence[int], guess: Sequence[int] | None) -> None:
        """Learn what a layer chose for prefetch alone: a tier above answers some of it."""
        self._end_measured()
        self._ahead.chose(il, ids, guess)

    def lease(self, il: int, experts: Sequence[int]) -> Leased | None:
        """Hold distinct experts of a layer until the next lease, or `end`."""
        self._let_go()
        load = self._start(il, experts)
        absent: list[int] = []
        if load.tickets:
            n_missing = len(load.missing)
            if n_missing < len(experts):
                self._measured = load.began
                if self.overlap.begin(n_missing):
                    absent = [page % self._n_expert for page in load.missing]
            if not absent and not self._finish(load):
                return None
        if not self._prefill:
            self._ahead.look()
        return Leased(load.slots, absent)

    def arrive(self) -> bool:
        """Wait for the absent experts of the latest lease."""
        load = self._loads[-1]
        ended = time.perf_counter()
        if all(ticket.done for ticket in load.tickets):
            ended = max(ticket.ended for ticket in load.tickets)
        self.overlapped_s += max(0.0, ended - load.began)
        return self._finish(load)

    def _end_measured(self) -> None:
        """Tell the gate how long a layer took that missed some of its experts."""
        if self._measured is not None:
            self.overlap.end(time.perf_counter() - self._measured)
            self._measured = None

    def in_turn(self, il: int, counts: Mapping[int, int], most: int) -> Iterator[Held | None]:
        """Hold distinct experts of a layer group by group, resident ones first.

        The first reads begin at once, not only when a group is asked for.
        """
        self._let_go()
        self._ahead.collect()
        if self._log is not None:
            self._log.turns_begin(most)
        waiting = deque(self._groups(il, counts, most))
        under_way = self._in_turn = deque[_Load]()
        self._fill_ahead(il, waiting, under_way)
        blind = len(counts) > MOST_OF_A_LAYER * self._n_expert
        return self._turns(il, waiting, under_way, blind=blind)

    @property
    def next_is_here(self) -> bool:
        """Whether the next group of `in_turn` needs no waiting."""
        return bool(self._in_turn) and all(ticket.done for ticket in self._in_turn[0].tickets)

    def _turns(
        self, il: int, waiting: deque[list[int]], under_way: deque[_Load], *, blind: bool
    ) -> Iterator[Held | None]:
        """Wait for group after group; `blind` reads on in the next layer at the end."""
        while waiting or under_way:
            self._fill_ahead(il, waiting, under_way)
            load = under_way.popleft()
            if not self._finish(load):
                yield None
                return
            if blind and not waiting and not under_way:
                self._ahead.read_on(il + 1, 2 * GROUP_BYTES)
            yield Held([page % self._n_expert for page in load.pages], load.slots)
            self._release(load)
        if self._log is not None:
            self._log.turns_end()

    def end(self) -> None:
        """Let go of everything held, whatever has happened."""
        self._let_go()
        self._end_measured()
        self._ahead.end(prefill=self._prefill)
        if not self._prefill:
            self._n_steps += 1
        if self._log is not None:
            with writing():
                self._log.end(time.perf_counter() - self._began, self.stalled_s - self._stalled)
        elif self.recorder is not None:
            self.recorder.end_step()

    def end_sequence(self) -> None:
        """An answer is complete: what follows may be about something else."""
        self._ahead.predictor.end_sequence()

    def reconsider(self) -> None:
        """Change to the eviction policy that would have served the latest tokens best.

        To be called when nothing is being computed: it takes a few tenths of a second, now
        and then.
        """
        if self._change_policies() and self._log is not None:
            self._log.changed()

    def close(self) -> None:
        """Stop the I/O threads, then free the slots; safe to call twice."""
        self._transfer.close()
        self._close_pools()

    # loads

    def _start(self, il: int, experts: Sequence[int]) -> _Load:
        """Lease pages and have the missing ones read."""
        pool, first = self._pool_of[il], il * self._n_expert
        pages = [first + expert for expert in experts]
        self._ahead.collect()
        slots, missing = pool.table.acquire(pages)
        tickets: list[Ticket] = []
        began = time.perf_counter() if missing else 0.0
        load = _Load(pool, il, pages, slots, tickets, [one.page for one in missing], began)
        self._loads.append(load)
        if not missing:
            return load
        jobs = []
        for page, slot, promote, cancels in missing:
            if cancels is not None:
                self._ahead.stop(cancels)
            if promote:
                tickets.append(self._ahead.take(page))
            else:
                jobs.append(pool.job(page, slot))
        if jobs:
            try:
                tickets.append(self._transfer.load(jobs))
            except BaseException:
                for job in jobs:
                    pool.table.failed(job.id)
                raise
        return load

    def _finish(self, load: _Load) -> bool:
        """Wait for a load; False if a stop was asked for, and then not all is there."""
        if not load.tickets:
            return True
        began = time.perf_counter()
        stop = self.stop_flag.is_set if self._prefill else None
        try:
            arrived = [self._transfer.wait(ticket, stop) for ticket in load.tickets]
        finally:
            waited_s = time.perf_counter() - began
            self.stalled_s += waited_s
            load.pool.table.counters.stalled(load.il, waited_s)
            self._book(load)
        return all(arrived)

    def _book(self, load: _Load) -> None:
        """Enter how a load's reads ended, once all of them have."""
        table = load.pool.table
        for ticket in load.tickets:
            if not ticket.done:
                self._transfer.cancel(ticket)
                with ticket.finished:
                    pass
            for result in ticket.results:
                (table.loaded if result.outcome == "ok" else table.failed)(result.id)
                if result.outcome != "ok" and self._log is not None:
                    self._log.broke()
        load.tickets.clear()

    def _release(self, load: _Load) -> None:
        self._book(load)
        self._loads.remove(load)
        load.pool.table.release(load.pages)

    def _let_go(self) -> None:
        self._in_turn.clear()
        while self._loads:
            self._release(self._loads[-1])

    # prompts

    def _groups(self, il: int, counts: Mapping[int, int], most: int) -> list[list[int]]:
        """Cut a layer's experts into groups that slots can be had for."""
        pool = self._pool_of[il]
        turns = Turns(first=il * self._n_expert, page_bytes=pool.plan.page_bytes, counts=counts,
                      most=most)  # fmt: skip
        return cut_turns(pool.table, turns, _turn_params(), self._ahead.coming)

    def _fill_ahead(self, il: int, waiting: deque[list[int]], under_way: deque[_Load]) -> None:
        """Begin the loads of the next groups, as far as slots allow; of one group always."""
        while waiting and len(under_way) <= GROUPS_AHEAD:
            try:
                under_way.append(self._start(il, waiting[0]))
            except CapacityError:
                if under_way:
                    return
                raise
            waiting.popleft()

    # the trace's file

    def begin_log(self) -> None:
        """Enter what the pools do into the recorder's file from now on."""
        assert self.recorder is not None
        self._log = PagingLog(self.recorder, self.pools, _turn_params())

    def end_log(self) -> None:
        """Enter what the pools have counted; a file that takes no more is whole without that."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # the step before has said so
                self._log.count()
            self._log = None

    # below another tier

    def pool(self, il: int) -> ExpertPool:
        """Return the slots of a layer's experts."""
        return self._pool_of[il]

    def stand_below(self, is_above: Callable[[int], bool], stop_flag: StopFlag) -> None:
        """Serve a tier that holds some pages itself, and whose device a stop flag belongs to.

        What it asks is recorded by it, not what layers chose.
        """
        self._ahead.is_above = is_above
        self.stop_flag = stop_flag

    @property
    def tiers(self) -> dict[str, list[ExpertPool]]:
        """Slots by the tier that they are in."""
        return {"dram": self.pools}

    # size and statistics

    @property
    def policy(self) -> str:
        """The policies at work."""
        return self.tier_policy

    def _read_pressure(self) -> None:
        """Look at the machine's memory now and then, and give way to others before they starve."""
        self._next_reading = self._began + READING_S
        target = self.pressure.read(machine.memory().available_bytes, self.slots_bytes)
        if target is not None:
            self.resize(target)

    def resize(self, slots_bytes: int) -> int:
        """Shrink or grow towards a number of bytes; leased pages stay.

        Returns:
            The bytes given back to the system.
        """
        plans = [pool.plan for pool in self.pools]
        least = self._n_used * sum(plan.slot_bytes for plan in plans)
        counts = share_slots(plans, max(slots_bytes, least), self._n_used)
        given = sum(pool.resize(n) for pool, n in zip(self.pools, counts, strict=True))
        if self._log is not None:
            self._log.changed()
        return given

    def prefetch_report(self) -> GateReport:
        """Return what is known of prefetch: whether it is on, and why not."""
        return self._ahead.gate.report()

    def spent(self) -> LayerCount:
        """Return what the experts cost so far, decode and prefill together."""
        return expert_stats.spent(self.pools)

    def stats(self) -> dict[str, object]:
        """Return what the experts cost so far, decode and prefill apart.

        `n_reads` and `read_bytes` are what the disk was asked for, in both.
        """
        moved = self._transfer.stats
        return {
            "policy": self.policy,
            "n_slots": sum(pool.table.n_slots for pool in self.pools),
            "n_pages": sum(pool.plan.n_pages for pool in self.pools),
            "slots_bytes": self.slots_bytes,
            "prefetch": self._ahead.gate.report().state,
            "overlap": self.overlap.state,
            "overlap_gain": self.overlap.gain_ratio,
            "overlap_s": round(self.overlapped_s, 6),
            "pages_from": None if self._pages_from is None else self._pages_from.name,
            "sidecar": self._sidecar,
            "n_reads": moved.n_reads,
            "read_bytes": moved.read_bytes,
            "warning": "; ".join(filter(None, (self._refused, self.cliff.warning))) or None,
            **expert_stats.by_kind(self.pools),
        }


def _turn_params() -> TurnParams:
    return TurnParams(group_bytes=GROUP_BYTES, n_ahead=GROUPS_AHEAD)
