"""The speculation benchmark: its demands on made-up answers, and small real runs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.commands import bench as command
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from edgeroute.tools.bench import speculate
from edgeroute.tools.bench.limit import MemoryLimit
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.bench.speculate import Answers, SpeculateParams

TEXTS = ((1, 2, 3, 4, 5), (6, 7, 8))


@pytest.fixture
def params(tmp_path: Path) -> BenchParams:
    (tmp_path / "m.gguf").write_bytes(b"0" * 1000)
    return BenchParams(path=tmp_path / "m.gguf", name="m", threads=1, reps=2, tokens=5,
                       pause_s=0.0)  # fmt: skip


def _played(seconds: dict[str, float], wrong: str = "") -> Any:
    """Answers of these seconds; a source other than `off` accepts one token in two passes."""

    def live(bench: Any, settings: dict[str, Any], prompts: Sequence[str]) -> Answers:
        name = settings["speculate"]
        drafted = {"passes": 4, "drafted": 8, "accepted": 2, "draft_s": 0.4}
        texts = ((9, 9, 9, 9, 9), TEXTS[1]) if name == wrong else TEXTS
        return Answers(texts=texts, decode_s=seconds[name], layers={"resident": 3, "streamed": 4},
                       speculation={} if name == "off" else drafted)  # fmt: skip

    return live


@pytest.mark.parametrize(
    ("seconds", "wrong", "met"),
    [
        ({"off": 6.0, "self": 3.0, "auto": 6.0}, "", True),
        ({"off": 6.0, "self": 3.5, "auto": 6.0}, "", False),
        ({"off": 6.0, "self": 3.0, "auto": 6.5}, "", False),
        ({"off": 6.0, "self": 3.0, "auto": 6.0}, "self", False),
    ],
)
def test_demands(
    seconds: dict[str, float], wrong: str, met: bool, params: BenchParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(speculate._Bench, "_live", _played(seconds, wrong))
    wanted = SpeculateParams(limit="60%", sources=("self", "auto"), n_prompts=2)
    report = speculate.run(params, lambda line: None, wanted)
    assert report.met == met
    data: Any = json.loads(json.dumps(report.to_dict()))
    off, drafted, _ = data["results"]
    assert off["tok_s"]["median"] == pytest.approx(1.0)
    assert drafted["gain"]["median"] == pytest.approx(6.0 / seconds["self"], rel=1e-4)
    assert (drafted["drafted"], drafted["accepted"], drafted["passes"]) == (16, 4, 8)
    assert drafted["n_equal"] == (2 if wrong else 4)
    row = report.rows[1]
    assert row[0] == "self" and row[3] == "25% of 16" and row[4] == "1.50"


def test_sources_are_checked() -> None:
    with pytest.raises(UsageError, match="no source 'guess'"):
        SpeculateParams(sources=("guess",))
    with pytest.raises(UsageError, match="needs a small model"):
        SpeculateParams(sources=("small",))
    with pytest.raises(UsageError, match="give --limit"):
        SpeculateParams(limit=None, disk_rate="1GB")


def test_a_real_small_run_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    synth.make("llama", path, weight_type="Q8_0", n_layer=6)
    result = CliRunner().invoke(command.command, [
        "speculate", "--model", str(path), "--limit", "none", "--source", "auto", "--source",
        "small", "--small", str(path), "--reps", "1", "--tokens", "8", "--prompts", "2",
        "--threads", "1", "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(result.stdout.splitlines()[-1])
    found = {each["source"]: each for each in data["results"]}
    assert {each["n_equal"] for each in found.values()} == {2}
    assert found["small"]["accepted"] > 0 and found["auto"]["passes"] == 0


def test_a_real_small_run_under_a_limit(tmp_path: Path) -> None:
    try:
        MemoryLimit(64 * MIB).close()
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    path = tmp_path / "dense.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=280, weight_type="Q8_0"), path)
    memory = int(0.95 * path.stat().st_size)  # far more than this program's own
    result = CliRunner().invoke(command.command, [
        "speculate", "--model", str(path), "--limit", "600MiB", "--memory", str(memory),
        "--source", "self", "--reps", "1", "--tokens", "8", "--prompts", "1", "--threads", "1",
        "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(result.stdout.splitlines()[-1])
    drafted = data["results"][1]
    assert drafted["layers"][0]["streamed"] > 0
    assert drafted["n_equal"] == 1 and drafted["passes"] + drafted["accepted"] == 7
