"""What a disk delivers by read size and number of reads at once, measured on one file."""

import mmap
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from edgeroute.offload.disk import Disk, read_full
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import KIB, MIB, format_bytes

READ_BYTES: Final = (256 * KIB, 512 * KIB, 1 * MIB, 2 * MIB, 4 * MIB)
DEPTHS: Final = (1, 2, 4, 8)
ROUNDS: Final = 3
"""Each cell is measured so often, spread over the time: others disturb one round, not all."""
GOOD_RATIO: Final = 0.95
"""A cell this near to the best is as good; the one with fewer threads and shorter reads wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Reads of one length, `n_threads` at once."""

    read_bytes: int
    n_threads: int
    n_bytes: int
    seconds: float

    @property
    def bytes_s(self) -> float:
        """Bandwidth."""
        return self.n_bytes / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """A table over READ_BYTES × DEPTHS (as far as the file allows) and the cell to use."""

    table: tuple[Speed, ...]
    best: Speed


def measure(disk: Disk, *, seconds: float = 2.0, seed: int = 0) -> DiskSpeed:
    """Read at random aligned offsets, each length at each depth.

    A disk that is not read past the page cache gives the cache's speed for what is in it.

    Args:
        disk: a file; lengths of which it does not hold 8 are left out.
        seconds: for the whole table, about.
        seed: of the offsets.

    Raises:
        UsageError: the file is too short to measure by.
        ModelFileError: a read failed.
    """
    lengths = [n for n in READ_BYTES if disk.size_bytes >= 8 * n]
    if not lengths:
        raise UsageError(
            f"{disk.path} has {format_bytes(disk.size_bytes)}; measuring reads takes at least "
            f"{format_bytes(8 * READ_BYTES[0])}"
        )
    cells = [(length, depth) for length in lengths for depth in DEPTHS]
    cell_s = seconds / len(cells) / ROUNDS
    rng = random.Random(seed)
    runs: dict[tuple[int, int], list[Speed]] = {cell: [] for cell in cells}
    for _ in range(ROUNDS):
        for length, depth in cells:
            offsets = _random_offsets(rng, disk, length)
            runs[length, depth].append(timed_reads(disk, offsets, (length, depth), cell_s))
    table = tuple(_median(found) for found in runs.values())
    top = max(speed.bytes_s for speed in table)
    good = [speed for speed in table if speed.bytes_s >= GOOD_RATIO * top]
    best = min(good, key=lambda speed: (speed.n_threads, speed.read_bytes))
    return DiskSpeed(table=table, best=best)


def timed_reads(disk: Disk, offsets: Iterable[int], shape: tuple[int, int], max_s: float) -> Speed:
    """Read at the given offsets by several threads until they end or the time is over.

    Args:
        disk: a file.
        offsets: multiples of its alignment, each with a whole read behind it.
        shape: (bytes of each read, reads at once).
        max_s: no read begins later; every thread does at least one.

    Raises:
        ModelFileError: a read failed.
    """
    read_bytes, depth = shape
    todo, lock = iter(offsets), threading.Lock()

    def work() -> int:
        done = 0
        # An anonymous mapping begins at a page, as reading past the cache demands. It is not
        # closed but let go: the frames of an error may still refer to it.
        buffer = memoryview(mmap.mmap(-1, read_bytes))
        while not done or time.perf_counter() - began < max_s:
            with lock:
                offset = next(todo, None)
            if offset is None:
                break
            read_full(disk, offset, buffer, read_bytes)
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        done = sum(task.result() for task in [pool.submit(work) for _ in range(depth)])
    seconds = time.perf_counter() - began
    return Speed(read_bytes=read_bytes, n_threads=depth, n_bytes=done * read_bytes, seconds=seconds)


def _random_offsets(rng: random.Random, disk: Disk, length: int) -> Iterator[int]:
    step = max(disk.alignment, mmap.PAGESIZE)
    n_places = (disk.size_bytes - length) // step + 1
    while True:
        yield rng.randrange(n_places) * step


def _median(runs: list[Speed]) -> Speed:
    return sorted(runs, key=lambda speed: speed.bytes_s)[len(runs) // 2]
