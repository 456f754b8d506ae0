"""The layers benchmark: its demands on made-up lives, and one real small run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.commands import bench as command
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from edgeroute.tools.bench import layers, layers_report
from edgeroute.tools.bench.experts import ExpertsParams
from edgeroute.tools.bench.experts_ceiling import Geometry
from edgeroute.tools.bench.experts_engines import Life, Phase
from edgeroute.tools.bench.experts_report import Found
from edgeroute.tools.bench.limit import MemoryLimit
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams


@pytest.fixture
def _groups() -> Iterator[None]:
    try:
        MemoryLimit(64 * MIB).close()
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield


def _life(tok_s: float, moved: int) -> Life:
    """Ten tokens in each phase; `moved` bytes for each."""
    counted = {"demand_bytes": 10 * moved, "prefetch_bytes": 0, "stall_s": 0.0}
    phase = Phase(n_tokens=10, seconds=10 / tok_s, read_bytes=10 * moved,
                  experts=counted if moved else {})  # fmt: skip
    pager = {"resident": 3, "streamed": 4, "bytes": moved, "stall_s": 0.5, "decode": counted}
    return Life(first=phase, decode=phase, prefill=phase, after=phase,
                pager=pager if moved else {})  # fmt: skip


def _found(path: Path, ours: float, theirs: float) -> Found:
    """A disk of 1 GB/s and 500 MB per token; 0.1 s of arithmetic."""
    lives = {"edgeroute": [_life(ours, 500_000_000)], "llama.cpp": [_life(theirs, 0)],
             "resident": [_life(10.0, 0)]}  # fmt: skip
    decode = {name: Series(values=(each[0].decode.tok_s,), others=(0.0,))
              for name, each in lives.items()}  # fmt: skip
    return Found(
        params=BenchParams(path=path, name="m", threads=1, reps=1), limit_bytes=1 << 30,
        budget_bytes=1 << 29, target=3.0, decode=decode, lives=lives, store_bytes_s=1e9,
        geometry=Geometry(file_bytes=1 << 31, expert_bytes=0, token_bytes=0), peaks={}, notes=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "met"), [(1.7, 0.5, True), (1.5, 0.4, False), (1.7, 0.6, False)]
)
def test_demands(ours: float, theirs: float, met: bool, tmp_path: Path) -> None:
    """The overlapped ceiling is two tokens a second, the serial one 1.67."""
    report = layers_report.make_report(_found(tmp_path, ours, theirs))
    assert report.met == met
    ratio, ceiling = report.criteria
    assert ratio.value == pytest.approx(ours / theirs)
    assert ceiling.value == pytest.approx(ours / 2.0)
    data: Any = json.loads(json.dumps(report.to_dict()))
    first = data["results"][0]
    assert first["reached"]["decode"]["serial"] == pytest.approx(ours * 0.6, rel=1e-3)
    assert first["lives"]["edgeroute"][0]["pager"]["streamed"] == 4
    assert "decode" not in first["lives"]["edgeroute"][0]["pager"]
    assert any("3 layers stay, 4 stream" in note for note in report.notes)


def test_experts_have_a_benchmark_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    synth.make("qwen3moe", path)
    params = BenchParams(path=path, name="moe", threads=1, reps=1)
    with pytest.raises(UsageError, match="bench experts"):
        layers.run(params, lambda line: None, ExpertsParams(limit="60%"))


@pytest.mark.usefixtures("_groups")
def test_a_real_small_run(tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=120), path)
    memory = int(0.95 * path.stat().st_size)  # far more than this program's own
    result = CliRunner().invoke(command.command, [
        "layers", "--model", str(path), "--limit", "600MiB", "--memory", str(memory), "--reps", "1",
        "--tokens", "8", "--prompt", "64", "--threads", "1", "--no-peer", "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(result.stdout.splitlines()[-1])
    assert data["bench"] == "layers"
    life = data["results"][0]["lives"]["edgeroute"][0]
    assert life["pager"]["streamed"] > 0 and life["decode"]["read_bytes"] is not None
    assert data["results"][0]["ceilings_per_token"]["decode"]["moved_bytes"] > 0
