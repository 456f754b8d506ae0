"""What every architecture has: hyperparameters from the file, and the shape of a family.

Hyperparameters are facts of the model; settings of a run live elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edgeroute.runtime.errors import ModelFileError, UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec

MAX_LAYERS, MAX_WIDTH, MAX_HEADS, MAX_CTX = 1024, 1 << 20, 4096, 1 << 24
"""Bounds on what a header may claim: far above any model, far below any overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding, as ggml_rope_ext takes it."""

    n_rot: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hparams:
    """Model facts read from GGUF, under ggml's names."""

    arch: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_ff: int
    n_ctx_train: int
    norm_rms_eps: float
    rope: Rope
    tied: bool

    @property
    def n_embd_k_gqa(self) -> int:
        """Width of all keys of one token."""
        return self.n_embd_head_k * self.n_head_kv

    @property
    def n_embd_v_gqa(self) -> int:
        """Width of all values of one token."""
        return self.n_embd_head_v * self.n_head_kv


class Model(Protocol):
    """One architecture with one file's hyperparameters. Pure description: it owns nothing."""

    hparams: Hparams
    n_swa: int | None

    def specs(self) -> list[TensorSpec]:
        """List every tensor, with the extents the hyperparameters imply."""

    def embed(self, b: Builder) -> Tensor:
        """Build token embeddings: F32 [n_embd, n_tokens]."""

    def layer(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build layer `il` on the residual stream: F32 [n_embd, n_tokens or n_out]."""

    def head(self, b: Builder, x: Tensor) -> Tensor:
        """Build logits: F32 [n_vocab, n_out]."""


ModelFactory = Callable[[GGUFFile], Model]


def read_hparams(file: GGUFFile, arch: str) -> Hparams:
    """Read and bound the hyperparameters that all supported families share.

    Raises:
        ModelFileError: a key is missing, has another type, or is out of bounds.
        UnsupportedModelError: the header asks for something this version has not.
    """
    meta = file.metadata
    n_layer = meta.get_int(f"{arch}.block_count", low=1, high=MAX_LAYERS)
    n_embd = meta.get_int(f"{arch}.embedding_length", low=1, high=MAX_WIDTH)
    n_head = _same(file, f"{arch}.attention.head_count", n_layer, MAX_HEADS)
    kv_key = f"{arch}.attention.head_count_kv"
    n_head_kv = _same(file, kv_key, n_layer, MAX_HEADS) if kv_key in meta else n_head
    n_ff = _same(file, f"{arch}.feed_forward_length", n_layer, MAX_WIDTH * 8)
    default_head = n_embd // n_head
    n_embd_head_k = meta.get_int(
        f"{arch}.attention.key_length", default_head, low=1, high=MAX_WIDTH
    )
    n_embd_head_v = meta.get_int(
        f"{arch}.attention.value_length", default_head, low=1, high=MAX_WIDTH
    )
    if n_head % n_head_kv:
        raise ModelFileError(
            f"{file.path.name} has {n_head} query heads, not a multiple of its {n_head_kv} KV heads"
        )
    if n_embd_head_k != n_embd_head_v:
        raise UnsupportedModelError(
            f"{file.path.name} has keys of width {n_embd_head_k} and values of width "
            f"{n_embd_head_v}; {arch} models with equal widths are supported"
        )
    eps = meta.get_float(f"{arch}.attention.layer_norm_rms_epsilon")
    if not 0 < eps < 1:
        raise ModelFileError(f"{arch}.attention.layer_norm_rms_epsilon is {eps}, not in (0, 1)")
    return Hparams(
        arch=arch, n_vocab=_n_vocab(file), n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        n_head_kv=n_head_kv, n_embd_head_k=n_embd_head_k, n_embd_head_v=n_embd_head_v, n_ff=n_ff,
        n_ctx_train=meta.get_int(f"{arch}.context_length", low=1, high=MAX_CTX),
        norm_rms_eps=eps, rope=read_rope(file, arch, n_embd_head_k),
        tied="output.weight" not in file.tensors,
    )  # fmt: skip


def _n_vocab(file: GGUFFile) -> int:
    """Take the vocabulary size from the embedding itself; the tokenizer must agree."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.ne) < 2:
        raise ModelFileError(f"{file.path.name} has no tensor token_embd.weight with two extents")
    n_vocab = embedding.ne[1]
    if "tokenizer.ggml.tokens" in file.metadata:
        n_tokens = file.metadata.array_len("tokenizer.ggml.tokens")
        if n_tokens != n_vocab:
            raise ModelFileError(
                f"{file.path.name} has {n_tokens} tokens but embeddings for {n_vocab}"
            )
    return n_vocab


def _same(file: GGUFFile, key: str, n_layer: int, high: int) -> int:
    """Read a count that may be given per layer, as long as all layers agree."""
    values = set(file.metadata.get_int_or_array(key, n_layer))
    if len(values) != 1:
        raise UnsupportedModelError(f"{key} differs between layers in {file.path.name}; "
                                    "models of equal layers are supported")  # fmt: skip
    value = values.pop()
    if not 1 <= value <= high:
        raise ModelFileError(f"{key} is {value}, outside 1 to {high}")
    return value


def read_rope(file: GGUFFile, arch: str, n_embd_head: int) -> Rope:
    """Read rotary settings, with the scaling that the header asks for.

    Source: llama.cpp's defaults (llama-model.cpp, load_hparams) and its YaRN attention
    factor (llama-context.cpp), so that both compute the same rotations.
    """
    meta = file.metadata
    n_ctx_train = meta.get_int(f"{arch}.context_length", low=1, high=MAX_CTX)
    kind = meta.get_str(f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported (none, linear, yarn are)"
        )
    n_rot = meta.get_int(f"{arch}.rope.dimension_count", n_embd_head, low=2, high=n_embd_head)
    if n_rot % 2:
        raise ModelFileError(f"{arch}.rope.dimension_count is {n_rot}, but must be even")
    factor = meta.get_float(f"{arch}.rope.scaling.factor", None)
    if factor is None:
        factor = meta.get_float(f"{arch}.rope.scale_linear", 0.0)
    freq_base = meta.get_float(f"{arch}.rope.freq_base", 10000.0)
    attn_factor = meta.get_float(f"{arch}.rope.scaling.attn_factor", 1.0)
    for name, value in (
        ("freq_base", freq_base),
        ("factor", factor or 1.0),
        ("attn_factor", attn_factor),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ModelFileError(
                f"rope {name} of {file.path.name} is {value}, not a positive number"
            )
    freq_scale = 1.0 / factor if factor and kind != "none" else 1.0
    ext_factor = 1.0 if kind == "yarn" else 0.0
    return Rope(
        n_rot=n_rot,
        n_ctx_orig=meta.get_int(
            f"{arch}.rope.scaling.original_context_length", n_ctx_train, low=1, high=MAX_CTX
        ),
        freq_base=freq_base, freq_scale=freq_scale, ext_factor=ext_factor,
        attn_factor=attn_factor * (_yarn_attn_factor(freq_scale) if ext_factor else 1.0),
        beta_fast=meta.get_float(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.get_float(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    )  # fmt: skip


def _yarn_attn_factor(freq_scale: float) -> float:
    """Undo the magnitude factor that ggml applies by itself for YaRN, then apply it once."""
    factor = 1.0 / freq_scale
    mscale = 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0
    return mscale / (1.0 + 0.1 * math.log(factor))
