"""gpt-oss: OpenAI's open models. Attention sinks, windows in every second layer, biased experts.

Source: llama.cpp, src/models/openai-moe.cpp; it drops unwanted outputs after the last layer's
experts, this before, as in the other families.
"""

import dataclasses
import math

from edgeroute.models import blocks, moe
from edgeroute.models.base import (
    Hparams,
    Rope,
    read_hparams,
    read_swa_freq_base,
    read_swa_layers,
)
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec

SWA_PERIOD = 2  # every second layer sees everything; the header may say otherwise
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # Source: llama-graph.cpp, LLM_FFN_SWIGLU_OAI_MOE


class GptOss(moe.MoeLayers):
    """Pre-norm decoder: attention with biases and sinks, then experts with biases."""

    routing = moe.Routing(gating="softmax_weight")
    ffn_norm = "post_attention_norm"

    def __init__(self, file: GGUFFile) -> None:
        self.hparams: Hparams = read_hparams(file, "gpt-oss")
        hp, meta = self.hparams, file.metadata
        moe.require(hp, file)
        if hp.rope.n_rot != hp.n_embd_head_k:
            raise ModelFileError(
                f"{file.path.name} rotates {hp.rope.n_rot} of {hp.n_embd_head_k} values per head; "
                "gpt-oss models rotate all"
            )
        window = meta.get_int("gpt-oss.attention.sliding_window", low=1, high=1 << 24)
        self.n_swa: int | None = window
        self.is_swa = read_swa_layers(file, "gpt-oss", hp.n_layer, SWA_PERIOD)
        base = read_swa_freq_base(file, "gpt-oss", hp.rope.freq_base)
        self.rope_swa: Rope = dataclasses.replace(hp.rope, freq_base=base)
        self.kq_scale = 1.0 / math.sqrt(hp.n_embd_head_k)

    def specs(self) -> list[TensorSpec]:
        hp = self.hparams
        found = blocks.common_specs(hp)
        for il in range(hp.n_layer):
            found += blocks.attention_specs(hp, il) + self.expert_specs(il)
            found += self.extra_specs(il)
        return found

    def expert_specs(self, il: int) -> list[TensorSpec]:
        """List router and experts with their biases; the norm has another name here."""
        hp, counts, p = self.hparams, self.moe, f"blk.{il}"
        norm = f"{p}.ffn_norm.weight"
        found = [each for each in moe.specs(hp, counts, il) if each.name != norm]
        found += [
            blocks.norm(f"{p}.post_attention_norm", hp.n_embd),
            blocks.bias(f"{p}.ffn_gate_inp", counts.n_expert, required=True),
        ]
        for part, width in (
            ("gate", counts.n_ff_exp),
            ("up", counts.n_ff_exp),
            ("down", hp.n_embd),
        ):
            name = f"{p}.ffn_{part}_exps.bias"
            found.append(blocks.spec(name, width, counts.n_expert, use="elementwise"))
        return found

    def extra_specs(self, il: int) -> list[TensorSpec]:
        """List the sinks and the biases of one attention block."""
        hp, p = self.hparams, f"blk.{il}"
        return [
            blocks.spec(f"{p}.attn_sinks.weight", hp.n_head, use="elementwise"),
            blocks.bias(f"{p}.attn_q", hp.n_embd_head_k * hp.n_head),
            blocks.bias(f"{p}.attn_k", hp.n_embd_k_gqa),
            blocks.bias(f"{p}.attn_v", hp.n_embd_v_gqa),
            blocks.bias(f"{p}.attn_output", hp.n_embd, required=True),
        ]

    def embed(self, b: Builder) -> Tensor:
        return blocks.embed_tokens(b)

    def attention(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build one attention block on normed input, windowed or full."""
        hp, p = self.hparams, f"blk.{il}"
        rope = self.rope_swa if self.is_swa[il] else hp.rope
        q, k, v = blocks.queries_keys_values(b, il, x)
        q = blocks.split_heads(b, q, hp.n_embd_head_k, hp.n_head)
        k = blocks.split_heads(b, k, hp.n_embd_head_k, hp.n_head_kv)
        v = blocks.split_heads(b, v, hp.n_embd_head_v, hp.n_head_kv)
        q, k = blocks.rotate_both(b, q, k, rope, blocks.ROPE_NEOX)
        b.store_kv(il, k, v)
        sinks = b.weight(f"{p}.attn_sinks.weight")
        out = b.attend(il, q, self.kq_scale, swa=self.is_swa[il], sinks=sinks)
        return b.linear(f"{p}.attn_output", out)

    def activate(self, b: Builder, gate: Tensor, up: Tensor) -> Tensor:
        return b.g.ggml_swiglu_oai(b.ctx, gate, up, SWIGLU_ALPHA, SWIGLU_LIMIT)

    def head(self, b: Builder, x: Tensor) -> Tensor:
        return blocks.logits(b, x, self.hparams.norm_rms_eps)
