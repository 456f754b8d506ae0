"""Writes GGUF files of several GB in the shape of real mixture-of-experts models, in seconds.

Every matrix is a mosaic of random blocks drawn from small pools, so that writing is as fast as
the disk and memory stays at one tensor. Expert bytes may be left as holes in the file.

The residual stream has three parts. Its first six eighths hold the token: embeddings and expert
outputs. One eighth holds a constant, the same for every token. The last eighth holds the
context: attention writes there and (almost) nowhere else, so it is a mean over the past and
changes slowly. A gate that reads all three has what the gates of trained models have: experts
that are popular everywhere, experts that are popular in this text, and a choice per token.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final

import click
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType, quants

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.synth_mosaic import MosaicTensor, Region, generator
from edgeroute.tools.synth_vocab import SynthVocab, bpe_vocab
from edgeroute.tools.synth_weights import WEIGHT_TYPES

_N_MERGED: Final = 640  # tokens of the small vocabulary that the large one begins with
_PARTS: Final = 8  # of the residual stream: six for the token, one constant, one for the context
_BRANCH_POWER: Final = 0.2
"""Power that one layer's experts add to a token part that begins with 1."""
_SILU_POWER: Final = 0.356
"""E[silu(g)^2] E[u^2] for independent standard normal g and u."""

_CONTEXT_POWER: Final = 0.1
"""Power that one layer's attention adds to the context part."""
_REACH: Final = 48.0
_NEAR_SCORE: Final = 5.0
"""Attention score at distance 0; it falls to 0 over about _REACH tokens."""
_EMBD_TYPE: Final = "Q4_0"
"""Type of the embedding always. Random blocks of a type with minima have means, which those of
the matrices that read the stream would answer to, and no deviation would be the wanted one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How the three parts of the stream count in an expert's score, as standard deviations.

    `popularity` falls with the logarithm of the rank, as Zipf's law has it.
    """

    popularity: float
    context: float
    token: float


GATES: Final[Mapping[str, Gate]] = MappingProxyType(
    {
        "skewed": Gate(popularity=0.9, context=1.2, token=0.8),
        "uniform": Gate(popularity=0.0, context=0.0, token=1.6),
    }
)
"""`skewed` routes with the locality of Qwen3-30B-A3B, `uniform` almost without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeSpec:
    """The shape of one large model, in ggml's names.

    `gate_mass` is the sum of the chosen experts' weights, about; 1 where they are normalised.
    """

    arch: str
    pre: str
    n_vocab: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_ff_exp: int
    n_head: int
    n_head_kv: int
    n_expert: int
    n_expert_used: int
    rope_base: float
    rms_eps: float
    qk_norm_width: str
    """`head`, or `all` heads together."""
    gate_mass: float = 1.0
    n_embd_head: int = 128
    n_ctx: int = 4096
    weight_type: str = "Q4_K"
    gate: Gate = GATES["skewed"]
    seed: int = 1

    @property
    def part(self) -> int:
        """Width of an eighth of the residual stream."""
        return self.n_embd // _PARTS


SHAPES: Final[Mapping[str, LargeSpec]] = MappingProxyType({
    "qwen3-30b-a3b": LargeSpec(
        arch="qwen3moe", pre="qwen2", n_vocab=151936, n_layer=48, n_embd=2048, n_ff=6144,
        n_ff_exp=768, n_head=32, n_head_kv=4, n_expert=128, n_expert_used=8, rope_base=1e6,
        rms_eps=1e-6, qk_norm_width="head",
    ),
    "olmoe": LargeSpec(
        arch="olmoe", pre="olmo", n_vocab=50304, n_layer=16, n_embd=2048, n_ff=1024,
        n_ff_exp=1024, n_head=16, n_head_kv=16, n_expert=64, n_expert_used=8, rope_base=10000.0,
        rms_eps=1e-5, qk_norm_width="all", gate_mass=0.6,
    ),
})  # fmt: skip
"""The published shapes; `n_layer` may be cut, everything else is as the models have it."""


def write_large(spec: LargeSpec, path: Path, *, sparse: bool = False) -> None:
    """Write the model that `spec` describes; memory stays at one layer's largest tensor.

    Args:
        spec: the shape.
        path: the file; replaced if it exists.
        sparse: leave the experts' bytes as a hole in the file: they read as zeros, take no
            room on disks that support holes, and every expert answers with zero.

    Raises:
        UsageError: a type or width that does not fit.
        OSError: no room on the disk.
    """
    _check(spec)
    with contextlib.closing(GGUFWriter(path, spec.arch)) as writer:
        _add_hparams(spec, writer)
        vocab = _vocab(spec)
        vocab.write(writer)
        tensors = list(_tensors(spec, vocab.ending_ids()))
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32),
                                   tensor.nbytes, raw_dtype=tensor.qtype)  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        _write_data(writer, writer.fout[0], tensors, sparse)


def _write_data(
    writer: GGUFWriter, out: IO[bytes], tensors: Sequence[MosaicTensor], sparse: bool
) -> None:
    writer.write_padding(out, out.tell())
    for tensor in tensors:
        if sparse and tensor.is_expert:
            out.seek(tensor.nbytes, 1)
        else:
            for rows in tensor.rows():
                out.write(rows.data)
        writer.write_padding(out, tensor.nbytes)
    out.truncate()  # a hole at the end is a part of the file only from here on


def _check(spec: LargeSpec) -> None:
    if spec.weight_type not in WEIGHT_TYPES:
        types = ", ".join(WEIGHT_TYPES)
        raise UsageError(f"unknown weight type {spec.weight_type!r}; choose from {types}")
    block_size = GGML_QUANT_SIZES[GGMLQuantizationType[spec.weight_type]][0]
    widths = {"n_embd / 8": spec.part, "n_ff_exp": spec.n_ff_exp,
              "n_head * n_embd_head": spec.n_head * spec.n_embd_head}  # fmt: skip
    for what, width in widths.items():
        if width % block_size or not width:
            raise UsageError(f"{what} is {width}; {spec.weight_type} needs a multiple of "
                             f"{block_size}")  # fmt: skip
    if spec.n_vocab < _N_MERGED:
        raise UsageError(f"n_vocab is {spec.n_vocab}; the least is {_N_MERGED}")


def _add_hparams(spec: LargeSpec, writer: GGUFWriter) -> None:
    writer.add_name(f"synthetic {spec.arch}, {spec.n_layer} layers")
    writer.add_context_length(spec.n_ctx)
    writer.add_embedding_length(spec.n_embd)
    writer.add_block_count(spec.n_layer)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_expert_feed_forward_length(spec.n_ff_exp)
    writer.add_expert_count(spec.n_expert)
    writer.add_expert_used_count(spec.n_expert_used)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head_kv)
    writer.add_key_length(spec.n_embd_head)
    writer.add_value_length(spec.n_embd_head)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(spec.rope_base)


def _vocab(spec: LargeSpec) -> SynthVocab:
    """Return a small vocabulary filled up with words that no merge makes.

    Ordinary words, because llama.cpp searches every text for every control token.
    """
    small = bpe_vocab(_N_MERGED, spec.pre)
    more = range(spec.n_vocab - _N_MERGED)
    return replace(
        small,
        tokens=small.tokens + [f"Ġw{i:06d}" for i in more],
        token_types=small.token_types + [int(TokenType.NORMAL)] * len(more),
    )


def _tensors(spec: LargeSpec, ending_ids: Sequence[int]) -> Iterator[MosaicTensor]:
    """Yield every tensor in file order."""
    token_embd = _matrix(replace(spec, weight_type=_EMBD_TYPE), "token_embd",
                         [Region(width=spec.n_vocab)], _stream_columns(spec))  # fmt: skip
    yield token_embd
    yield _ones("output_norm", spec.n_embd)
    # Read through the token part alone: through the others, one token would always win.
    quiet = Region(width=spec.part, std=0.02)
    heads = (*[Region(width=spec.part)] * (_PARTS - 2), quiet, quiet)
    output = _matrix(spec, "output", [Region(width=spec.n_vocab, std=2 / sqrt(spec.n_embd))], heads)
    # Random answers would end by chance, on another CPU's rounding elsewhere.
    yield replace(output, zeroed=tuple(ending_ids))
    constant = _constant(token_embd)
    for il in range(spec.n_layer):
        yield from _attention(spec, f"blk.{il}")
        yield _ones(f"blk.{il}.ffn_norm", spec.n_embd)
        yield _gate(spec, il, constant)
        yield from _experts(spec, f"blk.{il}")


def _stream_columns(spec: LargeSpec) -> tuple[Region, ...]:
    """Columns of an embedding: the token's own, the same constant for all, nothing yet."""
    token, constant = Region(width=spec.part), Region(width=spec.part, alike=True)
    return (*[token] * (_PARTS - 2), constant, Region(width=spec.part, std=0.02))


def _stream_rows(spec: LargeSpec, token: float, context: float) -> tuple[Region, ...]:
    """Rows of a matrix that writes to the stream; the constant stays as it is."""
    return (
        Region(width=(_PARTS - 2) * spec.part, std=token),
        Region(width=spec.part, std=0.0),
        Region(width=spec.part, std=context),
    )


def _attention(spec: LargeSpec, layer: str) -> Iterator[MosaicTensor]:
    """Yield an attention that averages over the last tokens, whatever they are.

    Queries and keys answer to the constant part alone and are alike, so that a score depends
    on the distance only; values read the token part.
    """
    n_q, n_kv = spec.n_head * spec.n_embd_head, spec.n_head_kv * spec.n_embd_head
    std = 1 / sqrt(spec.n_embd)
    token, silent = Region(width=spec.part), Region(width=spec.part, std=0.02)
    value = (*[token] * (_PARTS - 2), silent, silent)
    deaf = Region(width=spec.part, std=0.002)
    fixed = (*[deaf] * (_PARTS - 2), Region(width=spec.part, alike=True), deaf)
    weights, n_seen = _distance_norm(spec)
    yield _ones(f"{layer}.attn_norm", spec.n_embd)
    for part, n_out, columns in (("q", n_q, fixed), ("k", n_kv, fixed), ("v", n_kv, value)):
        outs = [Region(width=n_out, std=std)]
        yield _matrix(spec, f"{layer}.attn_{part}", outs, columns)
        if part != "v":
            n_heads = 1 if spec.qk_norm_width == "head" else n_out // spec.n_embd_head
            yield _vector(f"{layer}.attn_{part}_norm", np.tile(weights, n_heads))
    context = sqrt(_CONTEXT_POWER * n_seen / n_q)
    outs = list(_stream_rows(spec, token=0.1 * context, context=context))
    yield _matrix(spec, f"{layer}.attn_output", outs, [Region(width=n_q)])


def _distance_norm(spec: LargeSpec) -> tuple[npt.NDArray[np.float32], float]:
    """Return a norm of queries and keys by which nearer tokens count more.

    Only rotary frequencies whose periods are of the reach's order are let through: their
    cosines agree at distance 0 and cancel far away.

    Returns:
        F32 (n_embd_head), and over how many tokens the average then goes.
    """
    half = spec.n_embd_head // 2
    frequencies = spec.rope_base ** (-np.arange(half) / half)
    band = (frequencies <= 16 / _REACH) & (frequencies >= 0.5 / _REACH)
    power = _NEAR_SCORE * sqrt(spec.n_embd_head) / (2 * band.sum())
    weights = np.tile(np.where(band, sqrt(power), 0.0), 2).astype(np.float32)
    distances = np.arange(256)[:, None] * frequencies[band]
    shares = np.exp(_NEAR_SCORE * np.cos(distances).mean(axis=1))
    shares /= shares.sum()
    return weights, float(1 / (shares @ shares))


def _experts(spec: LargeSpec, layer: str) -> Iterator[MosaicTensor]:
    columns = [Region(width=spec.part)] * _PARTS
    outs = [Region(width=spec.n_ff_exp, std=1 / sqrt(spec.n_embd))]
    # A sum of n_expert_used independent answers with equal weights of gate_mass / n_expert_used.
    gain = sqrt(_BRANCH_POWER * spec.n_expert_used / _SILU_POWER) / spec.gate_mass
    down = _stream_rows(spec, token=gain / sqrt(spec.n_ff_exp), context=0.0)
    yield _matrix(spec, f"{layer}.ffn_gate_exps", outs, columns, n_expert=spec.n_expert)
    yield _matrix(spec, f"{layer}.ffn_up_exps", outs, columns, n_expert=spec.n_expert)
    yield _matrix(spec, f"{layer}.ffn_down_exps", down, [Region(width=spec.n_ff_exp)],
                  n_expert=spec.n_expert)  # fmt: skip


def _gate(spec: LargeSpec, il: int, constant: npt.NDArray[np.float32]) -> MosaicTensor:
    """Return a layer's gate, F32 [n_embd, n_expert]: scores of the wanted deviations."""
    name = f"blk.{il}.ffn_gate_inp.weight"
    rng = generator(name, spec.seed)
    n_token, part = (_PARTS - 2) * spec.part, spec.part
    token_power = 1 + _BRANCH_POWER * il
    # What the norm divides by, from the powers of the three parts; the context's is small.
    rms = sqrt(((_PARTS - 2) * token_power + 1 + _context_power(il)) / _PARTS)
    gate = np.empty((spec.n_expert, spec.n_embd), np.float32)
    popularity = -np.log(1.0 + rng.permutation(spec.n_expert))
    popularity = (popularity - popularity.mean()) / popularity.std() * spec.gate.popularity * rms
    gate[:, :n_token] = rng.standard_normal((spec.n_expert, n_token)) * (
        spec.gate.token * rms / sqrt(n_token * token_power)
    )
    gate[:, n_token : n_token + part] = np.outer(popularity, constant) / (constant @ constant)
    gate[:, n_token + part :] = rng.standard_normal((spec.n_expert, part)) * (
        spec.gate.context * rms / sqrt(part * _context_power(il))
    )
    return MosaicTensor(name=name, shape=gate.shape, qtype=GGMLQuantizationType.F32, seed=spec.seed,
                   ready=gate)  # fmt: skip


def _context_power(il: int) -> float:
    """Power of the context part when layer `il`'s gate reads it: every attention adds to it."""
    return _CONTEXT_POWER * (il + 1)


def _constant(token_embd: MosaicTensor) -> npt.NDArray[np.float32]:
    """Return the constant part of the stream as the embedding holds it, F32 (n_embd / 8)."""
    first = replace(token_embd, outs=(Region(width=1),))
    row = quants.dequantize(next(first.rows()).view(np.uint8), token_embd.qtype).reshape(-1)
    part = row.size // _PARTS
    return row[(_PARTS - 2) * part : (_PARTS - 1) * part].astype(np.float32)


def _matrix(
    spec: LargeSpec,
    stem: str,
    outs: Sequence[Region],
    columns: Sequence[Region],
    *,
    n_expert: int | None = None,
) -> MosaicTensor:
    shape = (sum(out.width for out in outs), sum(column.width for column in columns))
    return MosaicTensor(
        name=f"{stem}.weight",
        shape=shape if n_expert is None else (n_expert, *shape),
        qtype=GGMLQuantizationType[spec.weight_type],
        seed=spec.seed,
        outs=tuple(outs),
        columns=tuple(columns),
    )


def _ones(stem: str, n: int) -> MosaicTensor:
    return _vector(stem, np.ones(n, np.float32))


def _vector(stem: str, values: npt.NDArray[np.float32]) -> MosaicTensor:
    return MosaicTensor(name=f"{stem}.weight", shape=values.shape, qtype=GGMLQuantizationType.F32,
                   seed=0, ready=values)  # fmt: skip


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(1, 1024), help="Default: the model's own.")
@click.option("--gate", default="skewed", show_default=True, type=click.Choice(list(GATES)))
@click.option("--type", "weight_type", default="Q4_K", show_default=True,
              type=click.Choice(list(WEIGHT_TYPES)))  # fmt: skip
@click.option("--vocab", type=click.IntRange(_N_MERGED), help="Default: the model's own.")
@click.option("--sparse", is_flag=True, help="Leave the experts' bytes as holes (zeros).")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
def main(
    shape: str,
    out: Path,
    layers: int | None,
    gate: str,
    weight_type: str,
    vocab: int | None,
    sparse: bool,
    seed: int,
) -> None:
    """Write a random model of a real model's SHAPE to the file OUT."""
    spec = SHAPES[shape]
    spec = replace(
        spec, n_layer=layers or spec.n_layer, n_vocab=vocab or spec.n_vocab, gate=GATES[gate],
        weight_type=weight_type, seed=seed,
    )  # fmt: skip
    write_large(spec, out, sparse=sparse)
    click.echo(f"{out}: {shape}, {spec.n_layer} layers, {weight_type}, {gate} gate, "
               f"{out.stat().st_size} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
