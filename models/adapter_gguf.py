"""GGUF adapters, as llama.cpp loads them and its convert_lora_to_gguf.py writes them.

Source: llama.cpp, src/llama-adapter.cpp, llama_adapter_lora_init_impl, and llama-adapter.h,
get_scale. Unlike there, tensors that are no LoRA matrices are refused, not passed over.
"""

from pathlib import Path
from typing import Final

from edgeroute.models.adapter_data import Kind, Stored
from edgeroute.models.adapter_json import one_line
from edgeroute.models.adapter_names import gguf_target
from edgeroute.models.adapter_pairs import Part, make_pairs
from edgeroute.models.adapter_records import MAX_ALPHA, AdapterFile, BaseShapes, check_name
from edgeroute.runtime.errors import AdapterFileError, ModelFileError
from edgeroute.runtime.gguf import GGMLType, GGUFFile, TensorInfo
from edgeroute.runtime.gguf_metadata import quote

ALPHA_KEY: Final = "adapter.lora.alpha"
ACTIVATED_KEY: Final = "adapter.alora.invocation_tokens"
_KINDS: Final[dict[GGMLType, Kind]] = {
    GGMLType.F16: "F16",
    GGMLType.F32: "F32",
    GGMLType.BF16: "BF16",
}


def open_gguf(path: Path, base: BaseShapes) -> AdapterFile:
    """Open a GGUF adapter.

    Raises:
        AdapterFileError: malformed, a model, or it does not fit the base model.
    """
    name = check_name(path.stem, path)
    try:
        with GGUFFile.open(path) as file:
            return _open(file, name, base)
    except ModelFileError as error:
        raise AdapterFileError(f"the adapter {name} cannot be read: {error}") from error


def _open(file: GGUFFile, name: str, base: BaseShapes) -> AdapterFile:
    alpha = _check_header(file, name, base)
    parts = []
    for info in file.tensors.values():
        target = gguf_target(info.name, base, name)
        stored = _stored(info, name)
        parts.append(Part(stem=target.stem, side=target.side, module=target.module, stored=stored))
    # The converter has already reordered rows, so no heads are left to interleave.
    pairs = make_pairs(
        name, parts, base, lambda _, rank: alpha / rank if alpha else 1.0, lambda _: 0
    )
    status = file.status
    return AdapterFile(
        name=name,
        path=file.path,
        format="gguf",
        tensors=tuple(pair.tensor for pair in pairs),
        n_bytes=sum(pair.a.nbytes + pair.b.nbytes for pair in pairs),
        description=one_line(file.metadata.get_str("general.description", "")),
        data_path=file.path,
        identity=(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev),
        pairs=pairs,
    )


def _check_header(file: GGUFFile, name: str, base: BaseShapes) -> float:
    """Return alpha of a file that is a LoRA adapter for this architecture."""
    meta = file.metadata
    kind = meta.get_str("general.type", "model")
    if kind != "adapter":
        raise AdapterFileError(
            f"{file.path.name} is a {kind[:40]!r}, not an adapter (general.type); pass it as the "
            "model instead"
        )
    lora = meta.get_str("adapter.type", "")
    if lora != "lora":
        raise AdapterFileError(f"{name}: adapter.type is {lora[:40]!r}; only 'lora' is supported")
    arch = meta.get_str("general.architecture", "")
    if arch != base.arch:
        raise AdapterFileError(
            f"{name}: general.architecture is {arch[:40]!r}, but the model is {base.arch!r}; the "
            "adapter is for another base model"
        )
    if ACTIVATED_KEY in meta:
        raise AdapterFileError(f"{name}: it has {ACTIVATED_KEY}; activated LoRA is not supported")
    alpha = meta.get_float(ALPHA_KEY, 0.0)
    if abs(alpha) > MAX_ALPHA:
        raise AdapterFileError(f"{name}: {ALPHA_KEY} is {alpha:g}; at most {MAX_ALPHA:g} is read")
    return alpha


def _stored(info: TensorInfo, name: str) -> Stored:
    """Describe a matrix; ggml leaves out trailing extents of 1."""
    kind = _KINDS.get(info.type)
    if kind is None:
        raise AdapterFileError(
            f"{name}: tensor {quote(info.name)} is {info.type.name}; F16, F32 and BF16 are "
            "supported, convert the adapter to one of them"
        )
    ne = (*info.ne, 1)
    if any(extent != 1 for extent in ne[2:]):
        raise AdapterFileError(
            f"{name}: tensor {quote(info.name)} has extents {list(info.ne)}; a LoRA matrix has 2"
        )
    return Stored(name=info.name, kind=kind, shape=(ne[1], ne[0]), offset=info.offset)
