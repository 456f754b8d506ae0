"""Records of stand-ins: what to fit, how, and a tensor as a depth file stores it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.runtime.quantize import quantize
from edgeroute.tools.convert.moe_activations import ROWS_AT_ONCE, Array, FeedForward

Part = Literal["attn", "ffn", "layer"]
Progress = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and of how much."""

PARTS: Final[tuple[Part, ...]] = ("attn", "ffn", "layer")
OWN: Final = "own"
DOWN_TYPES: Final = (OWN, "Q8_0", "F16", "Q5_0", "Q4_0")
_TYPE = GGMLQuantizationType
_QUANTISED: Final = frozenset({_TYPE.Q4_0, _TYPE.Q4_1, _TYPE.Q5_0, _TYPE.Q5_1, _TYPE.Q8_0,
                               _TYPE.Q3_K, _TYPE.Q4_K, _TYPE.Q5_K, _TYPE.Q6_K})  # fmt: skip
"""What ggml quantises well without an importance matrix."""
STRENGTHS: Final = (0.1, 0.3, 1.0)
"""Ridge strengths to choose among, in each input's own power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInShape:
    """What to fit in the place of a sub-block.

    Attributes:
        il: layer.
        part: `attn`, `ffn`, or `layer` for both at once.
        rank: of the linear map; 0 for none.
        width: neurons of the layer's own feed-forward that stay; 0 for none. Not for `attn`.
    """

    il: int
    part: Part
    rank: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInParams:
    """How to fit.

    Attributes:
        repair: how much of what earlier stand-ins missed is part of the target: 1 is all, 0
            fits each to its own sub-block.
        strengths: ridge strengths, in each input's own power; the one that is best for the
            first stand-in of a kind, on windows kept apart, serves all of that kind.
        down_type: how refitted down projections are stored, one of DOWN_TYPES; `own` is as the
            model's are, so that bytes are saved in proportion to neurons. See `down_kind`.
        work: folder for what is done, so that a stopped fit goes on; None keeps nothing.
        progress: told after each layer.
    """

    repair: float = 1.0
    strengths: tuple[float, ...] = STRENGTHS
    down_type: str = OWN
    work: Path | None = None
    progress: Progress | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInTensor:
    """A tensor as a depth file stores it.

    Attributes:
        rows: vectors (n,) and matrices (n_out, n_in) as F32 or F16; quantised matrices as
            bytes (n_out, bytes of a row).
        kind: how to read them.
    """

    rows: npt.NDArray[np.generic]
    kind: GGMLQuantizationType

    @classmethod
    def vector(cls, values: Array) -> "StandInTensor":
        """Store a norm or bias, F32."""
        return cls(rows=np.ascontiguousarray(values, np.float32), kind=GGMLQuantizationType.F32)

    @classmethod
    def matrix(cls, values: Array, kind: GGMLQuantizationType) -> "StandInTensor":
        """Store (n_out, n_in) as `kind`, or as F16 where its blocks do not fit the rows."""
        block, _ = GGML_QUANT_SIZES[kind]
        if values.shape[1] % block:
            kind = GGMLQuantizationType.F16
        values = np.ascontiguousarray(values, np.float32)
        if kind in _QUANTISED:
            return cls(rows=quantize(values, GGMLType(kind)), kind=kind)
        return cls(rows=quants.quantize(values, kind), kind=kind)

    def decode(self) -> Array:
        """Return the values, F32 (n,) or (n_out, n_in)."""
        return np.ascontiguousarray(quants.dequantize(self.rows, self.kind), dtype=np.float32)

    @property
    def n_values(self) -> int:
        """Numbers in it: of a matrix, the weights that each token is multiplied with."""
        shape = self.rows.shape
        if self.rows.dtype == np.uint8:
            shape = quants.quant_shape_from_byte_shape(shape, self.kind)
        return int(np.prod(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInValues:
    """One stand-in in numpy, as the engine computes it: see models/standins.py.

    norm and bias (n_embd,); a (r, n_embd) and b (n_embd, r); gate and up (m, n_embd), down
    (n_embd, m).
    """

    norm: Array
    low_rank: tuple[Array, Array] | None = None
    ff: FeedForward | None = None
    bias: Array | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, StandInTensor]) -> "StandInValues":
        """Decode a stand-in's tensors, by the last part of their names."""
        got = {name: tensor.decode() for name, tensor in tensors.items()}
        ff = None
        if "gate" in got:
            ff = FeedForward(gate=got["gate"], up=got["up"], down=got["down"])
        low_rank = (got["a"], got["b"]) if "a" in got else None
        return cls(norm=got["norm"], low_rank=low_rank, ff=ff, bias=got.get("bias"))

    def outputs(self, x: Array, n_window: int, eps: float) -> Array:
        """Return what it adds to the stream `x` (n_tokens, n_embd) of whole windows."""
        y = np.empty_like(x)
        for at in range(0, len(x), ROWS_AT_ONCE):
            part = np.s_[at : at + ROWS_AT_ONCE]
            y[part] = self._some(unit_power(x[part], eps) * self.norm)
        y[::n_window] = 0
        return y

    def _some(self, h: Array) -> Array:
        y = np.zeros_like(h)
        if self.low_rank is not None:
            a, b = self.low_rank
            y += (h @ a.T) @ b.T
        if self.ff is not None:
            y += self.ff.hidden(h) @ self.ff.down.T
        if self.bias is not None:
            y += self.bias
        return y


def down_kind(own: GGMLQuantizationType, wanted: str, width: int) -> GGMLQuantizationType:
    """Choose how a down projection from `width` neurons is stored.

    Args:
        own: the model's.
        wanted: one of DOWN_TYPES.
        width: must be whole blocks; Q8_0 has the shortest, and takes the place of others.
    """
    kind = own if wanted == OWN else GGMLQuantizationType[wanted]
    if kind in _QUANTISED and width % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    plain = kind in (GGMLQuantizationType.F16, GGMLQuantizationType.F32)
    return GGMLQuantizationType.F16 if plain else GGMLQuantizationType.Q8_0


def unit_power(x: Array, eps: float) -> Array:
    """Scale rows to unit mean square."""
    power = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
    found: Array = x / np.sqrt(power + np.float32(eps))
    return found
