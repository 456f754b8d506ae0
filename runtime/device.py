"""Devices and buffers through ggml's backend interface.

Nothing here assumes that a tensor's memory is host memory: bytes go in and out through
`ggml_backend_tensor_set` and `_get` only.
"""

import ctypes
import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Self

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CapacityError, ComputeError, LibraryError, UsageError
from edgeroute.runtime.ggml import api, structs
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.ggml.lib import libraries
from edgeroute.runtime.stop_flag import StopFlag
from edgeroute.runtime.unified import shares_memory
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.runtime.rpc_link import RpcLink

RPC_PREFIX: Final = "rpc:"
_KINDS = {
    api.DEVICE_CPU: "cpu",
    api.DEVICE_GPU: "gpu",
    api.DEVICE_IGPU: "igpu",
    api.DEVICE_ACCEL: "accel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What ggml says about one device. Memory in bytes; 0 where the backend does not know.

    Attributes:
        kind: cpu, gpu, igpu (shares the host's memory), accel or other.
        memory_free_bytes: when this was read; `Device.memory` asks again.
        host_pointers: buffers can be made of host memory, without a copy.
        asynchronous: copies and graphs are queued, and waited for when that is asked.
        events: places in such a queue can be waited for, by the host and by other queues.
        pinned: there is host memory that it copies from more quickly.
        unified: its memory is the host's: see runtime/unified.py.
    """

    name: str
    description: str
    kind: str
    memory_free_bytes: int
    memory_total_bytes: int
    host_pointers: bool
    pointer: int
    asynchronous: bool
    events: bool
    pinned: bool
    unified: bool


def _drop(level: int, text: bytes, user: int | None) -> None:
    """Drop one log line."""


_SILENT = structs.LOG_CALLBACK(_drop)  # ggml keeps the pointer: it must live as long as we do


@functools.cache
def _load_backends() -> None:
    """Make sure that a CPU device is registered; builds with loadable backends need a search."""
    g = ggml()
    # Wrong tokens on an H100 came from the first single-token attention of a layer, behind a rope:
    # ggml starts both before their predecessors have ended (BENCHLOG, 2026-11-23). It asks once.
    os.environ.setdefault("GGML_CUDA_PDL", "0")
    # ggml prints to stderr by default; what matters reaches the user as an exception.
    g.ggml_log_set(ctypes.cast(_SILENT, ctypes.c_void_p), None)
    if g.ggml_backend_dev_by_type(api.DEVICE_CPU) is None:
        g.ggml_backend_load_all_from_path(str(libraries().folder).encode())
    if g.ggml_backend_dev_by_type(api.DEVICE_CPU) is None:
        raise LibraryError(
            f"ggml in {libraries().folder} offers no CPU device for {platform.machine()}; "
            "reinstall llama-cpp-python for this machine"
        )


def devices() -> list[DeviceInfo]:
    """List every device of every registered backend."""
    _load_backends()
    g = ggml()
    return [_info(g.ggml_backend_dev_get(i)) for i in range(g.ggml_backend_dev_count())]


def _info(pointer: int) -> DeviceInfo:
    g, props = ggml(), structs.DevProps()
    g.ggml_backend_dev_get_props(pointer, ctypes.byref(props))
    reg = g.ggml_backend_reg_name(g.ggml_backend_dev_backend_reg(pointer)) or b"?"
    kind = _KINDS.get(props.type, "other")
    host_pointers = bool(props.caps.buffer_from_host_ptr)
    return DeviceInfo(
        name=(props.name or b"?").decode(errors="replace"),
        description=(props.description or b"?").decode(errors="replace"),
        kind=kind,
        memory_free_bytes=props.memory_free,
        memory_total_bytes=props.memory_total,
        host_pointers=host_pointers,
        pointer=pointer,
        asynchronous=bool(props.caps.async_),
        events=bool(props.caps.events),
        pinned=bool(props.caps.host_buffer),
        unified=shares_memory(kind, host_pointers, reg.decode(errors="replace")),
    )


class Buffer:
    """A ggml buffer: memory of one buffer type on one device.

    Lifetime: tensors placed in it are valid until `free`.
    """

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer
        self.n_bytes = ggml().ggml_backend_buffer_get_size(pointer)

    @property
    def base(self) -> int:
        """Address of the first byte, in the device's address space."""
        return ggml().ggml_backend_buffer_get_base(self.pointer)

    def free(self) -> None:
        """Give the memory back; safe to call twice."""
        if self.pointer:
            ggml().ggml_backend_buffer_free(self.pointer)
            self.pointer = 0


class Device(Closing):
    """One backend instance: it allocates buffers and computes graphs.

    Not thread-safe: one thread owns it. Close it after everything allocated from it.
    """

    def __init__(self, info: DeviceInfo, link: "RpcLink | None" = None) -> None:
        """Open it; a device behind a `link`, which it then owns, is one of another process."""
        g = ggml()
        self.link = link
        backend = g.ggml_backend_dev_init(info.pointer, None)
        if backend is None:
            raise LibraryError(f"ggml could not open device {info.name}")
        self.info = info
        self._backend = backend
        self.buffer_type = g.ggml_backend_dev_buffer_type(info.pointer)
        reg = g.ggml_backend_dev_backend_reg(info.pointer)
        self._set_threads = self._proc(
            reg, b"ggml_backend_set_n_threads", None, (ctypes.c_void_p, ctypes.c_int)
        )
        self._set_abort = self._proc(
            reg, b"ggml_backend_set_abort_callback", None,
            (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        )  # fmt: skip
        self.stop_flag = StopFlag()
        self.extra_buffer_types = self._find_extra_buffer_types(reg)
        self.n_threads = 0
        self._begun = api.STATUS_SUCCESS
        self.beat = time.monotonic()
        """When it last ended a computation, for whoever watches from another thread."""

    @classmethod
    def open(cls, name: str = "cpu") -> Self:
        """Open a device by ggml's name for it, by kind (`cpu`, `gpu`), or as `rpc:host:port`.

        Raises:
            UsageError: no such device; the message lists those there are.
            DeviceLostError: nobody answers at an RPC address.
        """
        if name.startswith(RPC_PREFIX):
            return cls._open_rpc(name)
        found, want = devices(), name.lower()
        kinds = ("gpu", "igpu") if want == "gpu" else (want,)
        alike = [info for info in found if info.name.lower() == want]
        alike += [info for kind in kinds for info in found if info.kind == kind]
        if alike:
            return cls(alike[0])
        names = ", ".join(info.name for info in found)
        raise UsageError(f"there is no device {name!r} here; ggml offers: {names}")

    @classmethod
    def _open_rpc(cls, name: str) -> Self:
        # Imported here: a program on its own processor should not wait for sockets.
        from edgeroute.runtime.rpc_link import RpcLink

        _load_backends()
        link = RpcLink.open(name)
        try:
            info = _info(link.devices()[0])
            link.check()
            # ggml describes it by our end of the connection, which is another each time.
            told = replace(info, name=f"{RPC_PREFIX}{link.address}", unified=False,
                           description=f"device of {link.address}")  # fmt: skip
            return cls(told, link)
        except BaseException:
            link.close()
            raise

    def check(self) -> None:
        """Raise DeviceLostError where the device is gone; what was read from it since is void."""
        if self.link is not None:
            self.link.check()

    @property
    def backend(self) -> int:
        """ggml's pointer of the instance that computes, which is also a queue of its own."""
        return self._backend

    def second_backend(self) -> int | None:
        """Make another instance: a queue for copies beside that of graphs.

        Returns:
            None where the device has one queue for all. The caller frees the instance.
        """
        if self.link is not None or not (self.info.asynchronous and self.info.events):
            return None
        return ggml().ggml_backend_dev_init(self.info.pointer, None)

    @property
    def is_cpu(self) -> bool:
        """Whether it is this machine's processor."""
        return self.info.kind == "cpu" and self.link is None

    @staticmethod
    def _proc(
        reg: int, name: bytes, result: object, args: tuple[object, ...]
    ) -> Callable[..., object] | None:
        address = ggml().ggml_backend_reg_get_proc_address(reg, name)
        if address is None:
            return None
        return ctypes.CFUNCTYPE(result, *args)(address)  # type: ignore[arg-type]

    def _find_extra_buffer_types(self, reg: int) -> tuple[int, ...]:
        """Ask for buffer types that hold weights in another layout, such as CPU repacking."""
        get = self._proc(reg, b"ggml_backend_dev_get_extra_bufts",
                         ctypes.POINTER(ctypes.c_void_p), (ctypes.c_void_p,))  # fmt: skip
        if get is None:
            return ()
        array: Any = get(self.info.pointer)
        found: list[int] = []
        while array and (pointer := array[len(found)]):
            found.append(pointer)
        return tuple(found)

    def buffer_type_name(self, buffer_type: int) -> str:
        """Name a buffer type as ggml does: `CPU`, `CPU_REPACK`."""
        return (ggml().ggml_backend_buft_name(buffer_type) or b"?").decode(errors="replace")

    def memory(self) -> tuple[int, int]:
        """Ask for its memory as it is now: bytes free, bytes in all; 0 where it does not know.

        Raises:
            DeviceLostError: the device is gone.
        """
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml().ggml_backend_dev_memory(self.info.pointer, ctypes.byref(free), ctypes.byref(total))
        self.check()
        return free.value, total.value

    def allocate(self, n_bytes: int, buffer_type: int | None = None) -> Buffer:
        """Allocate a buffer.

        Raises:
            CapacityError: the device has not that much memory; nothing was allocated.
        """
        pointer = ggml().ggml_backend_buft_alloc_buffer(buffer_type or self.buffer_type, n_bytes)
        self.check()
        if pointer is None:
            raise CapacityError(
                f"device {self.info.name} could not allocate {format_bytes(n_bytes)}; "
                "close other programs, or use a smaller model or context"
            )
        return Buffer(pointer)

    def wrap_host_memory(self, address: int, n_bytes: int, max_tensor_bytes: int) -> Buffer | None:
        """Use host memory, such as a mapped file, as a buffer without a copy.

        Returns:
            None where the device cannot; the caller copies instead.

        Lifetime: the memory must stay mapped until the buffer is freed.
        """
        if not self.info.host_pointers:
            return None
        pointer = ggml().ggml_backend_dev_buffer_from_host_ptr(
            self.info.pointer, address, n_bytes, max_tensor_bytes
        )
        return None if pointer is None else Buffer(pointer)

    def set_threads(self, n_threads: int) -> None:
        """Set how many threads the next computation uses; devices without threads ignore it."""
        if n_threads != self.n_threads:
            if self._set_threads is not None:
                self._set_threads(self._backend, n_threads)
            self.n_threads = n_threads

    def watch_stop_flag(self, on: bool) -> None:
        """Let `stop_flag` stop the computations that follow, before their next operation."""
        if self._set_abort is not None:
            flag = self.stop_flag
            self._set_abort(self._backend, flag.callback if on else None, flag.address)

    def compute(self, graph: int) -> bool:
        """Compute a graph and wait for it.

        Returns:
            False when `stop_flag` stopped it; its outputs are undefined then. A device without
            a way to stop ends what it began: whoever computes several graphs looks at the flag
            in between.

        Raises:
            ComputeError: ggml reported a failure.
            DeviceLostError: the device is gone.
        """
        return self._ended(ggml().ggml_backend_graph_compute(self._backend, graph))

    def compute_begin(self, graph: int) -> None:
        """Begin to compute a graph; the host may work on other things until `compute_end`.

        A device that queues nothing computes it here. Until `compute_end` nobody may write what
        the graph reads, nor read what it writes; more graphs may be begun, which follow it.
        """
        status = ggml().ggml_backend_graph_compute_async(self._backend, graph)
        if self._begun == api.STATUS_SUCCESS:
            self._begun = status

    def compute_end(self) -> bool:
        """Wait for every graph that was begun; see `compute` for what it returns and raises."""
        ggml().ggml_backend_synchronize(self._backend)
        status, self._begun = self._begun, api.STATUS_SUCCESS
        return self._ended(status)

    def _ended(self, status: int) -> bool:
        self.beat = time.monotonic()
        self.check()
        if status == api.STATUS_ABORTED:
            return False
        if status != api.STATUS_SUCCESS:
            raise ComputeError(
                f"ggml could not compute a graph on {self.info.name}: status {status}"
            )
        return True

    def close(self) -> None:
        """Free the backend; safe to call twice."""
        if self._backend:
            ggml().ggml_backend_free(self._backend)
            self._backend = 0
        if self.link is not None:
            self.link.close()
