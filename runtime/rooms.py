"""Rooms: memory that groups of weights use in turn, and the seam to whoever fills them.

A unit is what comes and goes as a whole: the matrices of one layer, or of the output head.
Every unit has tensors of its own at fixed addresses in one room, so that graphs stay valid
while a room's bytes change; units that share a room need not have equal shapes or types.

Weights stay in the file's layout, never repacked, and a room mirrors stretches of the file:
the disk can then write into it past the page cache, and no processor copies a byte. Measured
for repacking instead (BENCHLOG, 2026-11-22): it takes as long as reading does.
"""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf import GGMLType, TensorInfo
from edgeroute.runtime.slots import SlotSink
from edgeroute.runtime.tensor import Descriptors, new_tensor, place
from edgeroute.runtime.weights import TensorSpec, Weights

_TENSOR_ALIGNMENT: Final = 32  # Source: ggml-impl.h, TENSOR_ALIGNMENT
_GAP_BYTES: Final = 64 << 10
"""Neighbours with less than this between them (norms, biases) are read as one."""


class LayerPager(Weights, Protocol):
    """Weights of which some layers come and go. One thread owns it.

    Units have their layer's number; the output head that of the layer after the last.
    """

    @property
    def streamed(self) -> frozenset[int]:
        """Units that must be held while they are computed with; all others are always there."""

    def reconsider(self) -> bool:
        """Between passes: give way where memory got scarce, or come back where it no longer is.

        True where other units stream now: tensors that were given out before are not valid.
        """

    def begin(self, units: Sequence[int], *, prefill: bool) -> None:
        """Begin a pass over these streamed units, in rising order; no other is read.

        Reading starts here, or did at the end of a pass over the same units.
        """

    def hold(self, units: Sequence[int]) -> bool:
        """Wait until units of the pass are there; False if a stop was asked for meanwhile.

        Raises:
            ModelFileError: their bytes cannot be read.
        """

    def release(self, units: Sequence[int]) -> None:
        """Say that units of the pass were computed; their rooms are filled for others."""


class Part(NamedTuple):
    """One tensor of a unit: its name in the model, and its place in the file."""

    name: str
    info: TensorInfo


class Stretch(NamedTuple):
    """Bytes of the file that are read together, and the tensors among them.

    `room_bytes` is what they take in a room.
    """

    offset: int
    nbytes: int
    room_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is read and let go as a whole."""

    number: int
    stretches: tuple[Stretch, ...]

    @property
    def parts(self) -> list[Part]:
        """Its tensors, in the file's order."""
        return [part for stretch in self.stretches for part in stretch.parts]

    @property
    def room_bytes(self) -> int:
        """Bytes in a room."""
        return sum(stretch.room_bytes for stretch in self.stretches)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it: what lies between its tensors is among them."""
        return sum(stretch.nbytes for stretch in self.stretches)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.info.nbytes for part in self.parts)


def make_unit(
    device: Device, number: int, pairs: Sequence[tuple[TensorSpec, TensorInfo]], file_bytes: int
) -> Unit:
    """Plan how tensors of a file of `file_bytes` are read into a room of a device.

    Where the host can write to it, neighbours are one stretch that begins and ends at memory
    pages, as reads past the page cache demand; else each tensor is copied by itself.
    """
    parts = sorted((Part(spec.name, info) for spec, info in pairs), key=lambda p: p.info.offset)
    if not mirrors(device, [part.info for part in parts]):
        return Unit(number=number, stretches=tuple(_copied(device, part) for part in parts))
    groups: list[list[Part]] = []
    for part in parts:
        if groups and part.info.offset - _end(groups[-1][-1].info) < _GAP_BYTES:
            groups[-1].append(part)
        else:
            groups.append([part])
    return Unit(number=number, stretches=tuple(_mirrored(group, file_bytes) for group in groups))


def mirrors(device: Device, infos: Sequence[TensorInfo]) -> bool:
    """Whether tensors can be computed with at the distances that they have in the file."""
    aligned = all(info.offset % _TENSOR_ALIGNMENT == 0 for info in infos)
    return device.info.host_pointers and aligned


def _end(info: TensorInfo) -> int:
    return info.offset + info.nbytes


def _mirrored(parts: Sequence[Part], file_bytes: int) -> Stretch:
    start = parts[0].info.offset // mmap.PAGESIZE * mmap.PAGESIZE
    end = max(_end(part.info) for part in parts)
    stop = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    # Nothing can be read behind the file's last byte: what ends there is copied.
    read = (stop if stop <= file_bytes else end) - start
    return Stretch(start, read, stop - start, tuple(parts))


def _copied(device: Device, part: Part) -> Stretch:
    g, described, info = ggml(), Descriptors(1), part.info
    try:
        tensor = new_tensor(described, info.type, info.ne, part.name)
        size = g.ggml_backend_buft_get_alloc_size(device.buffer_type, tensor)
    finally:
        described.free()
    align = g.ggml_backend_buft_get_alignment(device.buffer_type)
    return Stretch(info.offset, info.nbytes, -(-size // align) * align, (part,))


def room_bytes(units: Sequence[Unit]) -> int:
    """Return the bytes of a room that any one of `units` fits in, its alignment included."""
    return max(unit.room_bytes for unit in units) + mmap.PAGESIZE


class Rooms(Closing):
    """A ring of rooms, and the tensors of the units that share it: unit j has room j mod n_rooms.

    Lifetime: tensors and sinks are valid until the next `settle`, or `close`; end all reads
    before either.
    """

    def __init__(self, device: Device, n_rooms: int, n_bytes: int) -> None:
        """Allocate rooms of `n_bytes`: see `room_bytes`. Their memory is touched when written.

        Raises:
            CapacityError: the device has not that much.
        """
        self._device = device
        self.n_bytes = n_bytes
        self._buffers: list[Buffer] = []
        self._descriptors: Descriptors | None = None
        self.tensors: dict[str, Tensor] = {}
        self.sinks: dict[int, SlotSink] = {}
        """By unit number; a sink's parts are the unit's stretches."""
        try:
            for _ in range(n_rooms):
                buffer = device.allocate(n_bytes)
                self._buffers.append(buffer)
                ggml().ggml_backend_buffer_set_usage(buffer.pointer, api.USAGE_WEIGHTS)
        except BaseException:
            self.close()
            raise

    def settle(self, units: Sequence[Unit]) -> None:
        """Give the tensors of these units, and of no others, their places."""
        self._unsettle()
        n_tensors = sum(len(unit.parts) + len(unit.stretches) for unit in units)
        self._descriptors = Descriptors(n_tensors)
        for j, unit in enumerate(units):
            buffer = self._buffers[j % len(self._buffers)]
            self.sinks[unit.number] = self._settle(self._descriptors, unit, buffer)

    def close(self) -> None:
        """Free the rooms; safe to call twice."""
        self._unsettle()
        for buffer in reversed(self._buffers):
            buffer.free()
        self._buffers.clear()

    def _unsettle(self) -> None:
        self.sinks.clear()
        self.tensors.clear()
        if self._descriptors is not None:
            self._descriptors.free()
            self._descriptors = None

    def _settle(self, descriptors: Descriptors, unit: Unit, buffer: Buffer) -> SlotSink:
        """Place a unit's tensors in its room, stretch behind stretch."""
        targets: list[Tensor] = []
        views: list[memoryview | None] = []
        at = -(-buffer.base // mmap.PAGESIZE) * mmap.PAGESIZE
        for stretch in unit.stretches:
            for name, info in stretch.parts:
                tensor = new_tensor(descriptors, info.type, info.ne, name)
                place(tensor, buffer, at + info.offset - stretch.offset)
                self.tensors[name] = tensor
            infos = [part.info for part in stretch.parts]
            if mirrors(self._device, infos):
                target = new_tensor(descriptors, GGMLType.I8, (stretch.nbytes,), "stretch")
                place(target, buffer, at)
                views.append(_view(at, stretch.nbytes))
            else:
                target = self.tensors[stretch.parts[0].name]
                views.append(None)
            targets.append(target)
            at += stretch.room_bytes
        return SlotSink(targets, views)


def _view(address: int, nbytes: int) -> memoryview:
    """View host memory."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
