"""A file that is replaced is the old one or the new one, and nothing is left beside it."""

import os
from pathlib import Path

import pytest

from edgeroute.runtime.whole_file import replacing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "notes.json"
    found.write_text("old")
    return found


def test_it_takes_the_name_when_the_block_ends(path: Path) -> None:
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == path.parent
    assert path.read_text() == "new" and os.listdir(path.parent) == [path.name]


def test_a_block_that_raises_leaves_the_old_one(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_one(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space"), replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "old" and os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "no" / "file") as part:
        part.write_text("new")
