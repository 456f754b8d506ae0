"""Disks that fail, files that change, stops and bugs midway: an error or a right answer.

After each, nothing is pinned or on its way, and the store answers with the same bits again.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.runtime.errors import ClosedError, ModelFileError
from edgeroute.tools import synth
from tests.edgeroute import paged_lab as lab
from tests.edgeroute.paged_lab import PREFILL, SHORT, SINGLE, TOGETHER
from tests.offload.faulty_disk import FaultyDisk

ALL = lab.LESS


class WatchedDisk(FaultyDisk):
    """A faulty disk that tells of each read before it is done; `late` are offsets it delays."""

    on_read: Callable[[int], None] = staticmethod(lambda index: None)
    late: Collection[int] = ()

    def read_at(self, offset: int, *buffers: memoryview) -> int:
        self.on_read(len(self.offsets))
        if offset in self.late:
            time.sleep(0.05)
        n: int = super().read_at(offset, *buffers)
        return n


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("faults") / "model.gguf"
    synth.write(lab.SMALL, found)
    return found


@pytest.fixture(scope="module")
def small(path: Path) -> Iterator[Any]:
    opened = lab.Lab(path)
    yield opened
    opened.close()


@pytest.fixture
def paged(small: Any) -> Iterator[Any]:
    """Few slots, reads ahead forced: as much is under way as can be."""
    with small.paged(slots=4, prefetch="gate", forced=True, wrap=WatchedDisk) as opened:
        yield opened


def check_works(paged: Any, small: Any) -> None:
    """Nothing was left behind, and the store answers as if nothing had happened."""
    paged.settle()
    assert lab.equal(paged.run(ALL), small.resident(ALL))
    paged.settle()


@pytest.mark.parametrize(
    "fault",
    [{"slow_s": 0.001}, {"longest": 4096}, {"longest": 1000}, {"interrupted": True}],
    ids=str,
)
def test_a_disk_that_takes_its_time_gives_the_same_bits(
    fault: dict[str, Any], paged: Any, small: Any
) -> None:
    for name, value in fault.items():
        if name != "longest" or value >= paged.disk.alignment:  # less would bring nothing
            setattr(paged.disk, name, value)
    check_works(paged, small)


@pytest.mark.parametrize("nth", [0, 1, 7, 40])
@pytest.mark.parametrize("where", ["prefill", "short", "decode", "together"])
def test_an_error_of_the_disk_is_told_and_over_when_it_is(
    where: str, nth: int, paged: Any, small: Any
) -> None:
    steps = {"prefill": PREFILL, "short": SHORT, "decode": SINGLE, "together": TOGETHER}[where]
    paged.run(SINGLE[:2])
    paged.disk.eio_at = len(paged.disk.offsets) + nth
    with pytest.raises(ModelFileError, match=r"Input/output error.*check the disk"):
        for _ in range(8):
            paged.run(steps)
    paged.settle()
    with pytest.raises(ModelFileError):  # still broken, still told
        paged.run(PREFILL)
    paged.disk.eio_at = None
    check_works(paged, small)


def test_a_bad_sector_fails_only_those_who_need_it(paged: Any, small: Any) -> None:
    """One byte of one expert cannot be read; answers without that expert are right."""
    info = small.file.tensors["blk.2.ffn_up_exps.weight"]
    paged.disk.eio_offset = info.offset + info.nbytes // 2 + 5
    with pytest.raises(ModelFileError, match=r"Input/output error"):
        paged.run(PREFILL)
    paged.settle()
    right = 0
    for seed in range(12):
        steps = [[("a", 1, 1)]] * 2
        expected = lab.play(small.forward, steps, seed=seed)
        try:
            found = lab.play(paged.forward, steps, seed=seed)
        except ModelFileError:
            paged.settle()
            continue
        assert lab.equal(found, expected)
        paged.settle()
        right += 1
    assert right
    paged.disk.eio_offset = None
    check_works(paged, small)


def test_a_failed_prefetch_is_read_again_when_it_is_needed(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without overlap, so that no demand is under way while the disk is broken."""
    with small.paged(slots=4, prefetch="gate", forced=True, overlap=False,
                     wrap=WatchedDisk) as paged:  # fmt: skip
        prefetch, n_failed = paged.transfer.prefetch, 0

        def fail(jobs: Any) -> Any:
            nonlocal n_failed
            paged.disk.eio_at = 0
            tickets = prefetch(jobs)
            for ticket in tickets:
                with ticket.finished:
                    n_failed += ticket.error is not None
            paged.disk.eio_at = None
            return tickets

        with monkeypatch.context() as patched:
            patched.setattr(paged.transfer, "prefetch", fail)
            assert lab.equal(paged.run(ALL), small.resident(ALL))
            paged.settle()
            assert n_failed > 20
        check_works(paged, small)


def test_a_prefetch_that_fails_while_it_is_waited_for(
    paged: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its read hangs until a layer asks for the page, and then fails."""
    prefetch, promote, wait = (
        paged.transfer.prefetch, paged.transfer.promote, paged.transfer.wait,
    )  # fmt: skip
    promoted = 0

    def hang(jobs: Any) -> Any:
        paged.disk.gate.clear()
        return prefetch(jobs)

    def fail(ticket: Any) -> None:
        nonlocal promoted
        promoted += 1
        paged.disk.eio_at = 0
        promote(ticket)

    def go_on(*args: Any) -> bool:
        paged.disk.gate.set()
        found: bool = wait(*args)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(paged.transfer, "prefetch", hang)
        patched.setattr(paged.transfer, "promote", fail)
        patched.setattr(paged.transfer, "wait", go_on)
        with pytest.raises(ModelFileError, match="Input/output error"):
            paged.run(SINGLE * 10)
        paged.disk.gate.set()
        assert promoted
    paged.disk.eio_at = None
    check_works(paged, small)


def test_a_prefetch_whose_slot_is_wanted_is_stopped_first(small: Any) -> None:
    """Else its bytes, which come late here, would land on those that took its place."""
    with small.paged(slots=1, prefetch="gate", forced=True, io_threads=4,
                     wrap=WatchedDisk) as tight:  # fmt: skip
        store, pool, step = tight.store, tight.store.pools[0], tight.disk.alignment
        unwanted = lab.SMALL.n_expert + 5
        extents = pool.job(unwanted, 0).extents
        tight.disk.late = {each.offset // step * step for each in extents}
        store.begin(prefill=False)
        store.chose(0, [0, 1, 2], [5, 5, 5])
        store.lease(0, [0, 1, 2])
        assert list(store._ahead.coming) == [unwanted]
        ticket = store._ahead.coming[unwanted]
        leased = store.lease(1, [0, 1, 2, 3])  # all that there are
        assert leased is not None and not store._ahead.coming
        with ticket.finished:
            pass
        assert ticket.done and not pool.table.has(unwanted)
        content = small.file.path.read_bytes()
        for expert, slot in enumerate(leased.slots):
            job = pool.job(lab.SMALL.n_expert + expert, slot)
            for _, offset, nbytes, part in job.extents:
                memory, lead = job.sink.destination(part)
                held = bytes(memory[lead : lead + nbytes])
                assert held == content[offset : offset + nbytes]
        store.end()
        check_works(tight, small)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be changed there")
@pytest.mark.parametrize("change", ["truncate", "rewrite", "touch"])
@pytest.mark.parametrize("steps", [PREFILL, SINGLE], ids=["prefill", "decode"])
def test_a_file_changed_while_it_is_in_use_is_refused(
    change: str, steps: Any, path: Path, tmp_path: Path, small: Any
) -> None:
    mine = tmp_path / "mine.gguf"
    shutil.copy(path, mine)
    opened = lab.Lab(mine)
    info = opened.file.tensors["blk.3.ffn_down_exps.weight"]
    assert info.offset == max(each.offset for each in opened.file.tensors.values())
    with opened.paged(slots=4, prefetch="gate", forced=True) as paged:
        assert lab.equal(paged.run(ALL), small.resident(ALL))
        if change == "truncate":
            os.truncate(mine, info.offset)
        elif change == "rewrite":
            with mine.open("r+b") as file:
                file.seek(info.offset)
                file.write(b"\x55" * info.nbytes)
        else:
            os.utime(mine, ns=(1, 1))
        for _ in range(3):
            with pytest.raises(ModelFileError, match=r"must be\s+replaced, not rewritten"):
                paged.run(steps)
            paged.settle()
    opened.close()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_a_file_replaced_under_its_name_is_no_matter(
    path: Path, tmp_path: Path, small: Any
) -> None:
    mine = tmp_path / "mine.gguf"
    shutil.copy(path, mine)
    opened = lab.Lab(mine)
    with opened.paged(slots=4) as paged:
        paged.run(SINGLE)
        other = tmp_path / "other.gguf"
        other.write_bytes(b"\x55" * path.stat().st_size)
        other.replace(mine)
        check_works(paged, small)
        mine.unlink()
        check_works(paged, small)
    opened.close()


# stops


@pytest.mark.parametrize("nth", [0, 1, 5, 11, 17])
def test_a_stop_while_a_prompt_is_loading(nth: int, paged: Any, small: Any) -> None:
    """Raised by a read, so that it falls into a load; nothing is computed after it."""
    flag = small.device.stop_flag
    first = len(paged.disk.offsets)
    paged.disk.on_read = lambda index: flag.set() if index == first + nth else None
    small.device.watch_stop_flag(True)
    try:
        region = paged.kv.allocate(256)
        piece = lab.Piece(list(range(5, 155)), 0, region, 1)
        assert paged.forward.run([piece]) is None
        n_read = len(paged.disk.offsets)
        assert paged.forward.run([piece]) is None  # it is still raised: not even begun
        assert len(paged.disk.offsets) <= n_read + 12
        paged.kv.release(region)
    finally:
        small.device.watch_stop_flag(False)
        flag.clear()
    check_works(paged, small)


def test_a_stop_ends_a_wait_for_a_disk_that_hangs(paged: Any, small: Any) -> None:
    """What has not begun is dropped; the reads that hang are waited for."""
    flag, disk = small.device.stop_flag, paged.disk
    started = threading.Event()
    disk.gate.clear()
    disk.on_read = lambda _: started.set()

    def stop() -> None:
        started.wait()
        flag.set()
        disk.gate.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    region = paged.kv.allocate(256)
    logits = paged.forward.run([lab.Piece(list(range(5, 155)), 0, region, 1)])
    stopper.join()
    paged.kv.release(region)
    flag.clear()
    if logits is not None:  # everything had arrived when the flag was looked at
        resident = small.kv.allocate(256)
        piece = lab.Piece(list(range(5, 155)), 0, resident, 1)
        assert np.array_equal(logits, small.forward.run([piece]))
        small.kv.release(resident)
    check_works(paged, small)


def test_a_stop_of_a_short_prompt_in_which_all_experts_fit(paged: Any, small: Any) -> None:
    flag = small.device.stop_flag
    paged.disk.on_read = lambda index: flag.set()
    small.device.watch_stop_flag(True)
    try:
        region = paged.kv.allocate(256)
        assert paged.forward.run([lab.Piece([5, 6], 0, region, 1)]) is None
        paged.kv.release(region)
    finally:
        small.device.watch_stop_flag(False)
        flag.clear()
        paged.disk.on_read = lambda index: None
    check_works(paged, small)


# bugs


@pytest.mark.parametrize("nth", [0, 1, 3, 7])
def test_an_exception_between_groups_lets_go_of_all(
    nth: int, paged: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = paged.forward._compute_pairs, 0

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise RuntimeError("planted")
        return compute(*args)

    with monkeypatch.context() as patched:
        patched.setattr(paged.forward, "_compute_pairs", broken)
        with pytest.raises(RuntimeError, match="planted"):
            paged.run(PREFILL)
    check_works(paged, small)


@pytest.mark.parametrize("n_taken", [0, 1, 2, 5])
def test_groups_nobody_takes_are_let_go(n_taken: int, paged: Any, small: Any) -> None:
    """A consumer that leaves the loop, with or without closing the iterator."""
    for close in (True, False):
        paged.store.begin(prefill=True)
        held = paged.store.in_turn(1, dict.fromkeys(range(12), 1), 3)
        for _ in range(n_taken):
            assert next(held, True) is not None
        if close:
            held.close()
        paged.store.end()
        paged.settle()
        del held
    check_works(paged, small)


def test_a_sink_that_raises_is_an_error_of_that_pass(
    paged: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    sink = type(paged.store.pools[0].job(0, 0).sink)
    with monkeypatch.context() as patched:
        patched.setattr(sink, "write", broken)
        with pytest.raises(RuntimeError, match="planted"):
            paged.run(PREFILL)
        paged.settle()
    check_works(paged, small)


def test_a_load_that_cannot_be_queued_leaves_nothing_reserved(
    paged: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(jobs: Any) -> None:
        raise ClosedError("planted")

    for steps in (PREFILL, SINGLE):
        with monkeypatch.context() as patched:
            patched.setattr(paged.transfer, "load", broken)
            with pytest.raises(ClosedError, match="planted"):
                paged.run(steps)
            paged.settle()
    with monkeypatch.context() as patched:
        patched.setattr(paged.transfer, "prefetch", broken)
        with pytest.raises(ClosedError, match="planted"):
            paged.run(SINGLE * 4)
        paged.settle()
    check_works(paged, small)


# closing


@pytest.mark.parametrize("steps", [PREFILL, SINGLE], ids=["prefill", "decode"])
def test_closing_the_disk_ends_a_pass_that_waits(steps: Any, small: Any) -> None:
    with small.paged(slots=4, prefetch="gate", forced=True, wrap=WatchedDisk) as paged:
        paged.run(SINGLE[:3])
        paged.disk.gate.clear()
        started = threading.Event()
        paged.disk.on_read = lambda _: started.set()
        ended: list[BaseException | None] = []

        def run() -> None:
            try:
                paged.run(steps * 4)
            except BaseException as error:
                ended.append(error)

        runner = threading.Thread(target=run)
        runner.start()
        started.wait()
        closer = threading.Thread(target=paged.transfer.close)
        closer.start()
        paged.disk.gate.set()
        closer.join()
        runner.join()
        assert len(ended) == 1 and isinstance(ended[0], ClosedError)
        paged.check()
        with pytest.raises(ClosedError):
            paged.run(PREFILL)
        paged.check()


def test_closing_the_store_while_prefetches_are_read(small: Any) -> None:
    for _ in range(4):
        with small.paged(slots=6, prefetch="frequency", forced=True, wrap=WatchedDisk) as paged:
            paged.disk.slow_s = 0.002
            paged.run(SINGLE[:4])
            paged.store.close()
            assert paged.disk.closed
            paged.store.close()
