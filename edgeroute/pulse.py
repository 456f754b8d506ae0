"""Signs of life of an engine thread, and of a model's opening, as others see them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.scheduler import Scheduler

BUSY_SHARE: Final = 0.01
"""Of a processor, what an opening takes at least that computes; a thread that only looks again and
again whether what it waits for is there takes less."""
READERS: Final = ("edgeroute-io", "edgeroute-vocab")
"""Names of threads that read for openings. Those of other models count as well: an opening is
rather taken for alive."""
_THREADS: Final = Path("/proc/self/task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Whether an engine works, and since when nothing has come of it.

    Attributes:
        busy: whether anybody waits for it. An engine that nobody waits for cannot stall.
        idle_s: while busy, seconds since the last progress (a graph was computed, a command ran,
            a round ended) or since it was given something to do, whichever is later. Else
            seconds since the last progress.
        doing: what it does, for people.
    """

    busy: bool
    idle_s: float
    doing: str


@dataclass(slots=True)
class Heart:
    """Times of `time.monotonic`. The engine thread writes `beat`, `command` and `opening`.

    `woke` is when an idle engine was given something to do, by whoever gave it.
    """

    beat: float = field(default_factory=time.monotonic)
    woke: float = field(default_factory=time.monotonic)
    command: bool = False
    opening: bool = False
    """Whether the model is being opened again: that is no stall, however long it takes."""
    _asked: int = 0
    _moved: float = 0.0
    """When somebody last saw that a long computation had got on."""

    def read(self, loaded: "LoadedModel", scheduler: "Scheduler", n_queued: int) -> Pulse:
        """Look, from any thread; nothing is locked and nothing waits."""
        busy = self.command or n_queued > 0 or scheduler.busy
        if self.opening:
            return Pulse(busy=True, idle_s=0.0, doing="opening the model again")
        devices = [loaded.device] if loaded.small is None else [loaded.device, loaded.small.device]
        asked = sum(device.stop_flag.n_asked for device in devices)
        if asked != self._asked:
            self._asked, self._moved = asked, time.monotonic()
        beats = [self.beat, self._moved, *(device.beat for device in devices)]
        if busy:
            beats.append(self.woke)
        doing = "a command" if self.command else scheduler.doing
        idle_s = max(0.0, time.monotonic() - max(beats))
        return Pulse(busy=busy, idle_s=idle_s, doing=doing if busy else "nothing")


@dataclass(frozen=True, slots=True)
class _Work:
    """What threads have done: pages and bytes that they read, processor time."""

    n_read: int
    cpu_s: float


class OpeningPulse:
    """Signs of life of one opening: bytes that its threads read, or processor time that they take.

    The system counts both, whatever the threads are in. How long an opening lasts says nothing: a
    large model from a slow disk takes long. Where the system does not count by threads (anywhere
    but on Linux), the whole process counts, so that an opening that hangs is found when nothing
    else goes on. Any thread may read it, one at a time.
    """

    def __init__(self) -> None:
        self._threads: set[int] = set()
        self._moved = self._looked = time.monotonic()
        self._seen = _Work(0, 0.0)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Count this thread in, and the engine threads that it starts within."""
        token = _opening.set(self)
        self._threads.add(threading.get_native_id())
        try:
            yield
        finally:
            _opening.reset(token)

    def add(self, thread: threading.Thread) -> None:
        """Count a thread in, which has been started."""
        if thread.native_id is not None:
            self._threads.add(thread.native_id)

    def read(self) -> Pulse:
        """Look; `idle_s` is since the last look that found progress."""
        now, work = time.monotonic(), _work(list(self._threads))
        computed_s = work.cpu_s - self._seen.cpu_s
        busy = computed_s > 0 and computed_s >= BUSY_SHARE * (now - self._looked)
        if busy or work.n_read != self._seen.n_read:
            self._moved = now
        self._seen, self._looked = work, now
        return Pulse(busy=True, idle_s=now - self._moved, doing="opening the model")


_opening: ContextVar[OpeningPulse | None] = ContextVar("opening", default=None)


def opens_in(thread: threading.Thread) -> None:
    """Say, where a model is opened, which other thread does the work."""
    opening = _opening.get()
    if opening is not None:
        opening.add(thread)


def _work(threads: list[int]) -> _Work:
    if _work_of(threading.get_native_id()) is None:
        return _work_of_all()
    found = [each for each in map(_work_of, threads) if each is not None]
    readers = [each for each in threading.enumerate() if each.name.startswith(READERS)]
    read = [_work_of(each.native_id) for each in readers if each.native_id is not None]
    return _Work(
        n_read=sum(each.n_read for each in [*found, *read] if each is not None),
        cpu_s=sum(each.cpu_s for each in found),
    )


def _work_of(thread: int) -> _Work | None:
    """Tell what one thread has done; None where it has ended, or the system does not tell.

    Source: proc(5), /proc/pid/stat (10, 12: page faults), /proc/pid/io, /proc/pid/schedstat.
    """
    folder = _THREADS / str(thread)
    try:
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        reads = (folder / "io").read_text().split()
        cpu_ns = int((folder / "schedstat").read_text().split()[0])
    except OSError:
        return None
    values = dict(zip(reads[::2], map(int, reads[1::2]), strict=True))
    n_read = int(stat[7]) + int(stat[9]) + values["rchar:"] + values["read_bytes:"]
    return _Work(n_read, cpu_ns / 1e9)


def _work_of_all() -> _Work:
    import psutil  # 10 ms that Linux need not pay

    process = psutil.Process()
    times = process.cpu_times()
    counters = getattr(process, "io_counters", None)  # not every system has them
    return _Work(0 if counters is None else counters().read_bytes, times.user + times.system)
