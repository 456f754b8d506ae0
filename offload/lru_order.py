"""At which sizes each use hits under LRU, where all pages of a request are wanted at once.

LRU evicts whole requests, the oldest first, and so is a stack algorithm but for the request
at the edge, of which some pages have left. Their order is that of the page table: pages that
hit were moved first, in the order of the request, then those that missed entered. Which pages
hit depends on the size, so the order inside a request does, too, and only there a use may hit
with n slots and miss with n + 1. Such sizes are settled one by one.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.stack_distance import NONE, Ints, Uses, pages_between

_CHUNK_CELLS: Final = 1 << 16
_FAR: Final = 1 << 30

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fates:
    """What becomes of each use, by number of slots.

    Attributes:
        is_first: (n_use,) no use came before: a miss at every size.
        between: (n_use,) distinct pages asked for since the page's last use; with that many
            slots or fewer the use misses.
        n_peer: (n_use,) pages of the last use's request that were not used since, itself
            among them; with `between + n_peer` slots or more the use hits.
        hits: (n_use, max_request) whether it hits with `between + 1 + column` slots, true from
            column `n_peer - 1` on.
    """

    is_first: Bools
    between: Ints
    n_peer: Ints
    hits: Bools


def settle(uses: Uses) -> Fates:
    """Find for every use the sizes at which it hits.

    Uses depend on earlier ones only, so working off what changed ends, with the one solution.
    """
    width = uses.max_request
    between = pages_between(uses)
    first = between == NONE
    between[first] = _FAR
    n_use = uses.page.size
    fates = Fates(
        is_first=first,
        between=between,
        n_peer=np.ones(n_use, np.int32),
        hits=np.zeros((n_use, width), bool),
    )
    n_side = max(64, _CHUNK_CELLS // (width * width))
    for at in range(0, n_use, n_side):
        chunk = np.arange(at, min(at + n_side, n_use), dtype=np.int32)
        _settle_chunk(uses, fates, chunk[~first[chunk]])
    return fates


def _settle_chunk(uses: Uses, fates: Fates, chunk: Ints) -> None:
    """Settle uses, ascending, all before them being settled."""
    _count_peers(uses, fates, chunk)
    open_uses = chunk[fates.n_peer[chunk] > 1]
    source = uses.request[uses.before[open_uses]]  # the request whose order decides
    changed = np.zeros(uses.start.size - 1, bool)
    work = np.ones(open_uses.size, bool)
    while work.any():
        now = open_uses[work]
        found = _hits_within(uses, fates, now)
        differs = (found != fates.hits[now]).any(axis=1)
        fates.hits[now] = found
        changed[uses.request[now[differs]]] = True
        work = changed[source]
        changed[uses.request[now]] = False


def _peers(uses: Uses, chunk: Ints) -> tuple[Ints, Bools]:
    """The uses of the last use's request, padded, and which were not repeated since."""
    source = uses.request[uses.before[chunk]]
    places = np.arange(uses.max_request, dtype=np.int32)
    peer: Ints = np.add(uses.start[source][:, None], places, dtype=np.int32)
    real = peer < uses.start[source + 1][:, None]
    peer[~real] = 0
    again = uses.after[peer]
    idle = (again == NONE) | (again >= uses.start[uses.request[chunk]][:, None])
    return peer, real & idle


def _count_peers(uses: Uses, fates: Fates, chunk: Ints) -> None:
    """Enter n_peer, and as a first guess at hits the order of the request."""
    if not chunk.size:
        return
    peer, idle = _peers(uses, chunk)
    fates.n_peer[chunk] = idle.sum(axis=1)
    n_later = (idle & (peer > uses.before[chunk][:, None])).sum(axis=1)
    fates.hits[chunk] = n_later[:, None] <= np.arange(fates.hits.shape[1])


def _hits_within(uses: Uses, fates: Fates, chunk: Ints) -> Bools:
    """Whether uses hit with 1, 2, ... slots more than `between`, (n, max_request).

    A page is kept if fewer peers than these slots are behind it in the order of its request:
    the missed ones after the hit ones, else as in the request.
    """
    peer, idle = _peers(uses, chunk)
    later = idle & (peer > uses.before[chunk][:, None])
    extra = np.arange(fates.hits.shape[1], dtype=np.int32)
    slots = fates.between[chunk][:, None] + extra + np.int32(1)
    missed = np.zeros(slots.shape, np.int32)  # of all peers
    missed_later = np.zeros_like(missed)  # of those behind the page in the request
    hit_later = np.zeros_like(missed)
    own_hit = np.zeros(slots.shape, bool)
    for place in range(peer.shape[1]):
        use, there = peer[:, place], idle[:, place, None]
        hit = _hit_at(fates, use, slots)
        miss = there & ~hit
        missed += miss
        missed_later += miss & later[:, place, None]
        hit_later += hit & later[:, place, None]
        own_hit |= hit & (use == uses.before[chunk])[:, None]
    behind = np.where(own_hit, missed + hit_later, missed_later)
    return np.asarray(behind <= extra)


def _hit_at(fates: Fates, use: Ints, slots: Ints) -> Bools:
    """Whether uses (n,) hit with so many slots (n, n_size)."""
    beyond = slots - fates.between[use][:, None] - np.int32(1)
    width = fates.hits.shape[1]
    column = np.clip(beyond, 0, width - 1) + use.astype(np.int64)[:, None] * width
    return np.asarray((beyond >= 0) & fates.hits.ravel().take(column))
