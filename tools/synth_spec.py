"""Shapes of the synthetic models: every supported architecture and what its header says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthLatent:
    """Widths of DeepSeek's latent attention, in place of `n_embd_head`.

    Attributes:
        n_lora_q: width of compressed queries; None where they are projected at once, which
            llama.cpp expects of 26 or 27 layers only.
        n_nope, n_rot: values of a head without and with a position.
        absorbed: whether the file has split projections, so that only latents are cached.
    """

    n_lora_q: int | None = 256
    n_lora_kv: int = 256
    n_nope: int = 128
    n_rot: int = 64
    n_head_v: int = 128
    absorbed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """The shape of one synthetic model, in ggml's names.

    The default widths are multiples of 256, so that any block type fits.
    """

    arch: str
    weight_type: str = "F32"
    seed: int = 1
    n_vocab: int = 384
    n_ctx: int = 2048
    n_layer: int = 3
    n_embd: int = 256
    n_ff: int = 512
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 64
    rms_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_base_swa: float | None = None
    rope_scaling: str | None = None
    """`linear`, `yarn` or None, with `rope_factor`."""
    rope_factor: float = 4.0
    yarn_log_mul: float = 0.0
    """A tenth of DeepSeek's `mscale_all_dim`."""
    rope_freqs: bool = False
    """Whether Llama 3's per-frequency factors are stored as a tensor."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    sliding_window: int | None = None
    tied: bool = False
    """Whether the output matrix is the token embedding."""
    vocab: str = "bpe"
    pre: str = "smollm"
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 256
    n_ff_shexp: int = 0
    """Width of the shared expert beside the routed ones; 0 for none."""
    n_expert_shared: int = 0
    """Shared experts given as a count of routed ones, not by `n_ff_shexp`."""
    expert_type: str | None = None
    """Type of the routed experts where it is not `weight_type`."""
    n_layer_dense_lead: int = 0
    expert_weights_scale: float | None = None
    sigmoid_gate: bool = False
    """DeepSeek-V3's gate: sigmoids, a bias for the choice only, normalised weights."""
    qk_norm_whole: bool = False
    """Whether `qk_norm` covers all heads of a token at once."""
    latent: SynthLatent | None = None


_GEMMA3: Final = SynthSpec(
    arch="gemma3",
    n_layer=7,
    n_head_kv=1,
    n_embd_head=128,
    rms_eps=1e-6,
    rope_base=1e6,
    rope_base_swa=10000.0,
    qk_norm=True,
    post_norm=True,
    sliding_window=32,
    tied=True,
    vocab="spm",
)
_LLAMA: Final = SynthSpec(arch="llama")
_MIXTRAL: Final = replace(_LLAMA, n_layer=2, n_expert=8, n_expert_used=2, n_ff=256)

_DEEPSEEK2: Final = SynthSpec(
    arch="deepseek2",
    n_head_kv=1,
    rope_scaling="yarn",
    rope_factor=40.0,
    yarn_log_mul=0.0707,
    n_expert=12,
    n_expert_used=4,
    n_expert_shared=2,
    n_layer_dense_lead=1,
    expert_weights_scale=1.5,
    latent=SynthLatent(),
)

ARCHITECTURES: Final[Mapping[str, SynthSpec]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "llama-rope-freqs": replace(_LLAMA, rope_freqs=True, rope_base=500000.0),
        "llama-linear": replace(_LLAMA, rope_scaling="linear"),
        "llama-yarn": replace(_LLAMA, rope_scaling="yarn"),
        "llama-bias": replace(_LLAMA, qkv_bias=True, out_bias=True, tied=True),
        "qwen2": SynthSpec(arch="qwen2", rope_base=1e6, rms_eps=1e-6, qkv_bias=True, pre="qwen2"),
        "qwen3": SynthSpec(
            arch="qwen3",
            n_embd_head=128,
            rope_base=1e6,
            rms_eps=1e-6,
            qk_norm=True,
            tied=True,
            pre="qwen2",
        ),
        "gemma3": _GEMMA3,
        "gemma3-linear": replace(_GEMMA3, rope_scaling="linear", rope_factor=8.0),
        "llama-moe": _MIXTRAL,
        "llama-moe-one": replace(_MIXTRAL, n_expert_used=1),
        "qwen2moe": SynthSpec(
            arch="qwen2moe",
            n_layer=2,
            rope_base=1e6,
            rms_eps=1e-6,
            qkv_bias=True,
            n_expert=12,
            n_expert_used=4,
            n_ff_shexp=512,
            pre="qwen2",
        ),
        "qwen3moe": SynthSpec(
            arch="qwen3moe",
            n_layer=2,
            n_embd_head=128,
            rope_base=1e6,
            rms_eps=1e-6,
            qk_norm=True,
            n_expert=16,
            n_expert_used=8,
            pre="qwen2",
        ),
        "olmoe": SynthSpec(
            arch="olmoe",
            n_layer=2,
            n_head_kv=4,
            qk_norm=True,
            qk_norm_whole=True,
            n_expert=16,
            n_expert_used=3,
            n_ff=256,
        ),
        "gpt-oss": SynthSpec(
            arch="gpt-oss",
            n_head=8,
            rope_base=150000.0,
            rope_scaling="yarn",
            rope_factor=32.0,
            qkv_bias=True,
            out_bias=True,
            sliding_window=32,
            n_expert=12,
            n_expert_used=4,
        ),
        "deepseek": SynthSpec(
            arch="deepseek",
            n_layer=2,
            n_head_kv=4,
            n_expert=16,
            n_expert_used=6,
            n_expert_shared=2,
            n_layer_dense_lead=1,
        ),
        "deepseek2": _DEEPSEEK2,
        "deepseek2-heads": replace(_DEEPSEEK2, n_head_kv=4, latent=SynthLatent(absorbed=False)),
    }
)
"""Every supported architecture and the variants of it that change the arithmetic."""
