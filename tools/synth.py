"""Makes tiny random-weight GGUF models of every supported architecture.

The same seed gives the same bytes. llama.cpp loads and decodes every one of them, so they
serve as test subjects wherever two engines are compared.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import click
from gguf import (
    GGML_QUANT_SIZES,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
)

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.synth_spec import ARCHITECTURES, SynthLatent, SynthSpec
from edgeroute.tools.synth_tensors import tensors
from edgeroute.tools.synth_vocab import bpe_vocab, spm_vocab
from edgeroute.tools.synth_weights import WEIGHT_TYPES


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
    for weight_type in (spec.weight_type, spec.expert_type):
        if weight_type is not None and weight_type not in WEIGHT_TYPES:
            types = ", ".join(WEIGHT_TYPES)
            raise UsageError(f"unknown weight type {weight_type!r}; choose from {types}")
    _check_rows(spec)
    with contextlib.closing(GGUFWriter(path, spec.arch)) as writer:
        _add_hparams(spec, writer)
        vocab = (
            spm_vocab(spec.n_vocab) if spec.vocab == "spm" else bpe_vocab(spec.n_vocab, spec.pre)
        )
        vocab.write(writer)
        for name, data, qtype in tensors(spec):
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
        "n_ff_exp": spec.n_ff_exp,
        "n_ff_shexp": spec.n_ff_shexp,
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
    if spec.latent is None:
        writer.add_key_length(spec.n_embd_head)
        writer.add_value_length(spec.n_embd_head)
    else:
        _add_latent(spec.latent, writer)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(spec.rope_base)
    if spec.arch == "llama":
        writer.add_vocab_size(spec.n_vocab)
        writer.add_rope_dimension_count(spec.n_embd_head)
    if spec.n_expert:
        _add_experts(spec, writer)
    if spec.rope_base_swa is not None:
        writer.add_float32(f"{spec.arch}.rope.freq_base_swa", spec.rope_base_swa)
    if spec.sliding_window is not None:
        writer.add_sliding_window(spec.sliding_window)
    if spec.rope_scaling is not None:
        writer.add_rope_scaling_type(RopeScalingType(spec.rope_scaling))
        writer.add_rope_scaling_factor(spec.rope_factor)
    if spec.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(spec.n_ctx / spec.rope_factor))
    if spec.yarn_log_mul:
        writer.add_rope_scaling_yarn_log_mul(spec.yarn_log_mul)


def _add_experts(spec: SynthSpec, writer: GGUFWriter) -> None:
    writer.add_expert_count(spec.n_expert)
    writer.add_expert_used_count(spec.n_expert_used)
    if spec.arch not in ("llama", "olmoe"):  # their experts are as wide as n_ff says
        writer.add_expert_feed_forward_length(spec.n_ff_exp)
    if spec.n_expert_shared:
        writer.add_expert_shared_count(spec.n_expert_shared)
    elif spec.n_ff_shexp:
        writer.add_expert_shared_feed_forward_length(spec.n_ff_shexp)
    if spec.n_layer_dense_lead:
        writer.add_leading_dense_block_count(spec.n_layer_dense_lead)
    if spec.expert_weights_scale is not None:
        writer.add_expert_weights_scale(spec.expert_weights_scale)
    if spec.sigmoid_gate:
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)


def _add_latent(latent: SynthLatent, writer: GGUFWriter) -> None:
    n_head_k = latent.n_nope + latent.n_rot
    if latent.absorbed:
        writer.add_key_length(latent.n_lora_kv + latent.n_rot)
        writer.add_value_length(latent.n_lora_kv)
        writer.add_key_length_mla(n_head_k)
        writer.add_value_length_mla(latent.n_head_v)
    else:
        writer.add_key_length(n_head_k)
        writer.add_value_length(latent.n_head_v)
    if latent.n_lora_q is not None:
        writer.add_q_lora_rank(latent.n_lora_q)
    writer.add_kv_lora_rank(latent.n_lora_kv)
    writer.add_rope_dimension_count(latent.n_rot)


__all__ = ["ARCHITECTURES", "SynthLatent", "SynthSpec", "main", "make", "write"]


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
