"""What is to be read, and how it is cut into reads.

Parts that lie next to each other in a file are read together, wherever they go; what is longer
than one read is cut, so that several threads bring it.
"""

import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np

from edgeroute.offload.disk import Disk
from edgeroute.runtime.errors import EdgerouteError, ModelFileError, UsageError
from edgeroute.runtime.slots import Landing

_BLOCK_BYTES: Final = 4096
"""Parts with a smaller gap between them are read together: another read costs more."""
_MAX_PLACES: Final = 256
"""Buffers that one read fills at most: systems take 1024."""


class Priority(IntEnum):
    """Which queue a read waits in. Somebody waits for a demand load."""

    DEMAND = 0
    PREFETCH = 1


class Extent(NamedTuple):
    """Bytes of a file that are one part of a page."""

    file: int
    offset: int
    nbytes: int
    part: int


class Sink(Protocol):
    """Where the bytes of one page go. Its methods but `destination` run on I/O threads.

    Parts, and the pieces of a part where `whole_parts` is false, come in any order and from
    several threads at once; each byte comes once. After a load that failed or was dropped,
    what the sink holds is undefined.
    """

    @property
    def whole_parts(self) -> bool:
        """Whether `write` must be given a part in one piece."""

    def destination(self, part: int) -> Landing | None:
        """Return writable memory to read the part into, without `write`.

        It is used if reads as the disk wants them, from a multiple of its alignment to one,
        can end there. Called by the thread that asks for the load.
        """

    def write(self, part: int, at: int, data: memoryview) -> None:
        """Take bytes of a part, beginning `at` bytes into it.

        Lifetime: `data` is released when this returns.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """One page to load: `extents` has one entry for each part."""

    id: int
    extents: Sequence[Extent]
    sink: Sink


Outcome = Literal["ok", "failed", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a load ended. `seconds` from the begin of its first read; `nbytes` delivered."""

    id: int
    outcome: Outcome
    seconds: float
    nbytes: int


class Ticket:
    """Loads that were asked for together."""

    def __init__(self, n_jobs: int) -> None:
        self.jobs: list[Job] = []
        self.n_open = n_jobs
        self.ended = 0.0
        """When the last job ended, by time.perf_counter."""
        self.finished = threading.Lock()
        """Held until the last job has ended."""
        if n_jobs:
            self.finished.acquire()

    @property
    def done(self) -> bool:
        """Whether every load has ended, well or not."""
        return self.n_open == 0

    @property
    def results(self) -> list[JobResult]:
        """How the loads that have ended did, in the order they were asked for."""
        return [job.result for job in self.jobs if job.result is not None]

    @property
    def error(self) -> BaseException | None:
        """The first error of its loads, in the order they were asked for."""
        return next((job.error for job in self.jobs if job.error is not None), None)


class Job:
    """A LoadJob under way. The transfer's lock guards all that changes."""

    __slots__ = ("began", "dropped", "error", "n_open", "nbytes", "result", "spans", "spec",
                 "ticket")  # fmt: skip

    def __init__(self, spec: LoadJob, ticket: Ticket) -> None:
        self.spec = spec
        self.ticket = ticket
        self.spans: list[Span] = []
        self.n_open = 0
        """Items, that is pieces for its sink, that have not ended."""
        self.began = 0.0
        self.nbytes = 0
        self.dropped = False
        self.error: BaseException | None = None
        self.result: JobResult | None = None

    @property
    def wanted(self) -> bool:
        """Whether its bytes still have a taker."""
        return not self.dropped and self.error is None


class Item(NamedTuple):
    """Bytes of a span that go to a sink: `nbytes` from `offset` in the file.

    `place` is the sink's own memory for them and for what aligns them, if they are read there.
    """

    job: Job
    part: int
    at: int
    offset: int
    nbytes: int
    place: memoryview | None = None


class Span:
    """A run of a file that is read at once, by one read or several.

    Either into one staging buffer, or, if `in_place`, into the places of its items, which then
    follow each other without a gap. `start` and `stop` suit the disk's alignment; `end` is where
    the last wanted byte ends.
    """

    __slots__ = ("end", "file", "in_place", "items", "memory", "n_reads", "places", "priority",
                 "start", "started", "stop")  # fmt: skip

    def __init__(self, file: int, start: int, item: Item) -> None:
        self.file = file
        self.start = start
        self.stop = start
        self.end = item.offset + item.nbytes
        self.items = [item]
        self.in_place = item.place is not None
        self.priority = Priority.DEMAND
        self.started = False
        self.n_reads = 0
        """Reads that have not ended."""
        self.memory: mmap.mmap | None = None
        """The staging buffer; None for a span that is read in place."""
        self.places: list[tuple[int, memoryview]] = []
        """Once it has begun: where its bytes go, each with how far behind `start` it begins."""

    @property
    def nbytes(self) -> int:
        """Bytes from `start` to `stop`."""
        return self.stop - self.start

    @property
    def wanted(self) -> bool:
        """Whether any of its bytes still has a taker."""
        return any(item.job.wanted for item in self.items)

    def begin(self, memory: mmap.mmap | None, alignment: int) -> None:
        """Settle where the bytes go; nothing is read to where an item was taken out."""
        self.started = True
        if memory is not None:
            self.memory = memory
            self.places = [(0, memoryview(memory)[: self.nbytes])]
            return
        for item in self.items:
            assert item.place is not None
            self.places.append((item.offset // alignment * alignment - self.start, item.place))

    def buffers(self, low: int, high: int) -> list[memoryview]:
        """Return where the bytes from `low` to `high` behind `start` go."""
        return [
            place[max(0, low - at) : high - at]
            for at, place in self.places
            if at < high and low < at + len(place)
        ]

    def reads(self, read_bytes: int, alignment: int) -> Iterator[tuple[int, int]]:
        """Cut the span into reads of nearly equal length, `read_bytes` give or take a half."""
        for first, stop in self._runs():
            used = min(stop, self.end - self.start) - first
            length = stop - first
            if (n := n_reads(used, read_bytes)) > 1:
                length = -(-used // n)
                length = -(-length // alignment) * alignment
            for low in range(first, first + used, length):
                yield low, min(low + length, stop)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Stretches of the span that are wanted, behind `start`."""
        first = stop = 0
        for at, place in self.places:
            if at > stop:
                if stop > first:
                    yield first, stop
                first = at
            stop = at + len(place)
        yield first, stop

    def close(self) -> None:
        """Let go of the memory that its bytes went to."""
        for _, place in self.places:
            place.release()
        self.places.clear()


def n_reads(nbytes: int, read_bytes: int) -> int:
    """Return how many reads bytes in one piece take, none much longer than `read_bytes`."""
    return 1 if 2 * nbytes < 3 * read_bytes else max(1, round(nbytes / read_bytes))


def check_jobs(jobs: Sequence[LoadJob], files: Sequence[Disk]) -> None:
    """Refuse loads that no read could serve, before anything is queued.

    Raises:
        ModelFileError: an extent reaches past the end of its file.
        UsageError: an extent names no file or no bytes, or a part twice.
    """
    for job in jobs:
        parts = set()
        for extent in job.extents:
            if not 0 <= extent.file < len(files) or extent.offset < 0 or extent.nbytes <= 0:
                raise UsageError(f"page {job.id} has an impossible extent: {extent}; there are "
                                 f"{len(files)} files")  # fmt: skip
            disk = files[extent.file]
            if extent.offset + extent.nbytes > disk.size_bytes:
                raise ModelFileError(
                    f"page {job.id} needs {extent.nbytes} bytes at offset {extent.offset} of "
                    f"{disk.path}, which has {disk.size_bytes}; fetch the file again"
                )
            parts.add(extent.part)
        if len(parts) != len(job.extents):
            raise UsageError(f"page {job.id} names a part twice: {list(job.extents)}")


def plan(jobs: Sequence[Job], files: Sequence[Disk], read_bytes: int) -> list[Span]:
    """Cut loads into spans, in the order of the first load that each one serves."""
    spans: list[tuple[int, Span]] = []
    staged: list[tuple[Extent, int]] = []
    for index, job in enumerate(jobs):
        direct = []
        for extent in sorted(job.spec.extents):
            span = _direct_span(job, extent, files[extent.file].alignment)
            if span is not None:
                direct.append((index, span))
            else:
                staged.append((extent, index))
        spans += _together(direct)  # a page in one piece is cut into reads as a whole
    spans.sort(key=lambda pair: (pair[1].file, pair[1].start))
    spans = _together(spans, read_bytes)
    staged.sort()
    last: Span | None = None
    for extent, index in staged:
        job, alignment = jobs[index], files[extent.file].alignment
        if extent.nbytes > read_bytes and not job.spec.sink.whole_parts:
            spans += [(index, span) for span in _pieces(job, extent, read_bytes, alignment)]
            continue
        item = Item(job, extent.part, 0, extent.offset, extent.nbytes)
        if last is not None and _joins(last, extent, read_bytes, alignment):
            last.items.append(item)
            last.end = max(last.end, extent.offset + extent.nbytes)
            continue
        last = Span(extent.file, extent.offset // alignment * alignment, item)
        spans.append((index, last))
    spans.sort(key=lambda pair: pair[0])
    for _, span in spans:
        alignment = files[span.file].alignment
        span.stop = -(-span.end // alignment) * alignment
        for item in span.items:
            if not item.job.spans or item.job.spans[-1] is not span:
                item.job.spans.append(span)
            item.job.n_open += 1
    return [span for _, span in spans]


def _joins(span: Span, extent: Extent, read_bytes: int, alignment: int) -> bool:
    """Whether an extent behind a span is read with it: near enough, and still one read."""
    if span.file != extent.file or extent.offset - span.end >= max(alignment, _BLOCK_BYTES):
        return False
    return max(span.end, extent.offset + extent.nbytes) - span.start <= read_bytes


def _together(
    spans: Iterable[tuple[int, Span]], most_bytes: int | None = None
) -> list[tuple[int, Span]]:
    """Join spans in place, sorted by where they begin, that follow each other without a gap.

    Args:
        spans: each with the number of the first load that it serves.
        most_bytes: of a joined one; None is any.
    """
    found: list[tuple[int, Span]] = []
    for index, span in spans:
        if found:
            first, last = found[-1]
            near = (last.file, last.stop) == (span.file, span.start)
            few = len(last.items) + len(span.items) <= _MAX_PLACES
            if near and few and (most_bytes is None or span.stop - last.start <= most_bytes):
                last.items += span.items
                last.stop, last.end = span.stop, span.end
                found[-1] = min(first, index), last
                continue
        found.append((index, span))
    return found


def _pieces(job: Job, extent: Extent, read_bytes: int, alignment: int) -> Iterator[Span]:
    """Cut an extent at multiples of the alignment into spans of about `read_bytes`."""
    step = max(alignment, read_bytes // alignment * alignment)
    offset, end = extent.offset, extent.offset + extent.nbytes
    while offset < end:
        start = offset // alignment * alignment
        upto = min(start + step, end)
        item = Item(job, extent.part, offset - extent.offset, offset, upto - offset)
        yield Span(extent.file, start, item)
        offset = upto


def _direct_span(job: Job, extent: Extent, alignment: int) -> Span | None:
    """A span that is read into the sink's own memory, where it has some that suits."""
    landing = job.spec.sink.destination(extent.part)
    if landing is None:
        return None
    memory, lead = landing
    n_behind = memory.nbytes - lead - extent.nbytes
    if memory.readonly or not memory.c_contiguous or lead < 0 or n_behind < 0:
        raise EdgerouteError(
            f"the destination of part {extent.part} of page {job.spec.id} must be writable and "
            f"{extent.nbytes} contiguous bytes, got {memory.nbytes - lead}"
        )
    before = extent.offset % alignment
    after = -(extent.offset + extent.nbytes) % alignment
    if before > lead or after > n_behind:
        return None
    target = memory.cast("B")[lead - before : lead + extent.nbytes + after]
    if _address(target) % alignment:
        return None
    item = Item(job, extent.part, 0, extent.offset, extent.nbytes, target)
    span = Span(extent.file, extent.offset - before, item)
    span.stop = span.start + len(target)
    return span


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
