"""A disk is measured once; what is remembered is believed only as far as it makes sense."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute.offload import disk_profile
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_profile import DiskProfile, profile
from edgeroute.offload.disk_speed import DiskSpeed, Speed
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB

BEST = Speed(read_bytes=2 * MIB, n_threads=4, n_bytes=8 * MIB, seconds=0.01)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "disks.json"
    monkeypatch.setattr(disk_profile, "_path", lambda: path)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskFile]:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with DiskFile.open(path) as opened:
        yield opened


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[DiskFile]:
    calls: list[DiskFile] = []

    def measure(disk: DiskFile, *, seconds: float) -> DiskSpeed:
        calls.append(disk)
        return DiskSpeed(table=(BEST,), best=BEST)

    monkeypatch.setattr(disk_profile, "measure", measure)
    return calls


def test_a_disk_is_measured_once(cache: Path, disk: DiskFile, measured: list[DiskFile]) -> None:
    found = [profile(disk) for _ in range(3)]
    assert len(measured) == 1 and found[0] == found[1] == found[2]
    assert found[0].read_bytes == 2 * MIB and found[0].n_threads == 4 and found[0].bytes_s > 0


@pytest.mark.parametrize(
    "change",
    [
        {"n_threads": 1000}, {"read_bytes": 1}, {"read_bytes": 1 << 40}, {"n_threads": "2"},
        {"measured": 0}, {"measured": int(time.time()) + 10**6}, {"bytes_s": None},
    ],
)  # fmt: skip
def test_an_entry_that_makes_no_sense_is_measured_again(
    change: dict[str, object], cache: Path, disk: DiskFile, measured: list[DiskFile]
) -> None:
    profile(disk)
    entries = json.loads(cache.read_text())
    for entry in entries.values():
        entry.update(change)
    cache.write_text(json.dumps(entries))
    profile(disk)
    assert len(measured) == 2


@pytest.mark.parametrize("content", [b"", b"[" * 60000, b"[1]", b"\xff", b'{"a": '])
def test_a_damaged_file_counts_for_nothing(
    content: bytes, cache: Path, disk: DiskFile, measured: list[DiskFile]
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    profile(disk)
    profile(disk)
    assert len(measured) == 1


def test_a_file_too_short_to_measure_gets_the_default(
    cache: Path, disk: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(disk: DiskFile, *, seconds: float) -> DiskSpeed:
        raise UsageError("too short")

    monkeypatch.setattr(disk_profile, "measure", refuse)
    assert profile(disk) == DiskProfile() and not cache.exists()


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, disk: DiskFile, measured: list[DiskFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_text("")
    monkeypatch.setattr(disk_profile, "_path", lambda: tmp_path / "plain" / "disks.json")
    assert profile(disk) == profile(disk) and len(measured) == 2
