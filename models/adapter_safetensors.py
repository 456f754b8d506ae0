"""The header of a safetensors file, checked against the file's size.

Parsed here and not by the safetensors package: its numpy side cannot read BF16, it loads a
tensor or the file but does not say where bytes lie, so that a reader could check what it got,
and it would be a dependency of every installation for a length and a JSON object.
Source: huggingface/safetensors, README, "Format"; safetensors/src/tensor.rs for what is refused.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.models.adapter_data import KIND_BYTES, Identity, Kind, Stored, identify, open_regular
from edgeroute.models.adapter_json import parse_object
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.gguf_metadata import quote
from edgeroute.runtime.untrusted_json import show

MAX_HEADER_BYTES: Final = 8 << 20
"""An adapter of 10,000 weights has a header of 3 MB."""

MAX_EXTENT: Final = 1 << 40
_LENGTH_BYTES: Final = 8
_KINDS: Final[dict[str, Kind]] = {kind: kind for kind in KIND_BYTES}
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """What a file contains: matrices, texts about it, and which file it was."""

    tensors: tuple[Stored, ...]
    metadata: dict[str, str]
    identity: Identity


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a file of matrices in F16, F32 or BF16.

    Raises:
        AdapterFileError: malformed or truncated, or it holds something else.
    """
    label = path.name
    with open_regular(path, "the adapter file") as file:
        identity = identify(file)
        raw = _read_raw(file, identity[0], label)
    entries = parse_object(raw, f"the header of {label}")
    metadata = _metadata(entries.pop("__metadata__", {}), label)
    start = _LENGTH_BYTES + len(raw)
    tensors = [_tensor(name, entry, start, label) for name, entry in entries.items()]
    tensors.sort(key=lambda stored: stored.offset)
    _check_layout(tensors, start, identity[0], label)
    return SafetensorsHeader(tensors=tuple(tensors), metadata=metadata, identity=identity)


def _read_raw(file: io.FileIO, size: int, label: str) -> bytes:
    """Read the header's JSON text."""
    first = file.read(_LENGTH_BYTES)
    if first.startswith(_PICKLES):
        raise AdapterFileError(
            f"{label} is a pickle, which can run code when it is read, not safetensors; save the "
            "adapter again with PEFT's save_pretrained, which writes safetensors"
        )
    n_bytes = int.from_bytes(first, "little")
    if len(first) < _LENGTH_BYTES or n_bytes > size - _LENGTH_BYTES:
        raise AdapterFileError(
            f"{label} has {size} bytes, too few for a safetensors header of {n_bytes}; it is "
            "truncated or something else, fetch it again"
        )
    if not 2 <= n_bytes <= MAX_HEADER_BYTES:
        raise AdapterFileError(
            f"{label} has a header of {n_bytes} bytes; 2 to {MAX_HEADER_BYTES} are read"
        )
    raw = b""
    while len(raw) < n_bytes:
        more = file.read(n_bytes - len(raw))
        if not more:
            raise AdapterFileError(f"{label} ends within its header; fetch it again")
        raw += more
    if not raw.startswith(b"{"):
        raise AdapterFileError(
            f"{label} is not a safetensors file: its header starts with {raw[:1]!r}, not '{{'"
        )
    return raw


def _metadata(value: object, label: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise AdapterFileError(f"{label}: '__metadata__' must map names to texts; it is damaged")
    return value


def _tensor(name: str, entry: object, start: int, label: str) -> Stored:
    """Check one entry; where it lies relative to others is checked later."""
    what = f"{label}: tensor {quote(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterFileError(f"{what} must have dtype, shape and data_offsets alone")
    dtype = entry["dtype"]
    kind = _KINDS.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise AdapterFileError(
            f"{what} is {show(dtype)}; F16, F32 and BF16 are supported, save the adapter in one "
            "of them"
        )
    shape = _integers(entry["shape"], f"{what}: its shape")
    if len(shape) != 2:
        raise AdapterFileError(f"{what} has {len(shape)} dimensions; a LoRA matrix has 2")
    offsets = _integers(entry["data_offsets"], f"{what}: data_offsets")
    if len(offsets) != 2:
        raise AdapterFileError(f"{what}: data_offsets has {len(offsets)} numbers, not 2")
    begin, end = offsets
    n_bytes = math.prod(shape) * KIND_BYTES[kind]
    if end - begin != n_bytes:
        raise AdapterFileError(
            f"{what} has {end - begin} bytes, but {kind} {shape} takes {n_bytes}; it is damaged"
        )
    return Stored(name=name, kind=kind, shape=(shape[0], shape[1]), offset=start + begin)


def _integers(value: object, what: str) -> list[int]:
    """Check a list of counts."""
    if not isinstance(value, list):
        raise AdapterFileError(f"{what} is {show(value)}, but a list of numbers is wanted")
    for number in value:
        if type(number) is not int or not 0 <= number <= MAX_EXTENT:
            raise AdapterFileError(f"{what} contains {show(number)}, not 0 to {MAX_EXTENT}")
    return value


def _check_layout(tensors: list[Stored], start: int, size: int, label: str) -> None:
    """Check that tensors, by offset, fill the rest of the file without overlap or hole."""
    expected = start
    for stored in tensors:
        if stored.offset != expected:
            relation = "overlaps its predecessor" if stored.offset < expected else "leaves a hole"
            raise AdapterFileError(
                f"{label}: tensor {quote(stored.name)} {relation}: it starts at byte "
                f"{stored.offset}, not {expected}; the file is damaged"
            )
        expected += stored.nbytes
    if expected > size:
        raise AdapterFileError(
            f"{label} has {size} bytes, but its tensors end at {expected}; it is truncated, fetch "
            "it again"
        )
    if expected < size:
        raise AdapterFileError(
            f"{label}: {size - expected} bytes follow its last tensor; it is damaged"
        )
