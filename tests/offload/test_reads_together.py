"""Parts that lie side by side are read at once into memories that do not."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.disk import DiskFile, read_into
from edgeroute.offload.load_plan import Extent
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.errors import ModelFileError
from tests.offload.faulty_disk import FaultyDisk, MemorySink, job, write_file

BLOCK = 4096
N_PAGES = 12
PARTS = (2, 5, 1)
"""Blocks of each part."""
PAGE_BYTES = sum(PARTS) * BLOCK
N_BYTES = N_PAGES * PAGE_BYTES


class Stored(tuple[Path, bytes]):
    """A file and what is in it, which a report should not print."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Stored({self[0]})"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    path = tmp_path_factory.mktemp("together") / "pages"
    return Stored((path, write_file(path, N_BYTES)))


def page(number: int, short: int = 0) -> list[Extent]:
    """Where a page lies; its parts may end `short` bytes before their last block does."""
    found, at = [], number * PAGE_BYTES
    for part, n_blocks in enumerate(PARTS):
        found.append(Extent(0, at, n_blocks * BLOCK - short, part))
        at += n_blocks * BLOCK
    return found


def right(content: bytes, extents: list[Extent], sink: MemorySink) -> bool:
    return all(
        bytes(sink.parts[e.part]) == content[e.offset : e.offset + e.nbytes] for e in extents
    )


@settings(max_examples=150, deadline=None)
@given(
    direct=st.booleans(), short=st.sampled_from([0, 0, 100]), n_threads=st.integers(1, 3),
    numbers=st.lists(st.integers(0, N_PAGES - 1), min_size=1, unique=True),
    taken_out=st.sets(st.integers(0, N_PAGES - 1)),
    read_bytes=st.sampled_from([BLOCK, 3 * BLOCK, PAGE_BYTES, 5 * PAGE_BYTES]),
    longest=st.sampled_from([None, BLOCK, 2 * BLOCK + 512]),
)  # fmt: skip
def test_what_is_cancelled_is_not_touched_and_all_else_is_right(
    stored: Stored, direct: bool, short: int, n_threads: int, numbers: list[int],
    taken_out: set[int], read_bytes: int, longest: int | None,
) -> None:  # fmt: skip
    """Whatever is taken out of a run before it begins: its begin, its end, holes in it."""
    path, content = stored
    disk = FaultyDisk(DiskFile.open(path, direct=direct))
    disk.longest = longest
    cancelled = taken_out.intersection(numbers)
    loads = {n: job(n, page(n, short), own_memory=True, behind=BLOCK) for n in numbers}
    with Transfer([disk], n_threads, read_bytes, 64 * PAGE_BYTES) as transfer:
        disk.gate.clear()
        first = transfer.load([job(99, [Extent(0, 0, 1, 0)])[0] for _ in transfer._threads])
        while len(disk.offsets) < 1:  # now every thread is busy, or will be behind the gate
            time.sleep(0)
        tickets = dict(
            zip(numbers, transfer.prefetch([load for load, _ in loads.values()]), strict=True)
        )
        spans = {n: ticket.jobs[0].spans[0] for n, ticket in tickets.items()}
        for n in cancelled:
            transfer.cancel(tickets[n])
        # Looked at afterwards: a thread may begin one until the moment when it is cancelled.
        begun = {n: span.started for n, span in spans.items()}
        disk.gate.set()
        transfer.wait(first)
        for n, ticket in tickets.items():
            assert transfer.wait(ticket) or n in cancelled
    for n, (_, sink) in loads.items():
        assert not any(sink.n_written.values())  # read in place
        if n not in cancelled:
            assert right(content, page(n, short), sink)
        elif not begun[n] and tickets[n].results[0].nbytes == 0:
            assert all(set(part) == {0xEE} for part in sink.parts.values())


def test_a_run_is_cut_where_a_page_was_cancelled(stored: Stored) -> None:
    disk = FaultyDisk(DiskFile.open(stored[0]))
    loads = {n: job(n, page(n), own_memory=True) for n in (6, 4, 3, 5, 2)}
    with Transfer([disk], 1, 8 * PAGE_BYTES, 16 * PAGE_BYTES) as transfer:
        assert transfer.wait(transfer.load([load for load, _ in loads.values()]))
        assert disk.offsets == [2 * PAGE_BYTES] and transfer.stats.n_reads == 1
        disk.gate.clear()
        busy = transfer.load([job(99, [Extent(0, 0, 1, 0)])[0]])
        while len(disk.offsets) < 2:
            time.sleep(0.001)
        again = {n: job(n, page(n), own_memory=True) for n in (6, 4, 3, 5, 2)}
        tickets = transfer.prefetch([load for load, _ in again.values()])
        for ticket, n in zip(tickets, again, strict=True):
            if n in (2, 4):
                transfer.cancel(ticket)
        disk.gate.set()
        assert transfer.wait(busy)
        assert [transfer.wait(ticket) for ticket in tickets] == [True, False, True, True, False]
        assert disk.offsets[2:] == [3 * PAGE_BYTES, 5 * PAGE_BYTES]
    for n, (_, sink) in again.items():
        assert not any(sink.n_written.values())  # read in place
        untouched = all(set(part) == {0xEE} for part in sink.parts.values())
        assert untouched if n in (2, 4) else right(stored[1], page(n), sink)


def test_a_page_beyond_one_read_is_cut_evenly_and_joined_to_none(
    stored: tuple[Path, bytes],
) -> None:
    """Three reads for eight blocks in parts of 2, 5 and 1; apart they would be four."""
    disk = FaultyDisk(DiskFile.open(stored[0]))
    loads = [job(n, page(n), own_memory=True) for n in (0, 1)]
    with Transfer([disk], 1, 3 * BLOCK, 16 * PAGE_BYTES) as transfer:
        assert transfer.wait(transfer.load([load for load, _ in loads]))
    assert [offset // PAGE_BYTES for offset in disk.offsets] == [0, 0, 0, 1, 1, 1]
    assert disk.offsets[3] == PAGE_BYTES
    assert all(right(stored[1], page(n), sink) for n, (_, sink) in enumerate(loads))


def test_a_bad_block_fails_all_pages_of_its_read_and_no_other(stored: Stored) -> None:
    disk = FaultyDisk(DiskFile.open(stored[0]))
    disk.eio_offset = 3 * PAGE_BYTES + 100
    loads = [job(n, page(n), own_memory=True) for n in (2, 3, 7)]
    with Transfer([disk], 2, 2 * PAGE_BYTES, 16 * PAGE_BYTES) as transfer:
        ticket = transfer.load([load for load, _ in loads])
        with pytest.raises(ModelFileError, match="Input/output error"):
            transfer.wait(ticket)
        assert [result.outcome for result in ticket.results] == ["failed", "failed", "ok"]
        disk.eio_offset = None
        assert transfer.wait(transfer.load([job(2, page(2), own_memory=True)[0]]))
    assert right(stored[1], page(7), loads[2][1])


@pytest.mark.parametrize("cut", [1, 4095, BLOCK, PAGE_BYTES])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "pages"
    write_file(path, N_BYTES)
    disk = DiskFile.open(path)
    loads = [job(n, page(n), own_memory=True) for n in (N_PAGES - 2, N_PAGES - 1)]
    with Transfer([disk], 2, 2 * PAGE_BYTES, 16 * PAGE_BYTES) as transfer:
        os.truncate(path, N_BYTES - cut)
        with pytest.raises(ModelFileError, match="had 393216 bytes when it was opened"):
            transfer.wait(transfer.load([load for load, _ in loads]))


@pytest.mark.parametrize("longest", [1, 511, 4096, 4097, 9000])
@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_go_on_in_the_right_buffer(
    stored: tuple[Path, bytes], longest: int, direct: bool
) -> None:
    path, content = stored
    with DiskFile.open(path, direct=direct) as under:
        disk = FaultyDisk(under)
        disk.longest = longest
        rooms = [MemorySink([Extent(0, 0, n * BLOCK, 0)]).parts[0] for n in (1, 3, 2)]
        wanted = 5 * BLOCK + 77
        if longest < disk.alignment:
            with pytest.raises(ModelFileError, match="nothing more"):
                read_into(disk, BLOCK, rooms, wanted)
            return
        read_into(disk, BLOCK, rooms, wanted)
    assert b"".join(rooms)[:wanted] == content[BLOCK : BLOCK + wanted]


def test_a_system_without_reads_at_an_offset_fills_them_in_turn(
    stored: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    with DiskFile.open(stored[0], direct=False) as disk:
        rooms = [memoryview(bytearray(n)) for n in (5, 1000, 3000)]
        assert disk.read_at(N_BYTES - 2000, *rooms) == 2000
    assert b"".join(rooms)[:2000] == stored[1][-2000:]
