"""Stand-ins: small maps in the place of a sub-block, fitted by `edgeroute calibrate`.

For the input x of the sub-block and h = rms_norm(x) * norm, a stand-in adds to the residual
stream y = b (a h) + down (silu(gate h) * (up h)) + bias: a linear map of low rank, a narrow
gated feed-forward, or both, with or without a constant. It adds nothing at position 0, where
models keep a state hundreds of times larger than elsewhere, which no fit survives.

A bridge stands for a block of layers. It knows what the block made of the token before, too:
its h is that of x above rms_norm(x') * before, where x' is the stream behind the block then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_inputs import Inputs
from edgeroute.runtime.tensor import F32, set_bytes, shape
from edgeroute.runtime.weights import Weights

PARTS = ("attn", "ffn", "layer")
"""What a stand-in may stand for; `layer` for both sub-blocks, and layers that follow."""
TENSORS = ("norm", "a", "b", "gate", "up", "down", "bias")
BRIDGE_TENSORS = (*TENSORS, "before")
BEFORE: Final = "standin_before"
"""The input of bridges: the stream behind the block at the token before, F32 [n_embd, n]."""
_ON, _ON_OUT = "standin_on", "standin_on_out"


def tensor_name(plan: str, il: int, part: str, tensor: str) -> str:
    """Name a stand-in's tensor in a depth file."""
    return f"{plan}/blk.{il}.{part}.{tensor}"


class Gated(NamedTuple):
    """A narrow feed-forward: gate and up [n_in, m] by name, and down [m, n_embd]."""

    weights: Weights
    gate_up: tuple[str, str]
    down: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """The tensors of one stand-in, of those that it has.

    norm, before and bias F32 [n_embd]; a [n_in, r] and b [r, n_embd]; n_in is n_embd, with
    `before` twice that.
    """

    norm: Tensor
    low_rank: tuple[Tensor, Tensor] | None
    gated: Gated | None
    bias: Tensor | None
    before: Tensor | None

    @classmethod
    def find(cls, b: Builder, il: int, part: str) -> "StandIn | None":
        """Look the stand-in of a sub-block up in the plan of a graph."""
        weights = b.standins
        if weights is None:
            return None
        names = {name: tensor_name(b.span.plan, il, part, name) for name in BRIDGE_TENSORS}
        found = {name: weights.get(full) for name, full in names.items()}
        norm, low, up, down = (found[name] for name in ("norm", "a", "b", "down"))
        if norm is None:
            return None
        return cls(
            norm=norm, bias=found["bias"], before=found["before"],
            low_rank=None if low is None or up is None else (low, up),
            gated=None if down is None else Gated(weights, (names["gate"], names["up"]), down),
        )  # fmt: skip

    def build(self, b: Builder, x: Tensor, eps: float) -> Tensor:
        """Build what it adds to the residual stream `x`, F32 [n_embd, n]; same shape."""
        g, ctx = b.g, b.ctx
        h = g.ggml_mul(ctx, g.ggml_rms_norm(ctx, x, eps), self.norm)
        if self.before is not None:
            past = g.ggml_rms_norm(ctx, b.more(BEFORE, F32, *shape(x)[:2]), eps)
            h = g.ggml_concat(ctx, h, g.ggml_mul(ctx, past, self.before), 0)
        y: Tensor | None = None
        if self.low_rank is not None:
            a, up = self.low_rank
            y = g.ggml_mul_mat(ctx, up, g.ggml_mul_mat(ctx, a, h))
        if self.gated is not None:
            gate, wide = b.products(self.gated.weights, self.gated.gate_up, h)
            narrow = g.ggml_mul_mat(ctx, self.gated.down, g.ggml_swiglu_split(ctx, gate, wide))
            y = narrow if y is None else b.add(y, narrow)
        assert y is not None  # a depth file is refused otherwise
        if self.bias is not None:
            y = b.add(y, self.bias)
        return g.ggml_mul(ctx, y, _switch(b, *shape(x)[:2]))


def _switch(b: Builder, n_embd: int, n: int) -> Tensor:
    """Input F32 [n_embd, n]: 0 for tokens at position 0, 1 elsewhere.

    With one value a token ggml would multiply each of n_embd by itself, 5 us a stand-in.
    """
    name = _ON if n == b.n_tokens else _ON_OUT
    found = b.inputs.more.get(name)
    return b.more(name, F32, n_embd, n) if found is None else found


def fill_switches(inputs: Inputs, pieces: Sequence[tuple[int, int, int]]) -> None:
    """Write where stand-ins are off.

    Args:
        inputs: of a graph, with or without stand-ins.
        pieces: first position, tokens, and tokens at the end that get logits.
    """
    on, on_out = inputs.more.get(_ON), inputs.more.get(_ON_OUT)
    if on is None and on_out is None:
        return
    positions = [np.arange(pos, pos + n) for pos, n, _ in pieces]
    if on is not None:
        _write(on, np.concatenate(positions))
    if on_out is not None:
        wanted = [p[len(p) - n_out :] for p, (_, _, n_out) in zip(positions, pieces, strict=True)]
        _write(on_out, np.concatenate(wanted))


def _write(switch: Tensor, positions: npt.NDArray[np.int_]) -> None:
    on = np.repeat((positions > 0).astype(np.float32), shape(switch)[0])
    set_bytes(switch, on.reshape(len(positions), -1))


def fill_before(inputs: Inputs, state: npt.NDArray[np.float32], n_tokens: int) -> None:
    """Tell bridges what was behind their block at the token before.

    Args:
        inputs: of a graph, with or without bridges.
        state: F32 (n_embd,).
        n_tokens: tokens of the graph; all are told the same.
    """
    before = inputs.more.get(BEFORE)
    if before is not None:
        set_bytes(before, np.tile(state, (n_tokens, 1)))
