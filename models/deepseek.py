"""deepseek: DeepSeekMoE 16B. llama's attention, leading dense layers, experts and shared ones.

Source: llama.cpp, src/models/deepseek.cpp.
"""

import dataclasses

from edgeroute.models import blocks, moe
from edgeroute.models.base import MAX_EXPERTS, MoeHparams
from edgeroute.models.llama import Llama
from edgeroute.runtime.errors import UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec


class DeepSeek(Llama):
    """Every token also runs the shared experts, without a gate of their own."""

    arch = "deepseek"
    rope_factors = None
    may_be_dense = False

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        hp = self.hparams
        if hp.rope.n_rot != hp.n_embd_head_k:
            raise UnsupportedModelError(
                f"{file.path.name} rotates {hp.rope.n_rot} of {hp.n_embd_head_k} values per head; "
                "deepseek models rotate all"
            )
        self.hparams = dataclasses.replace(hp, moe=read_shared(file, self.arch, self.moe))
        scale = file.metadata.get_float("deepseek.expert_weights_scale", 0.0)
        self.routing = moe.Routing(w_scale=scale)

    def extra_specs(self, il: int) -> list[TensorSpec]:
        hp, p = self.hparams, f"blk.{il}"
        biases = [
            blocks.bias(f"{p}.attn_q", hp.n_embd_head_k * hp.n_head),
            blocks.bias(f"{p}.attn_k", hp.n_embd_k_gqa),
            blocks.bias(f"{p}.attn_v", hp.n_embd_v_gqa),
        ]
        if not self.is_moe(il):
            return biases
        return biases + shared_specs(hp.n_embd, self.moe.n_ff_shexp, il)

    def shared(self, b: Builder, il: int, h: Tensor) -> Tensor:
        return blocks.swiglu(b, f"blk.{il}", h, "_shexp")


def read_shared(file: GGUFFile, arch: str, counts: MoeHparams) -> MoeHparams:
    """Add the width of the shared experts, which these headers give as a count.

    Raises:
        ModelFileError: the count is missing or out of bounds.
    """
    n_shared = file.metadata.get_int(f"{arch}.expert_shared_count", low=1, high=MAX_EXPERTS)
    return dataclasses.replace(counts, n_ff_shexp=n_shared * counts.n_ff_exp)


def shared_specs(n_embd: int, n_ff: int, il: int) -> list[TensorSpec]:
    """List the shared experts of one layer, `n_ff` wide together."""
    p = f"blk.{il}"
    return [
        blocks.spec(f"{p}.ffn_gate_shexp.weight", n_embd, n_ff),
        blocks.spec(f"{p}.ffn_up_shexp.weight", n_embd, n_ff),
        blocks.spec(f"{p}.ffn_down_shexp.weight", n_ff, n_embd),
    ]
