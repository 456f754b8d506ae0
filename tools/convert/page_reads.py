"""Reads that missing pages take, wherever their parts lie: planned as a Transfer does, not read."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgeroute.offload.disk import Disk
from edgeroute.offload.load_plan import Extent, Job, LoadJob, Ticket, plan
from edgeroute.runtime.slots import BLOCK_BYTES, Landing, stride_bytes

Leases = Sequence[Sequence[int]]
"""Pages that were missing in one layer for one step, lease after lease."""
Extents = Callable[[int], Sequence[Extent]]
"""Where the parts of a page lie in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCount:
    """Reads of some missing pages, and the bytes that the disk is asked for."""

    n_reads: int
    read_bytes: int


class _Nowhere:
    """A sink of a page that is never read: places are as a slot's in host memory would be."""

    whole_parts = False

    def __init__(self, extents: Sequence[Extent], memory: memoryview) -> None:
        self._extents, self._memory = extents, memory

    def destination(self, part: int) -> Landing | None:
        """As `runtime.slots.HostSink`: short parts have no slack around them."""
        extent = self._extents[part]
        stride = stride_bytes(extent.nbytes)
        lead = extent.offset % BLOCK_BYTES if stride > extent.nbytes else 0
        return Landing(self._memory[:stride], lead)

    def write(self, part: int, at: int, data: memoryview) -> None:
        raise AssertionError("nothing is read for a count")


def count_reads(leases: Leases, extents: Extents, disk: Disk, read_bytes: int) -> ReadCount:
    """Count the reads that a Transfer would do for leases' missing pages.

    Args:
        leases: missing pages, those of one lease together.
        extents: where their parts lie in `disk`, in the order of parts.
        disk: the file; nothing is read.
        read_bytes: the longest read.
    """
    n_reads = total = 0
    for spans in _planned(leases, extents, disk, read_bytes):
        for low, high in spans:
            n_reads += 1
            total += high - low
    return ReadCount(n_reads=n_reads, read_bytes=total)


def _planned(
    leases: Leases, extents: Extents, disk: Disk, read_bytes: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the reads of each lease, each from and to how far behind its span's begin."""
    found = {page: extents(page) for pages in leases for page in pages}
    most = max((stride_bytes(one.nbytes) for parts in found.values() for one in parts), default=1)
    memory = memoryview(mmap.mmap(-1, most))
    for pages in leases:
        ticket = Ticket(0)
        jobs = [
            Job(LoadJob(id=page, extents=found[page], sink=_Nowhere(found[page], memory)), ticket)
            for page in pages
        ]
        reads: list[tuple[int, int]] = []
        for span in plan(jobs, [disk], read_bytes):
            if span.in_place:
                span.begin(None, disk.alignment)
                reads += span.reads(read_bytes, disk.alignment)
                span.close()
            else:  # as much as goes through a staging buffer is one read
                reads.append((0, span.nbytes))
        yield reads
