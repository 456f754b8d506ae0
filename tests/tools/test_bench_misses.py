"""The benchmark of experts done without: its sums, and one run on a tiny model."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute import paging
from edgeroute.commands.bench_lossy import misses as command
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.tools import synth
from edgeroute.tools.bench import misses as bench
from edgeroute.tools.bench.misses import Setting
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.convert.copies import write_copies

SPEC = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_vocab=384, n_embd=128, n_ff=128, n_ff_exp=128,
    n_head=2, n_head_kv=1, n_embd_head=64, n_expert=32, n_expert_used=4,
)  # fmt: skip


def test_a_score_is_what_it_says() -> None:
    rng = np.random.default_rng(1)
    reference, found = (np.log(rng.dirichlet(np.ones(5), 3)).astype(np.float32) for _ in range(2))
    window = [9, 9, 4, 0, 2, 1]  # of which the fourth to the last are predicted
    scored = bench.score(reference, found, window, 2)
    wanted = [0, 2, 1]
    kl = [sum(math.exp(p) * (p - q) for p, q in zip(a.tolist(), b.tolist(), strict=True))
          for a, b in zip(reference, found, strict=True)]  # fmt: skip
    assert scored.kl_nats == pytest.approx(sum(kl) / 3, rel=1e-4)
    assert scored.nats == pytest.approx(-sum(found[i, t] for i, t in enumerate(wanted)) / 3)
    assert scored.nats_reference == pytest.approx(
        -sum(reference[i, t] for i, t in enumerate(wanted)) / 3
    )
    same = bench.score(reference, reference, window, 2)
    assert (same.kl_nats, same.top1_ratio) == (0, 1)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchParams:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    synth.write(SPEC, tmp_path / "moe.gguf")
    return BenchParams(path=tmp_path / "moe.gguf", name="moe.gguf", threads=1, reps=2)


def test_one_run_tells_quality_and_cost(model: BenchParams) -> None:
    settings = (Setting(0.5), Setting(0.0, 1.0), Setting())
    wanted = bench.MissesParams(memory="26MiB", settings=settings, n_windows=1, n_window=40,
                                n_prompt=8)  # fmt: skip
    report = bench.run(model, lambda line: None, wanted)
    rows: list[Any] = list(report.results)
    assert [row["setting"] for row in rows] == ["off", "drop 0.5", "prefer 1"]
    off, drop, prefer = rows
    assert (off["kl_nats"], off["ppl_ratio"], off["top1_ratio"]) == (0, 1, 1)
    assert off["dropped"] == off["replaced"] == drop["replaced"] == prefer["dropped"] == 0
    assert drop["dropped"] > 0 and prefer["replaced"] > 0
    for row in (drop, prefer):
        assert row["kl_nats"] > 0 and 0 < row["moved_bytes"] < off["moved_bytes"]
        assert len(row["series"]["values"]) == 2
    assert len(report.criteria) == 2 and all(each.at_most for each in report.criteria)


def test_a_model_that_fits_is_refused(model: BenchParams) -> None:
    wanted = bench.MissesParams(memory="1GiB", settings=(Setting(0.5),), n_windows=1)
    with pytest.raises(UsageError, match="lower --memory"):
        bench.run(model, lambda line: None, wanted)


def test_copies_are_tried_where_there_are_some(model: BenchParams) -> None:
    asked = (Setting(0.5),)
    assert bench.with_copies(model.path, asked) == asked
    write_copies(model.path, kind=GGMLType.Q8_0)
    assert bench.with_copies(model.path, asked) == (*asked, *bench.COPIED)
    wanted = bench.MissesParams(memory="26MiB", settings=(Setting(degrade=0.6),), n_windows=1,
                                n_window=40, n_prompt=8)  # fmt: skip
    report = bench.run(model, lambda line: None, wanted)
    off, degraded = report.results
    assert [off["degraded"], degraded["dropped"]] == [0, 0] and degraded["degraded"] > 0
    assert degraded["kl_nats"] > 0 and degraded["moved_bytes"] > 0
    assert degraded["setting"] == "degrade 0.6"


@pytest.mark.parametrize("setting", ["0.1", "0.1:x", "0.1:0:0:1"])
def test_a_malformed_setting_is_refused(setting: str) -> None:
    found = CliRunner().invoke(command, ["--memory", "1GiB", "--setting", setting])
    assert found.exit_code == 2 and "write SHARE:NATS" in found.output
