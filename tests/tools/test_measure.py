"""Measurements of disk and memory: what is read, what is refused, what is left behind."""

import os
from pathlib import Path

import pytest

from edgeroute.offload import disk
from edgeroute.runtime.errors import UsageError
from edgeroute.tools import measure

MIB = 1 << 20


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "file"
    measure.write_probe_file(path, 24 * MIB)
    return path


def test_a_probe_file_has_no_two_equal_blocks(probe: Path) -> None:
    content = probe.read_bytes()
    assert len(content) == 24 * MIB
    assert len({content[i : i + MIB] for i in range(0, len(content), MIB)}) == 24


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_block_is_read_once(probe: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    offsets = []
    if hasattr(os, "preadv"):
        real = os.preadv

        def spy(descriptor: int, buffers: list[object], offset: int) -> int:
            n = real(descriptor, buffers, offset)  # type: ignore[arg-type]
            offsets.append(offset)
            return n

        monkeypatch.setattr(os, "preadv", spy)
    found = measure.disk_read_bandwidth(probe, queue_depth=depth)
    assert found.n_bytes == 24 * MIB and found.queue_depth == depth
    assert found.bytes_s == pytest.approx(found.n_bytes / found.seconds)
    if offsets:  # the first read only asks whether reading past the cache works
        assert {i * MIB for i in range(24)} == {at for at in offsets if at % MIB == 0}
        assert len(offsets) <= 25


def test_start_and_limit_choose_the_blocks(probe: Path) -> None:
    assert measure.disk_read_bandwidth(probe, max_bytes=4 * MIB).n_bytes == 4 * MIB
    assert measure.disk_read_bandwidth(probe, start=0.75).n_bytes == 6 * MIB


def test_a_limit_of_time_ends_it_early(probe: Path) -> None:
    assert measure.disk_read_bandwidth(probe, max_s=1e-9 + 0.0001).n_bytes <= 24 * MIB


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux has O_DIRECT")
@pytest.mark.parametrize("where", ["open", "preadv"])
def test_a_file_system_without_direct_reads_falls_back_and_says_so(
    probe: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def opening(path: object, flags: int, *more: object) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(22, "Invalid argument")
        descriptor = real_open(path, flags, *more)  # type: ignore[arg-type]
        direct.discard(descriptor)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def reading(descriptor: int, buffers: list[object], offset: int) -> int:
        if descriptor in direct and where == "preadv":
            raise OSError(22, "Invalid argument")
        return real_read(descriptor, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "preadv", reading)
    found = measure.disk_read_bandwidth(probe)
    assert found.cache == "dropped" and found.n_bytes == 24 * MIB


def test_a_system_without_reads_at_an_offset_is_measured_too(
    probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_O_DIRECT", 0)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    found = measure.disk_read_bandwidth(str(probe), queue_depth=2)
    assert found.cache == "possible" and found.n_bytes == 24 * MIB


def test_a_file_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(3 * MIB))
    with pytest.raises(UsageError, match="has 3 MiB"):
        measure.disk_read_bandwidth(tmp_path / "small")
    with pytest.raises(FileNotFoundError):
        measure.disk_read_bandwidth(tmp_path / "missing")


def test_arguments_out_of_range_are_refused(probe: Path) -> None:
    for arguments in ({"queue_depth": 0}, {"start": 1.0}, {"start": -0.1}):
        with pytest.raises(UsageError):
            measure.disk_read_bandwidth(probe, **arguments)
    for n_threads, kwargs in ((0, {}), (1, {"seconds": 0.0}), (4, {"array_bytes": 8})):
        with pytest.raises(UsageError):
            measure.memory_bandwidth(n_threads, **kwargs)


def test_a_probe_file_that_cannot_be_finished_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        measure.write_probe_file(tmp_path / "probe", MIB)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_threads", [1, 3])
def test_memory_bandwidth_counts_what_moves(n_threads: int) -> None:
    found = measure.memory_bandwidth(n_threads, array_bytes=8 * MIB, seconds=0.05)
    assert found.passes >= 2 and found.array_bytes == 8 * MIB and found.n_threads == n_threads
    assert found.read_bytes_s > 0 and found.copy_bytes_s > 0
