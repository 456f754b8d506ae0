"""A ggml backend in the tests' own process, which does late whatever it may do late.

Its devices keep tensors in host memory that they do not admit to be host memory, and compute with
the CPU backend's kernels. Copies and graphs that are queued happen when somebody waits for them,
not before: a wait that is missing shows as wrong bytes, every time. Layouts follow
ggml-backend-impl.h of ggml 0.25.
"""

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint8, c_void_p
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edgeroute.runtime.device import devices
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.lib import libraries
from edgeroute.runtime.ggml.structs import DevProps, TensorStruct

API_VERSION = 2
ALIGNMENT = 64
GARBAGE = 0xFF  # what fresh memory holds: a NaN, read as any float
KINDS = {"gpu": api.DEVICE_GPU, "igpu": api.DEVICE_IGPU}


@dataclass(frozen=True, kw_only=True)
class Fake:
    """What a fake device says about itself, and where it fails."""

    asynchronous: bool = True
    events: bool = True
    pinned: bool = True
    host_pointers: bool = False
    kind: str = "gpu"
    second: bool = True
    """Whether it makes more than one instance at a time."""
    n_events: int = 1 << 20
    """Events it has at most."""
    memory_bytes: int = 1 << 30
    pinned_bytes: int = 1 << 30
    fail_at: int | None = None
    """The allocation of its own memory that fails, counted from 0."""
    refuses: frozenset[str] = frozenset()
    """Operations that it says it lacks."""


def _functions(*fields: tuple[str, Any, tuple[Any, ...]]) -> type[ctypes.Structure]:
    """Make a structure of function pointers."""

    class Table(ctypes.Structure):
        _fields_ = [(name, ctypes.CFUNCTYPE(result, *args)) for name, result, args in fields]

    return Table


P, N = c_void_p, c_size_t
BuftI = _functions(
    ("get_name", P, (P,)), ("alloc_buffer", P, (P, N)), ("get_alignment", N, (P,)),
    ("get_max_size", N, (P,)), ("get_alloc_size", N, (P, P)), ("is_host", c_bool, (P,)),
)  # fmt: skip
BufferI = _functions(
    ("free_buffer", None, (P,)), ("get_base", P, (P,)), ("init_tensor", c_int, (P, P)),
    ("memset_tensor", None, (P, P, c_uint8, N, N)), ("set_tensor", None, (P, P, P, N, N)),
    ("get_tensor", None, (P, P, P, N, N)), ("set_tensor_2d", None, (P, P, P, N, N, N, N, N)),
    ("get_tensor_2d", None, (P, P, P, N, N, N, N, N)), ("cpy_tensor", c_bool, (P, P, P)),
    ("clear", None, (P, c_uint8)), ("reset", None, (P,)),
)  # fmt: skip
BackendI = _functions(
    ("get_name", P, (P,)), ("free", None, (P,)), ("set_tensor_async", None, (P, P, P, N, N)),
    ("get_tensor_async", None, (P, P, P, N, N)),
    ("set_tensor_2d_async", None, (P, P, P, N, N, N, N, N)),
    ("get_tensor_2d_async", None, (P, P, P, N, N, N, N, N)),
    ("cpy_tensor_async", c_bool, (P, P, P, P)), ("synchronize", None, (P,)),
    ("graph_plan_create", P, (P, P)), ("graph_plan_free", None, (P, P)),
    ("graph_plan_update", None, (P, P, P)), ("graph_plan_compute", c_int, (P, P)),
    ("graph_compute", c_int, (P, P)), ("event_record", None, (P, P)), ("event_wait", None, (P, P)),
    ("graph_optimize", None, (P, P, P)),
)  # fmt: skip
DeviceI = _functions(
    ("get_name", P, (P,)), ("get_description", P, (P,)),
    ("get_memory", None, (P, POINTER(N), POINTER(N))), ("get_type", c_int, (P,)),
    ("get_props", None, (P, POINTER(DevProps))), ("init_backend", P, (P, P)),
    ("get_buffer_type", P, (P,)), ("get_host_buffer_type", P, (P,)),
    ("buffer_from_host_ptr", P, (P, P, N, N)), ("supports_op", c_bool, (P, P)),
    ("supports_buft", c_bool, (P, P)), ("offload_op", c_bool, (P, P)), ("event_new", P, (P,)),
    ("event_free", None, (P, P)), ("event_synchronize", None, (P, P)),
)  # fmt: skip
RegI = _functions(
    ("get_name", P, (P,)), ("get_device_count", N, (P,)), ("get_device", P, (P, N)),
    ("get_proc_address", P, (P, c_char_p)),
)  # fmt: skip


class Buft(ctypes.Structure):
    _fields_ = [("iface", BuftI), ("device", P), ("context", P)]


class Backend(ctypes.Structure):
    _fields_ = [("guid", P), ("iface", BackendI), ("device", P), ("context", P)]


class Event(ctypes.Structure):
    _fields_ = [("device", P), ("context", P)]


class Dev(ctypes.Structure):
    _fields_ = [("iface", DeviceI), ("reg", P), ("context", P)]


class Reg(ctypes.Structure):
    _fields_ = [("api_version", c_int), ("iface", RegI), ("context", P)]


class Queue:
    """What one instance was asked to do and has not done yet, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self.n_added = 0
        self._n_done = 0

    def add(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)
        self.n_added += 1

    def run(self, until: int | None = None) -> None:
        """Do all of it, or what was added before `until` others."""
        while self._waiting and (until is None or self._n_done < until):
            self._n_done += 1
            self._waiting.popleft()()


@dataclass
class _Memory:
    """One buffer's bytes, if they are its own."""

    base: int
    n_bytes: int
    own: object = None
    pinned: bool = False


@dataclass
class FakeDevice:
    """One registered device; what it has done is counted here."""

    config: Fake
    name: str
    n_allocated: int = 0
    n_computed: int = 0
    n_waits: int = 0
    """Events that a queue was told to wait for."""
    status: int = api.STATUS_SUCCESS
    """What the next graphs are said to end with."""
    misuse: list[str] = field(default_factory=list)
    """What a real backend might not survive."""
    struct: Dev = field(default_factory=Dev)

    def __post_init__(self) -> None:
        self._buffers: dict[int, _Memory] = {}
        self._queues: dict[int, tuple[Backend, Queue]] = {}
        self._events: dict[int, tuple[Event, list[tuple[Queue, int]]]] = {}
        self._texts = [ctypes.create_string_buffer(each.encode()) for each in
                       (self.name, f"a fake {self.config.kind}")]  # fmt: skip
        self._kept: list[object] = []  # what ggml may still call, and calls to an end
        self.pointer = ctypes.addressof(self.struct)
        self._buft = self._make_buft(pinned=False)
        self._host_buft = self._make_buft(pinned=True)
        self._cpu_device = ggml().ggml_backend_dev_by_type(api.DEVICE_CPU)
        assert self._cpu_device is not None
        self._cpu = ggml().ggml_backend_dev_init(self._cpu_device, None)
        assert self._cpu is not None
        cpu_reg = ggml().ggml_backend_dev_backend_reg(self._cpu_device)
        address = ggml().ggml_backend_reg_get_proc_address(cpu_reg, b"ggml_backend_set_n_threads")
        assert address is not None
        ctypes.CFUNCTYPE(None, P, c_int)(address)(self._cpu, 1)
        self.struct.iface = self._device_table()

    @property
    def n_live(self) -> int:
        """Buffers that were allocated or wrapped, and not freed."""
        return len(self._buffers)

    @property
    def n_instances(self) -> int:
        return len(self._queues)

    @property
    def n_live_events(self) -> int:
        return len(self._events)

    @property
    def used_bytes(self) -> int:
        held = self._buffers.values()
        return sum(each.n_bytes for each in held if each.own is not None and not each.pinned)

    def close(self) -> None:
        ggml().ggml_backend_free(self._cpu)

    # buffers

    def _make_buft(self, *, pinned: bool) -> Buft:
        text = self._texts[0]
        table = _table(
            BuftI, get_name=lambda _: ctypes.addressof(text),
            alloc_buffer=self._alloc_pinned if pinned else self._alloc,
            get_alignment=lambda _: ALIGNMENT,
            is_host=lambda _: pinned or self.config.host_pointers,
        )  # fmt: skip
        return Buft(table, self.pointer, None)

    def _alloc(self, _: int, n_bytes: int) -> int | None:
        number, self.n_allocated = self.n_allocated, self.n_allocated + 1
        if number == self.config.fail_at:
            return None
        if self.used_bytes + n_bytes > self.config.memory_bytes:
            return None
        return self._fresh(self._buft, n_bytes, pinned=False)

    def _alloc_pinned(self, _: int, n_bytes: int) -> int | None:
        held = sum(each.n_bytes for each in self._buffers.values() if each.pinned)
        if held + n_bytes > self.config.pinned_bytes:
            return None
        return self._fresh(self._host_buft, n_bytes, pinned=True)

    def _fresh(self, buft: Buft, n_bytes: int, *, pinned: bool) -> int:
        own = (c_uint8 * (n_bytes + ALIGNMENT))()
        ctypes.memset(own, GARBAGE, n_bytes + ALIGNMENT)
        base = -(-ctypes.addressof(own) // ALIGNMENT) * ALIGNMENT
        return self._buffer(buft, _Memory(base, n_bytes, own, pinned))

    def _wrap(self, _: int, address: int, n_bytes: int, _max: int) -> int:
        return self._buffer(self._buft, _Memory(address, n_bytes))

    def _buffer(self, buft: Buft, memory: _Memory) -> int:
        key = len(self._kept) + 1
        self._buffers[key] = memory

        def free(_: int) -> None:
            self._buffers.pop(key).own = None

        table = _table(
            BufferI, free_buffer=free, get_base=lambda _: memory.base,
            memset_tensor=lambda _, t, value, at, n: _set(_data(t) + at, value, n),
            set_tensor=lambda _, t, source, at, n: _copy(_data(t) + at, source, n),
            get_tensor=lambda _, t, target, at, n: _copy(target, _data(t) + at, n),
            clear=lambda _, value: _set(memory.base, value, memory.n_bytes),
        )  # fmt: skip
        self._kept.append(table)
        return int(_buffer_init()(ctypes.addressof(buft), table, key, memory.n_bytes))

    # instances and their queues

    def _init_backend(self, _: int, _params: int | None) -> int | None:
        if self._queues and not self.config.second:
            return None
        queue, late = Queue(), self.config.asynchronous
        text = self._texts[0]

        def do(work: Callable[[], None]) -> None:
            queue.add(work)
            if not late:
                queue.run()

        def free(_: int) -> None:
            queue.run()
            del self._queues[key]

        def compute(_: int, graph: int) -> int:
            do(lambda: self._compute(graph))
            return self.status

        def wait(_: int, event: int) -> None:
            recorded, self.n_waits = list(self._events[event][1]), self.n_waits + 1
            do(lambda: [other.run(until) for other, until in recorded] and None)

        table = _table(
            BackendI, get_name=lambda _: ctypes.addressof(text), free=free, graph_compute=compute,
            **({} if not late else {
                "set_tensor_async": lambda _, t, source, at, n: do(
                    partial(_copy, _data(t) + at, source, n)),
                "get_tensor_async": lambda _, t, target, at, n: do(
                    partial(_copy, target, _data(t) + at, n)),
                "synchronize": lambda _: queue.run(),
            }),
            **({} if not self.config.events else {
                "event_record": lambda _, event: self._record(event, queue),
                "event_wait": wait,
            }),
        )  # fmt: skip
        backend = Backend(None, table, self.pointer, None)
        key = ctypes.addressof(backend)
        self._kept.append(backend)
        self._queues[key] = (backend, queue)
        return key

    def _compute(self, graph: int) -> None:
        self.n_computed += 1
        if self.status == api.STATUS_SUCCESS:
            assert ggml().ggml_backend_graph_compute(self._cpu, graph) == api.STATUS_SUCCESS

    # events

    def _event_new(self, _: int) -> int | None:
        if len(self._events) >= self.config.n_events:
            return None
        event = Event(self.pointer, None)
        key = ctypes.addressof(event)
        self._events[key] = (event, [])
        return key

    def _event_free(self, _: int, event: int) -> None:
        del self._events[event]

    def _record(self, event: int, queue: Queue) -> None:
        self._events[event][1][:] = [(queue, queue.n_added)]

    def _event_synchronize(self, _: int, event: int) -> None:
        if not self._events[event][1]:
            self.misuse.append("waited for an event that was never recorded")
        for queue, until in self._events[event][1]:
            queue.run(until)

    # the device

    def _device_table(self) -> Any:
        config, name, description = self.config, *map(ctypes.addressof, self._texts)
        more: dict[str, Callable[..., Any]] = {}
        if config.pinned:
            more["get_host_buffer_type"] = lambda _: ctypes.addressof(self._host_buft)
        if config.host_pointers:
            more["buffer_from_host_ptr"] = self._wrap
        if config.events:
            more |= {"event_new": self._event_new, "event_free": self._event_free,
                     "event_synchronize": self._event_synchronize}  # fmt: skip
        return _table(
            DeviceI, get_name=lambda _: name, get_description=lambda _: description,
            get_memory=self._get_memory, get_type=lambda _: KINDS[config.kind],
            get_props=self._get_props, init_backend=self._init_backend,
            get_buffer_type=lambda _: ctypes.addressof(self._buft), supports_op=self._supports_op,
            supports_buft=lambda _, buft: buft == ctypes.addressof(self._buft), **more,
        )  # fmt: skip

    def _get_memory(self, _: int, free: Any, total: Any) -> None:
        free[0] = self.config.memory_bytes - self.used_bytes
        total[0] = self.config.memory_bytes

    def _get_props(self, _: int, props: Any) -> None:
        config, seen = self.config, props[0]
        seen.name, seen.description = [ctypes.cast(each, c_char_p) for each in self._texts]
        seen.memory_free = config.memory_bytes - self.used_bytes
        seen.memory_total = config.memory_bytes
        seen.type = KINDS[config.kind]
        seen.caps.async_, seen.caps.events = config.asynchronous, config.events
        seen.caps.host_buffer = config.pinned
        seen.caps.buffer_from_host_ptr = config.host_pointers

    def _supports_op(self, _: int, op: int) -> bool:
        if ggml().ggml_op_desc(Tensor(op)).decode() in self.config.refuses:
            return False
        assert self._cpu_device is not None
        return ggml().ggml_backend_dev_supports_op(self._cpu_device, Tensor(op))


def _table(kind: type[ctypes.Structure], **functions: Callable[..., Any]) -> Any:
    """Fill a structure of function pointers; those not given are NULL."""
    types = dict(kind._fields_)  # type: ignore[arg-type]
    return kind(**{name: types[name](each) for name, each in functions.items()})


def _data(tensor: int) -> int:
    return int(TensorStruct.from_address(tensor).data)


def _copy(target: int, source: int, n_bytes: int) -> None:
    ctypes.memmove(target, source, n_bytes)


def _set(target: int, value: int, n_bytes: int) -> None:
    ctypes.memset(target, value, n_bytes)


def _buffer_init() -> Any:
    function = libraries().base.ggml_backend_buffer_init
    function.argtypes, function.restype = (P, BufferI, P, N), P
    return function


@contextlib.contextmanager
def fake_devices(*configs: Fake) -> Iterator[list[FakeDevice]]:
    """Register a backend with devices fake0, fake1, ... until the block ends."""
    devices()  # the CPU's backend is there from here on
    made = [FakeDevice(config, f"fake{i}") for i, config in enumerate(configs)]
    name = ctypes.create_string_buffer(b"Fake")
    reg = Reg(API_VERSION, _table(
        RegI, get_name=lambda _: ctypes.addressof(name), get_device_count=lambda _: len(made),
        get_device=lambda _, i: made[i].pointer, get_proc_address=lambda _, _name: None,
    ), None)  # fmt: skip
    for each in made:
        each.struct.reg = ctypes.addressof(reg)
    ggml().ggml_backend_register(ctypes.addressof(reg))
    try:
        yield made
    finally:
        ggml().ggml_backend_unload(ctypes.addressof(reg))
        for each in made:
            each.close()


@contextlib.contextmanager
def fake_device(config: Fake | None = None) -> Iterator[FakeDevice]:
    """Register one device, fake0, until the block ends."""
    with fake_devices(config or Fake()) as (device,):
        yield device
