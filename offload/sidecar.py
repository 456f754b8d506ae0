"""A model's experts once more, each page in one piece: files beside the model.

`<model>.pages` has their own bytes, `<model>.copies` copies of fewer bits, in types of their own.

In a GGUF an expert's slices lie in three tensors, far apart: the format gives a tensor no
strides, and tensors follow each other without a gap. A sidecar has them side by side, every
part at a multiple of 4096 bytes, so that a page is one read.

File (little endian): magic, version, bytes of the header, the header as JSON, zeros up to
the first page. The header names the model it was made from, the parts of a page of each
layer, and where each page begins.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Never

from edgeroute.offload.disk import Disk, read_range
from edgeroute.offload.load_plan import Extent
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.gguf import GGUFFile, TensorInfo
from edgeroute.runtime.gguf_types import GGMLType

VERSION: Final = 1
ALIGNMENT: Final = 4096
"""Of pages and of the parts within one: no disk has larger blocks in use."""
MAX_HEADER_BYTES: Final = 16 << 20
MAX_LAYER: Final = 1 << 14
MAX_EXPERT: Final = 1 << 16
MAX_PARTS: Final = 8

_START: Final = struct.Struct("<8sII")
_N_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 1 << 20


class Kind(NamedTuple):
    """What a sidecar begins with, what its name ends in, and the command that writes it."""

    magic: bytes
    suffix: str
    command: str


PAGES: Final = Kind(b"EDGEPAGE", ".pages", "edgeroute convert pack")
COPIES: Final = Kind(b"EDGECOPY", ".copies", "edgeroute convert copies")
COPY_TYPES: Final = tuple(
    GGMLType[name] for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
)
"""Types that copies may have, the best first; any processor multiplies them."""


class Part(NamedTuple):
    """One slice of a page: of which tensor, how long, and where in the page."""

    tensor: str
    type: str
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarHeader:
    """What a sidecar says of itself.

    `layers` gives the parts of a page by layer index, `pages` the offset of each page
    (layer index × `n_expert` + expert) in the order in which they lie.
    """

    model_bytes: int
    fingerprint: str
    n_expert: int
    layers: Mapping[int, tuple[Part, ...]]
    pages: Mapping[int, int]
    size_bytes: int


class Sidecar:
    """Where the pages of a checked sidecar are."""

    def __init__(self, header: SidecarHeader, kind: Kind = PAGES) -> None:
        self.header, self._kind = header, kind
        self._parts = {
            il: {part.tensor: part for part in parts} for il, parts in header.layers.items()
        }

    def moved(self, il: int, infos: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
        """Return a layer's expert tensors as they are here, where the first expert's slices are.

        Raises:
            ModelFileError: it lacks one of them.
        """
        parts = self._parts.get(il, {})
        if any(info.name not in parts for info in infos):
            raise ModelFileError(f"the sidecar lacks experts of layer {il}; write it again with "
                                 f"`{self._kind.command} --force`, or delete it")  # fmt: skip
        n_expert = self.header.n_expert
        start = self.header.pages[il * n_expert]
        found = [(info, parts[info.name]) for info in infos]
        return tuple(
            replace(info, offset=start + part.at, type=GGMLType[part.type],
                    nbytes=part.nbytes * n_expert)
            for info, part in found
        )  # fmt: skip

    def extents(self, file: int, page: int, tensors: Sequence[str]) -> list[Extent]:
        """Return the extents of a page: part i is the slice of `tensors[i]`.

        Args:
            file: the sidecar's number among the files of a Transfer.
            page: layer index × n_expert + expert.
            tensors: names of the layer's expert tensors, in the order of the sink's parts.

        Raises:
            ModelFileError: the sidecar has no such page or part.
        """
        start = self.header.pages.get(page)
        parts = self._parts.get(page // self.header.n_expert)
        if start is None or parts is None or any(name not in parts for name in tensors):
            raise ModelFileError(
                f"the sidecar has no page {page} with {', '.join(tensors)}; write it again with "
                f"`{self._kind.command} --force`"
            )
        found = [parts[name] for name in tensors]
        return [Extent(file, start + part.at, part.nbytes, i) for i, part in enumerate(found)]


def sidecar_path(model: Path, kind: Kind = PAGES) -> Path:
    """Where the sidecar of a model is, if there is one."""
    return model.with_name(model.name + kind.suffix)


def padded(n_bytes: int) -> int:
    """Round up to ALIGNMENT."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def page_bytes(parts: Sequence[Part]) -> int:
    """Bytes from the begin of a page to that of the next."""
    return padded(parts[-1].at + parts[-1].nbytes)


def fingerprint(model: Disk, data_offset: int) -> str:
    """Hash a model's size, its header, and 64 blocks spread over its weights.

    Takes milliseconds for any size. Another model of the same shape has another hash.

    Raises:
        ModelFileError: a read failed.
    """
    size = model.size_bytes
    digest = hashlib.sha256(f"{size} {data_offset}".encode())
    for at in range(0, min(data_offset, size), _CHUNK_BYTES):
        digest.update(read_range(model, at, min(_CHUNK_BYTES, data_offset - at, size - at)))
    span = size - data_offset
    for i in range(_N_SAMPLES if span > 0 else 0):
        at = data_offset + span * i // _N_SAMPLES
        digest.update(read_range(model, at, min(_SAMPLE_BYTES, size - at)))
    return digest.hexdigest()


def encode_header(header: SidecarHeader, kind: Kind = PAGES) -> bytes:
    """Return a sidecar's first bytes, up to the first page.

    Raises:
        ModelFileError: there are too many pages for a header.
    """
    content = {
        "model_bytes": header.model_bytes,
        "fingerprint": header.fingerprint,
        "n_expert": header.n_expert,
        "layers": [
            {"il": il, "parts": [list(part) for part in parts]}
            for il, parts in header.layers.items()
        ],
        "pages": [list(pair) for pair in header.pages.items()],
        "size_bytes": header.size_bytes,
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ModelFileError(f"a header of {len(text)} bytes is beyond {MAX_HEADER_BYTES}; "
                             "the model has too many experts for a sidecar")  # fmt: skip
    start = _START.pack(kind.magic, VERSION, len(text)) + text
    return start.ljust(padded(len(start)), b"\0")


def read_sidecar(disk: Disk, model: Disk, file: GGUFFile, kind: Kind = PAGES) -> Sidecar:
    """Check a sidecar against itself and against its model, a block of each layer included.

    Of copies no block can be compared; their types and lengths are checked instead.

    Args:
        disk: the sidecar, which the Transfer then reads.
        model: the model it should belong to.
        file: that model's header.

    Raises:
        ModelFileError: it is malformed, or belongs to another model.
    """
    checker = _Checker(disk, kind)
    header, refuse = checker.read(), checker.fail
    if header.model_bytes != model.size_bytes:
        refuse(f"it was made from a model of {header.model_bytes} bytes, and "
               f"{model.path.name} has {model.size_bytes}")  # fmt: skip
    if header.fingerprint != fingerprint(model, file.data_offset):
        refuse(f"it was made from another model than {model.path.name}")
    for il, parts in header.layers.items():
        for part in parts:
            info = file.tensors.get(part.tensor)
            if info is None:
                refuse(f"layer {il} has the tensor {part.tensor!r}, which the model lacks")
            if (part.type, part.nbytes) not in _slices(info, header.n_expert, kind):
                refuse(
                    f"its slices of {part.tensor} are {part.nbytes} bytes of {part.type}, "
                    f"not a {header.n_expert}th of {info.nbytes} bytes of {info.type.name}"
                    + (" or less of another type" if kind is COPIES else "")
                )
        if kind is PAGES and not _same_block(disk, model, file, (header, il)):
            refuse(f"its experts of layer {il} are not those of {model.path.name}")
    return Sidecar(header, kind)


def _slices(info: TensorInfo, n_expert: int, kind: Kind) -> set[tuple[str, int]]:
    """Return the type and the bytes that a slice of a tensor may have."""
    if len(info.ne) != 3 or info.ne[2] != n_expert:
        return set()
    own = info.nbytes // n_expert
    found = {(info.type.name, own)}
    if kind is COPIES:
        smaller = {each: copy_bytes(info, each) for each in COPY_TYPES}
        found |= {(each.name, n) for each, n in smaller.items() if n is not None and n <= own}
    return found


def copy_bytes(info: TensorInfo, kind: GGMLType) -> int | None:
    """Return the bytes of an expert's slice in a type; None where its rows are no whole blocks."""
    if info.ne[0] % kind.block_size:
        return None
    return kind.nbytes(info.ne[:2])


def _same_block(disk: Disk, model: Disk, file: GGUFFile, at: tuple[SidecarHeader, int]) -> bool:
    """Compare a block of one expert of a layer; which one differs from layer to layer."""
    header, il = at
    parts = header.layers[il]
    part, expert = parts[il % len(parts)], il * 7 % header.n_expert
    there = file.tensors[part.tensor].offset + expert * part.nbytes
    here = header.pages[il * header.n_expert + expert] + part.at
    skip = il * 31 * ALIGNMENT % part.nbytes
    length = min(ALIGNMENT, part.nbytes - skip)
    ours = read_range(disk, here + skip, length)
    return ours == read_range(model, there + skip, length)


class _Checker:
    """Parses a header that nobody vouches for; each step compares before it uses."""

    def __init__(self, disk: Disk, kind: Kind) -> None:
        self._disk, self._kind = disk, kind

    def fail(self, reason: str) -> Never:
        raise ModelFileError(
            f"the sidecar {self._disk.path} cannot be used: {reason}; write it again with "
            f"`{self._kind.command} --force`, or delete it"
        )

    def read(self) -> SidecarHeader:
        content = self._json()
        n_expert = self._int(content["n_expert"], 1, MAX_EXPERT, "n_expert")
        layers = self._layers(content["layers"])
        size = self._int(content["size_bytes"], 1, 1 << 62, "size_bytes")
        if size != self._disk.size_bytes:
            self.fail(f"it has {self._disk.size_bytes} bytes, its header says {size}")
        print_ = content["fingerprint"]
        if not isinstance(print_, str):
            self.fail("its fingerprint is not a string")
        return SidecarHeader(
            model_bytes=self._int(content["model_bytes"], 1, 1 << 62, "model_bytes"),
            fingerprint=print_,
            n_expert=n_expert,
            layers=MappingProxyType(layers),
            pages=MappingProxyType(self._pages(content["pages"], n_expert, layers)),
            size_bytes=size,
        )

    def _json(self) -> dict[str, Any]:
        size = self._disk.size_bytes
        if size < _START.size:
            self.fail(f"it has {size} bytes, too few for a header")
        magic, version, n_header = _START.unpack(read_range(self._disk, 0, _START.size))
        if magic != self._kind.magic:
            self.fail(f"it starts with {magic!r}, not {self._kind.magic!r}")
        if version != VERSION:
            self.fail(f"it is of version {version}, and only {VERSION} is read")
        if n_header > min(MAX_HEADER_BYTES, size - _START.size):
            self.fail(f"it claims a header of {n_header} bytes, more than it may have")
        try:
            content = json.loads(bytes(read_range(self._disk, _START.size, n_header)))
        except (ValueError, RecursionError) as error:
            self.fail(f"its header is not JSON ({str(error)[:80]})")
        self._data_offset = padded(_START.size + n_header)
        keys = {"model_bytes", "fingerprint", "n_expert", "layers", "pages", "size_bytes"}
        if not isinstance(content, dict) or content.keys() != keys:
            self.fail(f"its header does not have exactly the keys {', '.join(sorted(keys))}")
        return content

    def _layers(self, given: object) -> dict[int, tuple[Part, ...]]:
        if not isinstance(given, list) or not 0 < len(given) <= MAX_LAYER:
            self.fail(f"it does not list between 1 and {MAX_LAYER} layers")
        layers: dict[int, tuple[Part, ...]] = {}
        for entry in given:
            if not isinstance(entry, dict) or entry.keys() != {"il", "parts"}:
                self.fail("a layer is not an il and its parts")
            il = self._int(entry["il"], 0, MAX_LAYER, "il")
            parts = entry["parts"]
            if il in layers or not isinstance(parts, list) or not 0 < len(parts) <= MAX_PARTS:
                self.fail(f"layer {il} comes twice, or does not have 1 to {MAX_PARTS} parts")
            layers[il] = self._parts(il, parts)
        return layers

    def _parts(self, il: int, given: list[object]) -> tuple[Part, ...]:
        parts, end = [], 0
        for entry in given:
            if not isinstance(entry, list) or len(entry) != 4:
                self.fail(f"a part of layer {il} is not a name, a type, a length and a place")
            name, kind, nbytes, at = entry
            if not isinstance(name, str) or not isinstance(kind, str):
                self.fail(f"a part of layer {il} has a name or type that is no string")
            nbytes = self._int(nbytes, 1, self._disk.size_bytes, f"the length of {name!r}")
            at = self._int(at, end, self._disk.size_bytes, f"the place of {name!r}")
            if at % ALIGNMENT:
                self.fail(f"{name!r} lies at {at}, no multiple of {ALIGNMENT}")
            parts.append(Part(name, kind, nbytes, at))
            end = at + nbytes
        if len({part.tensor for part in parts}) != len(parts):
            self.fail(f"layer {il} names a tensor twice")
        return tuple(parts)

    def _pages(
        self, given: object, n_expert: int, layers: Mapping[int, tuple[Part, ...]]
    ) -> dict[int, int]:
        if not isinstance(given, list) or len(given) != n_expert * len(layers):
            self.fail(f"it does not list {n_expert} pages for each of {len(layers)} layers")
        sizes = {il: parts[-1].at + parts[-1].nbytes for il, parts in layers.items()}
        pages: dict[int, int] = {}
        end = self._data_offset
        for entry in given:
            if not isinstance(entry, list) or len(entry) != 2:
                self.fail("a page is not a number and an offset")
            page = self._int(entry[0], 0, MAX_LAYER * MAX_EXPERT, "a page's number")
            if page in pages or page // n_expert not in sizes:
                self.fail(f"page {page} comes twice, or is of no layer")
            nbytes = sizes[page // n_expert]
            limit = self._disk.size_bytes - nbytes
            offset = self._int(entry[1], end, limit, f"the offset of page {page}")
            if offset % ALIGNMENT:
                self.fail(f"page {page} lies at {offset}, no multiple of {ALIGNMENT}")
            pages[page] = offset
            end = offset + nbytes
        return pages

    def _int(self, value: object, low: int, high: int, what: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(f"{what[:80]} is {str(value)[:40]}, not a number between {low} and {high}")
        return value
