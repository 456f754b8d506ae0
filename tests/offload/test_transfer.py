"""Loads by I/O threads: bytes, order, faults; never a hang, a leak or a wrong byte."""

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.load_plan import Extent, LoadJob, Priority
from edgeroute.offload.load_queue import LoadQueue
from edgeroute.offload.staging import StagingPool
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.errors import (
    CapacityError,
    ClosedError,
    EdgerouteError,
    ModelFileError,
    UsageError,
)
from tests.offload.faulty_disk import FaultyDisk, MemorySink, job, write_file

N_BYTES = 700_001
KIB = 1 << 10


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("transfer") / "file"
    return path, write_file(path, N_BYTES)


@pytest.fixture
def slow(stored: tuple[Path, bytes]) -> Iterator[tuple[FaultyDisk, Transfer]]:
    """One thread behind a gate that a test opens; and nothing left behind."""
    disk = FaultyDisk(DiskFile.open(stored[0]))
    with Transfer([disk], 1, 16 * KIB, 256 * KIB) as transfer:
        yield disk, transfer
        disk.gate.set()


def until(condition: object) -> None:
    """Wait for what another thread does; the test's own timeout ends it."""
    assert callable(condition)
    while not condition():
        time.sleep(0.001)


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    gc.collect()
    before = n_descriptors()
    yield
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("edgeroute-io")])
    gc.collect()
    assert n_descriptors() == before


def pages(draw: st.DrawFn, n_files: int) -> list[list[Extent]]:
    """Pages of a few parts: some side by side, some apart, some of them shared."""
    found, at = [], 0
    for _ in range(draw(st.integers(1, 6))):
        page = []
        for part in range(draw(st.integers(0, 4))):
            nbytes = draw(st.sampled_from([1, 100, 512, 4096, 8192, 20_000, 65_536, 100_003]))
            jump = draw(st.sampled_from([0, 0, 0, 31, 512, 5000, 300_000]))
            at = (at + jump) % (N_BYTES - nbytes)
            page.append(Extent(draw(st.integers(0, n_files - 1)), at, nbytes, part))
            at += nbytes
        found.append(page)
    return found


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_page_arrives_as_it_is_in_the_file(
    stored: tuple[Path, bytes], data: st.DataObject
) -> None:
    path, content = stored
    n_threads = data.draw(st.integers(1, 5))
    read_bytes = data.draw(st.sampled_from([1000, 4096, 30_000, 64 * KIB, 256 * KIB]))
    wanted = pages(data.draw, 2)
    leads = st.sampled_from([0, 31, 512, 4096])
    jobs = [
        job(i, page, whole_parts=data.draw(st.booleans()), own_memory=data.draw(st.booleans()),
            lead=data.draw(leads), behind=data.draw(leads))
        for i, page in enumerate(wanted)
    ]  # fmt: skip
    demand, promoted = data.draw(st.booleans()), data.draw(st.lists(st.booleans(), max_size=6))
    files = [DiskFile.open(path), DiskFile.open(path, direct=False)]
    with Transfer(files, n_threads, read_bytes, 512 * KIB) as transfer:
        if demand:
            tickets = [transfer.load([load for load, _ in jobs])]
        else:
            tickets = transfer.prefetch([load for load, _ in jobs])
        for ticket, promote in zip(tickets, promoted, strict=False):
            if promote:
                transfer.promote(ticket)
        for ticket in tickets:
            assert transfer.wait(ticket) and ticket.done
        stats = transfer.stats
        assert transfer.staging_bytes <= 512 * KIB
    for page, (_, sink) in zip(wanted, jobs, strict=True):
        for extent in page:
            found = bytes(sink.parts[extent.part])
            assert found == content[extent.offset : extent.offset + extent.nbytes]
    results = [result for ticket in tickets for result in ticket.results]
    assert [(r.id, r.outcome) for r in results] == [(i, "ok") for i in range(len(jobs))]
    assert [r.nbytes for r in results] == [sum(e.nbytes for e in page) for page in wanted]
    assert stats.demand_bytes + stats.prefetch_bytes == sum(r.nbytes for r in results)


def test_neighbours_are_read_together_and_long_parts_in_pieces(
    stored: tuple[Path, bytes], slow: tuple[FaultyDisk, Transfer]
) -> None:
    disk, transfer = slow
    near = [Extent(0, 4096 + 4096 * i, 4000, i) for i in range(3)]
    assert transfer.wait(transfer.load([job(0, near)[0]]))
    assert disk.offsets == [4096]
    disk.offsets.clear()
    load, sink = job(1, [Extent(0, 0, 64 * KIB, 0)])
    assert transfer.wait(transfer.load([load]))
    assert disk.offsets == [16 * KIB * i for i in range(4)]
    assert bytes(sink.parts[0]) == stored[1][: 64 * KIB]


def test_aligned_memory_is_read_into_without_staging(stored: tuple[Path, bytes]) -> None:
    load, sink = job(0, [Extent(0, 8192, 65_536, 0)], own_memory=True)
    with Transfer([DiskFile.open(stored[0])], 2, 16 * KIB, 64 * KIB) as transfer:
        assert transfer.wait(transfer.load([load]))
        assert transfer.staging_bytes == 0 and transfer.stats.n_reads == 4
    assert bytes(sink.parts[0]) == stored[1][8192 : 8192 + 65_536]
    assert sink.n_written == {0: 0}


@pytest.mark.parametrize(("lead", "behind"), [(100, 1000), (99, 1000), (100, 10), (0, 0)])
def test_a_part_off_the_borders_is_read_with_what_lies_around_it(
    stored: tuple[Path, bytes], lead: int, behind: int
) -> None:
    """Where its memory lies as far off them, and may be overwritten; else through staging."""
    disk = DiskFile.open(stored[0])
    offset, nbytes = 8192 + 100, 65_536
    load, sink = job(0, [Extent(0, offset, nbytes, 0)], own_memory=True, lead=lead, behind=behind)
    direct = disk.alignment == 1 or (lead == 100 and behind == 1000 and disk.alignment == 512)
    with Transfer([disk], 2, 128 * KIB, 256 * KIB) as transfer:
        assert transfer.wait(transfer.load([load]))
        assert (transfer.staging_bytes == 0) == direct and transfer.stats.n_reads == 1
    assert bytes(sink.parts[0]) == stored[1][offset : offset + nbytes]
    assert sink.n_written == {0: 0 if direct else nbytes}


def test_a_destination_of_the_wrong_size_is_refused(slow: tuple[FaultyDisk, Transfer]) -> None:
    load, sink = job(0, [Extent(0, 0, 4096, 0)], own_memory=True)
    sink._rooms[0] = (sink.parts[0][:100], 0)
    with pytest.raises(EdgerouteError, match="must be writable and 4096 contiguous bytes, got 100"):
        slow[1].load([load])


def occupy(disk: FaultyDisk, transfer: Transfer) -> None:
    """Make the only thread stand at the gate, in a prefetch of offset 0."""
    disk.gate.clear()
    transfer.prefetch([job(99, [Extent(0, 0, 512, 0)])[0]])
    until(lambda: disk.offsets)


def test_demand_overtakes_prefetch(slow: tuple[FaultyDisk, Transfer]) -> None:
    disk, transfer = slow
    occupy(disk, transfer)
    step = 32 * KIB
    early = transfer.prefetch([job(i, [Extent(0, i * step, 512, 0)])[0] for i in (1, 2, 3, 4)])
    demand = transfer.load([job(i, [Extent(0, i * step, 512, 0)])[0] for i in (9, 8)])
    transfer.promote(early[2])
    disk.gate.set()
    assert transfer.wait(demand)
    assert all(transfer.wait(ticket) for ticket in early)
    assert [offset // step for offset in disk.offsets] == [0, 9, 8, 3, 1, 2, 4]
    stats = transfer.stats
    assert (stats.demand_bytes, stats.prefetch_bytes) == (3 * 512, 4 * 512)


def test_demand_overtakes_the_pieces_of_a_long_prefetch(
    stored: tuple[Path, bytes], slow: tuple[FaultyDisk, Transfer]
) -> None:
    disk, transfer = slow
    disk.gate.clear()
    long, sink = job(0, [Extent(0, 0, 160 * KIB, 0)])  # its memory leaves room for no other
    [early] = transfer.prefetch([long])
    until(lambda: disk.offsets)
    small = transfer.load([job(1, [Extent(0, 400_000 // 512 * 512, 4096, 0)])[0]])
    big, big_sink = job(2, [Extent(0, 300_000, 128 * KIB, 0)])
    demand = transfer.load([big])
    disk.gate.set()
    assert transfer.wait(small) and transfer.wait(demand) and transfer.wait(early)
    assert disk.offsets[:2] == [0, 400_000 // 512 * 512]
    assert bytes(sink.parts[0]) == stored[1][: 160 * KIB]
    assert bytes(big_sink.parts[0]) == stored[1][300_000 : 300_000 + 128 * KIB]


def test_what_has_not_begun_is_cancelled(slow: tuple[FaultyDisk, Transfer]) -> None:
    disk, transfer = slow
    occupy(disk, transfer)
    loads = [job(i, [Extent(0, 4096 * i, 4096, 0)]) for i in (1, 2, 3)]  # read together
    tickets = transfer.prefetch([load for load, _ in loads])
    transfer.cancel(tickets[1])
    assert tickets[1].done and tickets[1].results[0].outcome == "dropped"
    assert transfer.wait(tickets[1]) is False
    disk.gate.set()
    assert transfer.wait(tickets[0]) and transfer.wait(tickets[2])
    assert [sink.n_written[0] for _, sink in loads] == [4096, 0, 4096]
    transfer.cancel(tickets[0])  # too late, and harmless
    assert tickets[0].results[0].outcome == "ok"


def test_what_has_begun_ends_before_it_is_dropped(slow: tuple[FaultyDisk, Transfer]) -> None:
    disk, transfer = slow
    disk.gate.clear()
    load, sink = job(0, [Extent(0, 0, 100_000, 0), Extent(0, 300_000, 100_000, 1)])
    ticket = transfer.load([load])
    until(lambda: disk.offsets)
    transfer.cancel(ticket)
    assert not ticket.done
    disk.gate.set()
    assert transfer.wait(ticket) is False
    assert ticket.results[0].outcome == "dropped" and len(disk.offsets) == 1
    assert sink.n_written == {0: 0, 1: 0}


def test_a_wait_can_be_stopped(slow: tuple[FaultyDisk, Transfer]) -> None:
    disk, transfer = slow
    disk.gate.clear()
    ticket = transfer.load([job(i, [Extent(0, 20_000 * i, 9000, 0)])[0] for i in range(4)])

    def stop() -> bool:
        disk.gate.set()
        return True

    assert transfer.wait(ticket, stop) is False
    assert {r.outcome for r in ticket.results} == {"dropped"} and len(disk.offsets) == 1
    assert transfer.wait(transfer.load([job(9, [Extent(0, 5, 50, 0)])[0]]), stop=lambda: True)


FAULTS = {
    "eio": ("Input/output error", lambda disk: setattr(disk, "eio_at", 2)),
    "nothing comes": ("the file ends there", lambda disk: setattr(disk, "empty", True)),
    "truncated": ("bytes when it was opened", lambda disk: os.truncate(disk.path, 200_000)),
    "rewritten": ("written to", lambda disk: disk.path.write_bytes(b"x" * N_BYTES)),
    "too short": ("nothing more", lambda disk: setattr(disk, "longest", 3)),
}


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_after_all_loads_have_ended(
    tmp_path: Path, fault: str, n_threads: int
) -> None:
    content = write_file(tmp_path / "file", N_BYTES)
    os.utime(tmp_path / "file", ns=(0, 10**18))
    disk = FaultyDisk(DiskFile.open(tmp_path / "file"))
    if fault == "too short" and disk.alignment == 1:
        disk.close()
        pytest.skip("without alignment every byte is progress")
    message, plant = FAULTS[fault]
    loads = [
        job(i, [Extent(0, 60_000 * i + part * 15_000, 14_000, part) for part in range(3)])
        for i in range(11)
    ]
    with Transfer([disk], n_threads, 16 * KIB, 128 * KIB) as transfer:
        assert transfer.wait(transfer.load([job(50, [Extent(0, 0, 900, 0)])[0]]))
        plant(disk)
        ticket = transfer.load([load for load, _ in loads])
        with pytest.raises(ModelFileError, match=message):
            transfer.wait(ticket)
        assert ticket.done and len(ticket.results) == 11
        for result, (load, sink) in zip(ticket.results, loads, strict=True):
            for extent in load.extents:
                whole = bytes(sink.parts[extent.part])
                there = content[extent.offset : extent.offset + extent.nbytes]
                assert whole in (there, b"\xee" * 14_000)
                assert whole == there or result.outcome == "failed"
        assert transfer.staging_bytes <= 128 * KIB


def test_a_fault_leaves_other_pages_and_later_loads_alone(
    stored: tuple[Path, bytes], slow: tuple[FaultyDisk, Transfer]
) -> None:
    disk, transfer = slow
    disk.eio_offset = 300_000
    loads = [job(i, [Extent(0, 100_000 * i, 20_000, 0)]) for i in range(6)]
    ticket = transfer.load([load for load, _ in loads])
    with pytest.raises(ModelFileError, match=r"check the disk"):
        transfer.wait(ticket)
    assert [r.outcome for r in ticket.results] == ["ok"] * 3 + ["failed"] + ["ok"] * 2
    assert bytes(loads[5][1].parts[0]) == stored[1][500_000:520_000]
    disk.eio_offset = None
    assert transfer.wait(transfer.load([loads[3][0]]))
    assert bytes(loads[3][1].parts[0]) == stored[1][300_000:320_000]


def test_a_sink_that_fails_fails_its_page_only(slow: tuple[FaultyDisk, Transfer]) -> None:
    _, transfer = slow
    loads = [job(i, [Extent(0, 4096 * i, 4096, 0)]) for i in range(3)]  # in one read
    loads[1][1].on_write = ValueError("cannot repack")
    ticket = transfer.load([load for load, _ in loads])
    with pytest.raises(ValueError, match="cannot repack"):
        transfer.wait(ticket)
    assert [r.outcome for r in ticket.results] == ["ok", "failed", "ok"]


def test_slow_short_and_interrupted_reads_only_take_longer(stored: tuple[Path, bytes]) -> None:
    disk = FaultyDisk(DiskFile.open(stored[0]))
    disk.slow_s, disk.longest, disk.interrupted = 0.0005, 8192, True
    loads = [job(i, [Extent(0, 70_000 * i, 30_000, 0)]) for i in range(8)]
    with Transfer([disk], 3, 64 * KIB, 256 * KIB) as transfer:
        assert transfer.wait(transfer.load([load for load, _ in loads]))
        assert transfer.stats.wait_s > 0 and transfer.stats.busy_s > 0
    for load, sink in loads:
        at = load.extents[0].offset
        assert bytes(sink.parts[0]) == stored[1][at : at + 30_000]
    assert disk.closed


@pytest.mark.parametrize(
    ("extents", "kind", "message"),
    [
        ([Extent(0, N_BYTES - 10, 11, 0)], ModelFileError, "page 7 needs 11 bytes at offset"),
        ([Extent(0, 1 << 62, 1, 0)], ModelFileError, "which has 700001"),
        ([Extent(0, -1, 1, 0)], UsageError, "impossible extent"),
        ([Extent(0, 0, 0, 0)], UsageError, "impossible extent"),
        ([Extent(1, 0, 1, 0)], UsageError, "there are 1 files"),
        ([Extent(-1, 0, 1, 0)], UsageError, "impossible extent"),
        ([Extent(0, 0, 1, 0), Extent(0, 9, 1, 0)], UsageError, "a part twice"),
        ([Extent(0, 0, 300 * KIB, 0)], CapacityError, "300 KiB does not fit the staging memory"),
    ],
)
def test_impossible_loads_are_refused_before_any_read(
    slow: tuple[FaultyDisk, Transfer],
    extents: list[Extent],
    kind: type[EdgerouteError],
    message: str,
) -> None:
    disk, transfer = slow
    load = LoadJob(id=7, extents=extents, sink=MemorySink([]))
    for ask in (transfer.load, transfer.prefetch):
        with pytest.raises(kind, match=message):
            ask([job(1, [Extent(0, 0, 10, 0)])[0], load])
    assert disk.offsets == []


def test_arguments_out_of_range_are_refused() -> None:
    for arguments in ((0, 1, 1 << 20), (65, 1, 1 << 20), (1, 0, 1 << 20), (1, 1, 0)):
        with pytest.raises(UsageError):
            Transfer([], *arguments)
    with pytest.raises(UsageError, match="must hold one read of 1048576 bytes"):
        Transfer([], 1, 1 << 20, 1 << 20)


def test_nothing_to_load_is_loaded_at_once(slow: tuple[FaultyDisk, Transfer]) -> None:
    _, transfer = slow
    assert transfer.wait(transfer.load([])) and transfer.prefetch([]) == []
    ticket = transfer.load([job(3, [])[0]])
    assert ticket.done and transfer.wait(ticket)


def test_closing_ends_every_wait(slow: tuple[FaultyDisk, Transfer]) -> None:
    disk, transfer = slow
    occupy(disk, transfer)
    ticket = transfer.load([job(i, [Extent(0, 9000 * i, 9000, 0)])[0] for i in range(5)])
    threading.Timer(0.05, disk.gate.set).start()
    transfer.close()
    with pytest.raises(ClosedError, match="closed before a page was loaded"):
        transfer.wait(ticket)
    for ask in (transfer.load, transfer.prefetch):
        with pytest.raises(ClosedError, match="the transfer is closed"):
            ask([job(0, [])[0]])
    transfer.close()
    assert disk.closed


def test_a_stuck_read_does_not_hold_up_closing(stored: tuple[Path, bytes]) -> None:
    disk = FaultyDisk(DiskFile.open(stored[0]))
    transfer = Transfer([disk], 2, 16 * KIB, 128 * KIB)
    disk.gate.clear()
    ticket = transfer.load([job(0, [Extent(0, 0, 9000, 0)])[0]])
    until(lambda: disk.offsets)
    transfer.close(timeout_s=0.05)
    with pytest.raises(ClosedError):
        transfer.wait(ticket)
    assert not disk.closed  # a thread still reads it
    disk.gate.set()
    until(lambda: threading.active_count() == 1 or not transfer._threads[0].is_alive())
    transfer.close()
    assert disk.closed


def test_many_callers_at_once(stored: tuple[Path, bytes]) -> None:
    path, content = stored
    bad: list[object] = []

    def call(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            page = [Extent(0, rng.randrange(N_BYTES - 9000), 9000, part) for part in range(3)]
            load, sink = job(seed, page)
            if rng.random() < 0.5:
                ticket = transfer.load([load])
            else:
                [ticket] = transfer.prefetch([load])
                if rng.random() < 0.5:
                    transfer.cancel(ticket)
                elif rng.random() < 0.5:
                    transfer.promote(ticket)
            if transfer.wait(ticket):
                for extent in page:
                    there = content[extent.offset : extent.offset + 9000]
                    if bytes(sink.parts[extent.part]) != there:
                        bad.append(extent)

    with Transfer([DiskFile.open(path)], 3, 4096, 72 * KIB) as transfer:
        callers = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert bad == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_queue_ends_every_load_whatever_happens(
    stored: tuple[Path, bytes], data: st.DataObject
) -> None:
    """Played without threads: up to three reads under way end in any order, some badly."""
    from edgeroute.offload.load_plan import Job, Ticket, plan

    rng = data.draw(st.randoms(use_true_random=False))
    pool = StagingPool(256 * KIB)
    with DiskFile.open(stored[0]) as disk:
        queue = LoadQueue([disk], 16 * KIB, pool)
        running, jobs, seen = [], [], set()

        def take() -> object:
            read = queue.next()
            if read is not None:
                assert read not in seen
                seen.add(read)
            return read

        for _ in range(data.draw(st.integers(1, 60))):
            act = rng.random()
            if act < 0.3:
                ticket = Ticket(2)
                ticket.jobs = [
                    Job(job(0, [Extent(0, rng.randrange(9) * 50_000, rng.choice([512, 99_000]), k)
                                for k in range(2)])[0], ticket)
                    for _ in range(2)
                ]  # fmt: skip
                priority = rng.choice(list(Priority))
                queue.add(ticket.jobs, plan(ticket.jobs, [disk], 16 * KIB), priority)
                jobs += ticket.jobs
            elif act < 0.4 and jobs:
                queue.drop(rng.choice(jobs))
            elif act < 0.5 and jobs:
                for span in rng.choice(jobs).spans:
                    queue.promote(span)
            elif act < 0.8 and len(running) < 3 and (read := take()) is not None:
                running.append(read)
            elif running:
                _end_read(queue, running.pop(rng.randrange(len(running))), rng)
        while running or (read := take()) is not None:
            _end_read(queue, running.pop() if running else read, rng)
            assert pool.held_bytes <= pool.max_bytes
    assert not queue.open and not queue.waiting
    assert all(j.result is not None and j.n_open == 0 and j.ticket.done for j in jobs)
    pool.clear()
    assert pool.held_bytes == 0


def _end_read(queue: LoadQueue, read: object, rng: random.Random) -> None:
    error = OSError("planted") if rng.random() < 0.1 else None
    if queue.after_read(read, error):
        queue.after_span(read.span, {})
