"""The order in which reads are done, and when a load has ended. No threads, no locks.

A span waits in the queue of its priority, begins when there is memory for it, and is then
read by one thread or several. `Transfer` owns the threads and the lock around all of this.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from edgeroute.offload.disk import Disk
from edgeroute.offload.load_plan import Job, JobResult, Outcome, Priority, Span
from edgeroute.offload.staging import StagingPool

_IN_TURN: Final = (Priority.DEMAND, Priority.PREFETCH)


class Read:
    """Bytes [low, high) of a span's buffer, one read; `asked` once the disk was asked."""

    __slots__ = ("asked", "high", "low", "priority", "span")

    def __init__(self, span: Span, low: int, high: int) -> None:
        self.span = span
        self.low = low
        self.high = high
        self.priority = span.priority
        self.asked = False


class LoadQueue:
    """Loads that wait or are under way, and what was moved. Not thread-safe."""

    def __init__(self, files: Sequence[Disk], read_bytes: int, pool: StagingPool) -> None:
        self.files = files
        self.read_bytes = read_bytes
        self.pool = pool
        self.open: Final[set[Job]] = set()
        """Jobs that have not ended."""
        self.arrived = [0, 0]
        """Bytes that reached a sink, by priority."""
        self.read_total = 0
        self.n_reads = 0
        self._spans: tuple[deque[Span], deque[Span]] = (deque(), deque())
        self._reads: tuple[deque[Read], deque[Read]] = (deque(), deque())

    @property
    def waiting(self) -> bool:
        """Whether a span may be waiting to begin."""
        return any(self._spans)

    def add(self, jobs: Iterable[Job], spans: Iterable[Span], priority: Priority) -> None:
        """Queue loads behind those of their priority; one without bytes ends at once."""
        for job in jobs:
            self.open.add(job)
            if job.n_open == 0:
                self.end(job)
        for span in spans:
            span.priority = priority
            self._spans[priority].append(span)

    def promote(self, span: Span) -> None:
        """Make a span a demand; its entries in the other queue are passed over."""
        if span.priority is Priority.DEMAND:
            return
        span.priority = Priority.DEMAND
        if not span.started:
            self._spans[Priority.DEMAND].append(span)
            return
        for read in self._reads[Priority.PREFETCH]:
            if read.span is span:
                read.priority = Priority.DEMAND
                self._reads[Priority.DEMAND].append(read)

    def drop(self, job: Job, error: BaseException | None = None) -> None:
        """End a job early, or as soon as its reads under way have ended."""
        if job.result is not None:
            return
        job.dropped = True
        job.error = job.error or error
        self._abandon(job)
        if job.n_open == 0:
            self.end(job)

    @staticmethod
    def _abandon(job: Job) -> None:
        """Take a job out of the spans that have not begun."""
        for span in job.spans:
            if not span.started:
                left = [item for item in span.items if item.job is not job]
                job.n_open -= len(span.items) - len(left)
                span.items = left

    def end(self, job: Job) -> None:
        """Write a job's result; its ticket is done with its last job."""
        outcome: Outcome = "ok"
        if job.error is not None:
            outcome = "failed"
        elif job.dropped:
            outcome = "dropped"
        now = time.perf_counter()
        seconds = now - job.began if job.began else 0.0
        job.result = JobResult(id=job.spec.id, outcome=outcome, seconds=seconds, nbytes=job.nbytes)
        job.spans.clear()  # they refer to the job
        self.open.discard(job)
        job.ticket.ended = now
        job.ticket.n_open -= 1
        if job.ticket.n_open == 0:
            job.ticket.finished.release()

    def next(self) -> Read | None:
        """Choose what a free thread does: demand first; None when there is nothing for it.

        A span needs memory to begin. While a demand span waits for some, reads of prefetches
        that have begun go on, since they hold it, and none begins.
        """
        for priority in _IN_TURN:
            while True:
                if (read := self._begun(priority)) is not None:
                    return read
                span = self._first(priority)
                if span is None:
                    break
                if not self._begin(span):
                    return self._begun(Priority.PREFETCH)
                self._spans[priority].popleft()
        return None

    def _begun(self, priority: Priority) -> Read | None:
        """The next read of the spans that have begun, in this queue."""
        reads = self._reads[priority]
        while reads:
            read = reads.popleft()
            if read.priority is priority:
                return read
        return None

    def _first(self, priority: Priority) -> Span | None:
        """The first span that still waits in this queue, and for which somebody waits."""
        spans = self._spans[priority]
        while spans:
            span = spans[0]
            if span.priority is priority and not span.started and span.items:
                return span
            spans.popleft()
        return None

    def _begin(self, span: Span) -> bool:
        """Give a span its memory and queue its reads; False while there is no memory."""
        memory = None
        if not span.in_place:
            memory = self.pool.take(span.nbytes)
            if memory is None:
                return False
        alignment = self.files[span.file].alignment
        span.begin(memory, alignment)
        now = time.perf_counter()
        for item in span.items:
            item.job.began = item.job.began or now
        reads = [Read(span, low, high) for low, high in span.reads(self.read_bytes, alignment)]
        span.n_reads = len(reads)
        self._reads[span.priority].extend(reads)
        return True

    def after_read(self, read: Read, error: BaseException | None) -> bool:
        """Book a read; True if it was the last one of its span."""
        span = read.span
        if read.asked:
            self.n_reads += 1
            self.read_total += read.high - read.low
        if error is not None:
            self._fail([item.job for item in span.items], error)
        span.n_reads -= 1
        return span.n_reads == 0

    def after_span(self, span: Span, errors: dict[Job, BaseException]) -> None:
        """Book what a span brought, end the jobs that it completes, reuse its memory."""
        for job, error in errors.items():
            self._fail([job], error)
        for item in span.items:
            if item.job.wanted:
                item.job.nbytes += item.nbytes
                self.arrived[span.priority] += item.nbytes
            item.job.n_open -= 1
            if item.job.n_open == 0 and item.job in self.open:
                self.end(item.job)
        span.close()
        if span.memory is not None:
            self.pool.give(span.memory)

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.error = job.error or error
            self._abandon(job)
