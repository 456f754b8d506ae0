"""Which of the operations that edgeroute's graphs use a device lacks, whatever the model."""

from typing import Final

from edgeroute.runtime.device import Device
from edgeroute.runtime.device_ops import lacking, lying_on
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.runtime.tensor import F16, F32, I32, I64, Q8_0, Descriptors, new_tensor

_WEIGHTS: Final = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K",
                   "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # fmt: skip
_HEADS: Final = (64, 80, 96, 128, 256)
_WIDTH, _ROWS, _TOKENS, _CELLS, _EXPERTS, _USED = 256, 64, 8, 256, 8, 2
_NEOX, _ROOM = 2, 512


def lacking_operations(device: Device) -> list[str]:
    """List what a device says that it cannot compute, of all that edgeroute's graphs may hold.

    Nothing is allocated but descriptors, and nothing computed. A server of ggml's RPC says yes to
    whatever it is asked.
    """
    probes = _Probes()
    try:
        for n_tokens in (1, _TOKENS):
            probes.products(n_tokens)
            probes.attention(n_tokens)
            probes.elements(n_tokens)
            probes.choices(n_tokens)
        with lying_on(device, probes.leaves):
            return lacking(device, probes.graph)
    finally:
        probes.free()


class _Probes:
    """Descriptors of one operation of each kind, in one graph that is never computed."""

    def __init__(self) -> None:
        self.g = ggml()
        self._descriptors = Descriptors(_ROOM, _ROOM)
        self.ctx = self._descriptors.ctx
        self.graph = self.g.ggml_new_graph_custom(self.ctx, _ROOM, False)
        self.leaves: list[Tensor] = []

    def free(self) -> None:
        """Free the descriptors."""
        self._descriptors.free()

    def leaf(self, kind: int, *ne: int) -> Tensor:
        """Describe what a graph reads."""
        made = new_tensor(self._descriptors, kind, ne, "probe")
        self.leaves.append(made)
        return made

    def add(self, *outputs: Tensor) -> None:
        """Have operations asked about."""
        for output in outputs:
            self.g.ggml_build_forward_expand(self.graph, output)

    def products(self, n: int) -> None:
        """Products with weights of every type, whole and by expert, and rows looked up."""
        g, ctx = self.g, self.ctx
        x, each = self.leaf(F32, _WIDTH, n), self.leaf(F32, _WIDTH, 1, n)
        ids = self.leaf(I32, _USED, n)
        for name in _WEIGHTS:
            kind = int(GGMLType[name])
            self.add(g.ggml_mul_mat(ctx, self.leaf(kind, _WIDTH, _ROWS), x))
            slots = self.leaf(kind, _WIDTH, _ROWS, _EXPERTS)
            self.add(g.ggml_mul_mat_id(ctx, slots, each, ids))
        self.add(g.ggml_get_rows(ctx, x, self.leaf(I32, 1)))
        bias = self.leaf(F32, _ROWS, _EXPERTS)
        self.add(g.ggml_add_id(ctx, self.leaf(F32, _ROWS, _USED, n), bias, ids))

    def attention(self, n: int) -> None:
        """Keys and values stored, attention over them, rotary positions."""
        g, ctx = self.g, self.ctx
        rows, pos = self.leaf(I64, n), self.leaf(I32, n)
        mask = self.leaf(F16, _CELLS, n)
        for kind in (F16, Q8_0):
            cache = self.leaf(kind, _WIDTH, _CELLS)
            self.add(g.ggml_set_rows(ctx, cache, self.leaf(F32, _WIDTH, n), rows))
            for head in _HEADS if kind == F16 else (64, 128):
                q = self.leaf(F32, head, n, 4)
                k, v = (self.leaf(kind, head, _CELLS, 2) for _ in range(2))
                self.add(g.ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0, 0.0, 0.0))
        for mode in (0, _NEOX):
            x = self.leaf(F32, 64, 4, n)
            self.add(g.ggml_rope_ext(ctx, x, pos, None, 64, mode, 4096, 1e4, 1.0, 0.0, 1.0, 32.0,
                                     1.0))  # fmt: skip

    def elements(self, n: int) -> None:
        """What norms, feed-forwards and carries are made of."""
        g, ctx = self.g, self.ctx
        x, y = self.leaf(F32, _WIDTH, n), self.leaf(F32, _WIDTH, n)
        one = self.leaf(F32, _WIDTH)
        self.add(
            g.ggml_rms_norm(ctx, x, 1e-5), g.ggml_mul(ctx, x, one), g.ggml_add(ctx, x, y),
            g.ggml_div(ctx, x, y), g.ggml_scale(ctx, x, 2.0), g.ggml_scale_bias(ctx, x, 2.0, 1.0),
            g.ggml_swiglu_split(ctx, x, y), g.ggml_geglu_split(ctx, x, y),
            g.ggml_swiglu_oai(ctx, x, y, 1.7, 7.0), g.ggml_silu(ctx, x), g.ggml_sigmoid(ctx, x),
            g.ggml_tanh(ctx, x), g.ggml_concat(ctx, x, y, 1), g.ggml_cpy(ctx, x, y),
            g.ggml_cont(ctx, g.ggml_permute(ctx, x, 1, 0, 2, 3)),
            g.ggml_repeat_4d(ctx, one, _WIDTH, n, 1, 1),
        )  # fmt: skip

    def choices(self, n: int) -> None:
        """How experts, and tokens that are computed, are chosen."""
        g, ctx = self.g, self.ctx
        x = self.leaf(F32, _EXPERTS, n)
        self.add(
            g.ggml_soft_max(ctx, x), g.ggml_argsort_top_k(ctx, x, _USED), g.ggml_sum_rows(ctx, x),
            g.ggml_clamp(ctx, x, 0.0, 1.0), g.ggml_step(ctx, x), g.ggml_cumsum(ctx, x),
        )  # fmt: skip
