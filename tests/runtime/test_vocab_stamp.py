"""A file whose vocabulary has passed is not checked again, and any other file is."""

import os
import time
from pathlib import Path

import pytest

from edgeroute.runtime import vocab_check, vocab_stamp
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer

posix = pytest.mark.skipif(os.name != "posix", reason="needs a change time")


@pytest.fixture
def settled(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file that was not changed just now, as far as the clock tells."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 60_000_000_000)
    return tiny_path


def n_checks(path: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> int:
    calls: list[GGUFFile] = []
    check = vocab_check.check_vocab
    with monkeypatch.context() as patch:
        patch.setattr(vocab_check, "check_vocab", lambda file: (calls.append(file), check(file)))
        for _ in range(times):
            with GGUFFile.open(path) as file, Tokenizer.open(file):
                pass
    return len(calls)


@posix
def test_a_vocabulary_is_checked_once(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert n_checks(settled, 3, monkeypatch) == 1


@posix
def test_a_changed_file_is_checked_again(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(settled.read_bytes())
    assert n_checks(copy, 2, monkeypatch) == 1
    status = copy.stat()
    with copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))  # its change time stays honest
    assert n_checks(copy, 2, monkeypatch) == 1


def test_a_file_that_just_changed_is_not_remembered(
    settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = settled.stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: changed + 1)
    assert n_checks(settled, 2, monkeypatch) == 2


@posix
def test_a_refused_file_is_refused_again(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: GGUFFile) -> None:
        raise ModelFileError("no")

    monkeypatch.setattr(vocab_check, "check_vocab", refuse)
    for _ in range(2):
        with GGUFFile.open(settled) as file, pytest.raises(ModelFileError):
            Tokenizer.open(file)


@posix
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n" * 40, b"x" * 100_000])
def test_a_damaged_note_counts_for_nothing(
    content: bytes, settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_stamp._path().write_bytes(content)
    assert n_checks(settled, 2, monkeypatch) == 1


@posix
def test_a_cache_that_cannot_be_written_costs_only_time(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(vocab_stamp, "_path", lambda: tmp_path / "file" / "stamps")
    assert n_checks(settled, 2, monkeypatch) == 2
