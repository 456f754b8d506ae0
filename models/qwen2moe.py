"""qwen2moe: Qwen1.5-MoE, Qwen2-57B-A14B. qwen2's attention, experts, and a gated shared one.

Source: llama.cpp, src/models/qwen2moe.cpp.
"""

from edgeroute.models import blocks, moe
from edgeroute.models.qwen2 import Qwen2
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec


class Qwen2Moe(Qwen2):
    """Every token also runs the shared expert, scaled by a sigmoid of its own score."""

    arch = "qwen2moe"
    may_be_dense, may_be_moe = False, True
    routing = moe.Routing()

    def extra_specs(self, il: int) -> list[TensorSpec]:
        hp, p = self.hparams, f"blk.{il}"
        n_ff = self.moe.n_ff_shexp or hp.n_ff
        return [
            *super().extra_specs(il),
            blocks.spec(f"{p}.ffn_gate_inp_shexp.weight", hp.n_embd),
            blocks.spec(f"{p}.ffn_gate_shexp.weight", hp.n_embd, n_ff),
            blocks.spec(f"{p}.ffn_up_shexp.weight", hp.n_embd, n_ff),
            blocks.spec(f"{p}.ffn_down_shexp.weight", n_ff, hp.n_embd),
        ]

    def shared(self, b: Builder, il: int, h: Tensor) -> Tensor:
        p = f"blk.{il}"
        score = b.linear(f"{p}.ffn_gate_inp_shexp", h)
        # A sigmoid as silu(x) / x, for llama.cpp's bits: a score of exactly 0 is NaN there too.
        gate = b.g.ggml_div(b.ctx, b.g.ggml_silu(b.ctx, score), score)
        return b.g.ggml_mul(b.ctx, blocks.swiglu(b, p, h, "_shexp"), gate)
