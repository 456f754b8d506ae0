"""Prefetch of experts: what is on its way, what is likely, and whether it pays."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from edgeroute.offload.expert_pool import ExpertPool
from edgeroute.offload.prefetch import Predictor
from edgeroute.offload.prefetch_gate import PrefetchGate, StepCost
from edgeroute.offload.transfer import Ticket, Transfer


class ExpertsAhead:
    """Reads experts before they are asked for. Not thread-safe: the engine thread owns it.

    Lifetime: transfer and pools must outlive it.
    """

    def __init__(
        self, transfer: Transfer, pool_of: Mapping[int, ExpertPool], predictor: Predictor,
        gate: PrefetchGate, forced: bool,
    ) -> None:  # fmt: skip
        """Take what it works with; `forced` prefetches whether it pays or not."""
        self.clock: Callable[[], float] = time.perf_counter
        """Tells what a step has cost; tests have one that counts reads."""
        self._transfer = transfer
        self._pool_of = pool_of
        self._pools = list(dict.fromkeys(pool_of.values()))
        self._n_expert = self._pools[0].plan.n_expert
        self.predictor = predictor
        self.gate = gate
        self._forced = forced
        self.coming: dict[int, Ticket] = {}
        """Prefetches on their way, by page."""
        self.is_above: Callable[[int], bool] | None = None
        """Tells of a page that a tier above holds it, so that nobody will ask for it here."""
        self._on = False
        self._chosen: tuple[int, Sequence[int], Sequence[int] | None] | None = None
        self._began = 0.0
        self._before = 0, 0

    @property
    def wants_guess(self) -> bool:
        """Whether the next layer's router should be asked ahead in this pass."""
        return self._on and self.predictor.name == "gate"

    def begin(self, *, prefill: bool) -> None:
        """Begin a pass over the model."""
        self._on = not prefill and (self.gate.begin_step() or self._forced)
        self._began = self.clock()
        if not prefill:
            self.predictor.begin_step()
            self._before = self._prefetched()

    def end(self, *, prefill: bool) -> None:
        """End a pass, and tell the gate what a token has cost."""
        self.collect()
        if prefill:
            return
        useful, issued = self._prefetched()
        self.gate.end_step(StepCost(
            stall_s=self.clock() - self._began,
            prefetched_bytes=issued - self._before[1], useful_bytes=useful - self._before[0],
        ))  # fmt: skip

    def chose(self, il: int, ids: Sequence[int], guess: Sequence[int] | None) -> None:
        """Learn what a layer chose, to be used when its own loads are under way."""
        self._chosen = il, ids, guess

    def look(self) -> None:
        """Prefetch what the layer at work makes likely for the next one."""
        chosen, self._chosen = self._chosen, None
        if chosen is None or not (self._on or self.predictor.name != "gate"):
            return
        ranked = self.predictor.predict(*chosen)
        if not self._on:
            return
        pool = self._pool_of.get(chosen[0] + 1)
        if pool is None:
            return
        likely = [page for page, _ in ranked[: len(chosen[1])]]
        pages: Iterator[int] = (page for page in likely if not self._has(pool, page))
        if not self._forced:
            pages = itertools.takewhile(lambda _: self.gate.take(pool.plan.page_bytes), pages)
        self._prefetch(pool, pages)

    def read_on(self, il: int, most_bytes: int) -> None:
        """Read absent experts of a layer that a prompt comes to next."""
        pool = self._pool_of.get(il)
        if pool is None or self.predictor.name == "none":
            return
        n = max(1, most_bytes // pool.plan.page_bytes)
        first = il * self._n_expert
        absent = (p for p in range(first, first + self._n_expert) if not self._has(pool, p))
        self._prefetch(pool, itertools.islice(absent, n))

    def take(self, page: int) -> Ticket:
        """Hand a page on its way over to one who waits for it."""
        ticket = self.coming.pop(page)
        self._transfer.promote(ticket)
        return ticket

    def stop(self, page: int) -> None:
        """Have a read ended whose slot is wanted for another page."""
        ticket = self.coming.pop(page)
        self._transfer.cancel(ticket)
        with ticket.finished:
            pass

    def collect(self) -> None:
        """Enter prefetches that have ended."""
        coming = self.coming
        if not coming:
            return
        for page in [page for page, ticket in coming.items() if ticket.done]:
            result = coming.pop(page).results[0]
            table = self._pool_of[page // self._n_expert].table
            (table.loaded if result.outcome == "ok" else table.failed)(page)

    def _has(self, pool: ExpertPool, page: int) -> bool:
        return pool.table.has(page) or (self.is_above is not None and self.is_above(page))

    def _prefetch(self, pool: ExpertPool, pages: Iterable[int]) -> None:
        """Have pages read behind all demand loads, as far as slots are to be had for that."""
        found, jobs = [], []
        for page in pages:
            slot = pool.table.reserve_prefetch(page)
            if slot is None:
                break
            found.append(page)
            jobs.append(pool.job(page, slot))
        if jobs:
            try:
                tickets = self._transfer.prefetch(jobs)
            except BaseException:
                for page in found:
                    pool.table.failed(page)
                raise
            self.coming.update(zip(found, tickets, strict=True))

    def _prefetched(self) -> tuple[int, int]:
        """Bytes of prefetched pages that were asked for, and of all, so far."""
        useful = issued = 0
        for pool in self._pools:
            counters = pool.table.decode
            useful += sum(counters.prefetch_useful) * pool.plan.page_bytes
            issued += sum(counters.prefetch_bytes)
        return useful, issued
