"""The tensors of a synthetic model, in file order, with random weights."""

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edgeroute.tools.synth_spec import SynthLatent, SynthSpec
from edgeroute.tools.synth_weights import random_vector, random_weight

_Tensor = tuple[str, npt.NDArray[np.generic], GGMLQuantizationType]


def tensors(spec: SynthSpec) -> Iterator[_Tensor]:
    """Yield every tensor in file order: name, data as GGUFWriter takes it, type."""
    # With rows of 1/sqrt(n_embd) an activation of unit power gives logits of unit power;
    # twice that makes the likeliest token stand out without a degenerate distribution.
    embd_std = (1.0 if spec.tied else 2.0) / sqrt(spec.n_embd)
    yield _matrix(spec, "token_embd", spec.n_embd, spec.n_vocab, std=embd_std)
    yield _norm(spec, "output_norm", spec.n_embd)
    if not spec.tied:
        yield _matrix(spec, "output", spec.n_embd, spec.n_vocab, std=embd_std)
    if spec.rope_freqs:
        yield _rope_freqs(spec)
    for il in range(spec.n_layer):
        if spec.latent is None:
            yield from _attention(spec, f"blk.{il}")
        else:
            yield from _latent_attention(spec, spec.latent, f"blk.{il}")
        yield from _feed_forward(spec, il)


def _attention(spec: SynthSpec, layer: str) -> Iterator[_Tensor]:
    n_q = spec.n_head * spec.n_embd_head
    n_kv = spec.n_head_kv * spec.n_embd_head
    yield _norm(spec, f"{layer}.attn_norm", spec.n_embd)
    for part, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
        yield _matrix(spec, f"{layer}.attn_{part}", spec.n_embd, n_out)
        if spec.qkv_bias:
            yield _vector(spec, f"{layer}.attn_{part}.bias", n_out, mean=0.0, std=0.1)
        if spec.qk_norm and part != "v":
            width = n_out if spec.qk_norm_whole else spec.n_embd_head
            yield _norm(spec, f"{layer}.attn_{part}_norm", width)
    yield _matrix(spec, f"{layer}.attn_output", n_q, spec.n_embd)
    if spec.out_bias:
        yield _vector(spec, f"{layer}.attn_output.bias", spec.n_embd, mean=0.0, std=0.1)
    if spec.arch == "gpt-oss":
        yield _vector(spec, f"{layer}.attn_sinks.weight", spec.n_head, mean=0.0, std=1.0)
    if spec.post_norm:
        yield _norm(spec, f"{layer}.post_attention_norm", spec.n_embd)


def _latent_attention(spec: SynthSpec, latent: SynthLatent, layer: str) -> Iterator[_Tensor]:
    """Yield DeepSeek's projections to a latent, and from it to every head."""
    n_head, n_lora_kv = spec.n_head, latent.n_lora_kv
    n_q = n_head * (latent.n_nope + latent.n_rot)
    yield _norm(spec, f"{layer}.attn_norm", spec.n_embd)
    if latent.n_lora_q is None:
        yield _matrix(spec, f"{layer}.attn_q", spec.n_embd, n_q)
    else:
        yield _matrix(spec, f"{layer}.attn_q_a", spec.n_embd, latent.n_lora_q)
        yield _norm(spec, f"{layer}.attn_q_a_norm", latent.n_lora_q)
        yield _matrix(spec, f"{layer}.attn_q_b", latent.n_lora_q, n_q)
    yield _matrix(spec, f"{layer}.attn_kv_a_mqa", spec.n_embd, n_lora_kv + latent.n_rot)
    yield _norm(spec, f"{layer}.attn_kv_a_norm", n_lora_kv)
    if latent.absorbed:
        fitting = _fitting(spec, latent.n_nope)
        yield _matrix(fitting, f"{layer}.attn_k_b", latent.n_nope, n_lora_kv, n_slice=n_head)
        yield _matrix(spec, f"{layer}.attn_v_b", n_lora_kv, latent.n_head_v, n_slice=n_head)
    else:
        n_kv = n_head * (latent.n_nope + latent.n_head_v)
        yield _matrix(spec, f"{layer}.attn_kv_b", n_lora_kv, n_kv)
    yield _matrix(spec, f"{layer}.attn_output", n_head * latent.n_head_v, spec.n_embd)


def _fitting(spec: SynthSpec, n_in: int) -> SynthSpec:
    """Fall back to F16 for rows that the wanted type cannot hold, as converters do."""
    block_size = GGML_QUANT_SIZES[GGMLQuantizationType[spec.weight_type]][0]
    return replace(spec, weight_type="F16") if n_in % block_size else spec


def _feed_forward(spec: SynthSpec, il: int) -> Iterator[_Tensor]:
    layer = f"blk.{il}"
    name = "post_attention_norm" if spec.arch == "gpt-oss" else "ffn_norm"
    yield _norm(spec, f"{layer}.{name}", spec.n_embd)
    if spec.n_expert and il >= spec.n_layer_dense_lead:
        yield from _experts(spec, layer)
    else:
        yield _matrix(spec, f"{layer}.ffn_gate", spec.n_embd, spec.n_ff)
        yield _matrix(spec, f"{layer}.ffn_up", spec.n_embd, spec.n_ff)
        yield _matrix(spec, f"{layer}.ffn_down", spec.n_ff, spec.n_embd)
    if spec.post_norm:
        yield _norm(spec, f"{layer}.post_ffw_norm", spec.n_embd)


def _experts(spec: SynthSpec, layer: str) -> Iterator[_Tensor]:
    """Yield a router, which stays F32 as in real files, routed experts and a shared one."""
    n, n_embd, n_ff = spec.n_expert, spec.n_embd, spec.n_ff_exp
    yield _matrix(replace(spec, weight_type="F32"), f"{layer}.ffn_gate_inp", n_embd, n)
    routed = replace(spec, weight_type=spec.expert_type or spec.weight_type)
    yield _matrix(routed, f"{layer}.ffn_gate_exps", n_embd, n_ff, n_slice=n)
    yield _matrix(routed, f"{layer}.ffn_up_exps", n_embd, n_ff, n_slice=n)
    yield _matrix(routed, f"{layer}.ffn_down_exps", n_ff, n_embd, n_slice=n)
    if spec.arch == "gpt-oss":
        yield from _expert_biases(spec, layer)
    if spec.sigmoid_gate:
        yield _vector(spec, f"{layer}.exp_probs_b.bias", n, mean=0.0, std=0.1)
    if spec.arch == "qwen2moe":
        name = f"{layer}.ffn_gate_inp_shexp.weight"
        yield _vector(spec, name, n_embd, mean=0.0, std=1.0 / sqrt(n_embd))
    n_ff_shexp = spec.n_ff_shexp or spec.n_expert_shared * n_ff
    if n_ff_shexp:
        yield _matrix(spec, f"{layer}.ffn_gate_shexp", n_embd, n_ff_shexp)
        yield _matrix(spec, f"{layer}.ffn_up_shexp", n_embd, n_ff_shexp)
        yield _matrix(spec, f"{layer}.ffn_down_shexp", n_ff_shexp, n_embd)


def _expert_biases(spec: SynthSpec, layer: str) -> Iterator[_Tensor]:
    """Yield biases of the router and of each expert's matrices, F32 [n_out, n_expert]."""
    n = spec.n_expert
    yield _vector(spec, f"{layer}.ffn_gate_inp.bias", n, mean=0.0, std=0.1)
    for part, width in (("gate", spec.n_ff_exp), ("up", spec.n_ff_exp), ("down", spec.n_embd)):
        name = f"{layer}.ffn_{part}_exps.bias"
        name, data, qtype = _vector(spec, name, n * width, mean=0.0, std=0.1)
        yield name, data.reshape(n, width), qtype


def _matrix(
    spec: SynthSpec, stem: str, n_in: int, n_out: int, *, std: float | None = None,
    n_slice: int | None = None,
) -> _Tensor:  # fmt: skip
    name = f"{stem}.weight"
    data = random_weight(
        name,
        (n_out, n_in) if n_slice is None else (n_slice, n_out, n_in),
        1.0 / sqrt(n_in) if std is None else std,
        weight_type=spec.weight_type,
        seed=spec.seed,
    )
    return name, data, GGMLQuantizationType[spec.weight_type]


def _norm(spec: SynthSpec, stem: str, n: int) -> _Tensor:
    return _vector(spec, f"{stem}.weight", n, mean=1.0, std=0.1)


def _vector(spec: SynthSpec, name: str, n: int, *, mean: float, std: float) -> _Tensor:
    data = random_vector(name, n, mean=mean, std=std, seed=spec.seed)
    return name, data, GGMLQuantizationType.F32


def _rope_freqs(spec: SynthSpec) -> _Tensor:
    """Return Llama 3's divisors of the rope frequencies, F32 [n_embd_head / 2].

    Source: Hugging Face transformers, rope type "llama3": wavelengths above
    n_ctx_old / low_factor are stretched by `factor`, those below n_ctx_old / high_factor
    not at all, those between smoothly.
    """
    factor, low_factor, high_factor, n_ctx_old = 8.0, 1.0, 4.0, spec.n_ctx / 4
    pairs = np.arange(0, spec.n_embd_head, 2, dtype=np.float64)
    wavelength = 2 * np.pi * spec.rope_base ** (pairs / spec.n_embd_head)
    smooth = (n_ctx_old / wavelength - low_factor) / (high_factor - low_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors = 1.0 / ((1.0 - smooth) / factor + smooth)
    return "rope_freqs.weight", divisors.astype(np.float32), GGMLQuantizationType.F32
