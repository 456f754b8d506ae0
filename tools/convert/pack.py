"""Writes a model's experts once more, page by page: the sidecar that `offload.sidecar` reads."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

from edgeroute.offload.disk import DiskFile, read_range
from edgeroute.offload.sidecar import (
    ALIGNMENT,
    PAGES,
    Kind,
    Part,
    SidecarHeader,
    encode_header,
    fingerprint,
    padded,
    page_bytes,
    read_sidecar,
    sidecar_path,
)
from edgeroute.runtime.errors import CapacityError, ModelFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile, TensorInfo
from edgeroute.runtime.units import format_bytes

Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all."""
Slice = tuple[str, int]
"""The type of an expert's part, and its bytes."""
Read = Callable[[Part, int], bytes | memoryview]
"""Returns the bytes of a part of an expert."""

_SLICES: Final = re.compile(r"blk\.([0-9]{1,4})\.ffn_(gate|up|gate_up|down)_exps\.weight")
_IN_TURN: Final = ("gate", "gate_up", "up", "down")
_SYNC_BYTES: Final = 64 << 20
"""Written pages are sent to the disk and dropped from memory so often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What was written."""

    path: Path
    n_layer: int
    n_expert: int
    n_bytes: int
    page_bytes: tuple[int, ...]
    seconds: float


def pack(
    model: Path,
    *,
    order: Sequence[int] = (),
    replace: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Write the sidecar of a model with experts, beside it.

    Nothing has its final name before it is complete and checked; whatever ends it early
    leaves what was there before.

    Args:
        model: a GGUF file.
        order: pages (layer index × n_expert + expert) that shall lie first, those that are
            used together side by side; the others follow in their own order.
        replace: whether an existing sidecar may be replaced.
        progress: called in this thread after each page.

    Raises:
        ModelFileError: the file cannot be read, or was changed meanwhile.
        UsageError: it has no experts, the order names pages that it has not, or the sidecar
            exists.
        CapacityError: the disk has no room.
    """
    with opened(model) as (disk, file):
        layout = packed_layout(file, order)

        def read(part: Part, expert: int) -> memoryview:
            info = file.tensors[part.tensor]
            return read_range(disk, info.offset + expert * part.nbytes, part.nbytes)

        return write_sidecar((disk, file), layout, read, replace=replace, progress=progress)


@contextlib.contextmanager
def opened(model: Path) -> Iterator[tuple[DiskFile, GGUFFile]]:
    """Open a model for reads of its weights, and its header.

    Raises:
        ModelFileError: it cannot be read.
    """
    with DiskFile.open(model) as disk, GGUFFile.open(model) as file:
        yield disk, file


@dataclass(frozen=True, slots=True)
class Layout:
    """Which sidecar is written: of these layers' tensors, in slices of these types and lengths."""

    kind: Kind
    layers: Mapping[int, Sequence[TensorInfo]]
    slice_of: Callable[[TensorInfo, int], Slice]
    order: Sequence[int] = ()


def packed_layout(file: GGUFFile, order: Sequence[int] = ()) -> Layout:
    """Say what `pack` writes of a model.

    Raises:
        ModelFileError, UsageError: as in `pack`.
    """
    return Layout(PAGES, expert_layers(file), _own_slice, order)


def _own_slice(info: TensorInfo, n_expert: int) -> Slice:
    return info.type.name, info.nbytes // n_expert


def write_sidecar(
    model: tuple[DiskFile, GGUFFile], layout: Layout, read: Read, *, replace: bool,
    progress: Progress | None,
) -> PackReport:  # fmt: skip
    """Write a sidecar as `pack` says.

    Args:
        model: open.
        layout: what is written.
        read: gives its bytes.
        replace, progress: as in `pack`.

    Raises:
        ModelFileError, UsageError, CapacityError: as in `pack`.
    """
    began, (disk, file) = time.monotonic(), model
    out = sidecar_path(disk.path, layout.kind)
    if out.exists() and not replace:
        raise UsageError(f"{out} exists; replace it with --force")
    header = lay_out(file, disk, layout)
    _check_room(out.parent, header.size_bytes)
    with _replacing(out, header.size_bytes) as (temporary, target):
        _write(target, encode_header(header, layout.kind), (header, read), progress or _ignore)
        _sync(target)
        if not disk.unchanged():
            raise ModelFileError(f"{disk.path} was changed while it was packed; pack it again")
        with DiskFile.open(temporary) as written:
            read_sidecar(written, disk, file, layout.kind)
    return PackReport(
        path=out, n_layer=len(header.layers), n_expert=header.n_expert, n_bytes=header.size_bytes,
        page_bytes=tuple(sorted({page_bytes(parts) for parts in header.layers.values()})),
        seconds=time.monotonic() - began,
    )  # fmt: skip


def lay_out(file: GGUFFile, disk: DiskFile, layout: Layout) -> SidecarHeader:
    """Say where everything of a sidecar lies.

    Raises:
        ModelFileError, UsageError: as in `pack`.
    """
    layers, order = layout.layers, layout.order
    [n_expert] = {info.ne[2] for infos in layers.values() for info in infos}
    parts = {il: _parts(infos, n_expert, layout) for il, infos in layers.items()}
    natural = [il * n_expert + e for il in layers for e in range(n_expert)]
    pages = dict.fromkeys(chain(order, natural), 0)
    if len(pages) != len(natural) or len(set(order)) != len(order):
        strange = sorted(pages.keys() - set(natural))[:3]
        reason = f"names pages that the model has not, such as {strange}" if strange else "repeats"
        raise UsageError(f"the order of pages {reason}; record it from this model")
    header = SidecarHeader(
        model_bytes=disk.size_bytes, fingerprint=fingerprint(disk, file.data_offset),
        n_expert=n_expert, layers=parts, pages=pages, size_bytes=0,
    )  # fmt: skip
    # The header's length depends on the offsets in it: they are written against its own end,
    # which is found by writing it until it no longer grows.
    start = 0
    while True:
        at = start
        for page in pages:
            pages[page] = at
            at += page_bytes(parts[page // n_expert])
        header = SidecarHeader(
            model_bytes=header.model_bytes, fingerprint=header.fingerprint,
            n_expert=n_expert, layers=parts, pages=pages, size_bytes=at,
        )  # fmt: skip
        length = len(encode_header(header, layout.kind))
        if length <= start:
            return header
        start = length


def expert_layers(file: GGUFFile) -> dict[int, list[TensorInfo]]:
    """The expert tensors of each layer, in the order of the parts of a page.

    Raises:
        UsageError: there are none.
        ModelFileError: their numbers of experts differ, or one is empty.
    """
    found: dict[int, list[tuple[int, TensorInfo]]] = {}
    for info in file.tensors.values():
        match = _SLICES.fullmatch(info.name)
        if match is not None and len(info.ne) == 3 and info.nbytes:
            pair = (_IN_TURN.index(match[2]), info)
            found.setdefault(int(match[1]), []).append(pair)
    if not found:
        raise UsageError(
            f"{file.path.name} has no experts, so there is nothing to pack; dense models are "
            "read as they are"
        )
    layers = {il: [info for _, info in sorted(found[il], key=lambda p: p[0])]
              for il in sorted(found)}  # fmt: skip
    counts = {info.ne[2] for infos in layers.values() for info in infos}
    if len(counts) != 1:
        raise ModelFileError(f"the layers of {file.path.name} have {sorted(counts)} experts; they "
                             "must have equally many")  # fmt: skip
    return layers


def _parts(infos: Sequence[TensorInfo], n_expert: int, layout: Layout) -> tuple[Part, ...]:
    parts, at = [], 0
    for info in infos:
        kind, nbytes = layout.slice_of(info, n_expert)
        parts.append(Part(info.name, kind, nbytes, at))
        at = padded(at + nbytes)
    return tuple(parts)


def _write(
    target: BinaryIO, start: bytes, content: tuple[SidecarHeader, Read], report: Progress
) -> None:
    header, read = content
    first = next(iter(header.pages.values()))
    target.write(start.ljust(first, b"\0"))
    unsynced = 0
    for page, offset in header.pages.items():
        il, expert = divmod(page, header.n_expert)
        for part in header.layers[il]:
            target.write(read(part, expert))
            target.write(bytes(-part.nbytes % ALIGNMENT))
            unsynced += part.nbytes
        if unsynced >= _SYNC_BYTES:
            _sync(target)
            unsynced = 0
        report(offset + page_bytes(header.layers[il]), header.size_bytes)


def _sync(target: BinaryIO) -> None:
    """Send what was written to the disk, and let the system forget it."""
    target.flush()
    os.fsync(target.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check_room(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise CapacityError(
            f"the sidecar takes {format_bytes(n_bytes)} and the disk of {folder} has "
            f"{format_bytes(free)} free; free {format_bytes(n_bytes - free)}"
        )


@contextlib.contextmanager
def _replacing(out: Path, n_bytes: int) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a file beside `out` that takes its name at the end, or goes if there is none.

    Raises:
        CapacityError: the disk was full.
        ModelFileError: the folder cannot be written to.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as target:
            yield temporary, target
        os.replace(temporary, out)
    except BrokenPipeError:  # of the progress, not of the file
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"the disk of {out.parent} became full while {out.name} was written; nothing of "
                f"it was kept: free {format_bytes(n_bytes)}"
            ) from error
        reason = error.strerror or error
        raise ModelFileError(f"cannot write {out}: {reason}; nothing of it was kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def _ignore(n_done: int, n_total: int) -> None:
    """No progress is wanted."""
