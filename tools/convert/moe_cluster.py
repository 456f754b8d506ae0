"""Which neurons form the shared expert, and which of the others belong together.

Source: Read-ME (arXiv 2410.19123) for the shared part; balanced clusters of co-activation
as in MoEfication (arXiv 2110.01786), on contributions instead of weights.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.tools.convert.moe_activations import Array

Ints = npt.NDArray[np.int64]

N_SAMPLED_TOKENS: Final = 3072
N_PROJECTED: Final = 256
N_ROUNDS: Final = 9


def arrange(h: Array, down: Array, n_shared: int, n_expert: int, seed: int) -> Ints:
    """Order a layer's neurons: the shared ones first, then expert after expert.

    Args:
        h: activations on N_SAMPLED_TOKENS calibration tokens (n_tokens, n_ff).
        down: the down projection (n_embd, n_ff).
        n_shared: neurons of the shared expert, those that contribute most on average.
        n_expert: equal groups of the others; it divides n_ff - n_shared.
        seed: of the sample, the projection and the first centres.

    Returns:
        A permutation of the neurons, int64 (n_ff,); members of an expert in rising order.
    """
    rng = np.random.default_rng(seed)
    size = np.linalg.norm(down, axis=0)
    by_weight = np.argsort(-np.abs(h).mean(axis=0) * size, kind="stable")
    shared, routed = np.sort(by_weight[:n_shared]), np.sort(by_weight[n_shared:])
    together = np.abs(h[:, routed]) * size[routed]
    together -= together.mean(axis=0)
    projection = rng.standard_normal((len(h), N_PROJECTED), dtype=np.float32)
    groups = balanced_kmeans(together.T @ projection, n_expert, rng)
    return np.concatenate([shared, routed[np.argsort(groups, kind="stable")]])


def balanced_kmeans(points: Array, n_groups: int, rng: np.random.Generator) -> Ints:
    """Cluster points (n, n_dims) into groups of equal size; return each point's group."""
    capacity = len(points) // n_groups
    centres = points[np.sort(rng.permutation(len(points))[:n_groups])]
    power = np.einsum("ij,ij->i", points, points)
    groups = np.empty(0, np.int64)
    for _ in range(N_ROUNDS):
        distance = power[:, None] - 2 * (points @ centres.T)
        distance += np.einsum("ij,ij->i", centres, centres)
        groups = assign(distance, capacity)
        members = points[np.argsort(groups, kind="stable")]
        centres = members.reshape(n_groups, capacity, -1).mean(axis=1)
    return groups


def assign(distance: Array, capacity: int) -> Ints:
    """Give every point a group with room, closest pairs first.

    Each point asks its nearest group; a group keeps the closest that ask, and the others ask
    their next one. The end is that of going through all pairs by rising distance.
    Source: Gale and Shapley 1962, deferred acceptance.

    Args:
        distance: (n, n_groups), n = capacity * n_groups.
        capacity: points that a group holds.
    """
    left = distance.astype(np.float64)
    groups: Ints = np.argmin(left, axis=1)
    while True:
        counts = np.bincount(groups, minlength=distance.shape[1])
        full = np.flatnonzero(counts > capacity)
        if not len(full):
            return groups
        for group in full:
            asking = np.flatnonzero(groups == group)
            order = np.argsort(distance[asking, group], kind="stable")
            left[asking[order[capacity:]], group] = np.inf
        moved = np.flatnonzero(np.isinf(left[np.arange(len(left)), groups]))
        groups[moved] = np.argmin(left[moved], axis=1)
