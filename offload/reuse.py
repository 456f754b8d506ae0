"""How soon experts are asked for again: reuse distances, and the working set of some tokens."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgeroute.offload.locality import activation_counts
from edgeroute.offload.routes import Routes
from edgeroute.offload.stack_distance import NONE, pages_between, uses_of
from edgeroute.offload.trace import Trace
from edgeroute.runtime.errors import UsageError

WINDOWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Tokens of the windows whose working set is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseDistances:
    """Shares of all requests for pages, which with `cold` add up to 1.

    Attributes:
        bounds: 1, 2, 4, ...: the largest distance of each bin, which begins above the bound
            before. A distance is the number of distinct pages that other requests asked for
            between two uses of a page; those of the same layer and token are one request.
        shares: of requests, by bin.
        cold: share of first uses.
    """

    bounds: tuple[int, ...]
    shares: tuple[float, ...]
    cold: float


def reuse_distances(trace: Trace, layers: Collection[int] | None = None) -> ReuseDistances:
    """Sort the uses of pages in decode steps by distance, in bins that double.

    Raises:
        UsageError: no decode step, or layers that the trace has not.

    Source: R. L. Mattson et al. 1970.
    """
    distances = pages_between(uses_of(trace, layers))
    known = distances[distances != NONE]
    # The bin of d is the exponent of the least power of two that is d or more.
    bins = np.ceil(np.log2(np.maximum(known, 1))).astype(np.int64)
    counts = np.bincount(bins, minlength=1)
    return ReuseDistances(
        bounds=tuple(1 << i for i in range(counts.size)),
        shares=tuple((counts / distances.size).tolist()),
        cold=1 - known.size / distances.size,
    )


def working_set(
    routes: Sequence[Routes], n_expert: int, windows: Collection[int] = WINDOWS
) -> tuple[tuple[int, float], ...]:
    """Count the distinct pages, all layers together, that windows of tokens use in the mean.

    Windows lie at stride 1 inside sequences. Those longer than every sequence are left out.

    Returns:
        (tokens, pages) by ascending tokens.

    Raises:
        UsageError: no route, a window below 1 token, or an expert beyond `n_expert`.

    Source: P. J. Denning 1968.
    """
    longest = max((one.n_token for one in routes), default=0)
    if not longest:
        raise UsageError("a working set is of tokens; there are none")
    found = []
    for n_token in sorted(set(windows)):
        if n_token <= longest:
            counts = activation_counts(routes, n_expert, n_token).sum(axis=0)
            n_window = np.maximum(counts.sum(axis=1) / n_expert, 1)
            found.append((n_token, float((counts[:, 1:].sum(axis=1) / n_window).sum())))
    return tuple(found)
