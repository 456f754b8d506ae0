"""The bench of levers: gains and verdicts on made-up runs, what is kept, one real small run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute import lever_proofs
from edgeroute.commands import bench as command
from edgeroute.lever_proofs import load_proofs
from edgeroute.models.depth_file import fingerprint as model_of
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.tools import synth
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.levers import bench
from edgeroute.tools.levers import measure as levers_measure
from edgeroute.tools.levers.bench import WantedLevers
from edgeroute.tools.levers.candidates import LEVERS, Facts, candidates
from edgeroute.tools.levers.gain import gain_of, verdict_of
from edgeroute.tools.levers.measure import Bench, LeverParams
from edgeroute.tools.levers.runner import Sample, Work

FACTS = Facts(pages="experts", drafts=False, repacks=False, cores=2)
SPEEDS = {"prefetch": {"gate": 0.5, "auto": 0.55, "eam": 1.3}, "policy": {"lfu": 0.9}}
"""Seconds per token with a setting; 1 with others."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    where = tmp_path / "cache"
    monkeypatch.setattr(lever_proofs, "cache_path", lambda name: where / name)
    return where


@pytest.fixture
def params(tmp_path: Path) -> BenchParams:
    path = tmp_path / "m.gguf"
    synth.make("llama", path)
    return BenchParams(path=path, name="m", threads=1)


class Played:
    """Runs of these seconds per token, a little apart from each other, without any process."""

    def __init__(self, patch: pytest.MonkeyPatch, facts: Facts = FACTS) -> None:
        self.asked: list[dict[str, Any]] = []
        self.stop_after = 10_000
        self.proven: dict[str, Any] = {}
        patch.setattr(Bench, "run", self._run)
        patch.setattr(Bench, "ask", lambda bench, what, *given: facts if what == "facts" else 0.2)
        patch.setattr(Bench, "probed", lambda bench, action: (action(), False))

    def _run(self, settings: Mapping[str, Any], work: Work, options: Mapping[str, Any]) -> Sample:
        self.asked.append(dict(settings))
        if len(self.asked) > self.stop_after:
            raise KeyboardInterrupt
        given = {**(self.proven if settings["levers"] == "proven" else {}), **settings}
        if given.get("policy") == "mru":
            raise EdgerouteError("no room")
        token_s = 1.0
        for name, speeds in SPEEDS.items():
            token_s *= speeds.get(given.get(name), 1.0)
        token_s *= 1 + 0.01 * (len(self.asked) % 3)
        odd = given.get("policy") == "static"
        return Sample(decode_s=10 * token_s, n_decode=10, prefill_s=token_s, n_prefill=5,
                      token_ids=((1, 2 + odd),), switched_off=())  # fmt: skip


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def measure(params: BenchParams, **how: Any) -> tuple[dict[tuple[str, Any], dict[str, Any]], Any]:
    report, interrupted = bench.run(params, lambda line: None, WantedLevers(**how))
    data = json.loads(json.dumps(report.to_dict()))
    found = {}
    for each in data["results"]:
        if "settings" in each:
            found[each["lever"], each["settings"].get(each["lever"])] = each
    return found, (report, interrupted)


def test_gains_are_ratios_with_an_interval_that_holds_them() -> None:
    gain = gain_of([1.0, 1.1, 0.9, 1.0, 1.0, 1.05], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert gain.value == pytest.approx(1.0, abs=0.06) and gain.low < gain.value < gain.high
    assert gain_of([1.0] * 6, [1.0] * 5 + [9.0]).value == pytest.approx(0.0)  # one was disturbed
    few, many = (gain_of([1.0, 1.1, 0.9] * n, [0.9] * 3 * n) for n in (1, 8))
    assert few.low < 0 < many.low and many.high < few.high  # three pairs prove nothing
    same = gain_of([1.0] * 4, [1.25] * 4)
    assert same.value == same.low == same.high == pytest.approx(-0.2)


def test_verdicts() -> None:
    wins, loses = gain_of([1.0] * 4, [0.9] * 4), gain_of([0.9] * 4, [1.0] * 4)
    assert verdict_of(wins, 0.0, 4) == "wins" and verdict_of(loses, 0.0, 4) == "loses"
    assert verdict_of(wins, 0.2, 4) == "lossy" and verdict_of(loses, 0.2, 4) == "loses"
    level = gain_of([1.0, 1.1, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0])
    assert verdict_of(level, 0.0, 4) == "level"
    assert verdict_of(wins, 0.0, 2) == "failed"


def test_every_lever_has_candidates_somewhere() -> None:
    many = Facts(pages="experts", drafts=True, repacks=True, cores=4, plans=("half",),
                 small="s", steps=True, adapters=("a",))  # fmt: skip
    found = candidates(many)
    assert {each.lever for each in found} == set(LEVERS)
    assert not any("random" in each.name for each in found)
    assert any(each.name == "prefetch=random" for each in candidates(many, controls=True))
    few = {each.lever for each in candidates(Facts(pages=None, drafts=False, repacks=False,
                                                   cores=1))}  # fmt: skip
    assert few == {"threads", "kv_type", "n_ubatch"}
    assert all(each.settings != each.off or each.options for each in found)


def test_measured_levers_are_judged_and_kept(params: BenchParams, played: Played) -> None:
    wanted = LeverParams(pairs=4, settings={"memory": "1GiB"})
    found, (report, interrupted) = measure(params, only=("prefetch", "policy"), measure=wanted)
    assert not interrupted and len(report.rows) == len(found)
    assert found["prefetch", "gate"]["verdict"] == "wins"
    assert found["prefetch", "gate"]["gain"]["value"] == pytest.approx(1.0, abs=0.05)
    assert found["prefetch", "eam"]["verdict"] == "loses"
    assert found["prefetch", "frequency"]["verdict"] == "level"
    assert found["policy", "mru"]["verdict"] == "failed"
    assert found["policy", "mru"]["note"] == "no room"
    assert "differ" in found["policy", "static"]["note"]
    assert all(each["levers"] == "asked" for each in played.asked)
    made_for = bench._made_for(params, wanted)
    kept = {(p.lever, p.settings[p.lever]): p.verdict for p in load_proofs(made_for)}
    assert kept == {key: each["verdict"] for key, each in found.items()}


def test_lossy_levers_are_priced(params: BenchParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPEEDS, "kv_type", {"q8_0": 0.5})
    Played(monkeypatch)
    found, _ = measure(params, only=("kv_type",), measure=LeverParams(pairs=3), store=False)
    assert found["kv_type", "q8_0"]["verdict"] == "lossy"
    assert found["kv_type", "q8_0"]["kl_nats"] == 0.2


def test_a_win_on_a_busy_machine_is_none(
    params: BenchParams, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "probed", lambda bench, action: (action(), True))
    found, _ = measure(params, only=("prefetch",), measure=LeverParams(pairs=4))
    gate = found["prefetch", "gate"]
    assert gate["verdict"] == "level" and "8 of 8 runs" in gate["note"]


def test_interrupted_it_keeps_what_was_measured(params: BenchParams, played: Played) -> None:
    played.stop_after = 1 + 3 * 3 + 2  # in the fourth round
    how = LeverParams(pairs=6)
    found, (report, interrupted) = measure(params, only=("prefetch", "policy"), measure=how)
    assert interrupted and {lever for lever, _ in found} == {"prefetch"}
    assert found["prefetch", "gate"]["verdict"] == "wins"
    assert "interrupted" in report.notes[-1]
    assert len(load_proofs(bench._made_for(params, how))) == len(found)


@pytest.mark.parametrize(
    ("proven", "met"), [({"prefetch": "gate", "policy": "lfu"}, True), ({}, False)]
)
def test_the_default_must_be_near_the_best_single_one(
    proven: dict[str, Any], met: bool, params: BenchParams, played: Played
) -> None:
    played.proven = proven
    how = LeverParams(pairs=3)
    _, (report, _) = measure(params, only=("prefetch", "policy"), measure=how, exhaustive=True,
                             store=False)  # fmt: skip
    assert report.met == met and "prefetch=gate" in report.criteria[0].what
    expected = 1 / 0.9 if met else 0.5
    assert report.criteria[0].value == pytest.approx(expected, rel=0.05)


def test_what_cannot_be_measured_is_refused(params: BenchParams, played: Played) -> None:
    with pytest.raises(UsageError, match="no lever 'turbo'"):
        WantedLevers(only=("turbo",))
    with pytest.raises(UsageError, match="has no lever 'speculate'"):
        measure(params, only=("speculate",), measure=replace(LeverParams(), pairs=3))


class Here:
    """A worker in this process: starting a dozen would take the time of the test."""

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        self._engine = factory(*args)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._engine, method)(*args)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()


def test_a_real_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers_measure, "Worker", Here)
    path = tmp_path / "dense.gguf"
    synth.make("llama", path, weight_type="Q8_0", n_layer=3)
    skip = LayerDepth(attn="skip", ffn="skip")
    plan = DepthPlan(name="headless", layers=(skip, LayerDepth(), LayerDepth()), compute=0.7,
                     speed=1.4, kl=0.01, kl_error=0.001)  # fmt: skip
    with GGUFFile.open(path) as file:
        content = DepthContent(model=model_of(file), data="0" * 64, plans=(plan,), tensors={})
    write_depth_file(path.with_suffix(".depth"), content)
    result = CliRunner().invoke(command.command, [
        "levers", str(path), "--only", "kv_type", "--only", "depth", "--pairs", "3", "--seconds",
        "0.1", "--threads", "1", "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(result.stdout.splitlines()[-1])
    short_keys, headless = data["results"]
    assert short_keys["settings"] == {"kv_type": "q8_0"} and len(short_keys["on_s"]) == 3
    assert 0 < short_keys["kl_nats"] < 0.1
    assert headless["settings"] == {"depth": "headless"} and not headless["same_answers"]
    assert headless["kl_nats"] > short_keys["kl_nats"]
    for found in data["results"]:
        assert found["verdict"] in ("wins", "loses", "level", "lossy")
