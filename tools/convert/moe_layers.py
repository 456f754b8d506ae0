"""Layer after layer: split the neurons, fit the gate, repair the down projection.

Calibration tokens run through the refactored layers, so that each layer is fitted to what
it will really see. Windows kept apart judge the result.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.tools.convert.moe_activations import ROWS_AT_ONCE, Array, DenseModel, FeedForward
from edgeroute.tools.convert.moe_cluster import N_SAMPLED_TOKENS, arrange
from edgeroute.tools.convert.moe_gate import choose, contributions, fit_gate
from edgeroute.tools.convert.moe_refit import refit
from edgeroute.tools.convert.moe_writer import MoeLayer, MoeShape

_TINY: Final = 1e-20  # against a division by the power of an output that is zero

Windows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """One layer on the windows kept apart.

    Attributes:
        recall_ratio: of the experts that contribute most, the share that the gate chose.
        lost_ratio: squared error over power of the layer's output, mean of tokens.
    """

    recall_ratio: float
    lost_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Nats per token of windows kept apart, before and after; means over the layers."""

    n_tokens: int
    nats_dense: float
    nats_moe: float
    recall_ratio: float
    lost_ratio: float


class Refactoring:
    """The residual stream of all calibration tokens, advanced by `layer`, in order.

    Args:
        model: the dense model.
        shape: what to make of it.
        fit: windows to fit to (n, n_window).
        check: windows kept apart, of the same width.
        repair: whether down projections are refitted.
        seed: of samples and first centres.
    """

    def __init__(
        self, model: DenseModel, shape: MoeShape, fit: Windows, check: Windows, *,
        repair: bool, seed: int,
    ) -> None:  # fmt: skip
        self._model, self._shape, self._repair, self._seed = model, shape, repair, seed
        self._check = check
        self._n_fit, self._n_window = fit.size, fit.shape[1]
        self._x = model.embed(np.concatenate([fit, check]).reshape(-1))
        self._dense = model.embed(check.reshape(-1))
        self._sample = np.sort(np.random.default_rng(seed).permutation(fit.size)[:N_SAMPLED_TOKENS])
        self._qualities: list[LayerQuality] = []

    def layer(self, il: int) -> MoeLayer:
        """Refactor layer `il` and move the stream past it."""
        model, shape, n_fit = self._model, self._shape, self._n_fit
        ff = model.feed_forward(il)
        self._advance_dense(il, ff)
        model.add_attention(il, self._x, self._n_window)
        u = model.norm(f"blk.{il}.ffn_norm", self._x)
        ff = self._arranged(ff, u)
        h = ff.hidden(u)
        y = h @ ff.down.T
        truth = contributions(
            h[:, shape.n_ff_shexp :], ff.down[:, shape.n_ff_shexp :], shape.n_expert
        )
        gate = self._gate(u[:n_fit], truth[:n_fit])
        scores = u @ gate.T
        mask = choose(scores, shape.n_expert_used)
        self._weigh(h[:, shape.n_ff_shexp :], scores, mask)
        power = np.maximum(np.einsum("ij,ij->i", y, y), _TINY)
        if self._repair:
            # Each token's output counts alike: the first token's may be a thousand times larger.
            down = refit(h[:n_fit], y[:n_fit], ff.down, 1 / power[:n_fit])
            ff = FeedForward(gate=ff.gate, up=ff.up, down=down)
        z = h @ ff.down.T
        best = choose(truth[n_fit:], shape.n_expert_used)
        lost = np.einsum("ij,ij->i", z - y, z - y) / power
        self._qualities.append(LayerQuality(
            recall_ratio=float((mask[n_fit:] & best).sum() / best.sum()),
            lost_ratio=float(lost[n_fit:].mean()),
        ))  # fmt: skip
        self._x += z
        return MoeLayer(gate=gate, ff=ff)

    def quality(self) -> Quality:
        """Judge the model on the windows kept apart, when all layers are done."""
        routed = self._x[self._n_fit :]
        return Quality(
            n_tokens=self._check.size - len(self._check),
            nats_dense=self._nats(self._dense), nats_moe=self._nats(routed),
            recall_ratio=float(np.mean([q.recall_ratio for q in self._qualities])),
            lost_ratio=float(np.mean([q.lost_ratio for q in self._qualities])),
        )  # fmt: skip

    def _gate(self, u: Array, truth: Array) -> Array:
        """Fit what scores the experts, (n_expert, n_embd), to what each contributes."""
        return fit_gate(u, truth)

    def _weigh(self, h: Array, scores: Array, mask: npt.NDArray[np.bool_]) -> None:
        """Weigh the routed neurons by their experts, in place: all chosen ones alike."""
        _silence(h, mask)

    def _arranged(self, ff: FeedForward, u: Array) -> FeedForward:
        """Put a layer's neurons in the order of the experts they will belong to."""
        shape = self._shape
        order = arrange(ff.hidden(u[self._sample]), ff.down, shape.n_ff_shexp, shape.n_expert,
                        self._seed)  # fmt: skip
        return FeedForward(gate=ff.gate[order], up=ff.up[order],
                           down=np.ascontiguousarray(ff.down[:, order]))  # fmt: skip

    def _advance_dense(self, il: int, ff: FeedForward) -> None:
        self._model.add_attention(il, self._dense, self._n_window)
        u = self._model.norm(f"blk.{il}.ffn_norm", self._dense)
        self._dense += ff.hidden(u) @ ff.down.T

    def _nats(self, x: Array) -> float:
        """Mean negative log-likelihood of each window's tokens after its first."""
        found = []
        for ids, part in zip(self._check, x.reshape(*self._check.shape, -1), strict=True):
            logits = self._model.logits(part[:-1])
            top = logits.max(axis=1, keepdims=True)
            total = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
            found.append(total - logits[np.arange(len(logits)), ids[1:]])
        return float(np.mean(found))


def _silence(h: Array, mask: npt.NDArray[np.bool_]) -> None:
    """Zero the neurons of experts that were not chosen, in place."""
    width = h.shape[1] // mask.shape[1]
    for at in range(0, len(h), ROWS_AT_ONCE):
        part = np.s_[at : at + ROWS_AT_ONCE]
        h[part] *= np.repeat(mask[part], width, axis=1)
