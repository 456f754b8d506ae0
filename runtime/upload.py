"""Bytes on their way to a device: from host memory into tensors, before a graph reads them.

Where a device queues copies and has events, bytes go through a ring of staging buffers: the host
fills one while the device still copies from another. Elsewhere each copy ends before `send` does.
"""

import ctypes
import time
from typing import Final

import numpy as np

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.tensor import get_bytes

STAGING_BYTES: Final = 16 << 20
"""Host memory that bytes on their way take by default."""
_N_STAGING: Final = 4
_ALIGNMENT: Final = 64
_LEAST_BYTES: Final = 1 << 16  # below this a staging buffer saves less than its events cost


class Uploader(Closing):
    """Copies host memory into tensors of one device. Not thread-safe: one thread owns it.

    `send` may return before the bytes are there; `finish` waits for all of them. What a graph
    on the same device computes after `send` sees them in any case: its queue waits for the copy.
    The old bytes must not be in use by a graph that was begun and not ended, and who reads the
    new ones otherwise than by a graph calls `finish` first.

    Attributes:
        n_bytes: bytes sent so far.
        seconds: what the caller waited for in `send` and `finish`, altogether.
        staging_bytes: host memory that is held; 0 where copies need none.
        pinned: whether that is memory which the device copies from more quickly.
    """

    def __init__(self, device: Device, staging_bytes: int = STAGING_BYTES) -> None:
        """Prepare; at most `staging_bytes` of host memory are held for bytes on their way.

        A device whose memory is the host's needs none, and one without events cannot use any.
        Where no memory can be had either, copies end before `send` does.
        """
        self._device = device
        self.n_bytes = 0
        self.seconds = 0.0
        self._second: int | None = None
        self._ring: list[_Staging] = []
        self._now = 0  # the buffer that is being filled
        self._last: Tensor | None = None  # what was sent to, since the latest `finish`
        info, each = device.info, staging_bytes // _N_STAGING // _ALIGNMENT * _ALIGNMENT
        if info.asynchronous and info.events and not info.unified and each >= _LEAST_BYTES:
            self._ring = _make_ring(device, each)
        self.staging_bytes = sum(staging.n_bytes for staging in self._ring)
        self.pinned = bool(self._ring) and all(staging.pinned for staging in self._ring)
        if self._ring:
            self._second = device.second_backend()
        self._queue = self._second or device.backend

    def send(self, tensor: Tensor, at: int, data: memoryview) -> None:
        """Copy `data` to offset `at` of a tensor; it may be overwritten when this returns.

        It lies within the tensor, or ggml ends the process.
        """
        if not data.nbytes:
            return
        began = time.perf_counter()
        address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        if self._ring:
            self._stage(tensor, at, address, data.nbytes)
        else:
            ggml().ggml_backend_tensor_set(tensor, address, at, data.nbytes)
        self._last = tensor
        self.n_bytes += data.nbytes
        self.seconds += time.perf_counter() - began

    def _stage(self, tensor: Tensor, at: int, address: int, n_bytes: int) -> None:
        """Copy into staging buffers and queue the copies from there."""
        g, done = ggml(), 0
        staging = self._ring[self._now]
        while done < n_bytes:
            if not staging.n_free:
                self._now = (self._now + 1) % len(self._ring)
                staging = self._ring[self._now]
                staging.wait()
            part = min(n_bytes - done, staging.n_free)
            source = staging.fill(address + done, part)
            g.ggml_backend_tensor_set_async(self._queue, tensor, source, at + done, part)
            g.ggml_backend_event_record(staging.event, self._queue)
            done += part
        if self._second is not None:  # queued copies end in their order: the last stands for all
            g.ggml_backend_event_wait(self._device.backend, staging.event)

    def finish(self) -> None:
        """Wait until everything that was sent is there.

        Raises:
            DeviceLostError: the device is gone.
        """
        began = time.perf_counter()
        if self._ring:
            ggml().ggml_backend_synchronize(self._queue)
            for staging in self._ring:
                staging.clear()
        if self._device.link is not None and self._last is not None:
            # To ggml a copy to another process has ended when it is on its way; what is asked
            # for behind it is answered when it is there.
            get_bytes(self._last, np.empty(1, np.uint8))
        self._last = None
        self.seconds += time.perf_counter() - began
        self._device.check()

    def close(self) -> None:
        """Wait, then free the staging memory and the queue; safe to call twice."""
        if self._ring:
            ggml().ggml_backend_synchronize(self._queue)
        for staging in self._ring:
            staging.close()
        self._ring = []
        if self._second is not None:
            ggml().ggml_backend_free(self._second)
            self._second = None


def _make_ring(device: Device, n_bytes: int) -> "list[_Staging]":
    """Make the staging buffers, all or none: without memory or events copies do not overlap."""
    ring: list[_Staging] = []
    try:
        for _ in range(_N_STAGING):
            ring.append(_Staging(device, n_bytes))
    except (CapacityError, MemoryError):
        for staging in ring:
            staging.close()
        return []
    return ring


class _Staging:
    """One staging buffer, and the event behind the last copy that was queued from it."""

    def __init__(self, device: Device, n_bytes: int) -> None:
        """Take pinned memory where the device has any, else the process's own.

        Raises:
            CapacityError: the device has no event left.
            MemoryError: the process has no memory.
        """
        g = ggml()
        self.n_bytes = n_bytes
        self._n_filled = 0
        self._held: Buffer | None = None
        kind = g.ggml_backend_dev_host_buffer_type(device.info.pointer)
        if device.info.pinned and kind is not None:
            pointer = g.ggml_backend_buft_alloc_buffer(kind, n_bytes)
            self._held = None if pointer is None else Buffer(pointer)
        self._own = np.empty(0 if self._held is not None else n_bytes, np.uint8)
        self._base = self._own.ctypes.data if self._held is None else self._held.base
        event = g.ggml_backend_event_new(device.info.pointer)
        if event is None:
            self._free_memory()
            raise CapacityError(f"device {device.info.name} has no event left for an upload")
        self.event = event

    @property
    def pinned(self) -> bool:
        """Whether its memory is the device's kind of host memory."""
        return self._held is not None

    @property
    def n_free(self) -> int:
        """Bytes that can be filled without a wait."""
        return self.n_bytes - self._n_filled

    def fill(self, address: int, n_bytes: int) -> int:
        """Copy host memory behind what is there already, and return where it lies now."""
        place = self._base + self._n_filled
        ctypes.memmove(place, address, n_bytes)
        padded = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        self._n_filled = min(self.n_bytes, self._n_filled + padded)
        return place

    def wait(self) -> None:
        """Wait until nothing is copied from here any more; then it is empty."""
        if self._n_filled:  # not every backend lets one wait for an event that was never recorded
            ggml().ggml_backend_event_synchronize(self.event)
        self.clear()

    def clear(self) -> None:
        """Empty it, when its copies have ended."""
        self._n_filled = 0

    def close(self) -> None:
        """Free memory and event, when its copies have ended."""
        ggml().ggml_backend_event_free(self.event)
        self._free_memory()

    def _free_memory(self) -> None:
        if self._held is not None:
            self._held.free()
