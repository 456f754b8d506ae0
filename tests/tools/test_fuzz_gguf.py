"""The fuzz target itself: it accepts what it should, and it notices what it should."""

import importlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeroute.runtime import gguf_header, vocab_check
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import fuzz_gguf


class RandomProvider:
    """Stands in for atheris.FuzzedDataProvider."""

    def __init__(self, data: bytes) -> None:
        self._rng = random.Random(data)

    def ConsumeBytes(self, count: int) -> bytes:
        return self._rng.randbytes(count)

    def ConsumeIntInRange(self, low: int, high: int) -> int:
        return self._rng.randint(low, high)

    def ConsumeBool(self) -> bool:
        return self._rng.random() < 0.5


@pytest.fixture
def target() -> Callable[[bytes], None]:
    return fuzz_gguf.make_target(RandomProvider)


def test_seeds_are_valid_and_pass(target: Callable[[bytes], None], tmp_path: Path) -> None:
    assert fuzz_gguf.write_seeds(tmp_path) == len(list(tmp_path.iterdir()))
    for path in tmp_path.iterdir():
        target(path.read_bytes())
        if path.suffix == ".gguf":
            with GGUFFile.open(path) as file:
                vocab_check.check_vocab(file)
                assert file.size_bytes < fuzz_gguf.MAX_INPUT_BYTES


def test_built_files_reach_the_vocabulary(target: Callable[[bytes], None]) -> None:
    n_reached = 0
    for seed in range(200):
        data = fuzz_gguf.build_file(RandomProvider(bytes([seed])))
        target(bytes([seed]))
        try:
            gguf_header.parse_header(memoryview(data), "built")
            n_reached += 1
        except ModelFileError as error:
            assert "general.alignment" in str(error)
    assert n_reached > 150


def test_another_exception_is_a_finding(
    target: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise IndexError("planted")

    monkeypatch.setattr(gguf_header._Parser, "parse", crash)
    with pytest.raises(IndexError, match="planted"):
        target(b"GGUF")


def test_an_error_without_a_sentence_is_a_finding(
    target: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mute(*_: object) -> None:
        raise ModelFileError("")

    monkeypatch.setattr(gguf_header._Parser, "parse", mute)
    with pytest.raises(AssertionError, match="not a sentence"):
        target(b"GGUF")


def test_missing_atheris_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    result = CliRunner().invoke(fuzz_gguf.main, ["--seconds", "1"])
    assert "pip install atheris" in str(result.exception)
