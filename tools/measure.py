"""What this machine's disk and memory deliver, measured now, in bytes per second.

A measurement that cannot be made raises; it never comes back as a guess.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError

BLOCK_BYTES = 1 << 20
_MIN_BLOCKS = 8
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_F_NOCACHE = 48  # Source: macOS fcntl.h; Python's fcntl does not name it
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBandwidth:
    """Reads of whole blocks from one file.

    `cache` says what stood between: `bypassed` (the disk itself), `dropped` (the system was
    asked to forget the file first) or `possible` (the figure may be that of memory).
    """

    bytes_s: float
    n_bytes: int
    seconds: float
    block_bytes: int
    queue_depth: int
    cache: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBandwidth:
    """Best of several passes over arrays larger than the caches.

    `copy_bytes_s` counts what is read and what is written, `read_bytes_s` a sum over one
    array. Decoding reads, so its ceiling is the read figure.
    """

    read_bytes_s: float
    copy_bytes_s: float
    n_threads: int
    array_bytes: int
    passes: int


def disk_read_bandwidth(
    path: str | os.PathLike[str],
    *,
    queue_depth: int = 1,
    max_bytes: int = 128 << 20,
    max_s: float = 3.0,
    start: float = 0.0,
) -> DiskBandwidth:
    """Read blocks of 1 MiB from a file, past the page cache where the system allows it.

    Args:
        path: a file of at least 8 MiB.
        queue_depth: reads under way at once, each by a thread of its own.
        max_bytes: stop after so many bytes, or at the end of the file.
        max_s: stop after so many seconds.
        start: where to begin, as a share (0 to 1) of the file: two measurements of one
            file should not read the same blocks, which the disk itself may have cached.

    Raises:
        UsageError: the file is too small to measure anything by, or an argument is out
            of range.
        OSError: it cannot be read.
    """
    if queue_depth < 1 or not 0 <= start < 1:
        raise UsageError(f"need queue_depth >= 1 and 0 <= start < 1, got {queue_depth}, {start}")
    n_blocks = Path(path).stat().st_size // BLOCK_BYTES
    if n_blocks < _MIN_BLOCKS:
        raise UsageError(
            f"{path} has {n_blocks} MiB; reading fewer than {_MIN_BLOCKS} measures nothing"
        )
    first = int(start * n_blocks)
    end = min(n_blocks, first + max(1, max_bytes // BLOCK_BYTES))
    with _opened(Path(path), (first, end)) as (read, cache):
        done, seconds = _read_blocks(read, range(first, end), queue_depth, max_s)
    return DiskBandwidth(
        bytes_s=done * BLOCK_BYTES / seconds, n_bytes=done * BLOCK_BYTES, seconds=seconds,
        block_bytes=BLOCK_BYTES, queue_depth=queue_depth, cache=cache,
    )  # fmt: skip


def write_probe_file(path: str | os.PathLike[str], n_bytes: int = 128 << 20) -> None:
    """Write a file to measure by, of bytes that no file system compresses, to the disk.

    Raises:
        OSError: no room, or no permission; what was written is deleted.
    """
    block = bytearray(os.urandom(BLOCK_BYTES))
    try:
        with Path(path).open("wb") as file:
            for i in range(n_bytes // BLOCK_BYTES):
                block[:8] = i.to_bytes(8, "little")  # no two blocks alike
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        Path(path).unlink(missing_ok=True)
        raise


def memory_bandwidth(
    n_threads: int = 1, *, array_bytes: int = 64 << 20, seconds: float = 0.3
) -> MemoryBandwidth:
    """Sum and copy arrays by `n_threads` at once for about `seconds` in all.

    Args:
        n_threads: as many as will decode.
        array_bytes: size of each of two arrays; more than the last cache holds.
        seconds: how long to go on; each figure has at least two passes.

    Raises:
        UsageError: an argument is out of range.
        MemoryError: no room for the arrays.
    """
    if n_threads < 1 or array_bytes < 8 * n_threads or seconds <= 0:
        raise UsageError(
            "need n_threads >= 1, array_bytes of 8 per thread and seconds > 0, got "
            f"{n_threads}, {array_bytes}, {seconds}"
        )
    source = np.ones(array_bytes // 8, np.uint64)
    target = np.zeros_like(source)
    pairs = list(
        zip(np.array_split(source, n_threads), np.array_split(target, n_threads), strict=True)
    )
    with ThreadPoolExecutor(n_threads) as pool:
        sum_s, n_sums = _best(lambda: list(pool.map(_sum, pairs)), seconds / 2)
        copy_s, n_copies = _best(lambda: list(pool.map(_copy, pairs)), seconds / 2)
    return MemoryBandwidth(
        read_bytes_s=source.nbytes / sum_s, copy_bytes_s=2 * source.nbytes / copy_s,
        n_threads=n_threads, array_bytes=source.nbytes, passes=min(n_sums, n_copies),
    )  # fmt: skip


_Pair = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]


def _sum(pair: _Pair) -> None:
    np.add.reduce(pair[0])


def _copy(pair: _Pair) -> None:
    np.copyto(pair[1], pair[0])


def _best(work: Callable[[], object], seconds: float) -> tuple[float, int]:
    """Repeat for a while; the best time is the one that others disturbed least."""
    best, n, end = float("inf"), 0, time.perf_counter() + seconds
    while n < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        n += 1
    return best, n


_Read = Callable[[int, mmap.mmap], int]


def _read_blocks(read: _Read, blocks: range, queue_depth: int, max_s: float) -> tuple[int, float]:
    """Read blocks by several threads; return how many were read and in how many seconds."""
    todo, lock = iter(blocks), threading.Lock()
    began = time.perf_counter()

    def work() -> int:
        done = 0
        # An anonymous mapping begins at a page, as reading past the cache demands.
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:
            while time.perf_counter() - began < max_s:
                with lock:
                    block = next(todo, None)
                if block is None:
                    break
                n = read(block * BLOCK_BYTES, buffer)
                if n != BLOCK_BYTES:
                    raise OSError(f"a read at block {block} gave {n} bytes of {BLOCK_BYTES}")
                done += 1
        return done

    with ThreadPoolExecutor(queue_depth) as pool:
        done = sum(task.result() for task in [pool.submit(work) for _ in range(queue_depth)])
    return done, time.perf_counter() - began


@contextmanager
def _opened(path: Path, blocks: tuple[int, int]) -> Iterator[tuple[_Read, str]]:
    """Open a file in the way that comes closest to its disk; give a read and what it is worth."""
    descriptor, cache = _open_direct(path)
    if descriptor is None:
        descriptor = os.open(path, os.O_RDONLY | _BINARY)
        cache = _drop_cache(descriptor, blocks)
    lock = threading.Lock()

    def read(offset: int, buffer: mmap.mmap) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [buffer], offset)
        with lock:  # this system has no reads at an offset: one at a time
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, BLOCK_BYTES)
        buffer[: len(data)] = data
        return len(data)

    try:
        yield read, cache
    finally:
        os.close(descriptor)


def _open_direct(path: Path) -> tuple[int | None, str]:
    """Open past the page cache; None where the system or the file system cannot."""
    if os.name != "posix":
        return None, ""
    if not _O_DIRECT:
        return _open_uncached(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | _O_DIRECT)
    except OSError:  # this file system refuses the flag; a plain open says if the file is bad
        return None, ""
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:
            os.preadv(descriptor, [buffer], 0)
    except OSError:  # taken at open, refused at read
        os.close(descriptor)
        return None, ""
    return descriptor, "bypassed"


def _open_uncached(path: Path) -> tuple[int | None, str]:
    """Open without adding to the page cache: macOS's nearest to O_DIRECT."""
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
    except OSError:
        os.close(descriptor)
        return None, ""
    return descriptor, "possible"  # what was in the cache before still comes from there


def _drop_cache(descriptor: int, blocks: tuple[int, int]) -> str:
    """Ask the system to forget these blocks of the file."""
    if not hasattr(os, "posix_fadvise"):
        return "possible"
    first, end = blocks
    length = (end - first) * BLOCK_BYTES
    os.posix_fadvise(descriptor, first * BLOCK_BYTES, length, os.POSIX_FADV_DONTNEED)
    return "dropped"
