"""Mixtures of experts: routing, experts and their sum, as the families share them.

A family subclasses `MoeLayers`, writes `attention`, names its `Routing`, and overrides what it
does otherwise. Source: llama.cpp, src/llama-graph.cpp, build_moe_ffn: the same operations in
the same order, so that results can be compared bit for bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgeroute.models import blocks
from edgeroute.models.base import Hparams, MoeHparams, Rated
from edgeroute.runtime.depth import ExpertRule
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.tensor import shape, strides
from edgeroute.runtime.weights import TensorSpec

Gating = Literal["softmax", "sigmoid", "softmax_weight"]
"""How scores become probabilities; `softmax_weight` only among the chosen ones."""

Activation = Callable[[Builder, Tensor, Tensor], Tensor]
"""Joins gate and up, each F32 [n_ff_exp, k, n], to one of the same shape."""

THRESHOLDS: tuple[ExpertRule, ...] = ("weight", "mass", "ratio")
"""Rules that leave experts out by weight: every token has a number of its own."""

MIN_WEIGHT_SUM = 6.103515625e-5  # the smallest normal half; Source: build_moe_ffn
_FLT_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a family turns the router's scores into weights of the chosen experts.

    Attributes:
        gating: from scores to probabilities.
        norm_w: whether the chosen experts' weights are divided by their sum.
        w_scale: a factor on the weights; 0 and 1 leave them alone.
        selection_bias: stem of a bias added for the choice only, after "blk.N.".
    """

    gating: Gating = "softmax"
    norm_w: bool = False
    w_scale: float = 1.0
    selection_bias: str | None = None


class MoeLayers:
    """The parts of a layer with experts, and its two sub-blocks as their sequence.

    A model whose `hparams.moe` is None has dense layers only: one class serves both.
    """

    hparams: Hparams
    routing = Routing()
    ffn_norm = "ffn_norm"
    """The norm before the experts, in a layer."""

    def is_moe(self, il: int) -> bool:
        moe = self.hparams.moe
        return moe is not None and il >= moe.n_layer_dense_lead

    def attn_branch(self, b: Builder, il: int, x: Tensor) -> Tensor:
        normed = b.rms_norm(f"blk.{il}.attn_norm", x, self.hparams.norm_rms_eps)
        return self.attention(b, il, normed)

    def ffn_branch(self, b: Builder, il: int, x: Tensor) -> Tensor:
        h = self.ffn_input(b, il, x)
        if not self.is_moe(il):
            return self.dense(b, il, h)
        ids, weights = self.route(b, il, h)
        outs = self.experts(b, il, as_expert_input(b, h), ids, ids)
        return self.combine(b, il, h, outs, weights)

    def ffn_input(self, b: Builder, il: int, x: Tensor) -> Tensor:
        return b.rms_norm(f"blk.{il}.{self.ffn_norm}", x, self.hparams.norm_rms_eps)

    def attention(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build one attention block on normed input."""
        raise NotImplementedError

    def dense(self, b: Builder, il: int, h: Tensor) -> Tensor:
        """Build a feed-forward without experts on normed input: F32 [n_embd, n]."""
        return blocks.swiglu(b, f"blk.{il}", h)

    def shared(self, b: Builder, il: int, h: Tensor) -> Tensor | None:
        """Build the shared experts on normed input: F32 [n_embd, n]; None without any."""
        return None

    def rate(self, b: Builder, il: int, h: Tensor) -> Rated:
        return rate(b, il, b.linear(f"blk.{il}.ffn_gate_inp", h), self.routing)

    def pick(self, b: Builder, rated: Rated) -> tuple[Tensor, Tensor]:
        return pick(b, rated, self.moe, self.routing)

    def route(self, b: Builder, il: int, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.pick(b, self.rate(b, il, h))

    def experts(self, b: Builder, il: int, h: Tensor, ids: Tensor, slots: Tensor) -> Tensor:
        p = f"blk.{il}"
        up = b.linear_id(f"{p}.ffn_up_exps", h, ids, slots)
        gate = b.linear_id(f"{p}.ffn_gate_exps", h, ids, slots)
        return b.linear_id(f"{p}.ffn_down_exps", self.activate(b, gate, up), ids, slots)

    def activate(self, b: Builder, gate: Tensor, up: Tensor) -> Tensor:
        """Join an expert's gate and up, each F32 [n_ff_exp, k, n]."""
        return b.g.ggml_swiglu_split(b.ctx, gate, up)

    def combine(self, b: Builder, il: int, h: Tensor, outs: Tensor, weights: Tensor) -> Tensor:
        summed = weighted_sum(b, outs, weights)
        shared = self.shared(b, il, h)
        return summed if shared is None else b.add(summed, shared)

    def expert_tensors(self, il: int) -> tuple[str, ...]:
        if not self.is_moe(il):
            return ()
        return tuple(f"blk.{il}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))

    @property
    def moe(self) -> MoeHparams:
        """The counts, of a model that has experts."""
        assert self.hparams.moe is not None
        return self.hparams.moe


def as_expert_input(b: Builder, h: Tensor) -> Tensor:
    """Reshape F32 [n_embd, n] to [n_embd, 1, n]: each expert of a token reads the same."""
    n_embd, n, _, _ = shape(h)
    return b.g.ggml_reshape_3d(b.ctx, h, n_embd, 1, n)


def choose(
    b: Builder, il: int, scores: Tensor, moe: MoeHparams, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Choose experts by the router's scores, F32 [n_expert, n]: `pick` of `rate`."""
    return pick(b, rate(b, il, scores, routing), moe, routing)


def rate(b: Builder, il: int, scores: Tensor, routing: Routing) -> Rated:
    """Rate experts by the router's scores, F32 [n_expert, n]."""
    probs = scores
    if routing.gating == "softmax":
        probs = b.g.ggml_soft_max(b.ctx, scores)
    elif routing.gating == "sigmoid":
        probs = b.g.ggml_sigmoid(b.ctx, scores)
    return Rated(probs, _selection(b, il, probs, routing))


def pick(b: Builder, rated: Rated, moe: MoeHparams, routing: Routing) -> tuple[Tensor, Tensor]:
    """Choose the experts that are rated best.

    Returns:
        Expert numbers I32 [k, n], best first, and their weights F32 [1, k, n]; those that the
        step's rule leaves out weigh nothing. The rule `count` makes k smaller.
    """
    g, ctx, probs = b.g, b.ctx, rated.probs
    k, n = n_ranked(moe, b.expert_rule, b.expert_value), shape(probs)[1]
    ids = g.ggml_argsort_top_k(ctx, rated.ranked, k)
    rows = g.ggml_reshape_3d(ctx, probs, 1, moe.n_expert, n)
    weights = g.ggml_get_rows(ctx, rows, ids)
    if routing.gating == "softmax_weight":
        flat = g.ggml_reshape_2d(ctx, weights, k, n)
        weights = g.ggml_reshape_3d(ctx, g.ggml_soft_max(ctx, flat), 1, k, n)
    if routing.norm_w:
        flat = g.ggml_reshape_2d(ctx, weights, k, n)
        total = g.ggml_clamp(ctx, g.ggml_sum_rows(ctx, flat), MIN_WEIGHT_SUM, math.inf)
        weights = g.ggml_reshape_3d(ctx, g.ggml_div(ctx, flat, total), 1, k, n)
    if b.expert_rule in THRESHOLDS and k > 1:
        weights = thin(b, weights, routing)
    if routing.w_scale not in (0.0, 1.0):
        weights = b.scale(weights, routing.w_scale)
    return ids, weights


def n_ranked(moe: MoeHparams, rule: ExpertRule, value: float) -> int:
    """Count the experts that are ranked for each token under a rule; thresholds need all."""
    return min(moe.n_expert_used, max(1, int(value))) if rule == "count" else moe.n_expert_used


def thin(b: Builder, weights: Tensor, routing: Routing) -> Tensor:
    """Take the weight of experts that the step's rule leaves out, never that of the best.

    The rules are those of `skippers.experts.kept`, compared in the same single precision. What
    is left is divided by its sum where the family divides the chosen ones' weights by theirs.

    Args:
        b: the graph, which knows the rule.
        weights: F32 [1, k, n], k at least 2.
        routing: the family's.

    Returns:
        F32 [1, k, n].
    """
    g, ctx = b.g, b.ctx
    _, k, n, _ = shape(weights)
    flat = g.ggml_reshape_2d(ctx, weights, k, n)
    rest = g.ggml_mul(ctx, _columns(b, flat, 1), _kept(b, flat))
    best = g.ggml_view_2d(ctx, flat, 1, n, strides(flat)[1], 0)
    flat = g.ggml_concat(ctx, best, rest, 0)
    if routing.norm_w or routing.gating == "softmax_weight":
        total = g.ggml_clamp(ctx, g.ggml_sum_rows(ctx, flat), MIN_WEIGHT_SUM, math.inf)
        flat = g.ggml_div(ctx, flat, total)
    return g.ggml_reshape_3d(ctx, flat, 1, k, n)


def _kept(b: Builder, flat: Tensor) -> Tensor:
    """Build which experts but the best compute, by their weights [k, n]: 1 or 0, [k - 1, n]."""
    g, ctx, value = b.g, b.ctx, b.expert_value
    if b.expert_rule == "weight":
        below = g.ggml_step(ctx, g.ggml_scale_bias(ctx, flat, -1.0, value))
        return _columns(b, g.ggml_scale_bias(ctx, below, -1.0, 1.0), 1)
    before = g.ggml_cumsum(ctx, flat)
    if b.expert_rule == "mass":
        return _columns(b, g.ggml_step(ctx, g.ggml_scale_bias(ctx, before, -1.0, value)), 0)
    least = _columns(b, b.scale(before, value), 0)
    over = b.add(least, _columns(b, b.scale(flat, -1.0), 1))
    return g.ggml_scale_bias(ctx, g.ggml_step(ctx, over), -1.0, 1.0)


def _columns(b: Builder, flat: Tensor, first: int) -> Tensor:
    """View all columns but one of F32 [k, n]: from `first` on, F32 [k - 1, n]."""
    (k, n, _, _), (column, row, _, _) = shape(flat), strides(flat)
    return b.g.ggml_view_2d(b.ctx, flat, k - 1, n, row, first * column)


def _selection(b: Builder, il: int, probs: Tensor, routing: Routing) -> Tensor:
    """Build what experts are ranked by: F32 [n_expert, n]."""
    ranked = probs
    if routing.selection_bias is not None:
        bias = b.weights.get(f"blk.{il}.{routing.selection_bias}.bias")
        ranked = probs if bias is None else b.add(probs, bias)
    if routing.gating == "softmax" and ranked is probs:
        return ranked
    # ggml sorts with std::sort, which may leave its array where some scores are NaN and
    # others are not. A softmax makes a row NaN as a whole; elsewhere numbers are put for
    # them, and no finite score changes. Source: ggml-cpu/ops.cpp, cmp_argsort.
    return b.g.ggml_clamp(b.ctx, ranked, -_FLT_MAX, _FLT_MAX)


def weighted_sum(b: Builder, outs: Tensor, weights: Tensor) -> Tensor:
    """Sum expert outputs F32 [n_embd, k, n] by weights F32 [1, k, n], best expert first.

    Returns:
        F32 [n_embd, n].
    """
    g, ctx = b.g, b.ctx
    outs = g.ggml_mul(ctx, outs, weights)
    (n_embd, k, n, _), nb = shape(outs), strides(outs)
    parts = [g.ggml_view_2d(ctx, outs, n_embd, n, nb[2], i * nb[1]) for i in range(k)]
    if k == 1:
        return g.ggml_cont(ctx, parts[0])
    total = parts[0]
    for part in parts[1:]:
        total = b.add(total, part)
    return total


def specs(hp: Hparams, moe: MoeHparams, il: int) -> list[TensorSpec]:
    """List the norm, the router and the routed experts of one layer."""
    p, n_expert = f"blk.{il}", moe.n_expert
    use: Literal["mul_mat_id"] = "mul_mat_id"
    return [
        blocks.norm(f"{p}.ffn_norm", hp.n_embd),
        blocks.spec(f"{p}.ffn_gate_inp.weight", hp.n_embd, n_expert),
        blocks.spec(f"{p}.ffn_gate_exps.weight", hp.n_embd, moe.n_ff_exp, n_expert, use=use),
        blocks.spec(f"{p}.ffn_up_exps.weight", hp.n_embd, moe.n_ff_exp, n_expert, use=use),
        blocks.spec(f"{p}.ffn_down_exps.weight", moe.n_ff_exp, hp.n_embd, n_expert, use=use),
    ]


def require(hparams: Hparams, file: GGUFFile) -> MoeHparams:
    """Return the counts of a family that has experts always.

    Raises:
        ModelFileError: the header names none.
    """
    if hparams.moe is None:
        raise ModelFileError(
            f"{file.path.name} has no {hparams.arch}.expert_count, which {hparams.arch} models "
            "need; the file is incomplete"
        )
    return hparams.moe
