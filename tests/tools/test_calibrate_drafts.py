"""Bridges fitted to planted structure, and a tiny model's drafts calibrated end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.bridges import BridgeFile
from edgeroute.cli import cli
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.calibrate_drafts import DraftsParams, block_ends, calibrate_drafts
from edgeroute.tools.draft_streams import Streams
from edgeroute.tools.standin_records import unit_power
from tests.tools.depth_lab import write_deep, write_text

N_LAYER, N_WINDOW, EPS = 8, 48, 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("model"), n_layer=N_LAYER)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


class _Planted:
    """In the place of a probe: what a block adds is a map of rank 4 of both its inputs."""

    def __init__(self, n_embd: int) -> None:
        self._rng = np.random.default_rng(3)
        self.maps = [self._rng.standard_normal((n_embd, 4)) @ self._rng.standard_normal((4, n_embd))
                     / n_embd for _ in range(2)]  # fmt: skip

    def states(self, tokens: Any, layers: Any) -> dict[int, Any]:
        near = self._rng.standard_normal((len(tokens), 48)).astype(np.float32)
        far = near.copy()
        for t in range(1, len(tokens)):
            unit = unit_power(near[t : t + 1], EPS), unit_power(far[t - 1 : t], EPS)
            far[t] += sum(h[0] @ each for h, each in zip(unit, self.maps, strict=True))
        far[0] *= 1000  # the state at position 0 that no map should try to explain
        return {2: near, 5: far}


def test_a_planted_map_is_found_with_what_was_before() -> None:
    planted: Any = _Planted(48)
    streams = Streams(64, (2, 5))
    for _ in range(24):
        streams.read(planted, [0] * 64)
    a, b, error = streams.fit(2, 5, 8, EPS)
    assert a.shape == (97, 8) and b.shape == (8, 48)
    assert error < 0.05
    planted.maps[1][:] = 0
    _, _, less = streams.fit(2, 5, 1, EPS)
    assert less > 2 * error  # one dimension is not enough


def test_a_files_bridges_are_the_models(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep.drafts"
    told: list[str] = []
    report = calibrate_drafts(
        model, DraftsParams(files=(data,), n_window=N_WINDOW, out=out, rank=16),
        lambda phase, done, total: told.append(f"{phase} {done} of {total}"),
    )  # fmt: skip
    assert [each.end for each in report.bridges] == [4, 5, 6, 7]
    judged = [each for each in report.bridges if each.right is not None]
    assert len(judged) == 4 and report.n_guesses > 50
    assert all(0 <= each.error < 1.5 for each in report.bridges)
    assert {line.split()[0] for line in told} == {"text", "bridges", "guesses"}
    with GGUFFile.open(model) as file, BridgeFile(out, file, describe(file).hparams) as bridges:
        assert bridges.find([2, 3, 4]) is not None
        assert bridges.find([2, 3, 4, 5, 6, 7]) is None and bridges.find([3, 4]) is None


def test_a_bridge_guesses_better_than_a_hole(model: Path, data: Path, tmp_path: Path) -> None:
    """The longest block of a random model: what the bridge knows is better than nothing."""
    report = calibrate_drafts(
        model, DraftsParams(files=(data,), n_window=N_WINDOW, out=tmp_path / "x", rank=64),
        lambda *_: None,
    )  # fmt: skip
    last = report.bridges[-1]
    assert last.right is not None and last.right_without is not None
    assert last.right > last.right_without


def test_models_without_a_block_are_refused(model: Path) -> None:
    with GGUFFile.open(model) as file:
        hparams = describe(file).hparams
    assert block_ends(hparams, "m") == [4, 5, 6, 7]
    with pytest.raises(UsageError, match="too few layers"):
        block_ends(replace(hparams, n_layer=3), "m")


def test_the_command_shows_what_was_found(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep.drafts"
    text = data.read_text()
    more = tmp_path / "more.txt"
    more.write_text(text * 5)
    done = CliRunner().invoke(cli, [
        "calibrate", "--drafts", str(model), "--data", str(more), "--budget-minutes", "0.01",
        "--threads", "1", "--out", str(out), "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["path"] == str(out) and out.is_file() and len(found["bridges"]) == 4
    assert "2 to 6" in done.stdout


@pytest.mark.parametrize("option", [["--max-kl", "0.1"], ["--no-fits"]])
def test_the_command_refuses_what_means_nothing(model: Path, option: list[str]) -> None:
    done = CliRunner().invoke(cli, ["calibrate", "--drafts", str(model), *option])
    assert done.exit_code == 2 and option[0].removeprefix("--no-") in done.output
