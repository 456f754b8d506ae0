"""What every architecture has: hyperparameters from the file, and the shape of a family.

Hyperparameters are facts of the model; settings of a run live elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from edgeroute.runtime.errors import ModelFileError, UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.weights import TensorSpec

if TYPE_CHECKING:
    from edgeroute.models.moe import Routing

MAX_LAYERS, MAX_WIDTH, MAX_HEADS, MAX_CTX = 1024, 1 << 20, 4096, 1 << 24
MIN_STRETCH, MAX_STRETCH = 1e-3, 1e6  # times that rotary positions are drawn out
MAX_EXPERTS = 1024  # Source: llama-hparams.h, LLAMA_MAX_EXPERTS
SHARES_N_FF = frozenset({"qwen2moe", "qwen3moe"})
"""Where a file names no width of an expert, the chosen ones have n_ff together; else each has.
Source: llama.cpp, load_arch_tensors of these architectures."""
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
class MoeHparams:
    """Counts of a mixture of experts. How scores become weights is the family's `Routing`.

    Attributes:
        n_expert: routed experts per layer.
        n_expert_used: how many of them compute each token, 1 to n_expert.
        n_ff_exp: width of one routed expert.
        n_ff_shexp: width of the shared experts together; 0 where the layer has none.
        n_layer_dense_lead: layers 0 to n - 1 are dense.
    """

    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_ff_shexp: int = 0
    n_layer_dense_lead: int = 0


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
    moe: MoeHparams | None = None
    v_in_k: bool = False
    """Whether values are the first part of the keys, so that only keys are kept."""

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

    def attn_branch(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build what the attention of layer `il` adds to the residual stream `x`.

        Norms included; x and the result F32 [n_embd, n_tokens]. The keys and values enter the
        graph at once, the rest only if the result is used.
        """

    def ffn_branch(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Build what the feed-forward or the experts of layer `il` add to `x`.

        Norms included; x and the result F32 [n_embd, n], n at most n_tokens.
        """

    def head(self, b: Builder, x: Tensor) -> Tensor:
        """Build logits: F32 [n_vocab, n_out]."""


class Rated(NamedTuple):
    """What a router says of every expert, F32 [n_expert, n] each.

    `probs` become the weights of the chosen ones; they are chosen by `ranked`.
    """

    probs: Tensor
    ranked: Tensor


@runtime_checkable
class MoeModel(Model, Protocol):
    """A model whose layers' feed-forward comes apart, so that experts may be paged.

    `ffn_branch` is `combine` of `experts` of `route` of `ffn_input`. A paged forward calls the
    four in graphs of their own, with the same operations in the same order: the same bits.
    `route` is `pick` of `rate`. n is n_tokens, on the last layer n_out; k is n_expert_used.
    """

    routing: "Routing"

    def is_moe(self, il: int) -> bool:
        """Whether layer `il` has experts; other layers only answer the two branches."""

    def ffn_input(self, b: Builder, il: int, x: Tensor) -> Tensor:
        """Normalise the residual stream for the router and the experts: F32 [n_embd, n]."""

    def rate(self, b: Builder, il: int, h: Tensor) -> Rated:
        """Rate the experts of a layer for normed input `h`, F32 [n_embd, n]."""

    def pick(self, b: Builder, rated: Rated) -> tuple[Tensor, Tensor]:
        """Choose experts by what `rate` says of them: see `route`."""

    def route(self, b: Builder, il: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for normed input `h`, F32 [n_embd, n].

        Returns:
            Expert numbers I32 [k, n], best first: a view whose rows lie n_expert apart; and
            their weights F32 [1, k, n].
        """

    def experts(self, b: Builder, il: int, h: Tensor, ids: Tensor, slots: Tensor) -> Tensor:
        """Build the chosen experts' outputs, not weighted yet: F32 [n_embd, k, n].

        Args:
            b: the graph; its weights give the expert tensors, whatever slots they hold.
            il: layer.
            h: F32 [n_embd, 1, n].
            ids: I32 [k, n], true expert numbers; resident per-expert biases go by them.
            slots: I32 [k, n], where the experts are in the weight tensors; `ids` if resident.
        """

    def combine(self, b: Builder, il: int, h: Tensor, outs: Tensor, weights: Tensor) -> Tensor:
        """Weight and sum expert outputs, and add shared experts: F32 [n_embd, n].

        Takes h as `ffn_input` gives it, outs as `experts`, weights as `route`.
        """

    def expert_tensors(self, il: int) -> tuple[str, ...]:
        """Name the 3D tensors of layer `il` whose slices are pages."""


ModelFactory = Callable[[GGUFFile], Model]


def read_hparams(file: GGUFFile, arch: str, *, equal_heads: bool = True) -> Hparams:
    """Read and bound the hyperparameters that all supported families share.

    `equal_heads` demands keys and values of one width, which most families take for granted.

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
    moe = read_moe(file, arch)
    n_ff = _n_ff(file, arch, n_layer, moe)
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
    if equal_heads and n_embd_head_k != n_embd_head_v:
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
        tied="output.weight" not in file.tensors, moe=moe,
    )  # fmt: skip


def read_moe(file: GGUFFile, arch: str) -> MoeHparams | None:
    """Read and bound the counts of a mixture of experts; None for a dense model.

    Raises:
        ModelFileError: a count is out of bounds.
        UnsupportedModelError: experts are routed in groups, or stored one tensor each.
    """
    meta = file.metadata
    n_expert = meta.get_int(f"{arch}.expert_count", 0, low=0, high=MAX_EXPERTS)
    if not n_expert:
        return None
    n_layer = meta.get_int(f"{arch}.block_count", low=1, high=MAX_LAYERS)
    n_used = _same(file, f"{arch}.expert_used_count", n_layer, n_expert)
    n_group = meta.get_int(f"{arch}.expert_group_count", 0, low=0, high=MAX_EXPERTS)
    if n_group > 1:
        raise UnsupportedModelError(
            f"{file.path.name} routes its experts in {n_group} groups; only models that choose "
            "among all experts at once are supported"
        )
    if "blk.0.ffn_gate.0.weight" in file.tensors:
        raise UnsupportedModelError(
            f"{file.path.name} stores every expert as a tensor of its own, the format of early "
            "2024; convert the original model again, or use a newer GGUF of it"
        )
    key = f"{arch}.expert_feed_forward_length"
    if key in meta:
        n_ff_exp = _same(file, key, n_layer, MAX_WIDTH * 8)
    else:
        n_ff = _same(file, f"{arch}.feed_forward_length", n_layer, MAX_WIDTH * 8)
        n_ff_exp = n_ff // n_used if arch in SHARES_N_FF else n_ff
    return MoeHparams(
        n_expert=n_expert, n_expert_used=n_used, n_ff_exp=n_ff_exp,
        n_ff_shexp=meta.get_int(
            f"{arch}.expert_shared_feed_forward_length", 0, low=0, high=MAX_WIDTH * 8
        ),
        n_layer_dense_lead=meta.get_int(
            f"{arch}.leading_dense_block_count", 0, low=0, high=n_layer
        ),
    )  # fmt: skip


def _n_ff(file: GGUFFile, arch: str, n_layer: int, moe: MoeHparams | None) -> int:
    """Read the width of a dense feed-forward; a model of experts alone may name none."""
    key = f"{arch}.feed_forward_length"
    if moe is not None and key not in file.metadata:
        return moe.n_ff_exp
    return _same(file, key, n_layer, MAX_WIDTH * 8)


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
    if factor and not MIN_STRETCH <= factor <= MAX_STRETCH:
        raise ModelFileError(
            f"rope factor of {file.path.name} is {factor:g}, outside {MIN_STRETCH:g} to "
            f"{MAX_STRETCH:g}"
        )
    freq_scale = 1.0 / factor if factor and kind != "none" else 1.0
    ext_factor = 1.0 if kind == "yarn" else 0.0
    return Rope(
        n_rot=n_rot,
        n_ctx_orig=meta.get_int(
            f"{arch}.rope.scaling.original_context_length", n_ctx_train, low=1, high=MAX_CTX
        ),
        freq_base=freq_base, freq_scale=freq_scale, ext_factor=ext_factor,
        attn_factor=attn_factor * (yarn_attn_factor(freq_scale) if ext_factor else 1.0),
        beta_fast=meta.get_float(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.get_float(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    )  # fmt: skip


def read_swa_layers(
    file: GGUFFile, arch: str, n_layer: int, default_period: int
) -> tuple[bool, ...]:
    """Read which layers are windowed: per layer, or every n-th layer is not."""
    key = f"{arch}.attention.sliding_window_pattern"
    meta = file.metadata
    if key in meta and meta.is_array(key):
        flags = meta.get_int_or_array(key, n_layer)
        return tuple(bool(flag) for flag in flags)
    period = meta.get_int(key, default_period, low=0, high=1 << 16)
    return tuple(period == 0 or il % period < period - 1 for il in range(n_layer))


def read_swa_freq_base(file: GGUFFile, arch: str, default: float) -> float:
    """Read the rotary base of windowed layers.

    Raises:
        ModelFileError: it is not a positive number.
    """
    base = file.metadata.get_float(f"{arch}.rope.freq_base_swa", default)
    if not (math.isfinite(base) and base > 0):
        raise ModelFileError(f"{arch}.rope.freq_base_swa is {base}, not a positive number")
    return base


def stretch_log(freq_scale: float) -> np.float32:
    """Logarithm of a context's stretch, in single precision as llama.cpp takes it."""
    return np.float32(math.log(float(np.float32(1.0) / np.float32(freq_scale))))


def yarn_attn_factor(freq_scale: float, *, kept: bool = False) -> float:
    """Undo the magnitude factor that ggml applies by itself for YaRN, then apply it once.

    In single precision and in llama.cpp's order: undone and applied, 1 may be less by a bit.
    `kept` leaves the magnitude undone.
    """
    one, log = np.float32(1.0), stretch_log(freq_scale)
    magnitude = one + np.float32(0.1) * log
    return float((one if kept or log <= 0 else magnitude) * (one / magnitude))
