"""Fixtures of the tests of saved sessions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute import Generation, Runtime
from tests.edgeroute.session_lab import SETTINGS, ask, told


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where sessions are saved."""
    return str(tmp_path / "sessions")


@pytest.fixture
def one(tiny_path: Path, folder: str) -> Iterator[Runtime]:
    """The tiny model, saving sessions in `folder`."""
    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        yield runtime


@pytest.fixture
def saved(tiny_path: Path, folder: str) -> Generation:
    """An answer whose session `a` was saved by a Runtime that is closed now."""
    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        answer = ask(runtime, session="a")
    assert told(answer)["saved"] is True
    return answer
