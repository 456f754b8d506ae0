"""Makes tiny random-weight GGUF models of every supported architecture.

The same seed gives the same bytes. llama.cpp loads and decodes every one of them, so they
serve as test subjects wherever two engines are compared.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from types import MappingProxyType
from typing import Final

import click
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, RopeScalingType

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.synth_vocab import bpe_vocab, spm_vocab
from edgeroute.tools.synth_weights import WEIGHT_TYPES, random_vector, random_weight


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
    }
)
"""Every supported architecture and the variants of it that change the arithmetic."""


def make(
    arch: str, path: Path, *, seed: int = 1, weight_type: str = "F32", n_layer: int | None = None
) -> SynthSpec:
    """Write a synthetic model and return its shape.

    Args:
        arch: a key of ARCHITECTURES.
        path: the file to write; replaced if it exists.
        seed: same seed, same bytes.
        weight_type: type of all matrices, one of WEIGHT_TYPES; vectors stay F32.
        n_layer: layers, where the architecture's default is not wanted.

    Raises:
        UsageError: unknown architecture or type, or widths that the type cannot hold.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}")
    spec = replace(ARCHITECTURES[arch], seed=seed, weight_type=weight_type)
    if n_layer is not None:
        spec = replace(spec, n_layer=n_layer)
    write(spec, path)
    return spec


def write(spec: SynthSpec, path: Path) -> None:
    """Write the model that `spec` describes.

    Raises:
        UsageError: unknown weight type, or widths that it cannot hold.
    """
    if spec.weight_type not in WEIGHT_TYPES:
        types = ", ".join(WEIGHT_TYPES)
        raise UsageError(f"unknown weight type {spec.weight_type!r}; choose from {types}")
    _check_rows(spec)
    with contextlib.closing(GGUFWriter(path, spec.arch)) as writer:
        _add_hparams(spec, writer)
        vocab = (
            spm_vocab(spec.n_vocab) if spec.vocab == "spm" else bpe_vocab(spec.n_vocab, spec.pre)
        )
        vocab.write(writer)
        for name, data, qtype in _tensors(spec):
            if name == "output.weight":
                # Random answers would end by chance, on another CPU's rounding elsewhere.
                data[vocab.ending_ids()] = 0
            writer.add_tensor(name, data, raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _check_rows(spec: SynthSpec) -> None:
    qtype = GGMLQuantizationType[spec.weight_type]
    block_size = GGML_QUANT_SIZES[qtype][0]
    rows = {
        "n_embd": spec.n_embd,
        "n_ff": spec.n_ff,
        "n_head * n_embd_head": spec.n_head * spec.n_embd_head,
    }
    for what, size in rows.items():
        if size % block_size:
            raise UsageError(f"{what} is {size}; {qtype.name} needs a multiple of {block_size}")


def _add_hparams(spec: SynthSpec, writer: GGUFWriter) -> None:
    writer.add_name(f"synthetic {spec.arch}")
    writer.add_context_length(spec.n_ctx)
    writer.add_embedding_length(spec.n_embd)
    writer.add_block_count(spec.n_layer)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head_kv)
    writer.add_key_length(spec.n_embd_head)
    writer.add_value_length(spec.n_embd_head)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(spec.rope_base)
    if spec.arch == "llama":
        writer.add_vocab_size(spec.n_vocab)
        writer.add_rope_dimension_count(spec.n_embd_head)
    if spec.rope_base_swa is not None:
        writer.add_float32(f"{spec.arch}.rope.freq_base_swa", spec.rope_base_swa)
    if spec.sliding_window is not None:
        writer.add_sliding_window(spec.sliding_window)
    if spec.rope_scaling is not None:
        writer.add_rope_scaling_type(RopeScalingType(spec.rope_scaling))
        writer.add_rope_scaling_factor(spec.rope_factor)
    if spec.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(spec.n_ctx / spec.rope_factor))


_Tensor = tuple[str, npt.NDArray[np.generic], GGMLQuantizationType]


def _tensors(spec: SynthSpec) -> Iterator[_Tensor]:
    """Yield every tensor in file order."""
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
        yield from _attention(spec, f"blk.{il}")
        yield from _feed_forward(spec, f"blk.{il}")


def _attention(spec: SynthSpec, layer: str) -> Iterator[_Tensor]:
    n_q = spec.n_head * spec.n_embd_head
    n_kv = spec.n_head_kv * spec.n_embd_head
    yield _norm(spec, f"{layer}.attn_norm", spec.n_embd)
    for part, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
        yield _matrix(spec, f"{layer}.attn_{part}", spec.n_embd, n_out)
        if spec.qkv_bias:
            yield _vector(spec, f"{layer}.attn_{part}.bias", n_out, mean=0.0, std=0.1)
        if spec.qk_norm and part != "v":
            yield _norm(spec, f"{layer}.attn_{part}_norm", spec.n_embd_head)
    yield _matrix(spec, f"{layer}.attn_output", n_q, spec.n_embd)
    if spec.out_bias:
        yield _vector(spec, f"{layer}.attn_output.bias", spec.n_embd, mean=0.0, std=0.1)
    if spec.post_norm:
        yield _norm(spec, f"{layer}.post_attention_norm", spec.n_embd)


def _feed_forward(spec: SynthSpec, layer: str) -> Iterator[_Tensor]:
    yield _norm(spec, f"{layer}.ffn_norm", spec.n_embd)
    yield _matrix(spec, f"{layer}.ffn_gate", spec.n_embd, spec.n_ff)
    yield _matrix(spec, f"{layer}.ffn_up", spec.n_embd, spec.n_ff)
    yield _matrix(spec, f"{layer}.ffn_down", spec.n_ff, spec.n_embd)
    if spec.post_norm:
        yield _norm(spec, f"{layer}.post_ffw_norm", spec.n_embd)


def _matrix(
    spec: SynthSpec, stem: str, n_in: int, n_out: int, *, std: float | None = None
) -> _Tensor:
    name = f"{stem}.weight"
    data = random_weight(
        name,
        (n_out, n_in),
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


@click.command()
@click.argument("arch", type=click.Choice(list(ARCHITECTURES)))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--type", "weight_type", default="F32", type=click.Choice(list(WEIGHT_TYPES)))
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
def main(arch: str, out: Path, weight_type: str, seed: int) -> None:
    """Write a tiny random model of architecture ARCH to the file OUT."""
    make(arch, out, seed=seed, weight_type=weight_type)
    click.echo(f"{out}: {arch}, {weight_type}, seed {seed}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
