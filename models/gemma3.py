"""gemma3: text models of Gemma 3. Sandwich norms, GELU, sliding windows between full layers.

Source: llama.cpp, src/models/gemma3.cpp.
"""

import dataclasses
import math

from edgeroute.models import blocks
from edgeroute.models.base import (
    Hparams,
    Rope,
    read_hparams,
    read_swa_freq_base,
    read_swa_layers,
)
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec

SWA_PATTERN = 6  # every sixth layer sees everything; the header may say otherwise
N_LAYER_27B = 62  # the one size that scales attention by n_embd / n_head


class Gemma3:
    """Decoder with norms before and after each block, and two rotary bases."""

    def __init__(self, file: GGUFFile) -> None:
        self.hparams: Hparams = read_hparams(file, "gemma3")
        hp, meta = self.hparams, file.metadata
        window = meta.get_int("gemma3.attention.sliding_window", 0, low=0, high=1 << 24)
        self.n_swa: int | None = window or None
        windowed = read_swa_layers(file, "gemma3", hp.n_layer, SWA_PATTERN)
        self.is_swa = windowed if window else (False,) * hp.n_layer
        base = read_swa_freq_base(file, "gemma3", 10000.0)
        self.rope_swa: Rope = dataclasses.replace(hp.rope, freq_base=base, freq_scale=1.0)
        width = hp.n_embd // hp.n_head if hp.n_layer == N_LAYER_27B else hp.n_embd_head_k
        self.kq_scale = 1.0 / math.sqrt(width)
        self.softcap = meta.get_float("gemma3.final_logit_softcapping", 0.0)

    def specs(self) -> list[TensorSpec]:
        hp = self.hparams
        found = blocks.common_specs(hp)
        for il in range(hp.n_layer):
            p = f"blk.{il}"
            found += blocks.attention_specs(hp, il) + blocks.ffn_specs(hp, il)
            found += [
                blocks.norm(f"{p}.attn_q_norm", hp.n_embd_head_k),
                blocks.norm(f"{p}.attn_k_norm", hp.n_embd_head_k),
                blocks.norm(f"{p}.post_attention_norm", hp.n_embd),
                blocks.norm(f"{p}.post_ffw_norm", hp.n_embd),
            ]
        return found

    def embed(self, b: Builder) -> Tensor:
        return b.scale(blocks.embed_tokens(b), math.sqrt(self.hparams.n_embd))

    def attn_branch(self, b: Builder, il: int, x: Tensor) -> Tensor:
        eps, p = self.hparams.norm_rms_eps, f"blk.{il}"
        attn = self.attention(b, il, b.rms_norm(f"{p}.attn_norm", x, eps))
        return b.rms_norm(f"{p}.post_attention_norm", attn, eps)

    def ffn_branch(self, b: Builder, il: int, x: Tensor) -> Tensor:
        eps, p = self.hparams.norm_rms_eps, f"blk.{il}"
        ffn = blocks.geglu(b, p, b.rms_norm(f"{p}.ffn_norm", x, eps))
        return b.rms_norm(f"{p}.post_ffw_norm", ffn, eps)

    def attention(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build one attention block on normed input, windowed or full."""
        hp, p, eps = self.hparams, f"blk.{il}", self.hparams.norm_rms_eps
        rope = self.rope_swa if self.is_swa[il] else hp.rope
        q, k, v = blocks.queries_keys_values(b, il, x)
        q = blocks.split_heads(b, q, hp.n_embd_head_k, hp.n_head)
        k = blocks.split_heads(b, k, hp.n_embd_head_k, hp.n_head_kv)
        v = blocks.split_heads(b, v, hp.n_embd_head_v, hp.n_head_kv)
        q = blocks.rotate(b, b.rms_norm(f"{p}.attn_q_norm", q, eps), rope, blocks.ROPE_NEOX)
        k = blocks.rotate(b, b.rms_norm(f"{p}.attn_k_norm", k, eps), rope, blocks.ROPE_NEOX)
        b.store_kv(il, k, v)
        # Scaled before the products, not within them: the products' rounding depends on it.
        out = b.attend(il, b.scale(q, self.kq_scale), 1.0, swa=self.is_swa[il])
        return b.linear(f"{p}.attn_output", out)

    def head(self, b: Builder, x: Tensor) -> Tensor:
        out = blocks.logits(b, x, self.hparams.norm_rms_eps)
        if not self.softcap:
            return out
        out = b.g.ggml_tanh(b.ctx, b.scale(out, 1.0 / self.softcap))
        return b.scale(out, self.softcap)
