"""qwen2: Qwen2 and Qwen2.5. llama with NEOX rotation and biases on q, k and v.

Source: llama.cpp, src/models/qwen2.cpp.
"""

from edgeroute.models import blocks
from edgeroute.models.llama import Llama
from edgeroute.runtime.weights import TensorSpec


class Qwen2(Llama):
    """llama's layer; biases on the projections, and sometimes on the head."""

    arch = "qwen2"
    rope_mode = blocks.ROPE_NEOX
    rope_factors = None
    may_be_moe = False

    def specs(self) -> list[TensorSpec]:
        return [*super().specs(), blocks.bias("output", self.hparams.n_vocab)]

    def extra_specs(self, il: int) -> list[TensorSpec]:
        hp, p = self.hparams, f"blk.{il}"
        return [
            blocks.bias(f"{p}.attn_q", hp.n_embd_head_k * hp.n_head),
            blocks.bias(f"{p}.attn_k", hp.n_embd_k_gqa),
            blocks.bias(f"{p}.attn_v", hp.n_embd_v_gqa),
        ]
