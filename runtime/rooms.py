"""Rooms: memory that groups of weights use in turn, and the seam to whoever fills them.

A unit is what comes and goes as a whole: the matrices of one layer, or of the output head.
Every unit has tensors of its own at fixed addresses in one room, so that graphs stay valid
while a room's bytes change; units that share a room need not have equal shapes or types.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.slots import SlotSink
from edgeroute.runtime.tensor import Descriptors, new_tensor, place
from edgeroute.runtime.weights import TensorSpec, Weights, supports_product


class LayerPager(Weights, Protocol):
    """Weights of which some layers come and go. One thread owns it.

    Units have their layer's number; the output head that of the layer after the last.
    """

    streamed: frozenset[int]
    """Units that must be held while they are computed with; all others are always there."""

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
    """One tensor of a unit: its name in the model, its place on disk, and where it goes.

    `room_bytes` is what it takes in a room, alignment included.
    """

    name: str
    info: TensorInfo
    buffer_type: int
    repacked: bool
    room_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is read and let go as a whole."""

    number: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, resident or in a room."""
        return sum(part.room_bytes for part in self.parts)

    @property
    def read_bytes(self) -> int:
        """Bytes in the file."""
        return sum(part.info.nbytes for part in self.parts)


def make_unit(device: Device, number: int, pairs: Sequence[tuple[TensorSpec, TensorInfo]]) -> Unit:
    """Choose where a unit's tensors go: as ResidentWeights does, so that bits are equal."""
    return Unit(number=number, parts=tuple(_part(device, spec, info) for spec, info in pairs))


def _part(device: Device, spec: TensorSpec, info: TensorInfo) -> Part:
    g = ggml()
    extra = (kind for kind in device.extra_buffer_types if supports_product(device, kind, info))
    kind = next(extra, None)
    home = kind or device.buffer_type
    described = Descriptors(1)
    try:
        size = g.ggml_backend_buft_get_alloc_size(
            home, new_tensor(described, info.type, info.ne, spec.name)
        )
    finally:
        described.free()
    align = max(g.ggml_backend_buft_get_alignment(each) for each in (home, device.buffer_type))
    return Part(spec.name, info, home, kind is not None, -(-size // align) * align)


def room_bytes(device: Device, units: Sequence[Unit]) -> int:
    """Return the bytes of a room that any one of `units` fits in."""
    return sum(_area_bytes(units, _areas(device, units)).values())


def _areas(device: Device, units: Sequence[Unit]) -> dict[int, int]:
    """Map each buffer type that units use to the area of a room that serves it.

    A repacking type's memory is plain host memory on the CPU: one such area serves plain
    tensors too, so that a unit needs no more room than its sum.
    """
    kinds = {part.buffer_type for unit in units for part in unit.parts}
    repacking = [kind for kind in kinds if kind != device.buffer_type]
    if device.info.host_pointers and len(repacking) == 1:
        return dict.fromkeys(kinds, repacking[0])
    return {kind: kind for kind in kinds}


def _area_bytes(units: Sequence[Unit], areas: dict[int, int]) -> dict[int, int]:
    """Bytes of each area: what the unit that needs most of it needs."""
    most = dict.fromkeys(areas.values(), 0)
    for unit in units:
        for area in most:
            used = sum(p.room_bytes for p in unit.parts if areas[p.buffer_type] == area)
            most[area] = max(most[area], used)
    return most


class Load(NamedTuple):
    """Tensors of a unit that are read through one sink; a sink's parts count from 0."""

    infos: tuple[TensorInfo, ...]
    sink: SlotSink


class Rooms(Closing):
    """A ring of rooms and the tensors of every unit: unit j has room j mod n_rooms.

    Lifetime: tensors and sinks are valid until `close`; close the I/O threads first.
    """

    def __init__(self, device: Device, units: Sequence[Unit], n_rooms: int) -> None:
        """Allocate the rooms; memory is touched when a room is first written.

        Raises:
            CapacityError: the device has not that much.
        """
        self._device = device
        self._areas = _areas(device, units)
        self._sizes = _area_bytes(units, self._areas)
        self._descriptors = Descriptors(sum(len(unit.parts) for unit in units))
        self._buffers: list[Buffer] = []
        self.tensors: dict[str, Tensor] = {}
        self.loads: dict[int, tuple[Load, ...]] = {}
        """By unit number: plain tensors through one sink, repacked ones through another."""
        try:
            rooms = [self._add_room() for _ in range(n_rooms)]
            for j, unit in enumerate(units):
                self._settle(unit, rooms[j % n_rooms])
        except BaseException:
            self.close()
            raise

    @property
    def n_bytes(self) -> int:
        """Bytes of one room."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Free the rooms; safe to call twice."""
        self.loads.clear()
        self.tensors.clear()
        for buffer in reversed(self._buffers):
            buffer.free()
        self._buffers.clear()
        self._descriptors.free()

    def _add_room(self) -> dict[int, Buffer]:
        """Allocate one room: a buffer for each buffer type, some over the same memory."""
        found: dict[int, Buffer] = {}
        for area, n_bytes in self._sizes.items():
            found[area] = self._keep(self._device.allocate(n_bytes, area))
        for kind, area in self._areas.items():
            if kind == area:
                continue
            shared = self._device.wrap_host_memory(
                found[area].base, self._sizes[area], self._sizes[area]
            )
            if shared is None:
                raise CapacityError(
                    f"device {self._device.info.name} refused to share a room of "
                    f"{self._sizes[area]} bytes between plain and repacked weights"
                )
            found[kind] = self._keep(shared)
        return found

    def _keep(self, buffer: Buffer) -> Buffer:
        self._buffers.append(buffer)
        ggml().ggml_backend_buffer_set_usage(buffer.pointer, api.USAGE_WEIGHTS)
        return buffer

    def _settle(self, unit: Unit, room: dict[int, Buffer]) -> None:
        """Place a unit's tensors in its room, one after the other."""
        ends = dict.fromkeys(self._sizes, 0)
        for part in unit.parts:
            tensor = new_tensor(self._descriptors, part.info.type, part.info.ne, part.name)
            area, buffer = self._areas[part.buffer_type], room[part.buffer_type]
            place(tensor, buffer, buffer.base + ends[area])
            ends[area] += part.room_bytes
            self.tensors[part.name] = tensor
        groups = [[p for p in unit.parts if p.repacked == repacked] for repacked in (False, True)]
        self.loads[unit.number] = tuple(self._load(parts) for parts in groups if parts)

    def _load(self, parts: Sequence[Part]) -> Load:
        repacked = parts[0].repacked
        tensors = [self.tensors[part.name] for part in parts]
        views: list[memoryview | None] = [None] * len(parts)
        if self._device.info.host_pointers and not repacked:
            views = [
                _view(tensor, part.info.nbytes) for tensor, part in zip(tensors, parts, strict=True)
            ]
        return Load(tuple(part.info for part in parts), SlotSink(tensors, views, repacked))


def _view(tensor: Tensor, nbytes: int) -> memoryview:
    """View a placed tensor's own host memory."""
    address: int | None = TensorStruct.from_address(tensor).data
    assert address is not None
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
