"""llama: SmolLM2, Llama 2 and 3.x (with their rope factors), Mistral.

Also the shape of qwen2 and qwen3, which differ in rotary order, biases and head norms.
Source: llama.cpp, src/models/llama.cpp, so that results can be compared bit for bit.
"""

import math

from edgeroute.models import blocks
from edgeroute.models.base import Hparams, read_hparams
from edgeroute.runtime.errors import UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec


class Llama:
    """Pre-norm decoder: attention with grouped heads, then a SwiGLU feed-forward."""

    arch = "llama"
    rope_mode = blocks.ROPE_NORMAL
    rope_factors: str | None = "rope_freqs.weight"
    n_swa: int | None = None

    def __init__(self, file: GGUFFile) -> None:
        self.hparams: Hparams = read_hparams(file, self.arch)
        hp = self.hparams
        if file.metadata.get_int(f"{self.arch}.expert_count", 0, low=0, high=1 << 16):
            raise UnsupportedModelError(f"{file.path.name} has experts; only dense {self.arch} "
                                        "models run in this version")  # fmt: skip
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

    def layer(self, b: Builder, il: int, x: Tensor) -> Tensor:
        hp, p = self.hparams, f"blk.{il}"
        attn = self.attention(b, il, b.rms_norm(f"{p}.attn_norm", x, hp.norm_rms_eps))
        if b.is_last(il):
            attn, x = b.select_outputs(attn), b.select_outputs(x)
        x = b.add(attn, x)
        ffn = blocks.swiglu(b, p, b.rms_norm(f"{p}.ffn_norm", x, hp.norm_rms_eps))
        return b.add(ffn, x)

    def attention(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build one attention block on normed input."""
        hp, p = self.hparams, f"blk.{il}"
        q = blocks.split_heads(b, b.linear(f"{p}.attn_q", x), hp.n_embd_head_k, hp.n_head)
        k = blocks.split_heads(b, b.linear(f"{p}.attn_k", x), hp.n_embd_head_k, hp.n_head_kv)
        v = blocks.split_heads(b, b.linear(f"{p}.attn_v", x), hp.n_embd_head_v, hp.n_head_kv)
        q, k = self.norm_heads(b, p, q, k)
        q = blocks.rotate(b, q, hp.rope, self.rope_mode, self.rope_factors)
        k = blocks.rotate(b, k, hp.rope, self.rope_mode, self.rope_factors)
        b.store_kv(il, k, v)
        return b.linear(f"{p}.attn_output", b.attend(il, q, self.kq_scale))

    def norm_heads(self, b: Builder, p: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise each head before rotation; llama does not."""
        return q, k

    def head(self, b: Builder, x: Tensor) -> Tensor:
        return blocks.logits(b, x, self.hparams.norm_rms_eps)
