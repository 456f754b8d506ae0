"""Experts of a long prompt, held group by group: how a layer is cut, and the same in a replay."""

from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgeroute.offload.page_table import Missing, PageTable
from edgeroute.runtime.errors import CapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnParams:
    """Bytes of experts that are loaded together, and how many groups more are begun ahead."""

    group_bytes: int
    n_ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What a layer asks for: experts, for how many tokens each, and the most in a group.

    `first` is the page of the layer's expert 0; `page_bytes` those of each.
    """

    first: int
    page_bytes: int
    counts: Mapping[int, int]
    most: int


def cut_groups(
    experts: Sequence[int], counts: Mapping[int, int], n_most: int, most: int
) -> Iterator[list[int]]:
    """Cut experts into groups of up to `n_most`, and in sum of counts up to `most` where a group
    has several."""
    group, total = list[int](), 0
    for expert in experts:
        if group and (len(group) == n_most or total + counts[expert] > most):
            yield group
            group, total = [], 0
        group.append(expert)
        total += counts[expert]
    if group:
        yield group


def cut_turns(
    table: PageTable, turns: Turns, params: TurnParams, coming: Container[int] = ()
) -> list[list[int]]:
    """Cut a layer's experts into groups: resident ones, those on their way, then the others by
    place on disk.

    Args:
        table: the pool's.
        turns: what the layer asks for.
        params: how large groups are.
        coming: pages that are being prefetched.
    """
    first, counts = turns.first, turns.counts
    here = [e for e in counts if table.slot_of(first + e) is not None]
    absent = sorted(set(counts).difference(here))
    # What was read ahead is pinned first: unpinned, it would make room for what comes after.
    absent.sort(key=lambda e: first + e not in coming)
    n_slots = table.n_slots
    n_groups = params.n_ahead + 1
    size = max(1, min(params.group_bytes // max(1, turns.page_bytes), n_slots // (n_groups + 1)))
    room = max(1, n_slots - n_groups * size)
    return [
        *cut_groups(here, counts, room, turns.most),
        *cut_groups(absent, counts, size, turns.most),
    ]


def replay_turns(table: PageTable, turns: Turns, params: TurnParams) -> None:
    """Do to a page table what `ExpertStore.in_turn` does, each page arriving when waited for.

    Raises:
        CapacityError: not even one group fits.
    """
    waiting = deque(cut_turns(table, turns, params))
    under_way: deque[tuple[list[int], list[Missing]]] = deque()
    while waiting or under_way:
        while waiting and len(under_way) <= params.n_ahead:
            pages = [turns.first + expert for expert in waiting[0]]
            try:
                under_way.append((pages, table.acquire(pages)[1]))
            except CapacityError:
                if under_way:
                    break
                raise
            waiting.popleft()
        pages, missing = under_way.popleft()
        for one in missing:
            table.loaded(one.page)
        table.release(pages)
