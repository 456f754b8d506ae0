"""What a trace is made of: routes step by step, and what the live run did beside them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.counters import CounterSnapshot
from edgeroute.offload.eviction import MAX_PAGES
from edgeroute.runtime.errors import UsageError

MAX_LAYER: Final = 4096
MAX_EXPERT: Final = 1 << 16
MAX_LABEL: Final = 256
"""Characters of a sequence's label."""
_STEP_BYTES: Final = 400  # of the objects around a step's ids

Ids = npt.NDArray[np.uint16]


class TraceError(UsageError):
    """A trace file is malformed, or a step does not match its trace's header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMeta:
    """What a trace is of. `layers` are the traced (MoE) layers, ascending.

    Raises:
        TraceError: a value that no model has.
    """

    model: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    page_bytes: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        _check("model", self.model, isinstance(self.model, str) and len(self.model) <= 4096)
        _check_int("n_layer", self.n_layer, 1, MAX_LAYER)
        _check_int("n_expert", self.n_expert, 1, MAX_EXPERT)
        _check_int("n_expert_used", self.n_expert_used, 1, self.n_expert)
        _check_int("page_bytes", self.page_bytes, 0, 1 << 50)
        good = isinstance(self.layers, tuple) and 0 < len(self.layers) <= self.n_layer
        _check("layers", self.layers, good)
        for il in self.layers:
            _check_int("layers", il, 0, self.n_layer - 1)
        _check("layers", self.layers, list(self.layers) == sorted(set(self.layers)))
        _check("n_expert", self.n_expert, (self.layers[-1] + 1) * self.n_expert <= MAX_PAGES)

    @property
    def file_type(self) -> str:
        """numpy's name for an expert's number as stored."""
        return "u1" if self.n_expert <= 256 else "<u2"

    @property
    def id_bytes(self) -> int:
        """Bytes of an expert's number as stored."""
        return 1 if self.n_expert <= 256 else 2


def _check(name: str, value: object, good: bool) -> None:
    if not good:
        raise TraceError(f"trace header: {name} is {str(value)[:80]!r}, which no model has")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    _check(name, value, type(value) is int and low <= value <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One decode step or prefill ubatch.

    `flat` is what layer after layer chose, `sizes[i]` experts of it by `layers[i]`: n_tokens *
    n_expert_used, token after token. The last layer may have fewer tokens than the others.
    """

    prefill: bool
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    flat: Ids

    def parts(self) -> Iterator[tuple[int, Ids]]:
        """Each layer with the ids that it chose."""
        at = 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            yield layer, self.flat[at : at + size]
            at += size

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, nearly."""
        return _STEP_BYTES + 16 * len(self.layers) + self.flat.nbytes


def pages_of(layer: int, ids: Iterable[int], n_expert: int) -> list[int]:
    """Turn the experts that a layer's tokens chose into distinct pages, in order of first use.

    Engine and replay both use it, so that both ask the page table the same.
    """
    base = layer * n_expert
    return [base + expert for expert in dict.fromkeys(ids)]


def make_step(
    meta: TraceMeta, prefill: bool, chosen: Sequence[tuple[int, npt.ArrayLike]]
) -> TraceStep:
    """Pack (layer, ids) pairs of one step into compact arrays of their own.

    Raises:
        TraceError: an id or layer that the header does not have, or a layer without ids.
    """
    layers = tuple(layer for layer, _ in chosen)
    parts = [np.asarray(ids).reshape(-1) for _, ids in chosen]
    sizes = tuple(part.size for part in parts)
    known = len(set(layers)) == len(layers) > 0 and set(layers) <= set(meta.layers)
    if not known or min(sizes) == 0:
        raise TraceError(f"layers {layers} with {sizes} ids are no step of {meta.model[:80]!r}")
    flat = np.concatenate(parts)
    if not np.issubdtype(flat.dtype, np.integer):
        raise TraceError(f"a step's experts must be integers, got {flat.dtype}")
    if int(flat.min()) < 0 or int(flat.max()) >= meta.n_expert:
        raise TraceError(
            f"a step has experts {int(flat.min())} to {int(flat.max())}, but {meta.model[:80]!r} "
            f"has {meta.n_expert}"
        )
    return TraceStep(prefill=prefill, layers=layers, sizes=sizes, flat=flat.astype(np.uint16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A sequence begins with step number `step`; `label` is its domain.

    Raises:
        TraceError: a label that is too long, or cannot be written as UTF-8.
    """

    step: int
    label: str

    def __post_init__(self) -> None:
        if any("\ud800" <= char <= "\udfff" for char in self.label):
            raise TraceError(f"the label {self.label[:80]!r} is no text; take letters and signs")
        if len(self.label) > MAX_LABEL:
            raise TraceError(
                f"a label of {len(self.label)} characters; the limit is {MAX_LABEL}, shorten it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPaging:
    """What the experts of step number `step` cost the live run.

    Attributes:
        seconds, stall_s: from the step's begin to its end, and waiting for experts in that.
        hits, late, misses: pages asked for, as `LayerCounters` counts them.
        demand_bytes, prefetch_bytes: asked of the disk.
        turns: places in the step's `layers` whose experts were held group by group, not at once.
        most: the largest sum of tokens in a group of several experts, where there are turns.
        is_broken: reads failed or were stopped in this step or since the one before, so that
            what the pools hold from here on is not known from the routes.
    """

    step: int
    seconds: float
    stall_s: float
    hits: int
    late: int
    misses: int
    demand_bytes: int
    prefetch_bytes: int
    turns: tuple[int, ...] = ()
    most: int = 0
    is_broken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """One pool of slots: whose experts share it, how many there are, and who evicts.

    `page_bytes` and `slot_bytes` are of one expert in the file and in memory.
    """

    layers: tuple[int, ...]
    n_slots: int
    policy: str
    page_bytes: int
    slot_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """The pools of a live run before step number `step`: empty ones where it `begins`.

    `group_bytes` and `n_ahead` are those of `expert_turns.TurnParams`.
    """

    step: int
    begins: bool
    pools: tuple[PoolState, ...]
    group_bytes: int
    n_ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """All that the live run had counted before step number `step`: (decode, prefill) by pool."""

    step: int
    pools: tuple[tuple[CounterSnapshot, CounterSnapshot], ...]


Record = TraceStep | Mark | StepPaging | Pools | Counted
"""What a trace's file holds, in order. The paging of a step follows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Steps in order, and what was recorded beside them.

    `truncated` where the file ended inside a record, which was left out. `paging` has a record
    for each step of a live run whose pools are known; none in files of version 1. `live` are
    that run's pools and counters, in order.
    """

    meta: TraceMeta
    steps: tuple[TraceStep, ...]
    truncated: bool = False
    marks: tuple[Mark, ...] = ()
    paging: tuple[StepPaging, ...] = ()
    live: tuple[Pools | Counted, ...] = ()

    @property
    def pools(self) -> tuple[Pools, ...]:
        """The pools at each start of a run, and at each change."""
        return tuple(record for record in self.live if isinstance(record, Pools))

    @property
    def counted(self) -> tuple[Counted, ...]:
        """The live counters now and then, and at the end of a run."""
        return tuple(record for record in self.live if isinstance(record, Counted))

    def records(self) -> Iterator[Record]:
        """All records in the order of a file."""
        between = deque(sorted([*self.live, *self.marks], key=lambda record: record.step))
        paging = deque(self.paging)
        for number, step in enumerate(self.steps):
            while between and between[0].step <= number:
                yield between.popleft()
            yield step
            while paging and paging[0].step <= number:
                yield paging.popleft()
        yield from between


def sequences(trace: Trace) -> Iterator[tuple[str, Trace]]:
    """Cut a trace at its marks; yield each sequence's label and its steps, with their paging.

    Steps before the first mark, or of a trace without marks, have the label "". A sequence
    without steps is left out. Pools stay behind: a sequence finds them as the one before left
    them, so it cannot be replayed alone.
    """
    starts = [(0, ""), *((mark.step, mark.label) for mark in trace.marks)]
    ends = [start for start, _ in starts[1:]] + [len(trace.steps)]
    paging = {record.step: record for record in trace.paging}
    for (start, label), end in zip(starts, ends, strict=True):
        if start >= end:
            continue
        kept = (paging[i] for i in range(start, end) if i in paging)
        yield label, Trace(
            meta=trace.meta, steps=trace.steps[start:end], truncated=trace.truncated,
            paging=tuple(replace(record, step=record.step - start) for record in kept),
        )  # fmt: skip
