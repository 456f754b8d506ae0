"""Makes random LoRA adapters for any base model, as PEFT folders and as GGUF files.

The same spec gives the same numbers whatever the format and type: they are rounded so that
F32, F16 and BF16 all hold them exactly.
"""

import contextlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import click
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, Keys

from edgeroute.models.adapter_data import KIND_BYTES, widen_bf16
from edgeroute.models.adapter_file import BaseShapes, base_shapes
from edgeroute.models.adapter_names import LEAVES, PEFT_PREFIX, heads_to_interleave
from edgeroute.models.adapter_peft import CONFIG_NAME, DATA_NAME
from edgeroute.models.adapter_records import interleave
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile

F32Array = npt.NDArray[np.float32]
Kind = Literal["F16", "F32", "BF16"]

ROUTER: Final = "ffn_gate_inp"
_SMALLEST: Final = 2.0**-17
"""Below it F16's spacing is wider than BF16's, so smaller numbers become zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What to make.

    Attributes:
        targets: ends of stems, such as "attn_q"; None for all linear layers but routers, whose
            choice of experts may flip on a rounding.
        delta: deviation of scale * B A, in units of a weight's usual 1 / sqrt(n_in).
        kind: type of the numbers in the file.
        ranks, alphas: values for modules by PEFT's name or its end, in place of the common ones.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    seed: int = 1
    delta: float = 0.05
    kind: Kind = "F32"
    use_rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    description: str = ""


class MadeTensor(NamedTuple):
    """One pair: stem, PEFT's module, scale, A (rank, n_in), B (n_out, rank) in PEFT's row order."""

    stem: str
    module: str
    scale: float
    a: F32Array
    b: F32Array


def make_peft(folder: Path, base: BaseShapes, spec: AdapterSpec) -> None:
    """Write a PEFT folder; files of the same names are replaced.

    Raises:
        UsageError: the base has no such targets.
    """
    made = list(_tensors(base, spec))
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_config(spec, sorted({each.module.rsplit(".", 1)[-1] for each in made}))
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    matrices = {}
    for each in made:
        matrices[f"{PEFT_PREFIX}{each.module}.lora_A.weight"] = each.a
        matrices[f"{PEFT_PREFIX}{each.module}.lora_B.weight"] = each.b
    metadata = {"format": "pt"} | ({"description": spec.description} if spec.description else {})
    (folder / DATA_NAME).write_bytes(safetensors_bytes(matrices, spec.kind, metadata))


def make_gguf(path: Path, base: BaseShapes, spec: AdapterSpec) -> None:
    """Write the same adapter as `make_peft` does, as llama.cpp's converter would.

    Raises:
        UsageError: the base has no such targets, or scales differ so that no single alpha, all
            that GGUF has, gives them.
    """
    made = list(_tensors(base, spec))
    alphas = {each.scale * each.a.shape[0] for each in made}
    if len(alphas) > 1:
        raise UsageError(
            f"GGUF adapters have one alpha, but this one needs {len(alphas)}; leave alphas out"
        )
    qtype = GGMLQuantizationType[spec.kind]
    with contextlib.closing(GGUFWriter(path, base.arch)) as writer:
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alphas.pop())
        if spec.description:
            writer.add_description(spec.description)
        for each in made:
            n_head = heads_to_interleave(each.stem, base)
            b = interleave(each.b, n_head) if n_head else each.b
            for side, data in (("a", each.a), ("b", b)):
                name = f"{each.stem}.weight.lora_{side}"
                writer.add_tensor(name, _encode(data, spec.kind), raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def peft_config(spec: AdapterSpec, modules: list[str]) -> dict[str, Any]:
    """Return the settings as PEFT saves them."""
    return {
        "alpha_pattern": dict(spec.alphas),
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": spec.alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.ranks),
        "revision": None,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.use_rslora,
    }


def safetensors_bytes(
    matrices: Mapping[str, F32Array], kind: Kind, metadata: Mapping[str, str]
) -> bytes:
    """Return a safetensors file of F32 matrices stored as `kind`, in order of their names."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    chunks, end = [], 0
    for name in sorted(matrices):
        begin, end = end, end + matrices[name].size * KIND_BYTES[kind]
        shape = list(matrices[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        chunks.append(_encode(matrices[name], kind).tobytes())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *chunks])


def _tensors(base: BaseShapes, spec: AdapterSpec) -> Iterator[MadeTensor]:
    modules = {leaf: module for module, leaf in LEAVES[base.arch].items()}
    n_made = 0
    for stem, (n_in, n_out) in base.linears.items():
        _, il, leaf = stem.split(".", 2)
        wanted = leaf != ROUTER if spec.targets is None else leaf in spec.targets
        if not wanted or leaf not in modules:
            continue
        n_made += 1
        module = f"model.layers.{il}.{modules[leaf]}"
        rank = int(_by_end(spec.ranks, module, spec.rank))
        alpha = _by_end(spec.alphas, module, spec.alpha)
        scale = alpha / (math.sqrt(rank) if spec.use_rslora else rank)
        rng = np.random.default_rng((spec.seed, zlib.crc32(stem.encode())))
        a = rng.standard_normal((rank, n_in), dtype=np.float32) / np.float32(math.sqrt(n_in))
        b = rng.standard_normal((n_out, rank), dtype=np.float32)
        b *= np.float32(spec.delta / (abs(scale) * math.sqrt(rank)))
        yield MadeTensor(stem, module, scale, _rounded(a), _rounded(b))
    if not n_made:
        raise UsageError(f"the {base.arch} model has no linear layers named {spec.targets}")


def _by_end(values: Mapping[str, float], module: str, default: float) -> float:
    fitting = (value for key, value in values.items() if f".{module}".endswith(f".{key}"))
    return next(fitting, default)


def _rounded(x: F32Array) -> F32Array:
    """Round to numbers that all three types hold."""
    kept = np.where(np.abs(x) < _SMALLEST, np.float32(0), x)
    return widen_bf16(_bf16(kept).view(np.uint8)).reshape(x.shape)


def _bf16(x: F32Array) -> npt.NDArray[np.uint16]:
    """Return the upper halves of F32 numbers, rounded to nearest even."""
    bits = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def _encode(x: F32Array, kind: Kind) -> npt.NDArray[Any]:
    """Return numbers as a file of type `kind` stores them; BF16 as bytes (rows, 2 * columns)."""
    if kind == "BF16":
        return _bf16(x).view(np.uint8).reshape(x.shape[0], -1)
    return x if kind == "F32" else x.astype(np.float16)


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 512))
@click.option("--alpha", default=16.0, show_default=True)
@click.option("--type", "kind", default="F32", type=click.Choice(list(KIND_BYTES)))
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
def main(model: Path, out: Path, rank: int, alpha: float, kind: Kind, seed: int) -> None:
    """Write a random adapter for the GGUF file MODEL: to OUT.gguf, or as a PEFT folder OUT."""
    with GGUFFile.open(model) as file:
        base = base_shapes(describe(file))
    make = make_gguf if out.suffix == ".gguf" else make_peft
    make(out, base, AdapterSpec(rank=rank, alpha=alpha, kind=kind, seed=seed))
    click.echo(f"{out}: for {base.arch}, rank {rank}, alpha {alpha:g}, {kind}, seed {seed}")


if __name__ == "__main__":
    main()
