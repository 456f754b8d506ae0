"""A real disk file with planted faults, and a sink that keeps what it was given."""

import errno
import mmap
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeroute.offload.disk import Disk
from edgeroute.offload.load_plan import Extent, LoadJob
from edgeroute.runtime.slots import Landing


class FaultyDisk:
    """Reads through another disk; each fault is off until it is set.

    Attributes:
        gate: reads wait until it is set.
        slow_s: seconds that each read takes longer.
        longest: a read brings at most so many bytes, as a signal or a network disk may.
        interrupted: every second read ends in EINTR.
        eio_at: this read (counted from 0) and all later ones fail with EIO.
        eio_offset: reads that touch this byte fail with EIO.
        empty: reads bring nothing, as if the file ended.
        offsets: of the reads so far.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.gate = threading.Event()
        self.gate.set()
        self.slow_s = 0.0
        self.longest: int | None = None
        self.interrupted = False
        self.eio_at: int | None = None
        self.eio_offset: int | None = None
        self.empty = False
        self.offsets: list[int] = []
        self.closed = False

    @property
    def path(self) -> Path:
        return self.disk.path

    @property
    def size_bytes(self) -> int:
        return self.disk.size_bytes

    @property
    def alignment(self) -> int:
        return self.disk.alignment

    def read_at(self, offset: int, *buffers: memoryview) -> int:
        index, n_asked = len(self.offsets), sum(map(len, buffers))
        self.offsets.append(offset)
        self.gate.wait()
        if self.slow_s:
            time.sleep(self.slow_s)
        touched = self.eio_offset is not None and 0 <= self.eio_offset - offset < n_asked
        if touched or (self.eio_at is not None and index >= self.eio_at):
            raise OSError(errno.EIO, "Input/output error")
        if self.interrupted and index % 2 == 0:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        if self.empty:
            return 0
        n = self.disk.read_at(offset, *buffers)
        return n if self.longest is None else min(n, self.longest)

    def check(self) -> None:
        self.disk.check()

    def close(self) -> None:
        self.closed = True
        self.disk.close()


class MemorySink:
    """Keeps a page's parts; checks that each byte comes once."""

    def __init__(
        self, extents: Sequence[Extent], *, whole_parts: bool = True, own_memory: bool = False,
        lead: int = 0, behind: int = 0,
    ) -> None:  # fmt: skip
        self.whole_parts = whole_parts
        self._rooms = {e.part: (_memory(lead + e.nbytes + behind), lead) for e in extents}
        self.parts = {e.part: self._rooms[e.part][0][lead : lead + e.nbytes] for e in extents}
        self.n_written = dict.fromkeys(self.parts, 0)
        self.on_write: Exception | None = None
        self._own_memory = own_memory
        self._lock = threading.Lock()

    def destination(self, part: int) -> Landing | None:
        return Landing(*self._rooms[part]) if self._own_memory else None

    def write(self, part: int, at: int, data: memoryview) -> None:
        if self.on_write is not None:
            raise self.on_write
        if self.whole_parts:
            assert at == 0 and len(data) == len(self.parts[part])
        self.parts[part][at : at + len(data)] = data
        with self._lock:
            self.n_written[part] += len(data)
            assert self.n_written[part] <= len(self.parts[part])


def _memory(nbytes: int) -> memoryview:
    """Aligned memory full of a byte that tells what was never written."""
    view = memoryview(mmap.mmap(-1, nbytes))
    view[:] = b"\xee" * nbytes
    return view


def job(index: int, extents: Sequence[Extent], **kwargs: Any) -> tuple[LoadJob, MemorySink]:
    """A load into memory, and that memory."""
    sink = MemorySink(extents, **kwargs)
    return LoadJob(id=index, extents=extents, sink=sink), sink


def write_file(path: Path, n_bytes: int, seed: int = 0) -> bytes:
    """Fill a file with random bytes and return them."""
    content = random.Random(seed).randbytes(n_bytes)
    path.write_bytes(content)
    return content
