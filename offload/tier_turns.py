"""Experts of a long prompt on their way up: groups of the DRAM tier, cut to what a device takes."""

from collections import deque
from collections.abc import Mapping

from edgeroute.offload.expert_store import ExpertStore


class Coming:
    """Experts of one layer as the tier below has them, group by group."""

    def __init__(self, below: ExpertStore, il: int, counts: Mapping[int, int], most: int) -> None:
        self._below = below
        self._turns = below.in_turn(il, counts, most) if counts else iter(())
        self._rest: deque[tuple[int, int]] = deque()
        self.n_left = len(counts)
        self.is_stopped = False

    @property
    def is_here(self) -> bool:
        """Whether more of them can be had without waiting."""
        return bool(self._rest) or self._below.next_is_here

    def take(self, n_most: int) -> dict[int, int]:
        """Return up to so many experts of one group, each with its slot in DRAM.

        They stay there until the next call. None of them on a stop.
        """
        if not self._rest:
            held = next(self._turns, None)
            if held is None:
                self.is_stopped = True
                return {}
            self._rest.extend(zip(held.experts, held.slots, strict=True))
        taken = dict(self._rest.popleft() for _ in range(min(n_most, len(self._rest))))
        self.n_left -= len(taken)
        return taken
