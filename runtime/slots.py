"""Slots: room on a device for many pages of one shape, as tensors that a graph indexes.

A page has parts (an expert's gate, up and down). Each part of every slot lies in one tensor
[n_in, n_out, n_slots], which `ggml_mul_mat_id` addresses by slot number.
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from edgeroute.runtime import host_memory
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.tensor import Descriptors, new_tensor, place

BLOCK_BYTES: Final = 4096
"""Direct reads begin and end at multiples of this, or of a divisor of it, on nearly all disks."""
SECTOR_BYTES: Final = 512
IN_PLACE_MIN_BYTES = 256 << 10
"""Parts from here on get slack to be read into; shorter ones are better read several at once."""


def stride_bytes(nbytes: int) -> int:
    """Return the bytes from one slot's part of `nbytes` to the next.

    A slot begins at a block and has slack, so that a part can lie as far behind a block's
    border as it does in its file, and whole blocks be read into the slot without a copy.
    Slices of which the later ones lie otherwise than the first get none: nothing is gained.
    """
    if nbytes < IN_PLACE_MIN_BYTES or nbytes % SECTOR_BYTES:
        return nbytes
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


class Landing(NamedTuple):
    """Memory that a part can be read into: it begins at `lead`, and what lies around it in
    `memory` may be overwritten."""

    memory: memoryview
    lead: int


class Slots(Closing):
    """The slot tensors of one pool. Memory is touched when a slot is first written.

    Lifetime: tensors and sinks are valid until `close`; close the I/O threads first.
    """

    def __init__(
        self, device: Device, layers: Sequence[Sequence[TensorInfo]], n_slots: int
    ) -> None:
        """Reserve address space for `n_slots` slots.

        Args:
            device: where to.
            layers: for each layer its tensors [n_in, n_out, n_expert] of the file, one per
                part, alike in type and shape over all layers; slots hold their slices in the
                layout that they have there. A repacked layout would make a token's arithmetic
                quicker by a quarter, but a prompt's slower by 40 %, and every load dearer: see
                BENCHLOG, 2026-11-22.
            n_slots: how many.

        Raises:
            CapacityError: the device has not that much.
        """
        self.n_slots = n_slots
        infos = layers[0]
        self._sizes = [info.nbytes // info.ne[2] for info in infos]
        self._on_host = device.info.host_pointers
        self._strides = [stride_bytes(n) if self._on_host else n for n in self._sizes]
        leads = {self._leads(layer) for layer in layers}
        self._descriptors = Descriptors(len(infos) * len(leads))
        self._buffers: list[Buffer] = []
        self._bases: list[int] = []
        self._tensors: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self._sinks: dict[int, SlotSink] = {}
        self._infos = tuple(infos)
        try:
            for part in range(len(infos)):
                self._reserve(device, part)
            for each in leads:
                self._tensors[each] = self._make_tensors(each)
        except BaseException:
            self.close()
            raise

    def _leads(self, layer: Sequence[TensorInfo]) -> tuple[int, ...]:
        """Bytes from a slot's begin to that of each part, for experts of one layer."""
        return tuple(
            info.offset % BLOCK_BYTES if stride > size else 0
            for info, stride, size in zip(layer, self._strides, self._sizes, strict=True)
        )

    def _reserve(self, device: Device, part: int) -> None:
        n_bytes = self._strides[part] * self.n_slots + BLOCK_BYTES  # and what aligns the first
        buffer = device.allocate(n_bytes)
        ggml().ggml_backend_buffer_set_usage(buffer.pointer, api.USAGE_WEIGHTS)
        self._buffers.append(buffer)
        # A device's own memory is aligned as it needs; the block behind the last slot is then
        # what it may want to pad the tensor with.
        base = buffer.base
        self._bases.append(-(-base // BLOCK_BYTES) * BLOCK_BYTES if self._on_host else base)

    def _make_tensors(self, leads: Sequence[int]) -> tuple[Tensor, ...]:
        made = []
        for part, info in enumerate(self._infos):
            ne = (*info.ne[:2], self.n_slots)
            tensor = new_tensor(self._descriptors, info.type, ne, "slots")
            struct, stride = TensorStruct.from_address(tensor), self._strides[part]
            struct.nb[2], struct.nb[3] = stride, stride * self.n_slots
            place(tensor, self._buffers[part], self._bases[part] + leads[part])
            made.append(tensor)
        return tuple(made)

    def tensors(self, layer: Sequence[TensorInfo]) -> tuple[Tensor, ...]:
        """Return the slot tensors, one per part, through which experts of a layer are seen."""
        return self._tensors[self._leads(layer)]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot over all parts."""
        return sum(self._strides)

    def sink(self, slot: int, layer: Sequence[TensorInfo]) -> "SlotSink | HostSink":
        """Return what writes experts of a layer into a slot.

        Engine thread only; its methods from any.
        """
        if self._on_host:
            return HostSink([
                (self._address(slot, part), self._strides[part], lead, self._sizes[part])
                for part, lead in enumerate(self._leads(layer))
            ])  # fmt: skip
        sink = self._sinks.get(slot)
        if sink is None:
            sink = self._sinks[slot] = self._make_sink(slot)
        return sink

    @property
    def n_bytes(self) -> int:
        """Bytes of the device that they take in all."""
        return sum(buffer.n_bytes for buffer in self._buffers)

    def view(self, slot: int, layer: Sequence[TensorInfo], part: int) -> memoryview:
        """Return the bytes of a part of a layer's expert where its slot has them: host memory only.

        Lifetime: they are the expert's until the slot is written again.
        """
        assert self._on_host, "slots of a device have no memory of this process"
        return _view(self._address(slot, part) + self._leads(layer)[part], self._sizes[part])

    def offset(self, slot: int, part: int) -> int:
        """Return where a slot begins in the tensor of a part, in bytes."""
        return slot * self._strides[part]

    def give_back(self, slots: Iterable[int]) -> int:
        """Return the memory of slots that hold nothing to the system, where it can be done.

        They may be written again later. Returns the bytes given back.
        """
        done = 0
        if self._on_host:
            for slot in slots:
                for part in range(len(self._infos)):
                    done += host_memory.give_back(self._address(slot, part), self._strides[part])
        return done

    def close(self) -> None:
        """Free the tensors; safe to call twice."""
        self._sinks.clear()
        self._tensors.clear()
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
        self._descriptors.free()

    def _address(self, slot: int, part: int) -> int:
        return self._bases[part] + slot * self._strides[part]

    def _make_sink(self, slot: int) -> "SlotSink":
        """Make what writes into the tensors of all slots.

        A tensor of one slot would not do: some devices clear what lies behind a tensor when it
        is placed, and there the next slot begins. Source: ggml-cuda.cu, init_tensor.
        """
        (tensors,) = self._tensors.values()  # no part has a lead there
        offsets = [self.offset(slot, part) for part in range(len(tensors))]
        return SlotSink(tensors, [None] * len(tensors), offsets)


class HostSink:
    """Writes one page into its slot in host memory; from any thread, one page at a time."""

    whole_parts = False

    def __init__(self, parts: Sequence[tuple[int, int, int, int]]) -> None:
        """Take for each part its slot's address and bytes, the part's lead in it, and size."""
        self._parts = parts

    def destination(self, part: int) -> Landing:
        """Return the slot's own memory for a part, where the file's bytes go as they are."""
        address, stride, lead, _ = self._parts[part]
        return Landing(_view(address, stride), lead)

    def write(self, part: int, at: int, data: memoryview) -> None:
        """Copy bytes of a part."""
        address, _, lead, size = self._parts[part]
        assert 0 <= at <= at + data.nbytes <= size
        source: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        ctypes.memmove(address + lead + at, source, data.nbytes)


class SlotSink:
    """Writes one page, part by part, into tensors; from any thread, one page at a time."""

    whole_parts = False

    def __init__(
        self, parts: Sequence[Tensor], views: Sequence[memoryview | None],
        offsets: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Take each part's tensor, its memory where the host can write it, and where it begins."""
        self._parts = parts
        self._views = views
        self._offsets = offsets or [0] * len(parts)

    def destination(self, part: int) -> Landing | None:
        """Return the tensor's own memory, where the file's bytes go there as they are."""
        view = self._views[part]
        return None if view is None else Landing(view, 0)

    def write(self, part: int, at: int, data: memoryview) -> None:
        """Copy bytes of a part, in the file's layout."""
        address = np.frombuffer(data, np.uint8).ctypes.data
        at += self._offsets[part]
        ggml().ggml_backend_tensor_set(self._parts[part], address, at, data.nbytes)


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
