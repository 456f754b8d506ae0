"""A slowed disk: the bytes are the disk's, the time is the imitated drive's."""

import threading
from pathlib import Path

import pytest

from edgeroute.offload import disk_profile
from edgeroute.offload.disk import DiskFile, read_full
from edgeroute.offload.throttle import Point, Throttle, ThrottledDisk, profile, slowed, throttled
from edgeroute.runtime.errors import ClosedError, UsageError

MB = 10**6


class Clock:
    """Stands still until somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> DiskFile:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 4096)
    return DiskFile.open(path, direct=False)


def waiting(disk: ThrottledDisk, clock: Clock) -> list[float]:
    """Let waits move the clock, and note them."""
    waits: list[float] = []

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            clock.now += timeout
            return self.is_set()

    disk._closed = Closed()
    return waits


def test_reads_take_what_the_drive_would(file: DiskFile) -> None:
    clock = Clock()
    disk = ThrottledDisk(file, Throttle([Point(4096, 1, 1 * MB)], clock))
    waits = waiting(disk, clock)
    buffer = memoryview(bytearray(8192))
    with disk:
        assert disk.read_at(0, buffer) == 8192
        assert bytes(buffer[:256]) == bytes(range(256))
        assert disk.read_at(4096, buffer[:4096]) == 4096
    assert waits == pytest.approx([0.008192, 0.004096])


def test_a_disk_that_is_slower_itself_is_not_slowed_further(file: DiskFile) -> None:
    clock = Clock()
    throttle = Throttle([Point(4096, 1, 1 * MB)], clock)
    began = throttle.begin()
    clock.now += 0.5  # what the read itself took
    assert throttle.due(began, 4096) < clock.now
    throttle.end()
    # The drive was idle meanwhile: nothing is saved up for the next read.
    began = throttle.begin()
    assert throttle.due(began, 4096) == pytest.approx(clock.now + 0.004096)
    throttle.end()


def test_reads_at_once_share_the_bandwidth_of_their_depth() -> None:
    clock = Clock()
    throttle = Throttle([Point(MB, 1, 100 * MB), Point(MB, 4, 200 * MB)], clock)
    began = [throttle.begin() for _ in range(4)]
    due = [throttle.due(each, MB) - 100 for each in began]
    # Each for itself takes 10 ms; four of them, at 200 MB/s, 20 ms.
    assert due == pytest.approx([0.01, 0.01, 0.015, 0.02])
    for _ in began:
        throttle.end()
    clock.now = 101
    began_alone = throttle.begin()
    assert throttle.due(began_alone, MB) - 101 == pytest.approx(0.01)


def test_many_threads_never_get_more_than_the_drive_has(file: DiskFile) -> None:
    clock = Clock()
    throttle = Throttle([Point(4096, 1, 1 * MB), Point(4096, 8, 2 * MB)], clock)
    latest: list[float] = []
    lock = threading.Lock()

    def work() -> None:
        for _ in range(50):
            began = throttle.begin()
            due = throttle.due(began, 4096)
            throttle.end()
            with lock:
                latest.append(due)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    total = 8 * 50 * 4096
    assert max(latest) - 100 >= total / (2 * MB) - 1e-9
    assert throttle._n_reads == 0


def test_points_are_interpolated_and_never_exceeded() -> None:
    throttle = Throttle([Point(4096, 1, 10 * MB), Point(1 << 20, 1, 500 * MB),
                         Point(1 << 20, 4, 800 * MB)])  # fmt: skip
    assert throttle.bytes_s(1 << 20, 1) == pytest.approx(500 * MB)
    assert throttle.bytes_s(4 << 20, 1) == pytest.approx(500 * MB)
    assert 10 * MB < throttle.bytes_s(64 << 10, 1) < 500 * MB
    assert 500 * MB < throttle.bytes_s(1 << 20, 2) < 800 * MB
    assert throttle.bytes_s(1 << 20, 64) == pytest.approx(800 * MB)
    assert throttle.bytes_s(2048, 1) == pytest.approx(5 * MB)  # reads per second stay
    assert throttle.best_reads().n_threads == 4


def test_a_drive_that_cannot_be_is_refused() -> None:
    for points in ([], [Point(0, 1, 1.0)], [Point(1, 0, 1.0)], [Point(1, 1, 0.0)],
                   [Point(1, 1, float("inf"))], [Point(1, 1, float("nan"))]):  # fmt: skip
        with pytest.raises(UsageError):
            Throttle(points)


def test_closing_wakes_who_waits(file: DiskFile) -> None:
    waits = threading.Event()

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(timeout)

    disk = ThrottledDisk(file, Throttle([Point(4096, 1, 0.001)]))  # a read takes weeks
    disk._closed = Closed()
    read: list[int] = []
    buffer = memoryview(bytearray(4096))
    thread = threading.Thread(target=lambda: read.append(disk.read_at(0, buffer)), daemon=True)
    thread.start()
    assert waits.wait(5)
    disk.close()
    disk.close()
    thread.join(5)
    assert read == [4096] and disk.throttle._n_reads == 0
    with pytest.raises(ClosedError):
        disk.read_at(0, buffer)


def test_a_failed_read_leaves_no_read_behind(file: DiskFile) -> None:
    disk = ThrottledDisk(file, Throttle([Point(4096, 1, 1 * MB)]))
    file.close()
    with pytest.raises(ClosedError):
        disk.read_at(0, memoryview(bytearray(4096)))
    assert disk.throttle._n_reads == 0


def test_it_stands_in_for_the_disk(file: DiskFile) -> None:
    view = memoryview(bytearray(4096))
    with ThrottledDisk(file, Throttle([Point(4096, 1, 500 * MB)])) as disk:
        read_full(disk, 4096, view, 4096)
        assert disk.identity == file.identity and disk.mode == file.mode
        assert disk.size_bytes == 1 << 20 and disk.alignment == 1
    assert bytes(view) == bytes(range(256)) * 16


def test_models_opened_within_are_slowed(file: DiskFile, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = disk_profile.DiskProfile(read_bytes=4096, n_threads=1, bytes_s=1.0)
    monkeypatch.setattr(disk_profile, "profile", lambda disk: usual)
    assert throttled(file) is file and profile(file) is usual
    throttle = Throttle([Point(256 << 10, 2, 90 * MB), Point(8 << 20, 16, 91 * MB)])
    with slowed(throttle):
        disk = throttled(file)
        assert isinstance(disk, ThrottledDisk) and disk.throttle is throttle
        found = profile(disk)
        with pytest.raises(UsageError, match="already"), slowed(throttle):
            pass
        assert throttled(file) is not file  # the refusal changed nothing
    assert throttled(file) is file
    # More at once than the pager ever reads is not asked of it.
    assert (found.read_bytes, found.n_threads, found.bytes_s) == (256 << 10, 2, 90 * MB)
    file.close()
