"""How unequally a layer's experts are used, and how far domains use the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.routes import Routes, all_layers, loads

TOP_PERCENTS: Final = (10, 25, 50)
"""Parts of a layer's experts, the most used first, whose share of requests is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSkew:
    """Loads of experts, layer by layer.

    Attributes:
        layers: ascending.
        top_shares: by percent of a layer's experts (rounded up to whole ones), the share of
            its requests that its most used ones take, per layer.
        load_sd: standard deviation of a layer's loads in units of their mean, per layer; 0
            where all experts are used alike.
    """

    layers: tuple[int, ...]
    top_shares: dict[int, tuple[float, ...]]
    load_sd: tuple[float, ...]


def skew(routes: Sequence[Routes], n_expert: int) -> LoadSkew:
    """Measure how unequally each layer's experts are used, over all sequences.

    Raises:
        UsageError: no route, or an expert beyond `n_expert`.
    """
    counts = loads(routes, n_expert)
    most = np.cumsum(-np.sort(-counts, axis=1), axis=1) / counts.sum(axis=1, keepdims=True)
    return LoadSkew(
        layers=tuple(all_layers(routes)),
        top_shares={
            percent: tuple(most[:, -(-percent * n_expert // 100) - 1].tolist())
            for percent in TOP_PERCENTS
        },
        load_sd=tuple((counts.std(axis=1) / counts.mean(axis=1)).tolist()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainOverlap:
    """`overlap[i][j]` is 1 where domains i and j use each expert equally often, 0 if never any."""

    domains: tuple[str, ...]
    overlap: tuple[tuple[float, ...], ...]


def domain_overlap(routes: Sequence[Routes], n_expert: int) -> DomainOverlap:
    """Compare the loads of domains (labels), by the sum of minima, averaged over layers.

    Layers count that both domains have tokens in.

    Raises:
        UsageError: no route, or an expert beyond `n_expert`.
    """
    domains = tuple(dict.fromkeys(one.label for one in routes))
    layers = all_layers(routes)
    shares = np.stack([_shares(routes, name, layers, n_expert) for name in domains])
    overlap = []
    for mine in shares:
        both = (mine.sum(axis=1) > 0) & (shares.sum(axis=2) > 0)  # (n_domain, n_layer)
        common = np.minimum(mine, shares).sum(axis=2) * both
        means = common.sum(axis=1) / np.maximum(both.sum(axis=1), 1)
        overlap.append(tuple(means.tolist()))
    return DomainOverlap(domains=domains, overlap=tuple(overlap))


def _shares(
    routes: Sequence[Routes], domain: str, layers: Sequence[int], n_expert: int
) -> npt.NDArray[np.float64]:
    """A domain's requests by expert, as shares: (n_layer, n_expert), 0 for layers it has not."""
    mine = [one for one in routes if one.label == domain]
    counts = np.zeros((len(layers), n_expert))
    counts[np.searchsorted(layers, all_layers(mine))] = loads(mine, n_expert)
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
