"""The kernel's limit holds, counts page cache, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.units import MIB
from edgeroute.tools.bench import disk_rate
from edgeroute.tools.bench import limit as limits
from edgeroute.tools.bench.limit import MemoryLimit, cached_ratio, drop_page_cache
from edgeroute.tools.bench.workers import Worker

LIMIT = 192 * MIB


class Eater:
    """Takes memory and reads files, inside a worker."""

    def __init__(self, n_bytes: int) -> None:
        self._held = bytearray(n_bytes)
        self._held[::4096] = b"x" * len(self._held[::4096])

    def groups(self) -> str:
        return Path("/proc/self/cgroup").read_text()

    def read(self, path: str) -> int:
        """Read a file through the page cache; return how much came from the disk."""
        before = limits.disk_read_bytes()
        assert before is not None
        with open(path, "rb") as file:
            while file.read(MIB):
                pass
        after = limits.disk_read_bytes()
        assert after is not None
        return after - before

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def limit() -> Iterator[MemoryLimit]:
    try:
        made = MemoryLimit(LIMIT)
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    with made:
        yield made


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(MIB) * 256)
    return path


def test_a_worker_is_inside_and_the_group_goes_away(limit: MemoryLimit) -> None:
    with Worker(*limit.factory(Eater, 8 * MIB)) as worker:
        assert limit.folder.name in worker.call("groups")
        assert limit.folder.name not in Path("/proc/self/cgroup").read_text()
        assert 8 * MIB < (limit.peak_bytes or 0) <= LIMIT
    assert limit.n_killed == 0
    limit.close()
    assert not limit.folder.exists()
    limit.close()


def test_the_kernel_kills_what_takes_more(limit: MemoryLimit) -> None:
    with pytest.raises(EdgerouteError, match="ended with status -9"):
        Worker(*limit.factory(Eater, 2 * LIMIT))
    assert limit.n_killed >= 1


def test_page_cache_counts(limit: MemoryLimit, big_file: Path) -> None:
    """A file larger than the limit never fits: the second reading comes from disk again."""
    if drop_page_cache(big_file).how == "kept" or cached_ratio(big_file) is None:
        pytest.skip("this file system does not drop its cache on advice")
    with Worker(*limit.factory(Eater, 8 * MIB)) as worker:
        first, second = (worker.call("read", str(big_file)) for _ in range(2))
    assert first >= 0.9 * 256 * MIB
    assert second >= 0.2 * 256 * MIB
    assert (limit.peak_bytes or 0) <= LIMIT


def test_closing_ends_what_still_runs(limit: MemoryLimit) -> None:
    code = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(limit.folder / "cgroup.procs")],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        limit.close()
        assert process.wait(10) == -9
    assert not limit.folder.exists()


def test_groups_of_dead_benchmarks_are_swept(limit: MemoryLimit) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = limit.folder.parent / f"{limits.PREFIX}-{gone.pid}-0"
    left.mkdir()
    with MemoryLimit(LIMIT):
        assert not left.exists()
        assert limit.folder.exists(), "one whose process lives stays"


def test_dropping_the_page_cache_of_a_file(big_file: Path) -> None:
    before = cached_ratio(big_file)
    if before is None:
        pytest.skip("this system does not say what is in its page cache")
    state = drop_page_cache(big_file)
    assert state.cached_ratio is not None
    if state.how == "kept":
        assert "NOT dropped" in state.note
        return
    assert state.cached_ratio <= 0.02 < before
    with big_file.open("rb") as file:
        while file.read(MIB):
            pass
    assert (cached_ratio(big_file) or 0) > 0.9


def test_without_control_groups_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "own_groups", lambda controller: iter(()))
    with pytest.raises(UsageError, match="this system has none for memory"):
        MemoryLimit(LIMIT)
    with pytest.raises(UsageError, match="at least 1 MiB"):
        MemoryLimit(5)


def test_a_group_that_cannot_be_limited_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary folder stands for a group that we may make but not write a limit to."""

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(limits, "own_groups", lambda controller: iter([(False, tmp_path)]))
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UsageError, match=r"Permission denied\); run as root"):
        MemoryLimit(LIMIT)
    assert not list(tmp_path.iterdir())


def test_a_slower_disk_is_a_group_with_a_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ordinary folders stand for groups of both versions."""
    monkeypatch.setattr(disk_rate, "_disk_of", lambda path: "8:0")
    for v2, name, text in (
        (False, "blkio.throttle.read_bps_device", "8:0 300000000"),
        (True, "io.max", "8:0 rbps=300000000"),
    ):
        monkeypatch.setattr(disk_rate, "own_groups", lambda _, v2=v2: iter([(v2, tmp_path)]))
        rate = disk_rate.DiskRate(tmp_path, 300_000_000)
        assert (rate.folder / name).read_text() == text
        (rate.folder / name).unlink()  # as the kernel's own files go with their group
        rate.close()
        rate.close()
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(disk_rate, "own_groups", lambda _: iter(()))
    with pytest.raises(UsageError, match="none for disks"):
        disk_rate.DiskRate(tmp_path, 300_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="names of disks are Linux's")
def test_a_file_on_no_disk_is_refused() -> None:
    with pytest.raises(UsageError, match="on no disk"):
        disk_rate.DiskRate(Path("/proc/self/status"), 1 << 20)
