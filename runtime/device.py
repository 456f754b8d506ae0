"""Devices and buffers through ggml's backend interface.

Nothing here assumes that a tensor's memory is host memory: bytes go in and out through
`ggml_backend_tensor_set` and `_get` only.
"""

import ctypes
import functools
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CapacityError, ComputeError, LibraryError, UsageError
from edgeroute.runtime.ggml import api, structs
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.ggml.lib import libraries
from edgeroute.runtime.rpc_link import PREFIX, RpcLink
from edgeroute.runtime.units import format_bytes

_KINDS = {
    api.DEVICE_CPU: "cpu",
    api.DEVICE_GPU: "gpu",
    api.DEVICE_IGPU: "igpu",
    api.DEVICE_ACCEL: "accel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What ggml says about one device. Memory in bytes; 0 where the backend does not know."""

    name: str
    description: str
    kind: str
    memory_free_bytes: int
    memory_total_bytes: int
    host_pointers: bool
    pointer: int


def _drop(level: int, text: bytes, user: int | None) -> None:
    """Drop one log line."""


_SILENT = structs.LOG_CALLBACK(_drop)  # ggml keeps the pointer: it must live as long as we do


@functools.cache
def _load_backends() -> None:
    """Make sure that a CPU device is registered; builds with loadable backends need a search."""
    g = ggml()
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
    props = structs.DevProps()
    ggml().ggml_backend_dev_get_props(pointer, ctypes.byref(props))
    return DeviceInfo(
        name=(props.name or b"?").decode(errors="replace"),
        description=(props.description or b"?").decode(errors="replace"),
        kind=_KINDS.get(props.type, "other"),
        memory_free_bytes=props.memory_free,
        memory_total_bytes=props.memory_total,
        host_pointers=bool(props.caps.buffer_from_host_ptr),
        pointer=pointer,
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


class StopFlag:
    """What a running computation asks before each operation; any thread may raise it.

    ggml asks a C function `bool f(void *)`. A Python function would take Python's lock a
    thousand times per batch, which costs 5 % of a prefill. Where the C library has semaphores
    of a process's own, sem_trywait answers: it takes one of many until there are none, so that
    what is left tells how far the computation is. Elsewhere strlen answers the same question
    about a string of length zero or one.
    """

    _MANY: Final = (1 << 31) - 1  # SEM_VALUE_MAX

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint64 * 8)()
        self.address = ctypes.addressof(self._memory)
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        # macOS has these functions too, but they always fail.
        self._library = library if sys.platform == "linux" else None
        ask = library.strlen if self._library is None else library.sem_trywait
        self.callback = ctypes.cast(ask, ctypes.c_void_p).value
        self._n_asked = 0  # before it was raised
        self.clear()

    def set(self) -> None:
        """Stop the computation that runs now, if it watches."""
        self._n_asked = self.n_asked
        self._put(1 if self._library is None else 0)

    def is_set(self) -> bool:
        """Whether it was raised and not lowered since."""
        return bool(self._memory[0]) if self._library is None else not self._left()

    def clear(self) -> None:
        """Let computations run."""
        self._put(0 if self._library is None else self._MANY)

    @property
    def n_asked(self) -> int:
        """Operations begun since it was lowered, where that is known; any thread may look."""
        if self._library is None or not (left := self._left()):
            return self._n_asked
        return self._MANY - left

    def _put(self, value: int) -> None:
        if self._library is None:
            self._memory[0] = value
        else:
            self._library.sem_init(ctypes.byref(self._memory), 0, value)

    def _left(self) -> int:
        left = ctypes.c_int()
        assert self._library is not None
        self._library.sem_getvalue(ctypes.byref(self._memory), ctypes.byref(left))
        return left.value


class Device(Closing):
    """One backend instance: it allocates buffers and computes graphs.

    Not thread-safe: one thread owns it. Close it after everything allocated from it.
    """

    def __init__(self, info: DeviceInfo, link: RpcLink | None = None) -> None:
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
        self.beat = time.monotonic()
        """When it last ended a computation, for whoever watches from another thread."""

    @classmethod
    def open(cls, name: str = "cpu") -> Self:
        """Open a device by ggml's name for it, by kind (`cpu`, `gpu`), or as `rpc:host:port`.

        Raises:
            UsageError: no such device; the message lists those there are.
            DeviceLostError: nobody answers at an RPC address.
        """
        if name.startswith(PREFIX):
            return cls._open_rpc(name)
        found = devices()
        for info in found:
            if name.lower() in (info.name.lower(), info.kind):
                return cls(info)
        names = ", ".join(info.name for info in found)
        raise UsageError(f"there is no device {name!r} here; ggml offers: {names}")

    @classmethod
    def _open_rpc(cls, name: str) -> Self:
        _load_backends()
        link = RpcLink.open(name)
        try:
            info = _info(link.devices()[0])
            link.check()
            return cls(replace(info, name=f"{PREFIX}{link.address}"), link)
        except BaseException:
            link.close()
            raise

    def check(self) -> None:
        """Raise DeviceLostError where the device is gone; what was read from it since is void."""
        if self.link is not None:
            self.link.check()

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
            False when `stop_flag` stopped it; its outputs are undefined then.

        Raises:
            ComputeError: ggml reported a failure.
            DeviceLostError: the device is gone.
        """
        status = ggml().ggml_backend_graph_compute(self._backend, graph)
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
