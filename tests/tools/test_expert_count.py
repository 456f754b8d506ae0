"""Rules for experts judged on a model: calibration, equal counts, and the benchmark's reports."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute import paging
from edgeroute.commands import bench as command
from edgeroute.offload.disk_profile import DiskProfile
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers import experts
from edgeroute.tools import expert_count, synth
from edgeroute.tools.bench import expert_count as bench
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.expert_count import Calibration, CountParams, Point
from edgeroute.tools.expert_routes import WatchedModel

SPEC = replace(
    synth.ARCHITECTURES["qwen2moe"], n_layer=3, n_vocab=384, n_embd=64, n_ff=64, n_ff_exp=32,
    n_ff_shexp=32, n_head=2, n_head_kv=1, n_embd_head=32, n_expert=12, n_expert_used=6,
)  # fmt: skip
PARAMS = CountParams(n_window=48, n_kl=2, n_routes=3, n_check=2, budgets=(4, 2))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("count") / "moe.gguf"
    synth.write(SPEC, found)
    return found


@pytest.fixture(scope="module")
def watched(path: Path) -> Iterator[WatchedModel]:
    with expert_count.open_watched(path, PARAMS.n_window) as opened:
        yield opened


@pytest.fixture(scope="module")
def calibration(watched: WatchedModel) -> Calibration:
    cut = expert_count.calibration_windows(watched, PARAMS)
    return expert_count.calibrate(watched, cut, PARAMS, lambda line: None)


def test_a_layer_weighs_what_the_model_without_it_diverges(
    watched: WatchedModel, calibration: Calibration
) -> None:
    assert len(calibration.kl) == 3 and min(calibration.kl) > 0
    assert sum(calibration.factors) == pytest.approx(1)
    assert np.argmax(calibration.kl) == np.argmax(calibration.factors)
    assert all(weights.shape == (3 * 48, 6) for weights in calibration.routes)
    assert all((np.diff(weights, axis=1) <= 0).all() for weights in calibration.routes)
    window = list(range(10, 40))
    full = watched.run(window).copy()
    without = watched.run_without(window, 1).copy()
    assert not np.array_equal(full, without)
    assert np.array_equal(watched.run(window), full)  # graphs are kept apart
    best_alone = watched.run(window, [experts.LayerRule("count", 1)] * 3)
    assert not np.array_equal(best_alone, without)


def test_points_compute_what_was_wanted(watched: WatchedModel, calibration: Calibration) -> None:
    wanted = [(scheme, n) for n in (6.0, 3.0) for scheme in experts.SCHEMES]
    cut = [list(range(at, at + 48)) for at in (20, 100, 180)]
    points = expert_count.evaluate(watched, calibration, cut, wanted, lambda line: None)
    for point in points:
        assert len(point.kl_windows) == 3 and point.kl_nats == pytest.approx(
            np.mean(point.kl_windows)
        )
        if point.n_wanted == 6:
            assert point.n_experts > 5.5 and point.kl_nats < 0.01
        elif point.scheme == "uniform":
            assert point.n_experts == 3 and point.kl_nats > 1e-6
        else:
            assert 1 <= point.n_experts < 5 and point.kl_nats > 1e-6


def test_a_divergence_can_be_the_target(watched: WatchedModel, calibration: Calibration) -> None:
    """Experts fall as far as the limit allows, on the text it is fitted on."""
    cut = [list(range(20, 60))]
    least = expert_count.evaluate(watched, calibration, cut, [("modes", 1)], lambda line: None)
    limit = least[0].kl_nats / 4
    found = expert_count.fit_to_divergence(watched, calibration, cut, "modes", limit)
    assert 0 < found.reached <= limit
    rules = calibration.rules("modes", found.value)
    assert 1 < experts.mean_experts(calibration.routes, rules) < 6
    with pytest.raises(UsageError, match="over the limit"):
        expert_count.fit_to_divergence(watched, calibration, cut, "modes", -1.0)


def test_dense_models_are_refused(tiny_path: Path) -> None:
    with pytest.raises(UsageError, match="no experts"), expert_count.open_watched(tiny_path, 64):
        raise AssertionError


def test_budgets() -> None:
    assert CountParams().wanted(8) == (7, 6, 5, 4)
    assert CountParams().wanted(2) == (1,) and CountParams().wanted(1) == ()
    assert CountParams(budgets=(2, 3.5, 2)).wanted(8) == (3.5, 2)
    assert [name for name, _ in bench.rules_of([2, 4, 2], [0.5])] == [
        "all", "count 4", "count 2", "mass 0.5"
    ]  # fmt: skip
    with pytest.raises(UsageError):
        bench.rules_of([0], [])


def point(scheme: experts.Scheme, n_experts: float, *kl: float) -> Point:
    return Point(
        scheme=scheme, value=1, n_wanted=n_experts, n_experts=n_experts, kl_error=0, ppl=1,
        kl_nats=float(np.mean(kl)), ppl_ratio=1, top1_ratio=1, kl_windows=kl,
    )  # fmt: skip


def test_dominance_is_judged_at_equal_counts() -> None:
    """Between whole numbers uniform's divergence is worked out from those on either side."""
    uniform = [point("uniform", 4, 0.4, 0.8), point("uniform", 5, 0.1, 0.2)]
    at = expert_count.uniform_at(uniform, 4.5, 6)
    assert at == pytest.approx([0.2, 0.4])
    assert expert_count.uniform_at(uniform, 4, 6).tolist() == [0.4, 0.8]
    assert expert_count.uniform_at(uniform, 5.25, 6) == pytest.approx([0.075, 0.15])
    assert expert_count.uniform_at(uniform, 6, 6).tolist() == [0]
    good, bad = point("modes", 4.5, 0.1, 0.2), point("modes", 4, 0.5, 0.9)
    found = list(bench._dominance([*uniform, good, bad], 6))
    assert [c.value for c in found] == [pytest.approx(2), pytest.approx(0.6 / 0.7)]
    assert [c.met for c in found] == [True, False]
    assert "+0.1500 ± 0.0500" in next(iter(bench._paired([*uniform, good], 6)))


def test_the_report(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = BenchParams(path=path, name="moe", threads=1)
    lines: list[str] = []
    report = bench.run(params, lines.append, PARAMS)
    schemes = [row[0] for row in report.rows]
    assert all(schemes.count(name) == 2 for name in ("modes", "top-p", "halting"))
    assert schemes.count("uniform") >= 2
    assert len(report.criteria) == 2 and len(report.notes) == 6
    assert len(json.loads(json.dumps(report.to_dict()))["results"]) == 1 + len(schemes)
    assert any("window 2" in line for line in lines)


class Unlimited(Closing):
    """Stands for a control group, which not every machine lets tests make."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def factory(self, factory: Any, *args: object) -> tuple[Any, ...]:
        return factory, *args

    def close(self) -> None:
        """Nothing to free."""


class Here(Closing):
    """Stands for a worker: the engine lives in this process."""

    def __init__(self, factory: Any, *args: object) -> None:
        self._engine = factory(*args)

    def call(self, method: str, *args: object) -> Any:
        return getattr(self._engine, method)(*args)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in this process, whose own memory counts as nothing, and no long look at disks."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    for name, stand_in in (("MemoryLimit", Unlimited), ("Worker", Here)):
        monkeypatch.setattr(bench, name, stand_in)
    monkeypatch.setattr(bench, "STORE_S", 0.02)
    monkeypatch.setattr(paging, "profile", lambda disk: DiskProfile(read_bytes=1 << 16))


@pytest.mark.usefixtures("_here")
def test_fewer_experts_read_fewer_bytes(tmp_path: Path) -> None:
    """The command prints time and bytes of each rule, and the demands on them."""
    path = tmp_path / "moe.gguf"
    spec = replace(SPEC, n_layer=6, n_embd=128, n_ff_exp=128, n_expert=32, n_head_kv=2,
                   weight_type="F32")  # fmt: skip
    synth.write(spec, path)
    args = ["expert-count", "--model", str(path), "--limit", "64MiB", "--memory", "24MiB"]
    args += ["--experts", "2", "--mass", "0.2", "--reps", "1", "--tokens", "8", "--threads", "1"]
    done = CliRunner().invoke(command.command, [*args, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    every, two, mass = found["results"][:3]
    assert [each["rule"] for each in (every, two, mass)] == ["all", "count 2", "mass 0.2"]
    assert (every["n_experts"], two["n_experts"]) == (6, 2) and 1 <= mass["n_experts"] < 6
    assert two["moved_bytes"] < every["moved_bytes"] > mass["moved_bytes"]
    assert len(found["criteria"]) == 2
    refused = CliRunner().invoke(command.command, [*args[:5], "--memory", "1GiB", *args[7:]])
    assert isinstance(refused.exception, UsageError) and "fits 1 GiB" in str(refused.exception)
