"""olmoe: OLMoE-1B-7B. llama with NEOX rotation, norms over whole queries and keys, and experts.

Source: llama.cpp, src/models/olmoe.cpp.
"""

from edgeroute.models import blocks, moe
from edgeroute.models.llama import Llama
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec


class Olmoe(Llama):
    """llama's layer; queries and keys are normalised before they are split into heads."""

    arch = "olmoe"
    rope_mode = blocks.ROPE_NEOX
    rope_factors = None
    may_be_dense = False
    routing = moe.Routing()

    def extra_specs(self, il: int) -> list[TensorSpec]:
        hp, p = self.hparams, f"blk.{il}"
        return [
            blocks.norm(f"{p}.attn_q_norm", hp.n_embd_head_k * hp.n_head),
            blocks.norm(f"{p}.attn_k_norm", hp.n_embd_k_gqa),
        ]

    def heads(self, b: Builder, name: str, x: Tensor, n_head: int) -> Tensor:
        hp = self.hparams
        normed = b.rms_norm(f"{name}_norm", x, hp.norm_rms_eps)
        return blocks.split_heads(b, normed, hp.n_embd_head_k, n_head)
