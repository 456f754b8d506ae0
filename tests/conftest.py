"""Fixtures: the default model, tiny synthetic models, and a clean environment."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeroute
from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.models.pull import resolve
from edgeroute.runtime import vocab_stamp
from edgeroute.runtime.errors import CatalogueError
from edgeroute.tools.synth import make

MODELS_ENV = "EDGEROUTE_MODELS"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's file; `make test` pulls it before pytest starts."""
    try:
        return resolve(DEFAULT_MODEL)
    except CatalogueError as error:
        pytest.fail(f"run the tests by `make test`, which pulls {DEFAULT_MODEL}: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[edgeroute.Runtime]:
    """The default model loaded once; one thread, so that a busy machine slows tests least."""
    with edgeroute.Runtime(smollm2_path, n_ctx=2048, threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Settings from the developer's shell must not change what the tests see, nor they his."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    for name in list(os.environ):
        if name.startswith("EDGEROUTE_") and name != MODELS_ENV:
            del os.environ[name]


@pytest.fixture(autouse=True)
def _own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test neither trusts nor leaves notes on which files were checked, or what was learned."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(vocab_stamp, "_path", lambda: tmp_path / "checked_vocabularies")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight llama of three layers; quick enough for thousands of requests."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama.gguf"
    make("llama", path)
    return path


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[edgeroute.Runtime]:
    """The tiny model in a Runtime of its own, one thread."""
    with edgeroute.Runtime(tiny_path, n_ctx=512, n_kv=2048, threads=1) as runtime:
        yield runtime
