"""What the disk gives the pager: batches of reads by its own threads, between computations.

Unlike `offload.disk_speed`, which keeps so many reads under way all the time, a batch is asked
for and waited for as a layer's missing experts are: its begin and its end count too.
"""

import random
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_profile import profile
from edgeroute.offload.transfer import Extent, LoadJob, Ticket, Transfer
from edgeroute.paging import MIN_IO_THREADS, STAGING_MIN_BYTES
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.slots import BLOCK_BYTES, HostSink
from edgeroute.runtime.units import KIB, MIB, format_bytes
from edgeroute.tools.forecast.kernels import Load
from edgeroute.tools.forecast.records import StoragePoint

PART_BYTES: Final = (256 * KIB, 1 * MIB, 4 * MIB)
LAYER_BYTES: Final = 32 * MIB
"""What streams is read in pieces of this size, one behind the other."""
DEPTHS: Final = (1, 3, 6, 12, 24)
MOST_BYTES: Final = 32 * MIB
"""Longest batch."""
LEAST_FILE_BYTES: Final = 64 * MIB
ROUNDS, N_STREAMED, LEAST_BATCHES = 6, 10, 2
N_PLACES: Final = 64
"""Of each length, places that are read again and again, as experts are that had to leave: a disk
that has a cache of its own is quicker there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpeed:
    """Bandwidths by part and number of parts, and what of reading hides behind computing.

    `overlap_ratio` is 1 where reading and computing at once take as long as the longer of the
    two, 0 where they take as long as one after the other.
    """

    points: tuple[StoragePoint, ...]
    overlap_ratio: float


class _Room(Closing):
    """Memory as the engine's slots and rooms have it, for parts that lie behind each other.

    It matters: reads into pages that lie scattered take half as long again.
    """

    def __init__(self, device: Device) -> None:
        self._buffer = device.allocate(MOST_BYTES + BLOCK_BYTES)
        self._base = -(-self._buffer.base // BLOCK_BYTES) * BLOCK_BYTES

    def sink(self, n_parts: int, part_bytes: int) -> HostSink:
        """Return what takes so many parts."""
        begins = [self._base + part * part_bytes for part in range(n_parts)]
        return HostSink([(begin, part_bytes, 0, part_bytes) for begin in begins])

    def close(self) -> None:
        """Free it."""
        self._buffer.free()


def measure_storage(disk: DiskFile, device: Device, seconds: float, seed: int = 0) -> StorageSpeed:
    """Read parts at random places of a file, as the pager would.

    Args:
        disk: a file of at least 64 MiB. The transfer that reads it closes it.
        device: what computes in between, with the threads it is set to.
        seconds: for all of it, about.
        seed: of the places.

    Raises:
        UsageError: the file is too short.
        ModelFileError: a read failed.
    """
    if disk.size_bytes < LEAST_FILE_BYTES:
        raise UsageError(f"{disk.path} has {format_bytes(disk.size_bytes)}; measuring reads takes "
                         f"at least {format_bytes(LEAST_FILE_BYTES)}")  # fmt: skip
    reads = profile(disk)
    n_threads = max(MIN_IO_THREADS, reads.n_threads)
    cells = [(size, depth) for size in PART_BYTES for depth in DEPTHS if size * depth <= MOST_BYTES]
    cell_s = 0.5 * seconds / len(cells) / ROUNDS
    rng = random.Random(seed)
    found: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    streams: list[float] = []
    with (
        Transfer([disk], n_threads, reads.read_bytes, STAGING_MIN_BYTES) as transfer,
        Load(device) as load,
        _Room(device) as one,
        _Room(device) as other,
    ):
        reader = _Reader(transfer, load, (one, other), (disk.size_bytes, rng))
        for _ in range(ROUNDS):
            for cell in cells:
                found[cell].append(reader.batch_s(*cell, cell_s))
            streams.append(reader.stream_bytes_s())
        overlap = reader.overlap_ratio()
    points = smooth({cell: statistics.fmean(times) for cell, times in found.items()})
    whole = StoragePoint(read_bytes=LAYER_BYTES, depth=1, bytes_s=statistics.harmonic_mean(streams))
    return StorageSpeed(points=(*points, whole), overlap_ratio=overlap)


def smooth(found: Mapping[tuple[int, int], float]) -> list[StoragePoint]:
    """Lay a batch's time, a part's time and a bandwidth through noisy measurements.

    Args:
        found: seconds of a batch by (bytes of a part, parts).
    """
    cells, times = list(found), np.array(list(found.values()))
    columns = np.array([(1.0, depth, size * depth) for size, depth in cells])
    rows = columns / times[:, None]  # errors count as shares of what was measured
    used = [True, True, True]
    costs = np.zeros(3)
    while any(used):
        costs = np.zeros(3)
        costs[used] = np.linalg.lstsq(rows[:, used], np.ones(len(cells)), rcond=None)[0]
        if costs.min() >= 0.0:
            break
        used[int(costs.argmin())] = False
    return [
        StoragePoint(read_bytes=size, depth=depth, bytes_s=float(size * depth / seconds))
        for (size, depth), seconds in zip(cells, columns @ costs, strict=True)
    ]


class _Reader:
    """Reads batches and times them."""

    def __init__(
        self,
        transfer: Transfer,
        load: Load,
        rooms: tuple[_Room, _Room],
        file: tuple[int, random.Random],
    ) -> None:
        self._transfer, self._load, self._rooms = transfer, load, rooms
        self._size_bytes, self._rng = file
        self._places: dict[int, list[int]] = {}

    def batch_s(self, size: int, depth: int, seconds: float) -> float:
        """Seconds of a batch of `depth` parts, the mean: an engine waits for the slow ones too."""
        memory, found = self._rooms[0].sink(depth, size), list[float]()
        self._read(memory, size, depth)  # pages of memory come with their first bytes
        end = time.perf_counter() + seconds
        while len(found) < LEAST_BATCHES or time.perf_counter() < end:
            self._load.compute()  # the threads of ggml spin on for a while, as they do in a token
            found.append(_timed_s(lambda: self._read(memory, size, depth)))
        return statistics.fmean(found)

    def stream_bytes_s(self) -> float:
        """Bandwidth of layers read one behind the other, the next asked for while one is read."""
        size = LAYER_BYTES
        rooms = [room.sink(1, size) for room in self._rooms]
        n_places = max(1, self._size_bytes // size)
        first = self._rng.randrange(n_places)
        tickets: deque[Ticket] = deque()
        began = time.perf_counter()
        for i in range(N_STREAMED):
            if len(tickets) == len(rooms):
                self._transfer.wait(tickets.popleft())
            extent = Extent(0, (first + i) % n_places * size, size, 0)
            job = LoadJob(id=i, sink=rooms[i % len(rooms)], extents=[extent])
            tickets.append(self._transfer.load([job]))
        for ticket in tickets:
            self._transfer.wait(ticket)
        return N_STREAMED * size / (time.perf_counter() - began)

    def overlap_ratio(self) -> float:
        """Compare reading and computing at once with one after the other."""
        size, found = LAYER_BYTES, []
        memory = self._rooms[0].sink(1, size)
        for _ in range(ROUNDS):
            read_s = _timed_s(lambda: self._read(memory, size, 1))
            one_s = _timed_s(self._load.compute)
            n = max(1, round(read_s / one_s))
            compute_s = _timed_s(lambda n=n: self._compute(n))
            both_s = _timed_s(lambda n=n: self._both(memory, size, n))
            found.append((read_s + compute_s - both_s) / min(read_s, compute_s))
        return min(1.0, max(0.0, statistics.median(found)))

    def _compute(self, n: int) -> None:
        for _ in range(n):
            self._load.compute()

    def _both(self, memory: HostSink, size: int, n: int) -> None:
        ticket = self._transfer.load(self._jobs(memory, size, 1))
        self._compute(n)
        self._transfer.wait(ticket)

    def _read(self, memory: HostSink, size: int, depth: int) -> None:
        self._transfer.wait(self._transfer.load(self._jobs(memory, size, depth)))

    def _jobs(self, memory: HostSink, size: int, depth: int) -> Sequence[LoadJob]:
        places = self._places.get(size)
        if places is None:
            n_places = self._size_bytes // size
            places = self._rng.sample(range(n_places), min(n_places, N_PLACES))
            self._places[size] = places
        chosen = self._rng.choices(places, k=depth)
        extents = [Extent(0, place * size, size, part) for part, place in enumerate(chosen)]
        return [LoadJob(id=0, sink=memory, extents=extents)]


def _timed_s(work: object) -> float:
    assert callable(work)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
