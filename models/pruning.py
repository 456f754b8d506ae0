"""Layers that compute only some tokens of a prompt: gathered, not masked.

The others pass the layer by, but their keys and values are written, so that every later token
sees all. The choice is made inside the graph: what the last tokens attend to in this layer is
one of the four factors that `TokenRule` scores.
Source: FTP, arXiv 2412.11494. Attention received from a window of last queries: SnapKV,
arXiv 2404.14469.
"""

from collections.abc import Callable, Sequence

import numpy as np

from edgeroute.models.base import Model
from edgeroute.runtime.batch_shape import Segment
from edgeroute.runtime.depth import Step
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_inputs import Inputs
from edgeroute.runtime.lora import LoraShape
from edgeroute.runtime.lora_graph import LoraInputs
from edgeroute.runtime.tensor import F16, F32, set_bytes, shape, strides
from edgeroute.runtime.token_choice import TokenRule

N_BUILT = 4
"""Rooms of a layer that a pruned one takes in a graph: its operations are described for the keys
of all tokens, for the probe and for the kept tokens, and the choice comes on top."""

_FORCED, _PLACE, _RAMP = "choice_forced", "choice_place", "choice_ramp"
_HIDDEN, _OUT, _BIAS = "choice_hidden", "choice_out", "choice_bias_"
_BIG = 3e38

Take = Callable[[Tensor], Tensor]
"""Takes some columns of a matrix [m, n_tokens]: [m, n]; F16 may become F32."""


def n_kept(b: Builder, step: Step) -> int | None:
    """Count the tokens that a step computes in a graph's batch; None where it computes all.

    Only one sequence's prompt is pruned, and only where attention runs, which makes the choice.
    """
    if len(b.batch.segments) != 1 or step.attn != "run" or step.approximates:
        return None
    return b.token_rule.n_kept(b.n_tokens, step.keep, b.batch.n_out)


def build_pruned(b: Builder, model: Model, step: Step, x: Tensor, *, last: bool) -> Tensor:
    """Build one pass over a layer for the tokens it keeps, chosen in the graph.

    Args:
        b: the graph, of one sequence's prompt.
        model: gives the sub-blocks.
        step: `n_kept` says that it computes a part.
        x: the residual stream, F32 [n_embd, n_tokens].
        last: nothing follows but the head, so only tokens whose logits are wanted are computed.

    Returns:
        F32 [n_embd, n_tokens], unchanged where tokens were left out; [n_embd, n_out] if `last`.
    """
    model.attn_branch(b, step.il, x)  # what nobody uses is not computed, but for the keys
    if last and not b.batch.n_out:
        return b.select_outputs(x)
    ids = b.out_ids() if last else _choose(b, model, step, x)
    some = _taken(b, ids)
    y = some.take(x)
    y = b.add(model.attn_branch(some, step.il, y), y)
    if step.ffn == "run":
        y = b.add(model.ffn_branch(some, step.il, y), y)
    return y if last else b.g.ggml_set_rows(b.ctx, x, y, ids)


def n_described(steps: Sequence[Step]) -> int:
    """Count the layers' rooms that a graph of these steps needs."""
    return sum(1 if step.keep >= 100 else N_BUILT for step in steps)


class Narrowed(Builder):
    """A builder of the same graph for some of its tokens, whose keys are written already."""

    def __init__(self, whole: Builder, n_tokens: int, take: Take) -> None:
        vars(self).update(vars(whole))  # one graph and one set of inputs
        segment = whole.batch.segments[0]
        self.whole, self.take, self.n_tokens = whole, take, n_tokens
        self._groups = [(Segment(segment.start, segment.n_kv, n_tokens),)]
        self._narrow: dict[str, Tensor] = {}
        self.asked: tuple[Tensor, float, Tensor] | None = None
        """Queries F32 [n_embd_head, n_head, n_tokens], scale and mask of what was attended."""

    def pos(self) -> Tensor:
        """Positions, I32 [n_tokens]."""

        def make() -> Tensor:
            row = self.take(self.g.ggml_reshape_2d(self.ctx, self.whole.pos(), 1, self._n_whole))
            return self.g.ggml_reshape_2d(self.ctx, row, self.n_tokens, 1)

        return self._made("pos", make)

    def store_kv(self, il: int, k: Tensor, v: Tensor | None) -> None:
        """Write nothing: keys and values of the whole batch are written."""

    def attend(
        self, il: int, q: Tensor, scale: float, *, swa: bool = False, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend as `Builder.attend` does, and remember who asked."""
        turn_k, _ = self.kv.rotations[self._kv_row(il)]
        self.asked = self._rotate(q, turn_k), scale, self._masks(swa)[0]
        return super().attend(il, q, scale, swa=swa, sinks=sinks)

    @property
    def _n_whole(self) -> int:
        return self.whole.n_tokens

    def _made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._narrow:
            self._narrow[name] = make()
        return self._narrow[name]

    def _masks(self, swa: bool) -> list[Tensor]:
        def make() -> Tensor:
            return self.g.ggml_cast(self.ctx, self.take(self.whole._masks(swa)[0]), F16)

        return [self._made("mask_swa" if swa else "mask", make)]

    def _lora_inputs(self, n: int, lora: LoraShape) -> LoraInputs:
        """Slots and factors of the adapters of the tokens taken."""
        ids, factors, rows, _ = self.whole._lora_inputs(self._n_whole, lora)
        mine = self._made("lora_ids", lambda: self.take(ids))
        if factors is None:
            return LoraInputs(mine, None, rows, (n,))
        flat = self.g.ggml_reshape_2d(self.ctx, factors, lora.n_used, self._n_whole)

        def make() -> Tensor:
            return self.g.ggml_reshape_3d(self.ctx, self.take(flat), 1, lora.n_used, n)

        return LoraInputs(mine, self._made("lora_factors", make), rows, (n,))


def _taken(b: Builder, ids: Tensor) -> Narrowed:
    """Narrow a builder to the tokens of `ids`, I32 [n]."""
    return Narrowed(b, shape(ids)[0], lambda x: b.g.ggml_get_rows(b.ctx, x, ids))


def _last(b: Builder, n: int) -> Narrowed:
    """Narrow a builder to the last `n` tokens, which lie together."""

    def take(x: Tensor) -> Tensor:
        column = strides(x)[1]
        first = (b.n_tokens - n) * column
        return b.g.ggml_view_2d(b.ctx, x, shape(x)[0], n, column, first)

    return Narrowed(b, n, take)


def _choose(b: Builder, model: Model, step: Step, x: Tensor) -> Tensor:
    """Build the numbers of the tokens kept, I32 [n], ascending.

    In order, because attention leaves out whole tiles of cells that none of a tile's queries
    may see.
    """
    g, ctx, n = b.g, b.ctx, b.n_tokens
    n_wanted = n_kept(b, step)
    assert n_wanted is not None  # who calls has asked
    score = _input(b, _FORCED, 1, n)
    if b.token_rule.looks:
        score = b.add(_network(b, _attention(b, model, step.il, x), step.keep), score)
    # ggml's sort may leave its array where some numbers are NaN: no score may be one.
    score = g.ggml_clamp(ctx, g.ggml_reshape_2d(ctx, score, n, 1), -_BIG, _BIG)
    best = g.ggml_cont(ctx, g.ggml_argsort_top_k(ctx, score, n_wanted))
    places = g.ggml_get_rows(ctx, _input(b, _RAMP, 1, n), best)
    descending = g.ggml_scale(ctx, g.ggml_reshape_2d(ctx, places, n_wanted, 1), -1.0)
    order = g.ggml_argsort_top_k(ctx, descending, n_wanted)
    ids = g.ggml_get_rows(ctx, g.ggml_reshape_2d(ctx, best, 1, n_wanted), order)
    return g.ggml_reshape_2d(ctx, ids, n_wanted, 1)


def _attention(b: Builder, model: Model, il: int, x: Tensor) -> Tensor:
    """Build what each token receives from the last ones in a layer, F32 [1, n_tokens].

    Mean over heads and queries; 1 is an equal share of the pass.
    """
    g, ctx, n = b.g, b.ctx, b.token_rule.n_probe
    probe = _last(b, n)
    model.attn_branch(probe, il, probe.take(x))
    if probe.asked is None:
        raise ComputeError(f"layer {il} attends to nothing, so it cannot choose tokens")
    q, scale, mask = probe.asked
    n_head = shape(q)[1]
    products = g.ggml_mul_mat(ctx, b.keys(il), g.ggml_permute(ctx, q, 0, 2, 1, 3))
    shares = g.ggml_soft_max_ext(ctx, products, mask, scale, 0.0)  # [n_kv, n, n_head]
    flat = g.ggml_reshape_2d(ctx, shares, shape(shares)[0], n * n_head)
    by_cell = g.ggml_cont(ctx, g.ggml_permute(ctx, flat, 1, 0, 2, 3))
    received = g.ggml_get_rows(ctx, g.ggml_sum_rows(ctx, by_cell), b.pos())
    return b.scale(received, b.n_tokens / (n * n_head))


def _network(b: Builder, attention: Tensor, keep: int) -> Tensor:
    """Build scores from the four factors, F32 [1, n_tokens]; the share is in the bias."""
    g, ctx, n = b.g, b.ctx, b.n_tokens
    n_hidden = len(b.token_rule.bias)
    order = g.ggml_argsort_top_k(ctx, g.ggml_reshape_2d(ctx, attention, n, 1), n)
    ramp = _input(b, _RAMP, 1, n)
    rank = g.ggml_set_rows(ctx, g.ggml_scale(ctx, ramp, 0.0), ramp, order)
    factors = g.ggml_concat(ctx, _input(b, _PLACE, 1, n), g.ggml_tanh(ctx, attention), 0)
    factors = g.ggml_concat(ctx, factors, rank, 0)
    bias = _input(b, f"{_BIAS}{keep}", n_hidden)
    hidden = g.ggml_mul_mat(ctx, _input(b, _HIDDEN, 3, n_hidden), factors)
    hidden = g.ggml_silu(ctx, b.add(hidden, bias))
    return g.ggml_mul_mat(ctx, _input(b, _OUT, n_hidden, 1), hidden)


def _input(b: Builder, name: str, *ne: int) -> Tensor:
    found = b.inputs.more.get(name)
    return b.more(name, F32, *ne) if found is None else found


def fill_choice(inputs: Inputs, pieces: Sequence[tuple[int, int, int]], rule: TokenRule) -> None:
    """Write what the choice of tokens needs.

    Args:
        inputs: of a graph, pruned or not.
        pieces: first position, tokens, and tokens at the end that get logits.
        rule: the one that the graph was built with.
    """
    more = inputs.more
    if _FORCED not in more:
        return
    ((pos, n, n_out),) = pieces
    set_bytes(more[_FORCED], rule.forced(pos, n, n_out))
    set_bytes(more[_RAMP], np.arange(n, dtype=np.float32) / np.float32(n))
    if _PLACE not in more:
        return
    set_bytes(more[_PLACE], places(pos, n))
    set_bytes(more[_HIDDEN], np.ascontiguousarray(rule.hidden[:, :3]))
    set_bytes(more[_OUT], rule.out)
    for name, tensor in more.items():
        if name.startswith(_BIAS):
            left_out = np.float32(1 - int(name.removeprefix(_BIAS)) / 100)
            set_bytes(tensor, rule.bias + rule.hidden[:, 3] * left_out)


def places(pos: int, n: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Return the factor of position: 1 at the last token of the pass, F32 (n,)."""
    return (np.arange(pos + 1, pos + n + 1) / (pos + n)).astype(np.float32)
