"""The routes of a trace: token by token, which experts each layer of each sequence chose.

What the measures of locality and of skew are computed from. Prefill and decode tokens count
alike: a route belongs to a text, not to how it was cut into steps.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeroute.offload.trace import Ids, Trace, TraceError, sequences
from edgeroute.runtime.errors import UsageError

MAX_IDS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """One sequence. `ids` is, by layer, uint16 (n_token, n_expert_used), tokens in order.

    Layers need not have equally many tokens: the last one is run only for tokens whose logits
    are wanted, and a depth plan leaves layers out.
    """

    label: str
    ids: Mapping[int, Ids]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have tokens, ascending."""
        return tuple(sorted(self.ids))

    @property
    def n_token(self) -> int:
        """Tokens of the layer that has most."""
        return max((len(ids) for ids in self.ids.values()), default=0)


def routes_of(trace: Trace) -> list[Routes]:
    """Cut a trace into its sequences' routes; those without a step are left out.

    Raises:
        TraceError: a layer's ids are not whole tokens, or a token names an expert twice.
    """
    found = [_routes(label, part) for label, part in sequences(trace)]
    return [routes for routes in found if routes.ids]


def _routes(label: str, trace: Trace) -> Routes:
    used = trace.meta.n_expert_used
    parts: dict[int, list[Ids]] = {}
    for step in trace.steps:
        for layer, part in step.parts():
            parts.setdefault(layer, []).append(part)
    ids: dict[int, Ids] = {}
    for layer in sorted(parts):
        flat = np.concatenate(parts[layer])
        if flat.size % used:
            raise TraceError(
                f"layer {layer} chose {flat.size} experts, which is no multiple of the {used} "
                f"that a token uses"
            )
        ids[layer] = _distinct(layer, flat.reshape(-1, used))
    return Routes(label=label, ids=ids)


def _distinct(layer: int, ids: Ids) -> Ids:
    rows = np.sort(ids, axis=1)
    twice = (rows[:, 1:] == rows[:, :-1]).any(axis=1)
    if twice.any():
        token = int(np.argmax(twice))
        raise TraceError(f"token {token} of layer {layer} names an expert twice: {ids[token]}")
    return ids


def pieces(routes: Sequence[Routes], n_token: int) -> list[Routes]:
    """Cut sequences into pieces of `n_token` tokens, the rest of each a shorter piece.

    A bootstrap needs several sequences; a long text without marks is cut into such.

    Raises:
        UsageError: less than one token.
    """
    if n_token < 1:
        raise UsageError(f"a piece of a sequence has at least 1 token, got {n_token}")
    return [
        Routes(
            label=one.label,
            ids={il: ids[at : at + n_token] for il, ids in one.ids.items() if len(ids) > at},
        )
        for one in routes
        for at in range(0, one.n_token, n_token)
    ]


def joined(routes: Sequence[Routes], n_expert: int) -> list[Routes]:
    """Make one layer of all: expert e of the i-th layer becomes expert i * n_expert + e.

    So a cache that layers share is the cache of one wide layer. Layers without a sequence's
    full number of tokens are left out of it.

    Raises:
        UsageError: more experts in all layers than ids can name.
    """
    layers = all_layers(routes)
    if len(layers) * n_expert > MAX_IDS:
        raise UsageError(
            f"{len(layers)} layers of {n_expert} experts are more than the {MAX_IDS} experts "
            f"that can be joined; take fewer layers"
        )
    wide = []
    for one in routes:
        whole = [(i, one.ids[il]) for i, il in enumerate(layers) if il in one.ids]
        ids = [ids + np.uint16(i * n_expert) for i, ids in whole if len(ids) == one.n_token]
        wide.append(Routes(label=one.label, ids={0: np.concatenate(ids, axis=1)}))
    return wide


def all_layers(routes: Sequence[Routes], layers: Collection[int] | None = None) -> list[int]:
    """The layers of any of the sequences, ascending; or `layers`, if all are among them.

    Raises:
        UsageError: there is none, or a layer that no sequence has.
    """
    known = set().union(*(one.ids for one in routes))
    wanted = known if layers is None else set(layers)
    if not wanted or not wanted <= known:
        raise UsageError(f"layers {sorted(wanted)} are not all among those traced, {sorted(known)}")
    return sorted(wanted)


def loads(routes: Sequence[Routes], n_expert: int) -> npt.NDArray[np.int64]:
    """How often each expert was chosen: (n_layer, n_expert), layers as in `all_layers`.

    Raises:
        UsageError: no route, or an expert beyond `n_expert`.
    """
    layers = all_layers(routes)
    counts = np.zeros((len(layers), n_expert), np.int64)
    for one in routes:
        for i, il in enumerate(layers):
            if il in one.ids:
                counts[i] += np.bincount(checked(one.ids[il], n_expert).ravel(), minlength=n_expert)
    return counts


def checked(ids: Ids, n_expert: int) -> Ids:
    """Return ids if they are all below `n_expert`.

    Raises:
        UsageError: they are not.
    """
    if ids.size and int(ids.max()) >= n_expert:
        raise UsageError(f"routes name expert {int(ids.max())}, but a layer has {n_expert}")
    return ids
