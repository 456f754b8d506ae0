"""Files read by offset: what is read, what a changed or broken file is answered with."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload import disk as disk_module
from edgeroute.offload.disk import DiskFile, read_range
from edgeroute.offload.disk_speed import DEPTHS, READ_BYTES, measure, timed_reads
from edgeroute.runtime.errors import ClosedError, ModelFileError, UsageError
from tests.offload.faulty_disk import FaultyDisk, write_file

N_BYTES = 300_123  # no multiple of any block
PLACES = [None, *(p for p in ("/dev/shm",) if Path(p).is_dir() and os.access(p, os.W_OK))]


@pytest.fixture(scope="module", params=PLACES, ids=["disk", "tmpfs"][: len(PLACES)])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bytes]:
    """A file of random bytes, on the disk of the temporary folder and in memory."""
    path = tmp_path_factory.mktemp("disk") / "file"
    if request.param is not None:
        path = Path(request.param) / f"edgeroute-test-{os.getpid()}"
        request.addfinalizer(lambda: path.unlink(missing_ok=True))
    return path, write_file(path, N_BYTES)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_range_is_what_a_plain_read_gives(
    stored: tuple[Path, bytes], data: st.DataObject
) -> None:
    path, content = stored
    offset = data.draw(st.integers(0, N_BYTES - 1))
    nbytes = data.draw(st.integers(1, N_BYTES - offset))
    direct = data.draw(st.booleans())
    with DiskFile.open(path, direct=direct) as disk:
        faults = FaultyDisk(disk)
        faults.longest = data.draw(st.sampled_from([None, disk.alignment, 5000, 70_001]))
        faults.interrupted = data.draw(st.booleans())
        assert bytes(read_range(faults, offset, nbytes)) == content[offset : offset + nbytes]
        assert disk.unchanged()


def test_a_file_is_opened_past_the_cache_where_that_works(stored: tuple[Path, bytes]) -> None:
    with DiskFile.open(stored[0]) as disk:
        assert disk.mode in ("direct", "uncached", "buffered")
        assert (disk.alignment > 1) == (disk.mode == "direct")
        assert disk.alignment & (disk.alignment - 1) == 0
        assert disk.size_bytes == N_BYTES
    with DiskFile.open(stored[0], direct=False) as disk:
        assert disk.mode == "buffered" and disk.alignment == 1


@pytest.mark.parametrize("n_bytes", [1, 511, 4096, 5000])
def test_short_files_are_read_too(tmp_path: Path, n_bytes: int) -> None:
    content = write_file(tmp_path / "short", n_bytes)
    with DiskFile.open(tmp_path / "short") as disk:
        assert read_range(disk, 0, n_bytes) == content


def test_a_coarser_alignment_is_found_by_trying(
    stored: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of 4096-byte blocks refuses anything finer."""
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("only Linux has O_DIRECT")
    real = os.preadv

    def coarse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset % 4096 or len(buffers[0]) % 4096:
            raise OSError(22, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", coarse)
    with DiskFile.open(stored[0]) as disk:
        assert disk.mode == "direct" and disk.alignment == 4096
        assert read_range(disk, 12_345, 50_000) == stored[1][12_345:62_345]


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_a_file_system_that_refuses_direct_reads_is_read_plainly(
    stored: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("only Linux has O_DIRECT")
    real_open, real_read, refusing = os.open, os.preadv, [True]

    def opening(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(22, "Invalid argument")
        refusing[0] = bool(flags & os.O_DIRECT)
        return real_open(path, flags)

    def reading(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if refusing[0] and where == "preadv":
            raise OSError(22, "Invalid argument")
        return real_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "preadv", reading)
    with DiskFile.open(stored[0]) as disk:
        assert disk.mode == "buffered"
        assert read_range(disk, 7, 100_000) == stored[1][7:100_007]


def test_a_system_without_reads_at_an_offset(
    stored: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_O_DIRECT", 0)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with DiskFile.open(stored[0], direct=False) as disk:
        assert read_range(disk, 99, 200_000) == stored[1][99:200_099]
        assert not disk.drop_cache(0, 4096)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot open .*missing: No such file"):
        DiskFile.open(tmp_path / "missing")
    with pytest.raises(ModelFileError, match="not a regular file"):
        DiskFile.open(tmp_path)
    with pytest.raises(ModelFileError, match="null"):
        DiskFile.open("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ModelFileError, match="not a regular file"):
            DiskFile.open(tmp_path / "fifo")


def test_a_truncated_file_is_an_error_and_never_old_bytes(tmp_path: Path) -> None:
    write_file(tmp_path / "file", N_BYTES)
    with DiskFile.open(tmp_path / "file") as disk:
        os.truncate(tmp_path / "file", 100_000)
        assert not disk.unchanged()
        for offset in (0, 150_000):  # also where the bytes are still there
            with pytest.raises(ModelFileError, match=r"had 300123 bytes .* has 100000 now"):
                read_range(disk, offset, 5000)


def test_a_file_written_to_in_place_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, N_BYTES)
    os.utime(path, ns=(0, 10**18))  # long ago, whatever this system's clock resolves
    with DiskFile.open(path) as disk:
        with path.open("r+b") as file:
            file.seek(200_000)
            file.write(b"changed")
        with pytest.raises(ModelFileError, match="written to since it was opened"):
            read_range(disk, 0, 5000)
        assert not disk.unchanged()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace an open file")
def test_a_replaced_file_is_noticed_and_the_old_one_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = write_file(path, N_BYTES)
    with DiskFile.open(path) as disk:
        write_file(tmp_path / "new", N_BYTES, seed=1)
        os.replace(tmp_path / "new", path)
        assert not disk.unchanged()
        assert read_range(disk, 1000, 9000) == content[1000:10_000]
        path.unlink()
        assert not disk.unchanged()


def test_read_errors_name_the_place_and_what_came(stored: tuple[Path, bytes]) -> None:
    with DiskFile.open(stored[0]) as disk:
        faults = FaultyDisk(disk)
        faults.longest, faults.eio_at = 65_536, 1
        with pytest.raises(
            ModelFileError, match=r"offset 0: wanted 200000 bytes, got 65536 \(Input/output error"
        ):
            read_range(faults, 0, 200_000)
        faults.eio_at, faults.empty = None, True
        with pytest.raises(ModelFileError, match=r"got 0 \(the file ends there\)"):
            read_range(faults, 0, 200_000)


def test_a_disk_that_brings_nothing_usable_is_given_up(stored: tuple[Path, bytes]) -> None:
    with DiskFile.open(stored[0]) as disk:
        if disk.alignment == 1:
            pytest.skip("without alignment every byte is progress")
        faults = FaultyDisk(disk)
        faults.longest = 100
        with pytest.raises(ModelFileError, match="brings nothing more"):
            read_range(faults, 0, 200_000)


def test_a_closed_file_is_an_error(stored: tuple[Path, bytes]) -> None:
    disk = DiskFile.open(stored[0])
    disk.close()
    disk.close()
    for use in (disk.check, disk.unchanged, lambda: disk.read_at(0, memoryview(bytearray(1)))):
        with pytest.raises(ClosedError, match="open it again"):
            use()


def test_measuring_fills_the_table_and_picks_a_cell_of_it(tmp_path: Path) -> None:
    write_file(tmp_path / "file", 4 << 20)
    with DiskFile.open(tmp_path / "file") as disk:
        found = measure(disk, seconds=0.05)
    cells = {(speed.read_bytes, speed.n_threads) for speed in found.table}
    assert cells == {(n, depth) for n in READ_BYTES[:2] for depth in DEPTHS}
    assert found.best in found.table
    assert found.best.bytes_s >= 0.95 * max(speed.bytes_s for speed in found.table)
    for speed in found.table:
        assert speed.n_bytes >= speed.read_bytes * speed.n_threads


def test_measuring_refuses_what_it_cannot_measure(stored: tuple[Path, bytes]) -> None:
    with DiskFile.open(stored[0]) as disk:
        with pytest.raises(UsageError, match="at least 2 MiB"):
            measure(disk)
        faults = FaultyDisk(disk)
        faults.eio_at = 3
        with pytest.raises(ModelFileError, match="Input/output error"):
            timed_reads(faults, [0] * 8, (4096, 2), 10.0)
