"""What this machine's disk and memory deliver, measured now, in bytes per second.

A measurement that cannot be made raises; it never comes back as a guess.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_speed import timed_reads
from edgeroute.runtime.errors import UsageError

BLOCK_BYTES = 1 << 20
_MIN_BLOCKS = 8


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
        OSError: there is none.
        ModelFileError: it cannot be read.
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
    with DiskFile.open(path) as disk:
        cache = {"direct": "bypassed", "uncached": "possible"}.get(disk.mode)
        if cache is None:
            dropped = disk.drop_cache(first * BLOCK_BYTES, (end - first) * BLOCK_BYTES)
            cache = "dropped" if dropped else "possible"
        offsets = (block * BLOCK_BYTES for block in range(first, end))
        found = timed_reads(disk, offsets, (BLOCK_BYTES, queue_depth), max_s)
    return DiskBandwidth(
        bytes_s=found.bytes_s, n_bytes=found.n_bytes, seconds=found.seconds,
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
