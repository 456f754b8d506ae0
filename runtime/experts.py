"""The seam between a forward pass and whoever keeps the experts: pages are leased by layer.

models/ asks through this protocol, offload/ answers; neither knows the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.weights import Weights


class Held(NamedTuple):
    """Experts that may be computed with now, and the slot of each.

    Of those that are `away` the processor computes all, from slots of its own: see `Leased`.
    """

    experts: Sequence[int]
    slots: Sequence[int]
    away: bool = False


class Leased(NamedTuple):
    """The slot of each expert asked for, and those that may not be computed with yet.

    `away` have no slot on the device: the processor computes them, from the slots of its own
    that stand in `slots` for them. Only a pager over two tiers names any.
    """

    slots: list[int]
    absent: Sequence[int]
    away: Sequence[int] = ()


class ExpertPager(Weights, Protocol):
    """Weights whose expert tensors are slots, filled on demand.

    One thread owns it. A pass over the model is begun, leases layer after layer, and ends.
    """

    def begin(self, *, prefill: bool) -> None:
        """Begin a pass over the model: a token per sequence, or a ubatch of a prompt."""

    def max_at_once(self, il: int) -> int:
        """Return how many experts of a layer can be held at the same time."""

    def here(self, il: int) -> npt.NDArray[np.bool_]:
        """Mark the experts of a layer that are in memory or on their way: bool (n_expert,)."""

    def lease(self, il: int, experts: Sequence[int]) -> Leased | None:
        """Hold distinct experts of a layer until the next call for another layer, or `end`.

        Some are named absent where computing the others meanwhile is expected to pay; `arrive`
        must be called before those are computed with.

        Returns:
            Their slots, in order; None if a stop was asked for while they were loaded.

        Raises:
            ModelFileError: their bytes cannot be read.
        """

    def arrive(self) -> bool:
        """Wait for the absent experts of the latest lease; False if a stop was asked for.

        Raises:
            ModelFileError: their bytes cannot be read.
        """

    def in_turn(self, il: int, counts: Mapping[int, int], most: int) -> Iterator[Held | None]:
        """Hold distinct experts of a layer group by group, resident ones first.

        A group is let go when the next is asked for. Yields None, and ends, when a stop was
        asked for.

        Args:
            il: layer.
            counts: experts, and for how many tokens each is to be computed.
            most: the largest sum of counts in a group of several experts.

        Raises:
            ModelFileError: their bytes cannot be read.
        """

    def chose(self, il: int, ids: Sequence[int], guess: Sequence[int] | None) -> None:
        """Learn what layer `il` chose, and what its state says of the next layer's choice.

        Prefetches begin here; the call returns at once.
        """

    @property
    def wants_guess(self) -> bool:
        """Whether the next layer's router should be asked ahead in this pass."""

    def end(self) -> None:
        """Let go of everything held; called also after an error or a stop."""


class MissRule(Protocol):
    """Says which missing experts tokens do without: answers change. See `skippers.misses`."""

    @property
    def reads_scores(self) -> bool:
        """Whether it wants to know how all experts are rated."""

    def swap(
        self, numbers: npt.NDArray[np.int32], nats: npt.NDArray[np.float32],
        here: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int32]:  # fmt: skip
        """Choose again: I32 (n_tokens, k), best rated first; rows may stay as they are.

        Args:
            numbers: of the chosen experts, I32 (n_tokens, k), best rated first.
            nats: logarithm of what all experts are rated, F32 (n_tokens, n_expert).
            here: which are in memory or on their way, bool (n_expert,).
        """

    def drop(
        self, weights: npt.NDArray[np.float32], here: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Mark what is not computed, bool (n_tokens, k), never all of a token's; see `swap`."""

    def degrade(
        self, weights: npt.NDArray[np.float32], here: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:  # fmt: skip
        """Mark what a copy of fewer bits will do for, bool (n_tokens, k), never a token's best."""

    def count(
        self, il: int, *, replaced: int = 0, dropped: int = 0, saved: int = 0, degraded: int = 0
    ) -> None:
        """Learn what became of a layer's choice; `saved` experts were not read for it."""
