"""The depth benchmark on a tiny model: what it compares, and what it demands."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.skippers.static import Costs, Unit, leave_out
from edgeroute.tools.bench import depth, depth_report
from edgeroute.tools.bench.depth_report import Found, Point
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.depth_probe import Score
from edgeroute.tools.depth_speed import Speed
from edgeroute.tools.synth import write
from edgeroute.tools.synth_spec import ARCHITECTURES

N_LAYER = 6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write(replace(ARCHITECTURES["llama"], n_layer=N_LAYER, n_embd=64, n_ff=128, n_head=2,
                  n_head_kv=1, n_embd_head=32), path)  # fmt: skip
    return path


def write_plans(model: Path, plans: list[DepthPlan]) -> Path:
    with GGUFFile.open(model) as file:
        digest = fingerprint(file)
    out = model.with_name("plans.depth")
    write_depth_file(out, DepthContent(model=digest, data=digest, plans=plans, tensors={}))
    return out


def params(model: Path) -> BenchParams:
    return BenchParams(path=model, name="tiny", threads=1, reps=1, tokens=8)


def test_plans_are_set_beside_controls_that_compute_no_less(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [{Unit(2, "ffn")}, {Unit(2, "ffn"), Unit(3, "attn"), Unit(3, "ffn")}]
    costs = Costs(attn=(64 * 64 * 3,) * N_LAYER, ffn=(64 * 128 * 3,) * N_LAYER, head=64 * 384)
    plans = [
        DepthPlan(name=f"p{i}", layers=leave_out(units, N_LAYER),
                  compute=costs.compute(leave_out(units, N_LAYER)))
        for i, units in enumerate(some)
    ]  # fmt: skip
    full = DepthPlan(name="all", layers=(LayerDepth(),) * N_LAYER)
    path = write_plans(model, [*plans, full])
    rivals = []
    measure = depth._rivals
    monkeypatch.setattr(depth, "_rivals", lambda *args: rivals.append(measure(*args)) or rivals[-1])
    wanted = depth.DepthParams(plans=path, n_windows=1)
    report = depth.run(params(model), lambda _line: None, wanted)
    assert [each["plan"] for each in report.results] == ["p0", "p1"]  # one that runs all is none
    for plan, each in zip(plans, rivals, strict=True):
        assert set(each) == {"policy", "shortgpt", "uniform", "random-1", "random-2", "random-3"}
        assert all(rival.compute >= plan.compute - 1e-9 for rival in each.values())
        assert each["uniform"].compute < 1
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for result in found["results"]:
        for kind in ("prose", "code"):
            assert set(result["texts"][kind]) == {"policy", "shortgpt", "uniform", "random"}
            assert result["texts"][kind]["policy"]["kl"] > 0
    assert {each["what"] for each in found["criteria"]} >= {"speed points"}
    assert not report.met  # two points are fewer than six


def test_a_model_without_plans_is_told_what_to_do(model: Path) -> None:
    with pytest.raises(UsageError, match="edgeroute calibrate tiny"):
        depth.run(params(model), lambda _line: None, depth.DepthParams())
    path = write_plans(model, [DepthPlan(name="all", layers=(LayerDepth(),) * N_LAYER)])
    with pytest.raises(UsageError, match="no plan that leaves anything out"):
        depth.run(params(model), lambda _line: None, depth.DepthParams(plans=path))


def score(kl: float) -> Score:
    ones = np.ones(64, np.float32)
    return Score(kl=ones * kl, nats_full=ones, nats=ones * (1 + kl), same=ones)


def point(policy: float, others: float, *, compute: float = 0.9, full_s: float = 1.0) -> Point:
    both = {kind: score(others) for kind in depth_report.KINDS}
    names = ("shortgpt", "uniform", "random-1", "random-2", "skipped")
    return Point(
        plan=DepthPlan(name="x", layers=(LayerDepth(),), compute=compute),
        scores={"policy": {kind: score(policy) for kind in depth_report.KINDS}}
        | dict.fromkeys(names, both),
        speed=Speed(full_s=(full_s,) * 3, plan_s=(0.9,) * 3),
    )


def verdicts(points: list[Point]) -> dict[str, bool]:
    found = Found(params=params(Path("x")), points=points, n_tokens=64)
    report = depth_report.make_report(found)
    assert len(report.rows) == 2 * len(points)
    return {each.what.split(" ")[-1]: each.met for each in report.criteria}


def test_demands_are_met_by_a_policy_that_wins_everywhere() -> None:
    assert all(verdicts([point(0.1, 0.2)] * 6).values())


def test_every_demand_can_be_missed() -> None:
    assert not verdicts([point(0.1, 0.2)] * 5)["points"]
    lost = verdicts([point(0.1, 0.2)] * 5 + [point(0.2, 0.1)])
    assert lost == {"points": True, "shortgpt": False, "uniform": False, "random": False,
                    "same": False, "time": True}  # fmt: skip
    assert not verdicts([point(0.1, 0.2)] * 5 + [point(0.1, 0.2, full_s=0.95)])["time"]


def test_time_saved_is_a_share_of_the_compute_left_out() -> None:
    found = point(0.1, 0.2, compute=0.8, full_s=1.0)
    assert found.speed.gain == pytest.approx(1 / 0.9)
    assert found.time_share == pytest.approx(0.5)
    assert found.kl("random", "code") == pytest.approx(0.2)
    assert found.figures("policy", "prose")["ppl_ratio"] == pytest.approx(np.exp(0.1), rel=1e-5)
