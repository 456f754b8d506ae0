"""Adapters on disk: find them, open them against a base model, read their numbers.

Every name, rank, extent, type and byte count is checked before anything is allocated by it.
What a file asks for and cannot be applied is an error that names it, never left out.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from edgeroute.models import adapter_gguf, adapter_peft
from edgeroute.models.adapter_records import AdapterFile, BaseShapes, LoraTensor, Triple
from edgeroute.runtime.errors import AdapterFileError

if TYPE_CHECKING:
    from edgeroute.models.base import Model

__all__ = [
    "AdapterFile",
    "BaseShapes",
    "LoraTensor",
    "Triple",
    "base_shapes",
    "find_adapters",
    "open_adapter",
]

AnyPath = str | os.PathLike[str]

_FILES: Final = (".gguf", ".safetensors")
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PEFT_FILES: Final = (
    adapter_peft.CONFIG_NAME,
    adapter_peft.DATA_NAME,
    adapter_peft.PICKLE_NAME,
)


def base_shapes(model: "Model") -> BaseShapes:
    """Return what adapters of this model must fit."""
    hp = model.hparams
    linears = {
        spec.name.removesuffix(".weight"): (spec.ne[0], spec.ne[1])
        for spec in model.specs()
        if spec.use == "mul_mat" and len(spec.ne) == 2 and spec.name != "output.weight"
    }
    return BaseShapes(
        arch=hp.arch, n_head=hp.n_head, n_head_kv=hp.n_head_kv, n_layer=hp.n_layer,
        n_expert=hp.moe.n_expert if hp.moe else 0, linears=MappingProxyType(linears),
    )  # fmt: skip


def open_adapter(path: AnyPath, base: BaseShapes) -> AdapterFile:
    """Check an adapter's header and settings against a base model; no numbers are read.

    Args:
        path: a PEFT folder, a .safetensors file with its settings beside it, or a .gguf file.
        base: what it must fit.

    Raises:
        AdapterFileError: it is malformed, does not fit, or asks for what cannot be applied.
    """
    where = Path(path)
    suffix = where.suffix.lower()
    if _is_folder(where):
        return adapter_peft.open_folder(where, base)
    if suffix == ".gguf":
        return adapter_gguf.open_gguf(where, base)
    if suffix == ".safetensors":
        return adapter_peft.open_file(where, base)
    if suffix in _PICKLES:
        raise adapter_peft.pickle_refusal(where)
    raise AdapterFileError(
        f"{str(where)!r} is no adapter: a PEFT folder, a .safetensors or a .gguf file is wanted"
    )


def find_adapters(paths: AnyPath | Sequence[AnyPath]) -> list[Path]:
    """List adapters: those given, and those inside folders given, which are not searched deeper.

    Hidden entries are left out. Whether what is found can be used, `open_adapter` says.

    Raises:
        AdapterFileError: a path is missing, a folder holds no adapter, or two adapters would
            have one name.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found = []
    for each in given:
        path = Path(each)
        found += [path] if not _is_folder(path) or _is_peft(path) else _list_folder(path)
    by_name: dict[str, Path] = {}
    for path in found:
        name = adapter_name(path)
        if name in by_name:
            raise AdapterFileError(
                f"{str(by_name[name])!r} and {str(path)!r} are both named {name!r}; rename one"
            )
        by_name[name] = path
    return found


def adapter_name(path: Path) -> str:
    """Return the name that an adapter at this path has, not checked yet."""
    absolute = Path(os.path.abspath(path))
    if os.path.isdir(absolute):
        return absolute.name
    return absolute.parent.name if absolute.name == adapter_peft.DATA_NAME else absolute.stem


def _list_folder(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise AdapterFileError(
            f"cannot list the adapters in {str(folder)!r}: {error.strerror}"
        ) from error
    found = []
    for path in entries:
        if path.name.startswith("."):
            continue
        if os.path.isdir(path):
            found += [path] if _is_peft(path) else []
        elif path.suffix.lower() in _FILES:
            found.append(path)
    if not found:
        raise AdapterFileError(
            f"the folder {str(folder)!r} holds no adapters: no PEFT folders with "
            f"{adapter_peft.CONFIG_NAME}, no .safetensors and no .gguf files"
        )
    return found


def _is_peft(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in _PEFT_FILES)


def _is_folder(path: Path) -> bool:
    """Whether a path that must exist is a folder."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterFileError(f"cannot open the adapter {str(path)!r}: {reason}") from error
