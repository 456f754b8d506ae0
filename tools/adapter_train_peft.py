"""Writes a trained adapter as the folder that Hugging Face PEFT loads, whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from edgeroute.models.base import Hparams
from edgeroute.runtime.errors import CapacityError, ModelFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile

Matrix = npt.NDArray[np.float32]
Pairs = Mapping[tuple[int, str], tuple[Matrix, Matrix]]
"""A (rank, n_in) and B (n_out, rank) by layer and part, rows in the base file's order."""

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

MODULES: Final = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip
"""Parts of a layer under the names of transformers' llama and qwen2 modules."""

_MAX_NAME: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the folder says of itself; `details` are hyperparameters and results by name."""

    base_name: str
    license: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    store: Literal["f16", "f32"]
    about: str | None
    details: Mapping[str, Any]
    losses: tuple[float, ...]


def base_name(file: GGUFFile) -> tuple[str, str]:
    """Return the base's name and licence as its header claims them."""
    meta = file.metadata
    url = meta.get_str("general.base_model.0.repo_url", "") or ""
    name = url.removeprefix("https://huggingface.co/") or meta.get_str("general.name", "")
    found = _plain(name or file.path.stem)
    return found, _plain(meta.get_str("general.license", "") or "unknown")


def check_target(out: Path, *, replace: bool) -> None:
    """Refuse before hours of work a folder that may not be written.

    Raises:
        UsageError: it exists and is no adapter, or may not be replaced; or its parent is
            missing or cannot be written to.
    """
    if out.exists() or out.is_symlink():
        if not replace:
            raise UsageError(f"{out} exists; name another folder, or give --force to replace it")
        if out.is_symlink() or not (out / CONFIG_FILE).is_file():
            raise UsageError(f"{out} exists and is no adapter's folder, so it is not replaced; "
                             "name another")  # fmt: skip
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write to {parent}; make that folder first, or name another")


def write_folder(out: Path, pairs: Pairs, hparams: Hparams, card: Card, *, replace: bool) -> int:
    """Write the folder and return the bytes of its weights.

    Raises:
        UsageError: as `check_target`.
        CapacityError: the disk is full.
        ModelFileError: it cannot be written.
        In every case nothing of it is left, and what was there is untouched.
    """
    check_target(out, replace=replace)
    weights = save(tensors(pairs, hparams, card.store), metadata={"format": "pt"})
    files = {
        WEIGHTS_FILE: weights,
        CONFIG_FILE: json.dumps(config(card), indent=2).encode() + b"\n",
        "README.md": readme(out.name, card).encode(),
    }
    part = out.absolute().with_name(f"{out.name}.{os.getpid()}.part")
    try:
        try:
            part.mkdir()
            for name, data in files.items():
                _write(part / name, data)
            _put(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk became full while {out} was written; nothing of it "
                                "was kept: free some space") from error  # fmt: skip
        raise ModelFileError(
            f"cannot write {out}: {error.strerror or error}; nothing of it was kept"
        ) from error
    return len(weights)


def tensors(
    pairs: Pairs, hparams: Hparams, store: Literal["f16", "f32"]
) -> dict[str, npt.NDArray[Any]]:
    """Name the matrices as PEFT does, in the row order of transformers' weights.

    Raises:
        UsageError: a value is beyond F16's range.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for (il, part), (a, b) in sorted(pairs.items()):
        stem = f"base_model.model.model.layers.{il}.{MODULES[part]}"
        for which, matrix in (("lora_A", a), ("lora_B", unpermute(b, part, hparams))):
            values: npt.NDArray[Any] = np.ascontiguousarray(matrix, np.float32)
            if store == "f16":
                if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                    raise UsageError("a trained value is beyond F16; write F32 instead")
                values = values.astype(np.float16)
            found[f"{stem}.{which}.weight"] = values
    return found


def unpermute(b: Matrix, part: str, hparams: Hparams) -> Matrix:
    """Order a B's rows as transformers orders its base's.

    Files of the llama architecture hold a head's rotary pairs as neighbours; transformers
    holds them as first and second half.
    """
    if hparams.arch != "llama" or part not in ("q", "k"):
        return b
    n_head = hparams.n_head if part == "q" else hparams.n_head_kv
    halves = b.reshape(n_head, -1, 2, b.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(b.shape)


def permute(b: Matrix, part: str, hparams: Hparams) -> Matrix:
    """Undo `unpermute`: order a B's rows as the base's file does."""
    if hparams.arch != "llama" or part not in ("q", "k"):
        return b
    n_head = hparams.n_head if part == "q" else hparams.n_head_kv
    pairs = b.reshape(n_head, 2, -1, b.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(b.shape)


def config(card: Card) -> dict[str, Any]:
    """Return the values of adapter_config.json."""
    alpha = int(card.alpha) if card.alpha == int(card.alpha) else card.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": card.base_name,
        "r": card.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(MODULES[part].split(".")[1] for part in card.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        "revision": None,
    }


def readme(name: str, card: Card) -> str:
    """Return a model card."""
    quoted = json.dumps  # also a YAML string, whatever it holds
    lines = [
        "---", f"base_model: {quoted(card.base_name)}", "library_name: peft",
        f"license: {quoted(card.license)}", "tags: [lora, edgeroute]", "---", "",
        f"# {name}", "",
        f"LoRA adapter of rank {card.rank}, alpha {card.alpha:g}, on "
        f"{', '.join(card.targets)} of every layer of {card.base_name}, trained by "
        "`edgeroute adapters train`.", "",
        *([f"What it does: {card.about}.", ""] if card.about else []),
        f"Licence: {card.license}.", "", "| | |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in card.details.items()]
    n, shown = len(card.losses), []
    for step in sorted({0, n // 4, n // 2, 3 * n // 4, n - 1} & set(range(n))):
        shown.append(f"{step + 1}: {card.losses[step]:.3f}")
    return "\n".join([*lines, "", f"Loss in nats by step: {', '.join(shown)}.", ""])


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put(part: Path, out: Path) -> None:
    """Give the complete folder its name; an old one goes only once the new one is there."""
    if not out.exists():
        os.replace(part, out)
        return
    old = part.with_suffix(".old")
    os.replace(out, old)
    try:
        os.replace(part, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _plain(text: str) -> str:
    """Keep what is safe to print of a text from a file."""
    return "".join(char for char in text[:_MAX_NAME] if char.isprintable()).strip() or "unknown"
