"""The seam between a forward pass and whoever keeps copies of experts in fewer bits.

models/ asks through this protocol, offload/ answers; neither knows the other.
"""

from collections.abc import Sequence
from typing import Protocol

from edgeroute.runtime.weights import Weights


class CopyPager(Weights, Protocol):
    """Weights whose expert tensors are slots of copies, in types of their own, filled on demand.

    One thread owns it. A pass is begun, and leases layer after layer beside the experts' own
    pager: read for a token at once, never ahead.
    """

    def begin(self) -> None:
        """Begin a pass over the model."""

    def max_at_once(self, il: int) -> int:
        """Return how many copies of a layer's experts can be held at the same time."""

    def lease(self, il: int, experts: Sequence[int]) -> None:
        """Begin to hold distinct experts' copies, until the next call for another layer or `end`.

        `arrive` must be called before they are computed with.

        Raises:
            ModelFileError: their bytes cannot be read.
        """

    def arrive(self) -> list[int]:
        """Wait for the copies of the latest lease; return their slots, in the order asked for.

        Raises:
            ModelFileError: their bytes cannot be read.
        """

    def end(self) -> None:
        """Let go of everything held; called also after an error or a stop."""
