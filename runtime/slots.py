"""Slots: room on a device for many pages of one shape, as tensors that a graph indexes.

A page has parts (an expert's gate, up and down). Each part of every slot lies in one tensor
[n_in, n_out, n_slots], which `ggml_mul_mat_id` addresses by slot number.
"""

import ctypes
from collections.abc import Iterable, Sequence

import numpy as np

from edgeroute.runtime import host_memory
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.tensor import Descriptors, new_tensor, place, place_all


class Slots(Closing):
    """The slot tensors of one pool. Memory is touched when a slot is first written.

    Lifetime: tensors and sinks are valid until `close`; close the I/O threads first.
    """

    def __init__(self, device: Device, infos: Sequence[TensorInfo], n_slots: int) -> None:
        """Reserve address space for `n_slots` slots.

        Args:
            device: where to.
            infos: tensors [n_in, n_out, n_expert] of the file, one per part, whose slices
                slots will hold in the layout that they have there. A repacked layout would
                make a token's arithmetic quicker by a quarter, but a prompt's slower by 40 %,
                and every load dearer: see BENCHLOG, 2026-11-22.
            n_slots: how many.

        Raises:
            CapacityError: the device has not that much.
        """
        self.n_slots = n_slots
        self._infos = tuple(infos)
        self._descriptors = Descriptors(len(infos) * (n_slots + 1))
        self._buffers: list[Buffer] = []
        self.tensors: list[Tensor] = []
        self._strides: list[int] = []
        self._sinks: dict[int, SlotSink] = {}
        self._direct = device.info.host_pointers
        try:
            for info in infos:
                self._add_part(device, info)
        except BaseException:
            self.close()
            raise

    def _add_part(self, device: Device, info: TensorInfo) -> None:
        n_in, n_out = info.ne[:2]
        tensor = new_tensor(self._descriptors, info.type, (n_in, n_out, self.n_slots), "slots")
        buffer = place_all([tensor], device)
        ggml().ggml_backend_buffer_set_usage(buffer.pointer, api.USAGE_WEIGHTS)
        self._buffers.append(buffer)
        self.tensors.append(tensor)
        self._strides.append(TensorStruct.from_address(tensor).nb[2])

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot over all parts."""
        return sum(self._strides)

    def sink(self, slot: int) -> "SlotSink":
        """Return what writes pages into a slot. Engine thread only; its methods from any."""
        sink = self._sinks.get(slot)
        if sink is None:
            sink = self._sinks[slot] = self._make_sink(slot)
        return sink

    def give_back(self, slots: Iterable[int]) -> int:
        """Return the memory of slots that hold nothing to the system, where it can be done.

        They may be written again later. Returns the bytes given back.
        """
        done = 0
        if self._direct:
            for slot in slots:
                for part in range(len(self._infos)):
                    done += host_memory.give_back(self._address(slot, part), self._strides[part])
        return done

    def close(self) -> None:
        """Free the tensors; safe to call twice."""
        self._sinks.clear()
        self.tensors.clear()
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
        self._descriptors.free()

    def _address(self, slot: int, part: int) -> int:
        data: int | None = TensorStruct.from_address(self.tensors[part]).data
        assert data is not None
        return data + slot * self._strides[part]

    def _make_sink(self, slot: int) -> "SlotSink":
        parts: list[Tensor] = []
        views: list[memoryview | None] = []
        for part, info in enumerate(self._infos):
            one = new_tensor(self._descriptors, info.type, info.ne[:2], "slot")
            address = self._address(slot, part)
            place(one, self._buffers[part], address)
            parts.append(one)
            nbytes = info.nbytes // info.ne[2]
            views.append(_view(address, nbytes) if self._direct else None)
        return SlotSink(parts, views, whole_parts=False)


class SlotSink:
    """Writes one page, part by part, into its slot; from any thread, one page at a time."""

    def __init__(
        self, parts: list[Tensor], views: list[memoryview | None], whole_parts: bool
    ) -> None:
        self._parts = parts
        self._views = views
        self.whole_parts = whole_parts

    def destination(self, part: int) -> memoryview | None:
        """Return the slot's own memory for a part, where the file's bytes go there as they are."""
        return self._views[part]

    def write(self, part: int, at: int, data: memoryview) -> None:
        """Copy bytes of a part, in the file's layout; a repacked part must come whole."""
        address = np.frombuffer(data, np.uint8).ctypes.data
        ggml().ggml_backend_tensor_set(self._parts[part], address, at, data.nbytes)


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
