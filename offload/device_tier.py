"""Experts on a device with memory of its own, over a tier in DRAM: disk -> DRAM -> device.

Answers `runtime.experts.ExpertPager`. What the device has not is leased from the `ExpertStore`
below, which finds it in DRAM or reads it, and is sent on; or it stays there, and the processor
computes it. All of it runs on the engine thread.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.offload.counters import LayerCount
from edgeroute.offload.expert_pool import ExpertPool
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.offload.expert_tier import ExpertTier, SlotParams
from edgeroute.offload.expert_turns import cut_groups
from edgeroute.offload.miss_gate import HostExpertsMode, MissGate
from edgeroute.offload.overlap_gate import OverlapGate
from edgeroute.offload.page_table import Missing
from edgeroute.offload.paging_log import writing
from edgeroute.offload.prefetch_gate import GateReport
from edgeroute.offload.tier_counts import TierCount, with_hits
from edgeroute.offload.tier_link import suppose_uploads
from edgeroute.offload.tier_misses import TierMisses
from edgeroute.offload.tier_turns import Coming
from edgeroute.runtime.device import Device
from edgeroute.runtime.experts import Held, Leased
from edgeroute.runtime.upload import Uploader
from edgeroute.runtime.weights import Weights

TURN_SHARE: Final = 4
"""A prompt goes through the slots in groups of this part of them: one is computed while the next
arrives, and half of what decoding lives on stays."""
SETTLED_HITS: Final = 3
"""Hits on the device after which DRAM need not keep an expert as well, and lets it go first.

At once it would be too early: most experts leave the device soon, and cost a read then. See
BENCHLOG, 2026-11-23."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierParams(SlotParams):
    """How a device keeps experts: bytes for slots, and whose turn it is when one is missing.

    `host_experts` says who computes what is missing. At most `staging_bytes` of host memory
    hold what is being sent.
    """

    host_experts: HostExpertsMode = "off"
    staging_bytes: int = 0


class _Group(NamedTuple):
    """Leased pages of one layer, on the device."""

    pool: ExpertPool
    pages: list[int]
    slots: list[int]


class DeviceTier(ExpertTier):
    """The experts of one model on one device. Not thread-safe: the engine thread owns it.

    Lifetime: owns its slots; `base` and `below` must outlive it.
    """

    def __init__(
        self, base: Weights, device: Device, below: ExpertStore, params: TierParams
    ) -> None:
        """Reserve the slots; nothing is loaded yet.

        Raises:
            CapacityError: the device has too little memory.
            UsageError: no such policy.
        """
        self._device, self.below = device, below
        self._uploader = Uploader(device, params.staging_bytes)
        try:
            super().__init__(base, device, [pool.plan for pool in below.pools], params)
        except BaseException:
            self._uploader.close()
            raise
        self._misses = TierMisses(self._uploader, self._pool_of, below)
        self.gate = MissGate(
            sum(pool.slots.n_slots for pool in self.pools) // len(self._pool_of),
            params.host_experts,
        )
        """Says who computes what is missing; whoever computes it tells it what that took."""
        self._held: list[_Group] = []
        self._n_hits = [0] * (
            (1 + max(self._pool_of)) * self._n_expert
        )  # of each page, since it came
        self._turn: tuple[int, int] | None = None
        self._prefill = False
        self._stalled = 0.0
        below.stand_below(self._has, device.stop_flag)

    def measure_link(self) -> None:
        """Learn what uploads cost before there is anything to upload; nothing may be held yet.

        Raises:
            DeviceLostError: the device is gone.
        """
        suppose_uploads(self.gate.upload, self._uploader, self.pools[0], self._n_used)

    # a pass over the model

    def begin(self, *, prefill: bool) -> None:
        """Begin a pass: a token per sequence, or a ubatch of a prompt."""
        self._prefill = prefill
        self._misses.begin(prefill=prefill)
        self._stalled = self.below.stalled_s
        self.below.begin(prefill=prefill)
        self.gate.begin(prefill=prefill)
        for pool in self.pools:
            pool.table.begin_step(prefill)
        if self.recorder is not None:
            self.recorder.begin_step(prefill)

    @property
    def wants_guess(self) -> bool:
        """Whether the next layer's router should be asked ahead in this pass."""
        return self.below.wants_guess

    def max_at_once(self, il: int) -> int:
        """Return how many experts of a layer can be held at the same time."""
        return min(self._pool_of[il].table.n_slots, self.below.max_at_once(il))

    def chose(self, il: int, ids: Sequence[int], guess: Sequence[int] | None) -> None:
        """Learn what a layer chose; what it makes likely is read into DRAM."""
        if self.recorder is not None:
            self.recorder.record(il, ids)
        self.below.foresee(il, ids, guess)

    def here(self, il: int) -> npt.NDArray[np.bool_]:
        """Mark the experts of a layer that need no disk: on the device, or in DRAM."""
        return super().here(il) | self.below.here(il)

    def lease(self, il: int, experts: Sequence[int]) -> Leased | None:
        """Hold distinct experts of a layer until the next lease, or `end`.

        `away` are those that stay in DRAM, held there as long.
        """
        self._let_go()
        pool, first = self._pool_of[il], il * self._n_expert
        table = pool.table
        missing = [e for e in experts if table.slot_of(first + e) is None]
        self._hit(il, experts, missing)
        away = missing[len(missing) - self._n_away(il, experts, len(missing)) :]
        here = [e for e in experts if e not in away] if away else experts
        group, absent = self._take(il, here)
        if away:
            self._misses.left(il, len(away))
        host = self._ask_below(il, missing, absent)
        if host is None:
            return None
        if absent:
            self._send(il, absent, host, alone=True)
        slot_of = dict(zip(here, group.slots, strict=True))
        return Leased([slot_of[e] if e in slot_of else host[e] for e in experts], (), away)

    def arrive(self) -> bool:
        """Nothing is ever absent here: what is missing was uploaded, or is away."""
        return True

    def in_turn(self, il: int, counts: Mapping[int, int], most: int) -> Iterator[Held | None]:
        """Hold distinct experts of a layer group by group, those on the device first."""
        self._let_go()
        pool, first = self._pool_of[il], il * self._n_expert
        here = [e for e in counts if pool.table.slot_of(first + e) is not None]
        absent = {e: n for e, n in counts.items() if pool.table.slot_of(first + e) is None}
        away = absent and self._n_away(il, list(counts), len(absent), sum(absent.values()))
        if absent:
            self._record(il, list(absent))
            self._turn = il, self._asked_below(il) - pool.table.counters.misses[il]
        resident = cut_groups(here, counts, len(here), most)
        groups = deque(self._take(il, each)[0] for each in resident)
        coming = Coming(self.below, il, absent, most)
        while groups or coming.n_left:
            if away and not groups:
                yield (held := self._next_away(il, coming))
                if held is None:
                    return
                continue
            while not away and coming.n_left and len(groups) < 2 and (not groups or coming.is_here):
                taken = self._next_group(il, coming, n_held=len(groups))
                if taken is None:
                    break
                groups.append(taken)
            if coming.is_stopped or (self._prefill and self._device.stop_flag.is_set()):
                yield None
                return
            group = groups[0]
            yield Held([page % self._n_expert for page in group.pages], group.slots)
            self._release(groups.popleft())

    def end(self) -> None:
        """Let go of everything held, whatever has happened."""
        self._let_go()
        self.below.end()
        self.gate.end(self.below.stalled_s - self._stalled)
        if not self._prefill:
            self._n_steps += 1
        if self.recorder is not None:
            with writing():
                self.recorder.end_step()

    def end_sequence(self) -> None:
        """An answer is complete: what follows may be about something else."""
        self.below.end_sequence()

    def reconsider(self) -> None:
        """Change each tier to the eviction policy that would have served its latest tokens best.

        To be called when nothing is being computed: it takes a few tenths of a second, now
        and then.
        """
        self.below.reconsider()
        self._change_policies()

    def close(self) -> None:
        """Free the slots; safe to call twice."""
        self._uploader.close()
        self._close_pools()

    # pages

    def _has(self, page: int) -> bool:
        return self._pool_of[page // self._n_expert].table.slot_of(page) is not None

    def _hit(self, il: int, experts: Sequence[int], missing: Sequence[int]) -> None:
        """Let DRAM part with what proved of use on the device: see `SETTLED_HITS`.

        Decode only: prompts leave the order in which pages leave as it is.
        """
        if self._prefill or len(missing) == len(experts):
            return
        n_hits, first = self._n_hits, il * self._n_expert
        for expert in experts:
            if expert not in missing:
                page = first + expert
                n_hits[page] += 1
                if n_hits[page] == SETTLED_HITS:
                    self.below.pool(il).table.give_way(page)

    def _n_away(
        self, il: int, experts: Sequence[int], n_missing: int, n_pairs: int | None = None
    ) -> int:
        """Ask who computes what is missing."""
        n_free = self._pool_of[il].table.n_free
        return self.gate.away(il, experts, n_missing, n_free, n_pairs)

    def _take(self, il: int, experts: Sequence[int]) -> tuple[_Group, list[Missing]]:
        """Lease experts on the device; the missing ones have a slot that nothing is in yet."""
        pool, first = self._pool_of[il], il * self._n_expert
        pages = [first + expert for expert in experts]
        slots, absent = pool.table.acquire(pages)
        group = _Group(pool, pages, slots)
        self._held.append(group)
        for one in absent:
            self._n_hits[one.page] = 0
        return group, absent

    def _ask_below(
        self, il: int, missing: Sequence[int], absent: Sequence[Missing]
    ) -> dict[int, int] | None:
        """Have missing experts held in DRAM: the slots there; None if that was stopped."""
        leased: Leased | None = None
        if missing:
            self._record(il, missing)
        try:
            # Asked also for nothing: it is when prefetches are begun.
            leased = self.below.lease(il, missing)
        finally:
            if leased is None:
                self._misses.failed(il, absent)
        return None if leased is None else dict(zip(missing, leased.slots, strict=True))

    def _record(self, il: int, missing: Sequence[int]) -> None:
        """Tell the tier below's own choice of a policy what it is asked for."""
        if self.below.recorder is not None:
            self.below.recorder.record(il, missing)

    def _send(
        self, il: int, absent: Sequence[Missing], host: Mapping[int, int], *, alone: bool
    ) -> None:
        """Send experts to the device; `alone`, it is waited for and tells what uploads cost."""
        seconds = self._misses.send(il, absent, host, wait=alone)
        if alone:
            self.gate.uploaded(len(absent), seconds)

    def _release(self, group: _Group) -> None:
        self._held.remove(group)
        group.pool.table.release(group.pages)

    def _let_go(self) -> None:
        while self._held:
            self._release(self._held[-1])
        if self._turn is not None:
            self._settle(*self._turn)

    # prompts

    def _next_group(self, il: int, coming: Coming, n_held: int) -> _Group | None:
        """Take slots for what comes next, and send it; None if there are too few, or on a stop."""
        table = self._pool_of[il].table
        size = max(1, table.n_slots // TURN_SHARE)
        n_free = table.n_slots - table.n_pinned
        if n_free < min(size, coming.n_left) and n_held:
            return None  # a part of it now would make more and smaller groups
        host = coming.take(min(size, n_free))
        if not host:
            return None
        group, absent = self._take(il, list(host))
        self._send(il, absent, host, alone=not n_held)
        return group

    def _next_away(self, il: int, coming: Coming) -> Held | None:
        """Hold what comes next in DRAM, for the processor; None on a stop."""
        host = coming.take(coming.n_left)
        if not host or (self._prefill and self._device.stop_flag.is_set()):
            return None
        self._misses.left(il, len(host))
        return Held(list(host), list(host.values()), away=True)

    def _asked_below(self, il: int) -> int:
        counters = self.below.pool(il).table.counters
        return counters.hits[il] + counters.late[il] + counters.misses[il]

    def _settle(self, il: int, difference: int) -> None:
        """Count as missed what DRAM was asked for on behalf of groups that were given up."""
        self._turn = None
        missed = self._asked_below(il) - difference
        self._pool_of[il].table.counters.misses[il] = missed

    # statistics

    @property
    def tiers(self) -> dict[str, list[ExpertPool]]:
        """Slots by the tier that they are in."""
        return {"dram": self.below.pools, "device": self.pools}

    @property
    def stalled_s(self) -> float:
        """Seconds that passes over the model have waited for reads so far."""
        return self.below.stalled_s

    @property
    def policy(self) -> str:
        """The policies at work, the device's first where they differ."""
        return "+".join(dict.fromkeys((self.tier_policy, self.below.policy)))

    @property
    def overlap(self) -> OverlapGate:
        """The gate of the tier below; it is closed."""
        return self.below.overlap

    @property
    def slots_bytes(self) -> int:
        """Bytes of the device's slots."""
        return sum(pool.slots.n_bytes for pool in self.pools)

    def prefetch_report(self) -> GateReport:
        """Return what is known of prefetch into DRAM: whether it is on, and why not."""
        return self.below.prefetch_report()

    def spent(self) -> LayerCount:
        """Return what the experts cost so far; what the device had counts as hit."""
        return with_hits(self.below.spent(), self.pools)

    def layers(self, *, prefill: bool) -> dict[int, TierCount]:
        """Return where each layer's experts were found so far, in decode or in prefill."""
        return self._misses.layers(prefill=prefill)

    def stats(self) -> dict[str, object]:
        """Return what the DRAM tier has cost, and in `device` what the device's slots have."""
        return self.below.stats() | {"device": {
            "name": self._device.info.name,
            "policy": self.tier_policy,
            "n_slots": sum(pool.table.n_slots for pool in self.pools),
            "n_pages": sum(pool.plan.n_pages for pool in self.pools),
            "slots_bytes": self.slots_bytes,
            "warning": self.cliff.warning,
            "host_experts": self.gate.report().to_dict(),
            **self._misses.stats(),
        }}  # fmt: skip
