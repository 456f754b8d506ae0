"""deepseek2: DeepSeek-V2, V2-Lite and relatives. Latent attention, shared and routed experts.

Keys and values of a token are one latent vector and one rotated key that all heads share. Files
with split projections (attn_k_b, attn_v_b) attend in the latent space: queries are brought
there, the cache holds latents alone, and values are a part of them. Older files (attn_kv_b)
unfold keys and values of every head and cache those.
Source: llama.cpp, src/models/deepseek2.cpp.
"""

import dataclasses
import math

import numpy as np

from edgeroute.models import blocks, moe
from edgeroute.models.base import (
    MAX_WIDTH,
    Hparams,
    Rope,
    read_hparams,
    stretch_log,
    yarn_attn_factor,
)
from edgeroute.models.deepseek import read_shared, shared_specs
from edgeroute.runtime.errors import ModelFileError, UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.tensor import F32_BYTES, shape, strides
from edgeroute.runtime.weights import TensorSpec

ARCH = "deepseek2"
MAX_LOG_MUL = 1e3  # far above any model's 0.1, far from overflow
GATING: dict[int, moe.Gating] = {1: "softmax", 2: "sigmoid"}
"""Source: llama-hparams.h, enum llama_expert_gating_func_type."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Widths of latent attention.

    Attributes:
        n_lora_q: width of compressed queries; None where queries are projected at once.
        n_lora_kv: width of the latent that keys and values are made from.
        n_head_nope: values of a head that carry no position; the others are rotated.
        n_head_v: values of a head's output.
        absorbed: whether attention runs in the latent space.
    """

    n_lora_q: int | None
    n_lora_kv: int
    n_head_nope: int
    n_head_v: int
    absorbed: bool


class DeepSeek2(moe.MoeLayers):
    """Pre-norm decoder: latent attention, then a dense or a mixed feed-forward."""

    n_swa: int | None = None

    def __init__(self, file: GGUFFile) -> None:
        _refuse(file)
        hp = read_hparams(file, ARCH, equal_heads=False)
        self.latent = latent = read_latent(file, hp)
        counts = read_shared(file, ARCH, moe.require(hp, file))
        rope, self.kq_scale = scale_attention(file, hp.rope, latent.n_head_nope + hp.rope.n_rot)
        self.hparams: Hparams = dataclasses.replace(
            hp, moe=counts, rope=rope, v_in_k=latent.absorbed
        )
        self.routing = read_routing(file)

    def specs(self) -> list[TensorSpec]:
        hp = self.hparams
        found = blocks.common_specs(hp)
        for il in range(hp.n_layer):
            found += self.latent_specs(il)
            if self.is_moe(il):
                found += moe.specs(hp, self.moe, il)
                found += shared_specs(hp.n_embd, self.moe.n_ff_shexp, il)
                found.append(blocks.bias(f"blk.{il}.exp_probs_b", self.moe.n_expert))
            else:
                found += blocks.ffn_specs(hp, il)
        return found

    def latent_specs(self, il: int) -> list[TensorSpec]:
        """List the tensors of one attention block."""
        hp, la, p = self.hparams, self.latent, f"blk.{il}"
        n_nope, n_rot = la.n_head_nope, hp.rope.n_rot
        n_q = hp.n_head * (n_nope + n_rot)
        found = [
            blocks.norm(f"{p}.attn_norm", hp.n_embd),
            blocks.spec(f"{p}.attn_kv_a_mqa.weight", hp.n_embd, la.n_lora_kv + n_rot),
            blocks.norm(f"{p}.attn_kv_a_norm", la.n_lora_kv),
            blocks.spec(f"{p}.attn_output.weight", hp.n_head * la.n_head_v, hp.n_embd),
        ]
        if la.n_lora_q is None:
            found.append(blocks.spec(f"{p}.attn_q.weight", hp.n_embd, n_q))
        else:
            found += [
                blocks.spec(f"{p}.attn_q_a.weight", hp.n_embd, la.n_lora_q),
                blocks.norm(f"{p}.attn_q_a_norm", la.n_lora_q),
                blocks.spec(f"{p}.attn_q_b.weight", la.n_lora_q, n_q),
            ]
        if la.absorbed:
            return [
                *found,
                blocks.spec(f"{p}.attn_k_b.weight", n_nope, la.n_lora_kv, hp.n_head),
                blocks.spec(f"{p}.attn_v_b.weight", la.n_lora_kv, la.n_head_v, hp.n_head),
            ]
        n_kv = hp.n_head * (n_nope + la.n_head_v)
        return [*found, blocks.spec(f"{p}.attn_kv_b.weight", la.n_lora_kv, n_kv)]

    def embed(self, b: Builder) -> Tensor:
        return blocks.embed_tokens(b)

    def attention(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build one attention block on normed input."""
        p, hp, la = f"blk.{il}", self.hparams, self.latent
        q = self.queries(b, p, x)
        both = b.linear(f"{p}.attn_kv_a_mqa", x)  # [n_lora_kv + n_rot, n_tokens]
        row = strides(both)[1]
        latent = b.g.ggml_view_2d(b.ctx, both, la.n_lora_kv, b.n_tokens, row, 0)
        k_pe = b.g.ggml_view_3d(
            b.ctx, both, hp.rope.n_rot, 1, b.n_tokens, row, row, la.n_lora_kv * F32_BYTES
        )
        k_pe = blocks.rotate(b, k_pe, hp.rope, blocks.ROPE_NORMAL)
        latent = b.rms_norm(f"{p}.attn_kv_a_norm", latent, hp.norm_rms_eps)
        attend = self.attend_latents if la.absorbed else self.attend_heads
        return b.linear(f"{p}.attn_output", attend(b, il, q, latent, k_pe))

    def queries(self, b: Builder, p: str, x: Tensor) -> Tensor:
        """Build queries before rotation: F32 [n_head_nope + n_rot, n_head, n_tokens]."""
        hp, la = self.hparams, self.latent
        if la.n_lora_q is None:
            q = b.linear(f"{p}.attn_q", x)
        else:
            q = b.linear(f"{p}.attn_q_a", x)
            q = b.linear(f"{p}.attn_q_b", b.rms_norm(f"{p}.attn_q_a_norm", q, hp.norm_rms_eps))
        return blocks.split_heads(b, q, la.n_head_nope + hp.rope.n_rot, hp.n_head)

    def attend_latents(
        self, b: Builder, il: int, q: Tensor, latent: Tensor, k_pe: Tensor
    ) -> Tensor:
        """Attend with queries brought into the latent space, one key head for all.

        Takes q as `queries` gives it, latent F32 [n_lora_kv, n_tokens], k_pe F32 [n_rot, 1,
        n_tokens]; returns F32 [n_head_v * n_head, n_tokens].
        """
        g, ctx, hp, la, p = b.g, b.ctx, self.hparams, self.latent, f"blk.{il}"
        _, head, token, _ = strides(q)
        nope = g.ggml_view_3d(ctx, q, la.n_head_nope, hp.n_head, b.n_tokens, head, token, 0)
        q_pe = g.ggml_view_3d(
            ctx, q, hp.rope.n_rot, hp.n_head, b.n_tokens, head, token, la.n_head_nope * F32_BYTES
        )
        q_pe = blocks.rotate(b, q_pe, hp.rope, blocks.ROPE_NORMAL)
        nope = g.ggml_permute(ctx, nope, 0, 2, 1, 3)  # [n_head_nope, n_tokens, n_head]
        absorbed = g.ggml_mul_mat(ctx, b.weight(f"{p}.attn_k_b.weight"), nope)
        absorbed = g.ggml_permute(ctx, absorbed, 0, 2, 1, 3)  # [n_lora_kv, n_head, n_tokens]
        latent = blocks.split_heads(b, latent, la.n_lora_kv, 1)
        b.store_kv(il, g.ggml_concat(ctx, latent, k_pe, 0), None)
        out = b.attend(il, g.ggml_concat(ctx, absorbed, q_pe, 0), self.kq_scale)
        out = blocks.split_heads(b, out, la.n_lora_kv, hp.n_head)
        out = g.ggml_permute(ctx, out, 0, 2, 1, 3)
        out = g.ggml_mul_mat(ctx, b.weight(f"{p}.attn_v_b.weight"), out)
        out = g.ggml_cont(ctx, g.ggml_permute(ctx, out, 0, 2, 1, 3))
        return g.ggml_reshape_2d(ctx, out, la.n_head_v * hp.n_head, b.n_tokens)

    def attend_heads(self, b: Builder, il: int, q: Tensor, latent: Tensor, k_pe: Tensor) -> Tensor:
        """Attend with keys and values of every head, made from the latents.

        Takes and returns what `attend_latents` does.
        """
        g, ctx, hp, la = b.g, b.ctx, self.hparams, self.latent
        kv = b.linear(f"blk.{il}.attn_kv_b", latent)
        kv = blocks.split_heads(b, kv, la.n_head_nope + la.n_head_v, hp.n_head)
        ne, (_, head, token, _) = shape(kv), strides(kv)
        nope = g.ggml_view_3d(ctx, kv, la.n_head_nope, ne[1], ne[2], head, token, 0)
        v = g.ggml_view_3d(
            ctx, kv, la.n_head_v, ne[1], ne[2], head, token, la.n_head_nope * F32_BYTES
        )
        q = blocks.rotate(b, q, hp.rope, blocks.ROPE_NORMAL)
        q = g.ggml_rope_set_offset(q, la.n_head_nope)  # the last values of a head turn
        k_pe = g.ggml_repeat_4d(ctx, k_pe, hp.rope.n_rot, hp.n_head, b.n_tokens, 1)
        b.store_kv(il, g.ggml_concat(ctx, nope, k_pe, 0), g.ggml_cont(ctx, v))
        return b.attend(il, q, self.kq_scale)

    def shared(self, b: Builder, il: int, h: Tensor) -> Tensor:
        return blocks.swiglu(b, f"blk.{il}", h, "_shexp")

    def head(self, b: Builder, x: Tensor) -> Tensor:
        return blocks.logits(b, x, self.hparams.norm_rms_eps)


def _refuse(file: GGUFFile) -> None:
    """Refuse what relatives of this architecture have and it does not run."""
    meta = file.metadata
    if meta.get_int(f"{ARCH}.nextn_predict_layers", 0, low=0, high=1 << 16):
        raise UnsupportedModelError(
            f"{file.path.name} has layers that predict further tokens, which are not supported; "
            "convert the model without them"
        )
    if meta.get_float(f"{ARCH}.attention.temperature_scale", 0.0):
        raise UnsupportedModelError(
            f"{file.path.name} scales attention by position, which is not supported"
        )


def read_latent(file: GGUFFile, hp: Hparams) -> Latent:
    """Read the widths of latent attention and check them against each other.

    Raises:
        ModelFileError: they do not agree.
    """
    meta, name = file.metadata, file.path.name
    n_lora_kv = meta.get_int(f"{ARCH}.attention.kv_lora_rank", low=1, high=MAX_WIDTH)
    direct = "blk.0.attn_q.weight" in file.tensors
    n_lora_q = (
        None if direct else meta.get_int(f"{ARCH}.attention.q_lora_rank", low=1, high=MAX_WIDTH)
    )
    absorbed = f"{ARCH}.attention.key_length_mla" in meta
    n_k, n_v, n_rot = hp.n_embd_head_k, hp.n_embd_head_v, hp.rope.n_rot
    if absorbed:
        if (hp.n_head_kv, n_k, n_v) != (1, n_lora_kv + n_rot, n_lora_kv):
            raise ModelFileError(
                f"{name} has {hp.n_head_kv} key heads of {n_k} and values of {n_v}; latents of "
                f"{n_lora_kv} with {n_rot} rotated values mean 1 of {n_lora_kv + n_rot} and "
                f"{n_lora_kv}"
            )
        n_k = meta.get_int(f"{ARCH}.attention.key_length_mla", low=1, high=MAX_WIDTH)
        n_v = meta.get_int(f"{ARCH}.attention.value_length_mla", low=1, high=MAX_WIDTH)
    elif hp.n_head_kv != hp.n_head:
        raise ModelFileError(
            f"{name} has {hp.n_head} query heads and {hp.n_head_kv} KV heads; unfolded latents "
            "need as many of each"
        )
    if n_rot >= n_k:
        raise ModelFileError(f"{name} rotates {n_rot} of {n_k} values per head; some must stay")
    return Latent(
        n_lora_q=n_lora_q, n_lora_kv=n_lora_kv, n_head_nope=n_k - n_rot, n_head_v=n_v,
        absorbed=absorbed,
    )  # fmt: skip


def read_routing(file: GGUFFile) -> moe.Routing:
    """Read how scores become weights; files older than the key use a softmax.

    Raises:
        UnsupportedModelError: the header asks for another function.
    """
    meta = file.metadata
    number = meta.get_int(f"{ARCH}.expert_gating_func", 0, low=0, high=1 << 16) or 1
    if number not in GATING:
        raise UnsupportedModelError(
            f"{file.path.name} has expert gating function {number}; 1 (softmax) and 2 (sigmoid) "
            "are supported"
        )
    return moe.Routing(
        gating=GATING[number],
        norm_w=meta.get_bool(f"{ARCH}.expert_weights_norm", False),
        w_scale=meta.get_float(f"{ARCH}.expert_weights_scale", 0.0),
        selection_bias="exp_probs_b",
    )


def scale_attention(file: GGUFFile, rope: Rope, n_embd_head: int) -> tuple[Rope, float]:
    """Work out YaRN's factors: one inside the rotation, one on the products.

    In single precision and in llama.cpp's order, for its bits: with a logarithmic multiplier
    rotations keep their magnitude and the products take its square instead. Source:
    llama-context.cpp (yarn_attn_factor), deepseek2.cpp (kq_scale).

    Returns:
        Rope with `attn_factor` set, and the factor on the products.

    Raises:
        ModelFileError: a number is far from any model's.
    """
    f32, tenth, one = np.float32, np.float32(0.1), np.float32(1.0)
    log_mul = file.metadata.get_float(f"{ARCH}.rope.scaling.yarn_log_multiplier", 0.0)
    if abs(log_mul) > MAX_LOG_MUL:
        raise ModelFileError(
            f"{file.path.name} has a YaRN multiplier of {log_mul:g}, above {MAX_LOG_MUL:g}"
        )
    log = stretch_log(rope.freq_scale)
    if log_mul and rope.ext_factor:
        given = file.metadata.get_float(f"{ARCH}.rope.scaling.attn_factor", 1.0)
        factor = given * yarn_attn_factor(rope.freq_scale, kept=True)
        rope = dataclasses.replace(rope, attn_factor=factor)
    with np.errstate(over="ignore"):
        magnitude = f32(rope.attn_factor) * (one + tenth * log)
        magnitude *= one + tenth * (f32(log_mul) / tenth) * log
        scale = magnitude * magnitude / f32(math.sqrt(n_embd_head))
    if not (np.isfinite(scale) and scale > 0):
        raise ModelFileError(f"{file.path.name} scales the products of attention by {scale}")
    return rope, float(scale)
