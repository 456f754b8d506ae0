"""qwen3: dense Qwen3. llama with NEOX rotation and a norm on every query and key head.

Source: llama.cpp, src/models/qwen3.cpp.
"""

from edgeroute.models import blocks
from edgeroute.models.llama import Llama
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec


class Qwen3(Llama):
    """llama's layer; heads are normalised before they are rotated."""

    arch = "qwen3"
    rope_mode = blocks.ROPE_NEOX
    rope_factors = None
    may_be_moe = False

    def extra_specs(self, il: int) -> list[TensorSpec]:
        hp, p = self.hparams, f"blk.{il}"
        return [
            blocks.norm(f"{p}.attn_q_norm", hp.n_embd_head_k),
            blocks.norm(f"{p}.attn_k_norm", hp.n_embd_head_k),
        ]

    def heads(self, b: Builder, name: str, x: Tensor, n_head: int) -> Tensor:
        heads = super().heads(b, name, x, n_head)
        return b.rms_norm(f"{name}_norm", heads, self.hparams.norm_rms_eps)
