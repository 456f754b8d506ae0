"""Calibrating a tiny model end to end: figures, the file, going on after an interruption."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.cli import cli
from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import DepthFile, fingerprint
from edgeroute.models.forward import Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import all_run
from edgeroute.runtime.errors import DepthFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.sampler import log_softmax
from edgeroute.skippers.plan import SUB_BLOCKS, DepthPlan, LayerDepth
from edgeroute.skippers.plan_json import plans_from_json
from edgeroute.skippers.static import Costs, Unit, leave_out
from edgeroute.tools.calibrate import CalibrateParams, calibrate
from edgeroute.tools.calibrate_report import CalibrateReport, Measured
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.depth_probe import Probe, Window, costs_of
from edgeroute.tools.depth_signals import mean_cosines, read_units, show_units
from edgeroute.tools.depth_speed import measure_times
from edgeroute.tools.depth_texts import MIN_WINDOWS, calibration_texts
from edgeroute.tools.depth_work import Work
from tests.tools.depth_lab import write_deep, write_text

N_LAYER, N_WINDOW = 6, 48


@pytest.fixture(scope="module", autouse=True)
def _bytes_for_times() -> Iterator[None]:
    """Take sub-blocks to cost time by their bytes, so that two runs search the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeroute.tools.calibrate.measure_times", lambda _, sizes, *_a, **_k: sizes)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("model"), n_layer=N_LAYER)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"), 150)


def params(out: Path, data: Path, **changes: Any) -> CalibrateParams:
    """Settings with time for everything, so that no choice hangs on the clock."""
    return CalibrateParams(**{"out": out, "files": (data,), "n_window": N_WINDOW,
                              "budget_minutes": 60.0} | changes)  # fmt: skip


def quiet(_phase: str, _done: int, _total: int) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def counted(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CalibrateReport, int]:
    """A calibration, and how many plans it scored on how many windows."""
    scored: list[int] = []
    score = Probe.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "score", lambda *args: scored.append(1) or score(*args))
        out = tmp_path_factory.mktemp("out") / "x.depth"
        return calibrate(model, params(out, data), quiet), len(scored)


@pytest.fixture(scope="module")
def report(counted: tuple[CalibrateReport, int]) -> CalibrateReport:
    return counted[0]


def test_it_finds_plans_of_both_kinds_and_measures_them(report: CalibrateReport) -> None:
    kinds = {each.plan.name.split("-")[0] for each in report.plans}
    assert kinds == {"skip", "narrow", "rank"}
    for each in report.plans:
        plan = each.plan
        assert plan.compute < 1 and plan.kl is not None and plan.kl > 0
        assert plan.speed is not None and plan.speed > 0
        assert plan.ppl_ratio is not None and 0 <= each.top1 <= 1
        assert plan.approximates == (plan.name.split("-")[0] != "skip")
        for il in (0, 1, N_LAYER - 1):
            skipped = [plan.layers[il].act(part) == "skip" for part in SUB_BLOCKS]
            assert not any(skipped)
    assert [p.plan.compute for p in report.plans] == sorted(
        (p.plan.compute for p in report.plans), reverse=True
    )
    json.dumps(report.to_dict(), allow_nan=False)


def test_its_file_holds_the_plans_and_their_stand_ins(report: CalibrateReport, model: Path) -> None:
    with Closed(model) as loaded, \
            DepthFile(report.path, loaded.file, loaded.model.hparams) as file:  # fmt: skip
        plans = plans_from_json(file.plans, N_LAYER)
        assert plans == tuple(each.plan for each in report.plans if each.kept)
        for plan in plans:
            file.specs(plan.name, plan.approximated)  # none is missing
    assert not list(report.path.parent.glob("*.work"))


class Closed:
    """A loaded model as a context manager."""

    def __init__(self, path: Path) -> None:
        self._loaded = LoadedModel(path, RunParams(n_ctx=256, n_ubatch=256, threads=1))

    def __enter__(self) -> LoadedModel:
        return self._loaded

    def __exit__(self, *_exc: object) -> None:
        self._loaded.close()


def test_a_probe_scores_what_the_engine_computes(model: Path) -> None:
    """Beginning at the first changed layer must give the bits of the whole pass."""
    tokens = [int(t) for t in np.random.default_rng(1).integers(4, 384, N_WINDOW)]
    with Closed(model) as loaded:
        probe = Probe(loaded)
        window = probe.window(tokens)
        whole = probe.run([Piece(tokens=tokens, pos=0, region=probe.region, n_out=N_WINDOW)])
        assert whole is not None
        assert np.array_equal(window.logs, log_softmax(whole[:-1]))
        full = probe.score(window, all_run(range(N_LAYER)))
        assert full.mean_kl == 0 and full.ppl_ratio == 1 and full.top1 == 1
        for units in ({Unit(3, "attn")}, {Unit(0, "ffn"), Unit(5, "ffn")}, {Unit(4, "attn")}):
            steps = DepthPlan(name="x", layers=leave_out(units, N_LAYER)).steps()
            piece = Piece(tokens=tokens, pos=0, region=probe.region, n_out=N_WINDOW)
            wanted = probe.run([piece], probe.spans(steps))
            assert wanted is not None
            wanted = np.array(wanted[:-1])
            assert np.array_equal(probe.resume(window, steps), wanted)
            score = probe.score(window, steps)
            logs = log_softmax(wanted)
            kl = (np.exp(window.logs) * (window.logs - logs)).sum(axis=1)
            assert np.allclose(score.kl, kl, atol=1e-5)
            ids = np.array(tokens[1:])
            assert np.allclose(score.nats, -logs[np.arange(len(ids)), ids])
        probe.close()


def test_cosines_are_of_states_without_position_0() -> None:
    states = np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32)
    states[:, 0] *= 1e4
    window = Window(tokens=(1, 2, 3, 4), states=states, logs=np.zeros((3, 2), np.float32))
    found = mean_cosines([window, window])
    a, b = states[0, 1:], states[2, 1:]
    each = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found[0, 2] == pytest.approx(each.mean(), abs=1e-6)
    assert np.allclose(np.diagonal(found), 1)


def test_costs_count_every_matrix_once(model: Path) -> None:
    with Closed(model) as loaded:
        costs, hp = costs_of(loaded), loaded.model.hparams
    heads = hp.n_embd * (hp.n_head + 2 * hp.n_head_kv) * hp.n_embd_head_k
    assert costs.ffn == (3 * hp.n_embd * hp.n_ff,) * N_LAYER
    assert costs.attn == (heads + hp.n_embd * hp.n_head * hp.n_embd_head_k,) * N_LAYER
    assert costs.head == hp.n_embd * hp.n_vocab


def test_times_are_what_leaving_sub_blocks_out_spares(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attentions take 4 of 10 seconds and feed-forwards 5, by their bytes; half the runs drift."""
    drift = iter(range(1000))

    def decode(_probe: Probe, spans: Sequence[Span], _text: object) -> float:
        steps = spans[0].steps
        n = 10.0 - 5 * (steps[0].ffn == "skip") - 4 * (steps[0].attn == "skip")
        return n + 20 * (next(drift) >= 9)

    monkeypatch.setattr("edgeroute.tools.depth_speed._decode", decode)
    sizes = Costs(attn=(1, 3), ffn=(0, 10), head=2)
    with Closed(model) as loaded:
        probe = Probe(loaded)
        found = measure_times(probe, sizes, [1] * 64, n_rounds=5)
        probe.close()
    s = 10**9
    assert found == Costs(attn=(s, 3 * s), ffn=(0, 5 * s), head=21 * s)


def test_stopped_anywhere_it_goes_on_and_finds_the_same(
    counted: tuple[CalibrateReport, int], model: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    report, n_all = counted
    out = tmp_path / "x.depth"
    scored: list[int] = []
    score = Probe.score
    monkeypatch.setattr(Probe, "score", lambda *args: scored.append(1) or score(*args))
    seen: list[str] = []
    stops = {("each sub-block left out", 4), ("search", 1), ("plans on text kept apart", 3),
             ("speed", 2)}  # fmt: skip

    def stop(phase: str, done: int, _total: int) -> None:
        if (phase, done) in stops and phase not in seen:
            seen.append(phase)
            raise KeyboardInterrupt

    while True:
        try:
            found = calibrate(model, params(out, data), stop)
            break
        except KeyboardInterrupt:
            assert not out.exists()
    assert len(seen) == 4
    assert [figures(each) for each in found.plans] == [figures(each) for each in report.plans]
    assert len(scored) == n_all  # what was found before was not computed again


def figures(measured: Measured) -> object:
    """All but the speed, which differs from run to run."""
    plan = measured.plan
    return plan.name, plan.key, plan.compute, plan.kl, plan.kl_error, plan.ppl_ratio


def test_a_wanted_speed_is_sought_and_no_more(model: Path, data: Path, tmp_path: Path) -> None:
    wanted = params(tmp_path / "x.depth", data, target_speed=1.1, fits=False)
    found = calibrate(model, wanted, quiet)
    least = min(each.plan.compute for each in found.plans)
    assert 1 / 1.3 < least < 1 / 1.1
    speeds = [p.plan.speed for p in found.plans if p.kept and (p.plan.speed or 0) >= 1.1]
    assert (found.best is None) == (not speeds)


def test_a_divergence_limit_ends_the_search(model: Path, data: Path, tmp_path: Path) -> None:
    found = calibrate(model, params(tmp_path / "x.depth", data, max_kl=1e-6, fits=False), quiet)
    assert len(found.plans) == 1  # the first one is beyond it
    assert found.best is None


@pytest.mark.parametrize(
    "change", [{"target_speed": 1.0}, {"target_speed": 9.0}, {"max_kl": 0.0}, {"max_kl": -1.0},
               {"budget_minutes": 0.0}, {"max_kl": float("nan")}, {"n_window": 32}],
)  # fmt: skip
def test_settings_are_bounded(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        CalibrateParams(**change)  # type: ignore[arg-type]


def test_the_users_text_is_cut_and_too_little_is_refused(tmp_path: Path) -> None:
    def encode(text: str, special: bool) -> list[int]:
        return ([1] if special else []) + [ord(char) % 300 for char in text]

    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("hello " * 30)
    long.write_text("".join(f"line {i} of a longer text\n" for i in range(400)))
    with pytest.raises(UsageError, match="name more text"):
        calibration_texts(encode, [short], 64)
    found = calibration_texts(encode, [long, short], 64)
    assert len(found.fit) + len(found.check) >= MIN_WINDOWS
    shared = {tuple(w) for w in found.fit.tolist()} & {tuple(w) for w in found.check.tolist()}
    assert not shared
    assert {tuple(w) for w in found.search.tolist()} <= {tuple(w) for w in found.fit.tolist()}
    assert calibration_texts(encode, [long, short], 64).digest == found.digest
    assert calibration_texts(encode, [long], 64).digest != found.digest


def test_work_survives_a_line_cut_short_and_not_another_subject(tmp_path: Path) -> None:
    folder = tmp_path / "x.work"
    with Work(folder, {"model": "a"}) as work:
        assert work.value("one", lambda: [1.5]) == [1.5]
        work.value("two", lambda: 2)
    path = folder / "found.jsonl"
    path.write_text(path.read_text()[:-4])
    with Work(folder, {"model": "a"}) as work:
        assert work.has("one") and not work.has("two")
        assert work.value("one", lambda: None) == [1.5]
        work.value("two", lambda: 3)
    with Work(folder, {"model": "a"}) as work:
        assert work.value("two", lambda: 4) == 3
    keep = folder / "mine.txt"
    keep.write_text("not yours")
    with Work(folder, {"model": "b"}) as work:
        assert not work.n_found
        work.subfolder("x").mkdir()
        work.finish()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]  # only what is ours goes


def test_units_by_name() -> None:
    units = frozenset({Unit(3, "ffn"), Unit(12, "attn"), Unit(3, "attn")})
    assert show_units(units) == "3.attn 3.ffn 12.attn"
    assert read_units(show_units(units)) == units


def test_a_file_is_written_whole_or_not_at_all(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.depth"
    with GGUFFile.open(model) as file:
        digest = fingerprint(file)
    plan = DepthPlan(name="one", layers=(LayerDepth(),) * N_LAYER)
    good = DepthContent(model=digest, data=digest, plans=[plan], tensors={})
    write_depth_file(out, good)
    before = out.read_bytes()
    with pytest.raises(DepthFileError, match="two depth plans"):
        write_depth_file(out, DepthContent(model=digest, data=digest, plans=[plan, plan],
                                           tensors={}))  # fmt: skip
    with pytest.raises(DepthFileError, match="no sha256"):
        write_depth_file(out, DepthContent(model="me", data=digest, plans=[plan], tensors={}))
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UsageError, match="cannot be written"):
        write_depth_file(tmp_path / "no" / "x.depth", good)


def test_the_command_prints_a_table_and_json(model: Path, data: Path, tmp_path: Path) -> None:
    data.write_text("".join(f"line {i}: {i * i} is its square.\n" for i in range(600)))
    out = tmp_path / "x.depth"
    done = CliRunner().invoke(cli, [
        "calibrate", str(model), "--data", str(data), "--no-fits", "--budget-minutes", "0.05",
        "--max-kl", "0.5", "--threads", "1", "--out", str(out), "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["path"] == str(out) and out.is_file()
    assert all(each["name"].startswith("skip") for each in found["plans"])
    assert "0.5 nats" in done.stdout


def test_the_command_refuses_two_goals(model: Path) -> None:
    done = CliRunner().invoke(
        cli, ["calibrate", str(model), "--max-kl", "0.1", "--target-speed", "1.2"]
    )
    assert done.exit_code == 2 and "exclude each other" in done.output
