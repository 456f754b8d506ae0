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

    def extra_specs(self, il: int) -> list[TensorSpec]:
        hp, p = self.hparams, f"blk.{il}"
        return [
            blocks.norm(f"{p}.attn_q_norm", hp.n_embd_head_k),
            blocks.norm(f"{p}.attn_k_norm", hp.n_embd_head_k),
        ]

    def norm_heads(self, b: Builder, p: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        eps = self.hparams.norm_rms_eps
        return b.rms_norm(f"{p}.attn_q_norm", q, eps), b.rms_norm(f"{p}.attn_k_norm", k, eps)
