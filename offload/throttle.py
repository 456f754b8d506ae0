"""A disk slowed down to another one: its bandwidth by read size and depth, its latency.

A model of a drive: one queue that serves bytes at the rate of the reads now under way, and no
read that takes less than it would alone. What the disk below needs counts; only the rest is
waited, so a slower disk than the one to imitate stays as slow as it is.
"""

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from edgeroute.offload import disk_profile
from edgeroute.offload.disk import DiskFile, Identity, Mode
from edgeroute.offload.disk_profile import MOST_READ_BYTES, MOST_THREADS, DiskProfile
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import UsageError

GOOD_RATIO: Final = 0.95
"""As `disk_speed`: a point this near to the best is as good, with fewer and shorter reads."""


class Point(NamedTuple):
    """Bandwidth of random reads of `read_bytes` each, `depth` of them at once."""

    read_bytes: int
    depth: int
    bytes_s: float


class Throttle:
    """The speed of one drive, shared by all files on it. Thread-safe.

    Args:
        points: at least one; between sizes and depths it is interpolated by logarithms, beyond
            them the nearest holds. A shorter read than the shortest point costs as many of
            them as could be done in its time: reads per second stay.
        clock: seconds, never going back.

    Raises:
        UsageError: no points, or one that no drive has.
    """

    def __init__(
        self, points: Sequence[Point], clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not points:
            raise UsageError("a drive needs at least one (read_bytes, depth, bytes_s)")
        for point in points:
            good = point.read_bytes > 0 and point.depth > 0 and 0 < point.bytes_s < math.inf
            if not good:
                raise UsageError(f"a drive cannot have the point {tuple(point)}")
        self.points = tuple(Point(*point) for point in points)
        self.clock = clock
        self._lock = threading.Lock()
        self._n_reads = 0
        self._free_at = -math.inf

    def bytes_s(self, read_bytes: int, depth: int) -> float:
        """Return the bandwidth of reads of a length, `depth` at once."""
        depths = sorted({point.depth for point in self.points})
        found = [(each, self._at_depth(read_bytes, each)) for each in depths]
        return _between(found, depth)

    def _at_depth(self, read_bytes: int, depth: int) -> float:
        points = sorted((p.read_bytes, p.bytes_s) for p in self.points if p.depth == depth)
        rate = _between(points, read_bytes)
        shortest = points[0][0]
        return rate * read_bytes / shortest if 0 < read_bytes < shortest else rate

    def begin(self) -> float:
        """Note that a read begins and return when; every call must be followed by `end`."""
        with self._lock:
            self._n_reads += 1
        return self.clock()

    def due(self, began: float, n_bytes: int) -> float:
        """Return when a read that began then would end on the drive, after those before it."""
        if n_bytes < 1:
            return began
        with self._lock:
            start = max(began, self._free_at)
            self._free_at = start + n_bytes / self.bytes_s(n_bytes, max(1, self._n_reads))
            return max(self._free_at, began + n_bytes / self.bytes_s(n_bytes, 1))

    def end(self) -> None:
        """Note that a read is over."""
        with self._lock:
            self._n_reads -= 1

    def best_reads(self) -> DiskProfile:
        """Return the point to read by, as the profile of a measured disk would say it."""
        usable = [p for p in self.points if p.depth <= MOST_THREADS] or [self.points[0]]
        top = max(point.bytes_s for point in usable)
        best = min(
            (p for p in usable if p.bytes_s >= GOOD_RATIO * top),
            key=lambda p: (p.depth, p.read_bytes),
        )
        return DiskProfile(
            read_bytes=max(4096, min(MOST_READ_BYTES, best.read_bytes)),
            n_threads=min(MOST_THREADS, best.depth), bytes_s=best.bytes_s,
        )  # fmt: skip


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    """Interpolate y over x, both by their logarithms; outside, the nearest y."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if at <= x1:
            share = math.log(at / x0) / math.log(x1 / x0)
            return float(y0 * (y1 / y0) ** share)
    return points[-1][1]


class ThrottledDisk(Closing):
    """An open file read through a Throttle; closing it wakes whoever waits."""

    def __init__(self, disk: DiskFile, throttle: Throttle) -> None:
        self.disk = disk
        self.throttle = throttle
        self._closed = threading.Event()

    @property
    def path(self) -> Path:
        """For messages."""
        return self.disk.path

    @property
    def size_bytes(self) -> int:
        """Size when it was opened."""
        return self.disk.size_bytes

    @property
    def alignment(self) -> int:
        """Of the disk below."""
        return self.disk.alignment

    @property
    def identity(self) -> Identity:
        """Of the file below."""
        return self.disk.identity

    @property
    def mode(self) -> Mode:
        """Of the disk below."""
        return self.disk.mode

    def read_at(self, offset: int, *buffers: memoryview) -> int:
        """Read once, into one buffer after the other, and return no sooner than the drive would.

        Raises:
            OSError: what the system said.
            ClosedError: the file was closed.
        """
        began = self.throttle.begin()
        try:
            n = self.disk.read_at(offset, *buffers)
            self._wait(self.throttle.due(began, n))
        finally:
            self.throttle.end()
        return n

    def _wait(self, due: float) -> None:
        """Wait until then, or until it is closed."""
        while (left := due - self.throttle.clock()) > 0:
            if self._closed.wait(left):
                return

    def check(self) -> None:
        """Raise ModelFileError if the open file is no longer as it was when opened."""
        self.disk.check()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._closed.set()
        self.disk.close()


_active: Throttle | None = None


@contextlib.contextmanager
def slowed(throttle: Throttle) -> Iterator[None]:
    """Slow the disks of every model that this process opens within.

    For benchmarks: a process imitates one device at a time.

    Raises:
        UsageError: another one is imitated already.
    """
    global _active
    if _active is not None:
        raise UsageError("this process imitates a drive already; end that first")
    _active = throttle
    try:
        yield
    finally:
        _active = None


def throttled(disk: DiskFile) -> DiskFile | ThrottledDisk:
    """Return the disk, slowed where this process imitates another one. It closes the file."""
    return disk if _active is None else ThrottledDisk(disk, _active)


def profile(disk: DiskFile | ThrottledDisk) -> DiskProfile:
    """Return how a disk is best read: that of the drive it imitates, else as measured.

    Raises:
        ModelFileError: a read failed while it was measured.
    """
    if isinstance(disk, ThrottledDisk):
        return disk.throttle.best_reads()
    return disk_profile.profile(disk)
