"""llama: SmolLM2, Llama 2 and 3.x (with their rope factors), Mistral; with experts, Mixtral.

Also the shape of the qwen and olmoe families, which differ in rotary order, biases and norms.
Source: llama.cpp, src/models/llama.cpp, so that results can be compared bit for bit.
"""

import math

from edgeroute.models import blocks, moe
from edgeroute.models.base import Hparams, read_hparams
from edgeroute.runtime.errors import UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec


class Llama(moe.MoeLayers):
    """Pre-norm decoder: attention with grouped heads, then a SwiGLU feed-forward or experts."""

    arch = "llama"
    may_be_dense = may_be_moe = True
    routing = moe.Routing(norm_w=True)
    rope_mode = blocks.ROPE_NORMAL
    rope_factors: str | None = "rope_freqs.weight"
    n_swa: int | None = None

    def __init__(self, file: GGUFFile) -> None:
        self.hparams: Hparams = read_hparams(file, self.arch)
        hp = self.hparams
        if not self.may_be_dense:
            moe.require(hp, file)
        if hp.moe is not None and not self.may_be_moe:
            raise UnsupportedModelError(
                f"{file.path.name} has experts, which {self.arch} models have not; its "
                f"architecture should be {self.arch}moe"
            )
        if self.arch == "llama" and hp.rope.n_rot != hp.n_embd_head_k:
            raise UnsupportedModelError(
                f"{file.path.name} rotates {hp.rope.n_rot} of {hp.n_embd_head_k} values per head; "
                "llama models rotate all"
            )
        scale = file.metadata.get_float(f"{self.arch}.attention.scale", 0.0)
        self.kq_scale = scale or 1.0 / math.sqrt(hp.n_embd_head_k)

    def specs(self) -> list[TensorSpec]:
        hp = self.hparams
        found = blocks.common_specs(hp)
        for il in range(hp.n_layer):
            found += blocks.attention_specs(hp, il) + self.extra_specs(il)
            if hp.moe is not None and self.is_moe(il):
                found += moe.specs(hp, hp.moe, il)
            else:
                found += blocks.ffn_specs(hp, il)
        if self.rope_factors:
            n_rot = hp.rope.n_rot
            found.append(
                blocks.spec(self.rope_factors, n_rot // 2, use="elementwise", required=False)
            )
        return found

    def extra_specs(self, il: int) -> list[TensorSpec]:
        """List what this family has beside the common tensors of a layer."""
        hp, p = self.hparams, f"blk.{il}"
        return [
            blocks.bias(f"{p}.attn_q", hp.n_embd_head_k * hp.n_head),
            blocks.bias(f"{p}.attn_k", hp.n_embd_k_gqa),
            blocks.bias(f"{p}.attn_v", hp.n_embd_v_gqa),
            blocks.bias(f"{p}.attn_output", hp.n_embd),
            blocks.bias(f"{p}.ffn_gate", hp.n_ff),
            blocks.bias(f"{p}.ffn_up", hp.n_ff),
            blocks.bias(f"{p}.ffn_down", hp.n_embd),
        ]

    def embed(self, b: Builder) -> Tensor:
        return blocks.embed_tokens(b)

    def attention(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build one attention block on normed input."""
        hp, p = self.hparams, f"blk.{il}"
        q, k, v = blocks.queries_keys_values(b, il, x)
        q = self.heads(b, f"{p}.attn_q", q, hp.n_head)
        k = self.heads(b, f"{p}.attn_k", k, hp.n_head_kv)
        v = blocks.split_heads(b, v, hp.n_embd_head_v, hp.n_head_kv)
        q, k = blocks.rotate_both(b, q, k, hp.rope, self.rope_mode, self.rope_factors)
        b.store_kv(il, k, v)
        return b.linear(f"{p}.attn_output", b.attend(il, q, self.kq_scale))

    def heads(self, b: Builder, name: str, x: Tensor, n_head: int) -> Tensor:
        """Split projected queries or keys for rotation: F32 [n_embd_head_k, n_head, n_tokens].

        Other families normalise them here, by their heads or before the split.
        """
        return blocks.split_heads(b, x, self.hparams.n_embd_head_k, n_head)

    def head(self, b: Builder, x: Tensor) -> Tensor:
        return blocks.logits(b, x, self.hparams.norm_rms_eps)
