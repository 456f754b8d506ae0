"""How long a pass takes whose layers are read while others are computed, through a ring of rooms.

As `offload.layer_store` does it: a room is filled for its next user as soon as the one before was
computed, reads are done in the order in which they were asked for, and the first users of the
next pass are read while this one ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.paging_layers import N_ROOMS

PASSES: Final = 4
"""The last of so many is taken: the first finds nothing read yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A layer: seconds to read it alone (0 where it stays), its bytes, seconds to compute it."""

    read_s: float
    n_bytes: int
    compute_s: float


class _Machine:
    """A disk and a processor, each slower while the other works."""

    def __init__(self, overlap_ratio: float) -> None:
        self.now = 0.0
        # At full overlap both go on as if alone, at none two equal works take twice as long.
        self._rate = 1.0 / (2.0 - overlap_ratio)
        self._queue: list[list[float]] = []  # [seconds left], in the order of asking

    def ask(self, read_s: float) -> list[float]:
        """Begin a read behind those that were asked for before."""
        left = [read_s]
        self._queue.append(left)
        return left

    def wait(self, read: list[float]) -> None:
        """Let time pass, without computing, until a read has ended."""
        while read[0] > 0.0:
            self._read_on(self._queue[0][0])

    def compute(self, seconds: float) -> None:
        """Compute, beside whatever is being read."""
        left = seconds
        while left > 0.0:
            if not self._queue:
                self.now += left
                return
            work = min(left, self._queue[0][0])
            self.now += work / self._rate
            left -= work
            self._done(work)

    def _read_on(self, seconds: float) -> None:
        self.now += seconds
        self._done(seconds)

    def _done(self, seconds: float) -> None:
        first = self._queue[0]
        first[0] -= seconds
        if first[0] <= 1e-12:
            first[0] = 0.0
            self._queue.pop(0)


def stream_s(stages: Sequence[Stage], overlap_ratio: float, n_rooms: int = N_ROOMS) -> float:
    """Seconds of a pass over stages in their order, once passes follow each other.

    Args:
        stages: layers, and what else a pass computes.
        overlap_ratio: what of reading hides behind computing, 0 to 1.
        n_rooms: length of the ring.
    """
    users = [i for i, stage in enumerate(stages) if stage.read_s > 0.0]
    if not users:
        return sum(stage.compute_s for stage in stages)
    n_rooms = min(n_rooms, len(users))
    machine = _Machine(overlap_ratio)
    reads = {i: machine.ask(stages[i].read_s) for i in users[:n_rooms]}
    began = 0.0
    for _ in range(PASSES):
        began, at = machine.now, 0
        for i, stage in enumerate(stages):
            if stage.read_s > 0.0:
                machine.wait(reads[i])
            machine.compute(stage.compute_s)
            if stage.read_s > 0.0:
                # The room's next user: in this pass, or its first of the next.
                later = at + n_rooms
                user = users[later] if later < len(users) else users[at % n_rooms]
                reads[user] = machine.ask(stages[user].read_s)
                at += 1
    return machine.now - began
