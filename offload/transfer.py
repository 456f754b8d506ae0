"""I/O threads that bring pages from disk: a demand load overtakes every prefetch that waits.

Reads are cut and merged by `load_plan`, land in aligned memory, and are handed to each
page's sink on the thread that read them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.offload.disk import Disk, read_into
from edgeroute.offload.load_plan import (
    Extent,
    Job,
    JobResult,
    LoadJob,
    Priority,
    Sink,
    Span,
    Ticket,
    check_jobs,
    plan,
)
from edgeroute.offload.load_queue import LoadQueue, Read
from edgeroute.offload.staging import StagingPool
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CapacityError, ClosedError, UsageError
from edgeroute.runtime.units import format_bytes

__all__ = ["Extent", "JobResult", "LoadJob", "Sink", "Ticket", "Transfer", "TransferStats"]

MAX_THREADS: Final = 64
STOP_POLL_S: Final = 0.01
"""How often a wait looks whether it should stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """What was moved so far. `read_bytes` counts what the disk was asked for, alignment and
    gaps included; the other two what arrived in a sink, by the queue it was read from.

    `busy_s` sums over threads the time spent in reads and sinks; `wait_s` is what callers
    spent in `wait`.
    """

    demand_bytes: int
    prefetch_bytes: int
    read_bytes: int
    n_reads: int
    busy_s: float
    wait_s: float


class Transfer(Closing):
    """A pool of I/O threads over a few open files, which it closes when it is closed.

    Any thread may call it. A sink must not.
    """

    def __init__(
        self, files: Sequence[Disk], n_threads: int, read_bytes: int, max_staging_bytes: int
    ) -> None:
        """Start the threads.

        Args:
            files: open files; an Extent's `file` counts from 0 here.
            n_threads: reads under way at once, 1 to 64.
            read_bytes: the longest read; see `disk_speed.measure`.
            max_staging_bytes: memory for parts on their way, at least one part.

        Raises:
            UsageError: an argument is out of range; nothing was started.
        """
        if not 1 <= n_threads <= MAX_THREADS:
            raise UsageError(f"n_threads must be between 1 and {MAX_THREADS}, got {n_threads}")
        if read_bytes < 1 or max_staging_bytes < 1:
            raise UsageError("read_bytes and max_staging_bytes must be positive, got "
                             f"{read_bytes} and {max_staging_bytes}")  # fmt: skip
        self._files = list(files)
        slack = 2 * max((file.alignment for file in self._files), default=1)
        self.read_bytes = read_bytes
        self._pool = StagingPool(max_staging_bytes)
        if not self._pool.fits(read_bytes + slack):
            raise UsageError(f"max_staging_bytes must hold one read of {read_bytes} bytes and what "
                             f"aligns it, got {max_staging_bytes}; raise it")  # fmt: skip
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queue = LoadQueue(self._files, read_bytes, self._pool)
        self._busy_s = 0.0
        self._wait_s = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"edgeroute-io-{i}", daemon=True)
            for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def load(self, jobs: Sequence[LoadJob]) -> Ticket:
        """Read pages that somebody waits for, before any prefetch that has not begun.

        Returns:
            A ticket for all of them; give it to `wait`.

        Raises:
            UsageError, ModelFileError: an extent is impossible; nothing was queued.
            CapacityError: a part exceeds the staging memory; nothing was queued.
            ClosedError: after `close`.
        """
        return self._submit([jobs], Priority.DEMAND)[0]

    def prefetch(self, jobs: Sequence[LoadJob]) -> list[Ticket]:
        """Read pages when no demand load waits, the first ones first.

        Returns:
            A ticket for each, to `promote`, `cancel` or `wait` for.

        Raises:
            As `load`.
        """
        return self._submit([[job] for job in jobs], Priority.PREFETCH)

    def promote(self, ticket: Ticket) -> None:
        """Make prefetches demand loads: what has not been read yet overtakes the others."""
        with self._lock:
            for job in ticket.jobs:
                for span in job.spans:
                    self._queue.promote(span)
            self._work.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Drop what has not begun. Reads under way end first: `wait` until `ticket.done`.

        The sink of a job that ends `dropped` holds nothing of use.
        """
        with self._lock:
            for job in ticket.jobs:
                self._queue.drop(job)

    def wait(self, ticket: Ticket, stop: Callable[[], bool] | None = None) -> bool:
        """Wait until every load of a ticket has ended.

        Args:
            ticket: from `load` or `prefetch`.
            stop: asked now and then; True cancels what has not begun.

        Returns:
            Whether all were loaded; False if any was dropped.

        Raises:
            ModelFileError: a read failed, or the file was changed.
            ClosedError: the transfer was closed meanwhile.
            Exception: what a sink raised.
        """
        if not ticket.done:
            began = time.perf_counter()
            self._await(ticket, stop)
            waited_s = time.perf_counter() - began
            with self._lock:
                self._wait_s += waited_s
        if (error := ticket.error) is not None:
            raise error
        return all(result.outcome == "ok" for result in ticket.results)

    @property
    def stats(self) -> TransferStats:
        """What was moved since the start."""
        with self._lock:
            return TransferStats(
                demand_bytes=self._queue.arrived[Priority.DEMAND],
                prefetch_bytes=self._queue.arrived[Priority.PREFETCH],
                read_bytes=self._queue.read_total,
                n_reads=self._queue.n_reads,
                busy_s=self._busy_s,
                wait_s=self._wait_s,
            )

    @property
    def staging_bytes(self) -> int:
        """Memory held for parts on their way, idle buffers included."""
        return self._pool.held_bytes

    def close(self, timeout_s: float = 10.0) -> None:
        """Drop what waits, let running reads end, join the threads and close the files.

        A thread that is stuck in a read for longer than `timeout_s` (a network disk that is
        gone) is left behind with the files open; it ends when its read does, and nobody
        waits for it. Safe to call twice.
        """
        with self._lock:
            self._closed = True
            for job in list(self._queue.open):
                self._queue.drop(
                    job, ClosedError("the transfer was closed before a page was loaded")
                )
            self._work.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for job in list(self._queue.open):  # of threads that are stuck
                self._queue.end(job)
            self._pool.clear()
        if not any(thread.is_alive() for thread in self._threads):
            for file in self._files:
                file.close()

    def _submit(self, groups: Sequence[Sequence[LoadJob]], priority: Priority) -> list[Ticket]:
        tickets, jobs = [], []
        for group in groups:
            check_jobs(group, self._files)
            ticket = Ticket(len(group))
            ticket.jobs = [Job(spec, ticket) for spec in group]
            tickets.append(ticket)
            jobs += ticket.jobs
        spans = plan(jobs, self._files, self.read_bytes)
        for span in spans:
            if not span.in_place and not self._pool.fits(span.nbytes):
                raise CapacityError(
                    f"a part of {format_bytes(span.nbytes)} does not fit the staging memory, "
                    f"{format_bytes(self._pool.max_bytes)}; raise max_staging_bytes"
                )
        with self._lock:
            if self._closed:
                raise ClosedError("the transfer is closed; no page can be loaded")
            self._queue.add(jobs, spans, priority)
            self._work.notify_all()
        return tickets

    def _await(self, ticket: Ticket, stop: Callable[[], bool] | None) -> None:
        while stop is not None and not ticket.done:
            if ticket.finished.acquire(timeout=STOP_POLL_S):
                ticket.finished.release()  # for whoever else waits
            elif stop():
                self.cancel(ticket)
                break
        with ticket.finished:
            return

    def _run(self) -> None:
        """One I/O thread."""
        with self._lock:
            read = self._take()
        while read is not None:
            read = self._serve(read)

    def _take(self) -> Read | None:
        """Wait for a read to do, with the lock held; None when the transfer is closed."""
        while (read := self._queue.next()) is None:
            if self._closed:
                return None
            self._work.wait()
        return read

    def _serve(self, read: Read) -> Read | None:
        """Do a read and, if its span is complete, hand it over; return the next one."""
        span, began = read.span, time.perf_counter()
        error = self._read(read)
        # Nobody else can end a span of which one read is left, so most need the lock once.
        shared = span.n_reads > 1
        if shared:
            with self._lock:
                if not self._queue.after_read(read, error):
                    self._busy_s += time.perf_counter() - began
                    return self._take()
        errors = _deliver(span) if error is None else {}
        with self._lock:
            if not shared:
                self._queue.after_read(read, error)
            self._queue.after_span(span, errors)
            self._busy_s += time.perf_counter() - began
            if self._queue.waiting:  # perhaps for this memory
                self._work.notify_all()
            return self._take()

    def _read(self, read: Read) -> BaseException | None:
        """Read, unless nobody wants it any more; return what went wrong."""
        span = read.span
        if not span.wanted:
            return None
        read.asked = True
        wanted = min(read.high, span.end - span.start) - read.low
        buffers = span.buffers(read.low, read.high)
        try:
            read_into(self._files[span.file], span.start + read.low, buffers, wanted)
        except BaseException as error:  # the thread lives on; `wait` raises it
            return error
        finally:
            for buffer in buffers:
                buffer.release()
        return None


def _deliver(span: Span) -> dict[Job, BaseException]:
    """Hand a span's bytes to the sinks that still want them; return what went wrong."""
    errors: dict[Job, BaseException] = {}
    if span.in_place:
        return errors  # the bytes were read to where they belong
    [(_, view)] = span.places
    for item in span.items:
        if not item.job.wanted or item.job in errors:
            continue
        low = item.offset - span.start
        data = view[low : low + item.nbytes]
        try:
            item.job.spec.sink.write(item.part, item.at, data)
            data.release()
        except BaseException as error:  # the thread lives on; `wait` raises it
            errors[item.job] = error
    return errors
