"""The bench of levers: gains and verdicts on made-up runs, what is kept, one real small run."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute import Runtime, lever_proofs, paging
from edgeroute.commands import bench as command
from edgeroute.config import RunParams
from edgeroute.lever_proofs import load_proofs
from edgeroute.loaded import budget_bytes
from edgeroute.models.depth_file import fingerprint as model_of
from edgeroute.runtime import machine
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.tools import synth
from edgeroute.tools.bench.limit import MemoryLimit
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.convert.pack import pack
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.levers import bench
from edgeroute.tools.levers import measure as levers_measure
from edgeroute.tools.levers.bench import WantedLevers
from edgeroute.tools.levers.candidates import LEVERS, Facts, candidates
from edgeroute.tools.levers.gain import gain_of, verdict_of
from edgeroute.tools.levers.measure import Bench, LeverParams
from edgeroute.tools.levers.race import LIFE
from edgeroute.tools.levers.runner import Judge, Sample, Turn, TurnRunner, Work

MOE = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=48, n_expert_used=3,
)  # fmt: skip
"""36 MiB of experts."""
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

    def opened(self, own: object, factory: object, settings: Mapping[str, Any]) -> "PlayedTurns":
        """What `Bench.opened` would return."""
        return PlayedTurns(self, settings)


class PlayedTurns:
    """A process that takes turns as `Played` takes runs."""

    def __init__(self, played: Played, settings: Mapping[str, Any]) -> None:
        self._played, self._settings = played, settings

    def call(self, method: str, *args: Any) -> Any:
        if method != "turn":
            return 1
        sample = self._played._run(self._settings, Work(prompts=("p",), n_tokens=8), {})
        return Turn(token_s=sample.token_s, token_ids=(1, 2))


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


def made_for(params: BenchParams, how: LeverParams) -> lever_proofs.Fingerprint:
    with GGUFFile.open(params.path) as file:
        memory = how.settings.get("memory")
        return lever_proofs.fingerprint(file, budget_bytes(RunParams(memory=memory)))


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
    many = Facts(pages="experts", drafts=True, repacks=True, twofold=True, sidecar=True, cores=4,
                 plans=("half",), small="s", shares=True, steps=True, adapters=("a",))  # fmt: skip
    found = candidates(many)
    assert {each.lever for each in found} == set(LEVERS) - {"run_ahead"}  # nothing is paged there
    assert not any("random" in each.name for each in found)
    assert any(each.name == "prefetch=random" for each in candidates(many, controls=True))
    few = {each.lever for each in candidates(Facts(pages=None, drafts=False, repacks=False,
                                                   cores=1))}  # fmt: skip
    assert few == {"run_ahead", "threads", "kv_type", "n_ubatch"}
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
    proofs = load_proofs(made_for(params, wanted))
    kept = {(p.lever, p.settings[p.lever]): p.verdict for p in proofs}
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
    assert len(load_proofs(made_for(params, how))) == len(found)


@pytest.mark.parametrize(
    ("proven", "met"), [({"prefetch": "gate", "policy": "lfu"}, True), ({}, False)]
)
def test_the_default_must_be_near_the_best_single_one(
    proven: dict[str, Any], met: bool, params: BenchParams, played: Played,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    played.proven = proven
    monkeypatch.setattr(Bench, "opened", played.opened)
    how = LeverParams(pairs=3, settings={"memory": "1MiB"})
    _, (report, _) = measure(params, only=("prefetch", "policy"), measure=how, exhaustive=True,
                             store=False)  # fmt: skip
    assert report.met == met and "prefetch=gate" in report.criteria[0].what
    expected = 1 / 0.9 if met else 0.5
    assert report.criteria[0].value == pytest.approx(expected, rel=0.05)
    singles = {each["setting"]: each for each in report.results if each["lever"] == "single"}
    assert "policy=mru" not in singles  # it could not be run
    assert singles["prefetch=eam"]["standing"] == "within"
    assert (singles["prefetch=gate"]["standing"] == "within") == met


def test_an_interrupted_race_is_told(
    params: BenchParams, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "opened", played.opened)
    how = LeverParams(pairs=3, settings={"memory": "1MiB"})
    measure(params, only=("overlap",), measure=how)
    played.stop_after = len(played.asked) + 1 + 4 * LIFE + 2  # in the second heat
    _, (report, interrupted) = measure(params, only=("overlap",), measure=how, missing=True,
                                       exhaustive=True)  # fmt: skip
    assert interrupted and not report.criteria and "interrupted" in report.notes[-1]
    singles = {each["setting"]: each for each in report.results if each["lever"] == "single"}
    assert set(singles) == {"overlap=auto", "overlap=on", "overlap=off"}
    assert {each["n_rounds"] for each in singles.values()} == {LIFE}
    assert len(report.rows) == len(report.results) == 2 + 3


def test_what_is_known_is_not_measured_again(params: BenchParams, played: Played) -> None:
    how = LeverParams(pairs=3)
    measure(params, only=("prefetch",), measure=how)
    played.asked.clear()
    _, (report, _) = measure(params, only=("prefetch", "overlap"), measure=how, missing=True)
    assert {each.get("overlap") for each in played.asked} == {"off", "on", "auto"}
    assert not any("prefetch" in each for each in played.asked)
    before = [each for each in report.results if each.get("before")]
    assert {each["lever"] for each in before} == {"prefetch"}
    assert len(report.rows) == len(report.results) == len(before) + 2


def test_a_small_model_of_another_vocabulary_writes_steps_only() -> None:
    facts = replace(FACTS, drafts=True, small="s", steps=True)
    for shares in (True, False):
        found = candidates(replace(facts, shares=shares))
        (steps,) = (each for each in found if each.lever == "steps")
        assert steps.settings["small"] == "s" and steps.off["small"] == ("s" if shares else None)
        drafts = [each for each in found if each.settings.get("speculate") == "small"]
        assert len(drafts) == shares


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
    assert any("--store keeps them" in note for note in data["notes"])
    assert not lever_proofs.cache_path(lever_proofs.FOLDER).exists()
    short_keys, headless = data["results"]
    assert short_keys["settings"] == {"kv_type": "q8_0"} and len(short_keys["on_s"]) == 3
    assert 0 < short_keys["kl_nats"] < 0.1
    assert headless["settings"] == {"depth": "headless"} and not headless["same_answers"]
    assert headless["kl_nats"] > short_keys["kl_nats"]
    for found in data["results"]:
        assert found["verdict"] in ("wins", "loses", "level", "lossy")


@pytest.mark.parametrize(
    ("given", "kept"),
    [((), True), (("--pairs", "4"), False), (("--seconds", "0.5"), False),
     (("--pairs", "3", "--store"), True), (("--no-store",), False)],
)  # fmt: skip
def test_few_pairs_decide_nothing(
    given: tuple[str, ...], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[WantedLevers] = []

    def run(params: BenchParams, say: object, wanted: WantedLevers) -> None:
        asked.append(wanted)
        raise UsageError("that is enough")

    monkeypatch.setattr(bench, "run", run)
    synth.make("llama", path := tmp_path / "m.gguf")
    CliRunner().invoke(command.command, ["levers", str(path), *given])
    assert [each.store for each in asked] == [kept]


def test_a_real_small_contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paged Runtimes side by side; who wins is nobody's promise, that answers agree is."""
    monkeypatch.setattr(levers_measure, "Worker", Here)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    path = tmp_path / "moe.gguf"
    synth.write(MOE, path)
    result = CliRunner().invoke(command.command, [
        "levers", str(path), "--memory", "24MiB", "--only", "overlap", "--pairs", "3", "--seconds",
        "0.1", "--threads", "1", "--exhaustive", "--minutes", "0.1", "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(result.stdout.splitlines()[-1])
    singles = {each["setting"]: each for each in data["results"] if each["lever"] == "single"}
    assert set(singles) == {"overlap=auto", "overlap=on", "overlap=off"}
    assert not any("error" in each for each in singles.values())
    assert all(each["n_rounds"] % LIFE == 0 for each in singles.values())
    (criterion,) = data["criteria"]
    assert "best single configuration, overlap=" in criterion["what"] and criterion["value"] > 0
    assert "3 single configurations against the default" in result.stderr


def test_turns_are_one_long_answer(tmp_path: Path) -> None:
    """What is in memory of an answer goes on as if it had never paused, bit for bit."""
    path = tmp_path / "dense.gguf"
    synth.make("llama", path, weight_type="Q8_0", n_layer=2)
    settings: Any = {"n_ctx": 256, "threads": 1}
    prompts = ("The keeper wrote down the weather.", "def refine(cells):")
    with Runtime(path, **settings) as runtime:
        long = [runtime.generate(each, max_tokens=40, prefix="off").token_ids for each in prompts]
    runner = TurnRunner(path, settings)
    try:
        for at in (0, 1, 2):
            runner.begin(prompts, at, n_warm=8)
            found = [token for _ in range(3) for token in runner.turn(9).token_ids]
            assert tuple(found) == long[at % 2][8:38]
    finally:
        runner.close()


def test_a_packed_model_has_a_lever_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    path = tmp_path / "moe.gguf"
    synth.write(MOE, path)
    judge = Judge(path, {"n_ctx": 64, "memory": 20 << 20})
    found = judge.facts(None)
    assert found.pages == "experts" and not found.sidecar
    pack(path)
    found = judge.facts(None)
    assert found.sidecar and "sidecar" in {each.lever for each in candidates(found)}


def test_runs_are_under_the_limit_that_was_asked_for(params: BenchParams) -> None:
    """A real process in a real group, and one whose limit is too small for it."""
    try:
        MemoryLimit(1 << 30).close()
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    limit_bytes = 768 << 20
    enough = Bench(params.path, LeverParams(limit_bytes=limit_bytes), lambda line: None)
    with contextlib.ExitStack() as own:
        worker = enough.opened(own, Limited, {})
        assert worker.call("limit_bytes") == limit_bytes
    assert "in a control group of 768 MiB, most used" in enough.note
    small = Bench(params.path, LeverParams(limit_bytes=64 << 20), lambda line: None)
    with pytest.raises(EdgerouteError, match="raise --limit"), contextlib.ExitStack() as own:
        small.opened(own, Limited, {}).call("eat", 128 << 20)


class Limited:
    """What a process knows of the group that it is in."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._held = b""

    def limit_bytes(self) -> int:
        """Return what the group may take."""
        return machine.memory().total_bytes

    def eat(self, n_bytes: int) -> None:
        """Take memory."""
        self._held = b"x" * n_bytes

    def close(self) -> None:
        """Nothing to free."""
