"""What a trace's decode steps ask for, use by use, and how many pages came between two uses.

All of a trace at once, in numpy: what LRU at every size and reuse distances are read from.
Source: R. L. Mattson et al. 1970 (stack algorithms).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.trace import Trace
from edgeroute.runtime.errors import UsageError

Ints = npt.NDArray[np.int32]

_BLOCK: Final = 512
NONE: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Uses:
    """Uses of pages in order, those of one request (one layer of one step) next to each other.

    Attributes:
        page: (n_use,) page of each use, numbered from 0; distinct within a request.
        request: (n_use,) request of each use, ascending from 0 without gaps.
        start: (n_request + 1,) first use of each request, then n_use.
        before, after: (n_use,) the same page's use before and after, or NONE.
        n_page: pages there are in all, used or not.
    """

    page: Ints
    request: Ints
    start: Ints
    before: Ints
    after: Ints
    n_page: int

    @property
    def max_request(self) -> int:
        """Pages of the largest request: fewer slots cannot serve it."""
        return int(np.diff(self.start).max())


def uses_of(trace: Trace, layers: Collection[int] | None = None) -> Uses:
    """List what the decode steps of a trace, or some of its layers, ask a page table.

    Prefill is left out: its pages pass through a pool without entering its order of use.

    Raises:
        UsageError: no decode step with such a layer, or a layer that the trace has not.
    """
    wanted = set(trace.meta.layers if layers is None else layers)
    if not wanted or not wanted <= set(trace.meta.layers):
        raise UsageError(
            f"layers {sorted(wanted)} are not all among the trace's, {list(trace.meta.layers)}"
        )
    index = {il: i for i, il in enumerate(sorted(wanted))}
    parts, where = [], []
    for step in trace.steps:
        if not step.prefill:
            for layer, ids in step.parts():
                if layer in index:
                    parts.append(ids)
                    where.append(index[layer])
    if not parts:
        raise UsageError("hit rates are of decode steps; this trace has none of these layers")
    sizes = np.array([ids.size for ids in parts])
    offset = np.array(where, np.int32) * np.int32(trace.meta.n_expert)
    page = np.repeat(offset, sizes) + np.concatenate(parts).astype(np.int32)
    request = np.repeat(np.arange(sizes.size, dtype=np.int32), sizes)
    return _linked(page, request, len(wanted) * trace.meta.n_expert)


def _linked(page: Ints, request: Ints, n_page: int) -> Uses:
    """Link the uses of each page, after dropping repetitions within a request."""
    before = _before(page)
    again = (before != NONE) & (request[before] == request)
    if again.any():
        page, request = page[~again], request[~again]
        before = _before(page)
    after = np.full_like(before, NONE)
    (later,) = np.nonzero(before != NONE)
    after[before[later]] = later
    start = np.concatenate(([0], np.cumsum(np.bincount(request)))).astype(np.int32)
    return Uses(page=page, request=request, start=start, before=before, after=after, n_page=n_page)


def _before(page: Ints) -> Ints:
    """The place of each page's occurrence before, or NONE."""
    order = np.argsort(page, kind="stable").astype(np.int32)
    same = page[order[1:]] == page[order[:-1]]
    before = np.full(page.size, NONE, np.int32)
    before[order[1:][same]] = order[:-1][same]
    return before


def pages_between(uses: Uses) -> Ints:
    """Count the distinct pages of the requests between each use and the one before it.

    Pages of the two requests themselves count only if they were asked for in between.

    Returns:
        (n_use,), NONE for first uses.
    """
    request, before = uses.request, uses.before
    past = np.where(before == NONE, np.int32(NONE), request[before])
    found = np.full_like(before, NONE)
    last = np.full(uses.n_page, NONE, np.int32)  # request in which each page was last used
    for block in _blocks(uses):
        found[block] = _block_distances(uses, past, last, block)
        last[uses.page[block]] = request[block]
    found[before == NONE] = NONE
    return found


def _blocks(uses: Uses) -> Iterator[slice]:
    """Cut the uses between requests, some hundreds at a time."""
    at = 0
    while at < uses.page.size:
        n_done = int(np.searchsorted(uses.start, at + _BLOCK))
        end = int(uses.start[min(n_done, uses.start.size - 1)])
        yield slice(at, end)
        at = end


def _block_distances(uses: Uses, past: Ints, last: Ints, block: slice) -> Ints:
    """Distances of one block of uses, `last` being as before it.

    A page was used after request g and before this one if its last use before the block was
    after g, or if a use inside the block, before this request, follows one not after g.
    """
    since = past[block]
    own_start = uses.start[uses.request[block]] - np.int32(block.start)
    inner = np.arange(block.stop - block.start, dtype=np.int32)
    returns = (since[None, :] <= since[:, None]) & (inner[None, :] < own_start[:, None])
    n_inside = np.count_nonzero(returns, axis=1)
    n_older = last.size - np.searchsorted(np.sort(last), since, side="right")
    # Uses inside the block that are not after g were found, too: they are no return since g.
    not_after = np.searchsorted(uses.request[block], since, side="right")
    return np.asarray(n_older + n_inside - not_after, np.int32)
