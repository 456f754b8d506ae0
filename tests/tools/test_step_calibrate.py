"""Calibrating step routing: phases and figures with a fake pair, and once with tiny models."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.cli import cli
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_learned import FEATURES, LearnedGlimpse
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_price import PassCost
from edgeroute.skippers.steps import Glance, StepPart, Who
from edgeroute.steps_file import Point, StepsFile
from edgeroute.tools import synth
from edgeroute.tools.step_calibrate import (
    CHECKED,
    JUDGE,
    MIN_TASKS,
    CalibrateStepsParams,
    calibrate_steps,
)
from edgeroute.tools.step_glances import from_json, open_watcher, to_json
from edgeroute.tools.step_pair import Answered, ModelFiles, Pair, Watch
from edgeroute.tools.step_report import StepsReport, nice_end, to_html, to_table
from edgeroute.tools.step_tasks import Task, digest
from tests.tools.test_step_figures import POINT

TASKS = [Task(prompt=f"task {i}", answer=str(i), form="exact") for i in range(24)]
PRICE = {
    "small": PassCost(base_s=0.01, token_s=0.001),
    "large": PassCost(base_s=0.2, token_s=0.002),
}


def quiet(_phase: str, _done: int, _total: int) -> None:
    """Say nothing."""


# a pair whose answers are known: the small model cannot do odd tasks, and every second step is
# one of which it is unsure


@dataclass
class FakePair:
    models: "FakeModels"
    file: StepsFile

    def answer(self, task: Task, steps: str, seed: int) -> Answered:
        self.models.asked.append((task.prompt or "", steps))
        if self.models.stop_at == len(self.models.asked):
            raise KeyboardInterrupt
        run = parse_steps(steps, self.file.learned).begin(seed)
        number = int((task.prompt or "").split()[1])
        parts: list[StepPart] = []
        for glance in glances(number):
            who: Who = "small" if run.check else run.choose(glance if run.looks else None)
            part = StepPart(index=glance.index, model=who, n_tokens=10, read_small=12,
                            read_large=10 if who == "large" else 0)  # fmt: skip
            run.note(part)
            parts.append(part)
        by_large = {part.index for part in parts if part.model == "large"}
        right = number % 2 == 0 or bool(by_large & {1, 3}) or run.check is not None
        seconds = sum(0.5 if part.model == "large" else 0.1 for part in parts)
        return Answered(text=task.answer if right else "wrong", seconds=seconds,
                        parts=tuple(parts), large_passes=10 * len(by_large) + 1)  # fmt: skip

    def costs(self) -> dict[Who, PassCost]:
        return {"small": PRICE["small"], "large": PRICE["large"]}


def glances(number: int) -> list[Glance]:
    """Four steps; an odd task's second and fourth are unsure."""
    rng = np.random.default_rng(number)
    found = []
    for i in range(4):
        unsure = number % 2 == 1 and i % 2 == 1
        entropy = (2.0 if unsure else 0.2) + 0.1 * float(rng.random())
        found.append(Glance(index=i, position=10 * i, entropy=entropy, top_entropy=0.8 * entropy,
                            margin=3 - entropy,
                            hidden=rng.standard_normal(8).astype(np.float32)))  # fmt: skip
    return found


@dataclass
class FakeModels:
    names: dict[Who, str] = field(default_factory=lambda: {"small": "s<b>", "large": "l"})
    fingerprints: dict[Who, str] = field(
        default_factory=lambda: {"small": "5" * 64, "large": "a" * 64}
    )
    settings: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    opened: list[StepsFile] = field(default_factory=list)
    stop_at: int = 0

    @contextlib.contextmanager
    def open(self, steps_file: Path) -> Iterator[Pair]:
        file = StepsFile.read(steps_file, self.fingerprints["small"], self.fingerprints["large"])
        self.opened.append(file)
        yield FakePair(self, file)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        yield lambda task, answer: glances(int((task.prompt or "").split()[1]))


@pytest.fixture
def params(tmp_path: Path) -> CalibrateStepsParams:
    return CalibrateStepsParams(out=tmp_path / "pair.steps.json", budget_minutes=60.0)


@pytest.fixture
def report(params: CalibrateStepsParams) -> StepsReport:
    return calibrate_steps(FakeModels(), TASKS, params, quiet)


def by_spec(report: StepsReport) -> dict[str, Point]:
    return {point.spec: point for point in report.file.points}


def test_every_policy_is_measured_on_the_same_tasks(report: StepsReport) -> None:
    found = by_spec(report)
    names = [spec.split(":")[0] for spec in found]
    alone, looking = {"small", "large", "random"}, {"glimpse", "query", "learned"}
    assert {*names} == alone | looking | {"agree", "verify", "judge"}
    assert JUDGE in found and set(CHECKED) <= found.keys()
    assert {point.n for point in found.values()} == {len(TASKS)}
    for point in found.values():
        assert point.low <= point.accuracy <= point.high


def test_figures_are_those_of_the_answers(report: StepsReport) -> None:
    found = by_spec(report)
    small, large = found["small"], found["large"]
    assert (small.accuracy, small.large_share, small.seconds) == (0.5, 0, pytest.approx(0.4))
    assert (large.accuracy, large.large_share, large.seconds) == (1, 1, pytest.approx(2.0))
    assert report.file.small_accuracy == 0.5 and report.file.large_accuracy == 1
    assert report.file.costs == PRICE and report.file.tasks == digest(TASKS)
    highest = max((spec for spec in found if spec.startswith("glimpse:")),
                  key=lambda spec: float(spec.split(":")[1]))  # fmt: skip
    assert found[highest].accuracy == 1  # only the unsure steps of odd tasks: a quarter of all
    assert 0 < found[highest].large_share <= 0.3


def test_random_routing_stands_beside_each_glimpse_at_its_share(report: StepsReport) -> None:
    found = by_spec(report)
    shares = {round(point.large_share, 2) for spec, point in found.items() if "glimpse:" in spec}
    controls = {float(spec.split(":")[1]) for spec in found if spec.startswith("random")}
    assert controls == {float(f"{share:.2g}") for share in shares if 0 < share < 1}


def test_the_quickest_good_policy_is_chosen_and_is_in_the_file(
    report: StepsReport, params: CalibrateStepsParams
) -> None:
    file = StepsFile.read(params.out, "5" * 64, "a" * 64)
    assert file == report.file
    assert file.chosen in {*CHECKED, JUDGE}  # checks cost the fake pair nothing
    assert not params.out.with_name(params.out.name + ".work").exists()


def test_what_is_learned_is_measured_on_tasks_it_was_not_fitted_to(
    params: CalibrateStepsParams,
) -> None:
    models = FakeModels()
    report = calibrate_steps(models, TASKS, params, quiet)
    opened = [file.learned for file in models.opened]
    assert [weights is None for weights in opened] == [True, False, False, True]
    assert opened[1] != opened[2]  # of either half
    assert report.file.learned is not None
    LearnedGlimpse.from_dict(report.file.learned)
    learned = [spec for spec in by_spec(report) if spec.startswith("learned")]
    assert len(learned) == 1
    assert sum(spec == learned[0] for _, spec in models.asked) == len(TASKS)


def test_stopped_anywhere_it_goes_on_and_finds_the_same(
    report: StepsReport, tmp_path: Path
) -> None:
    out = tmp_path / "again.steps.json"
    models = FakeModels()
    n_all = 0
    for stop_at in (5, 70, 200, 0):
        models.stop_at, models.asked = stop_at, []
        params = CalibrateStepsParams(out=out, budget_minutes=60.0)
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                calibrate_steps(models, TASKS, params, quiet)
            assert not out.exists()
            n_all += len(models.asked) - 1  # the last one is asked again
        else:
            again = calibrate_steps(models, TASKS, params, quiet)
            n_all += len(models.asked)
    assert again.file == report.file
    assert n_all == len(TASKS) * len(report.file.points)  # nothing was measured twice


def test_a_policy_that_the_pair_cannot_follow_is_left_out(
    params: CalibrateStepsParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = FakePair.answer

    def refuse(pair: FakePair, task: Task, steps: str, seed: int) -> Answered:
        if steps in (JUDGE, refused):
            raise UsageError("no digits")
        return answer(pair, task, steps, seed)

    refused = JUDGE
    monkeypatch.setattr(FakePair, "answer", refuse)
    report = calibrate_steps(FakeModels(), TASKS, params, quiet)
    assert JUDGE not in by_spec(report) and f"{JUDGE} is left out: no digits" in report.notes
    refused = "large"
    with pytest.raises(UsageError, match="no digits"):
        calibrate_steps(FakeModels(), TASKS[1:], params, quiet)


def test_other_settings_begin_anew(params: CalibrateStepsParams) -> None:
    """Seconds measured under one memory budget say nothing of another."""
    models = FakeModels(stop_at=40)
    with pytest.raises(KeyboardInterrupt):
        calibrate_steps(models, TASKS, params, quiet)
    models = FakeModels(settings={"memory": "1GiB"})
    report = calibrate_steps(models, TASKS, params, quiet)
    assert len(models.asked) == len(TASKS) * len(report.file.points)


def test_without_time_a_few_tasks_are_answered_by_all_policies(tmp_path: Path) -> None:
    params = CalibrateStepsParams(out=tmp_path / "x.steps.json", budget_minutes=1e-9)
    report = calibrate_steps(FakeModels(), TASKS, params, quiet)
    assert {point.n for point in report.file.points} == {MIN_TASKS}
    assert any(f"time for {MIN_TASKS} of {len(TASKS)} tasks" in note for note in report.notes)
    assert not any(spec.startswith("random") for spec in by_spec(report))
    assert any("random routing had answered 0" in note for note in report.notes)


def test_too_few_tasks_and_bad_settings_are_refused(params: CalibrateStepsParams) -> None:
    with pytest.raises(UsageError, match="at least 8"):
        calibrate_steps(FakeModels(), TASKS[:7], params, quiet)
    for change in ({"target": 0.0}, {"target": 1.1}, {"target": math.nan}, {"budget_minutes": 0.0}):
        with pytest.raises(UsageError):
            replace(params, **change)


# the report


def test_the_page_is_well_formed_and_asks_for_nothing(report: StepsReport) -> None:
    page = to_html(report)
    body = re.sub(r"<(meta)([^>]*)>", r"<\1\2/>", page.removeprefix("<!DOCTYPE html>\n"))
    root = ElementTree.fromstring(body)
    marks = [mark for mark in root.iter() if mark.tag.endswith("circle")]
    chosen = 2  # rings, one in each panel
    assert len(marks) == 2 * len(report.file.points) + chosen
    for mark in root.iter():
        assert not any("://" in value and "w3.org" not in value for value in mark.attrib.values())
        assert mark.tag.split("}")[-1] not in ("script", "link", "img", "iframe")
    places = [float(mark.attrib["cx"]) for mark in marks] + [float(m.attrib["cy"]) for m in marks]
    assert all(0 <= place <= 620 for place in places)


def test_names_are_escaped(report: StepsReport) -> None:
    page = to_html(report)
    assert "s<b>" not in page and "s&lt;b&gt;" in page
    note = "<script>alert(1)</script>"
    assert note not in to_html(replace(report, notes=(note,), large=note))


def test_the_table_has_every_policy(report: StepsReport) -> None:
    table = to_table(report)
    assert table.row_count == len(report.file.points)
    assert table.columns[0].header == "policy"


@pytest.mark.parametrize(
    ("chosen", "large_s", "words"),
    [
        ("glimpse:1", 4.0, "quickest that reaches 0.95 of .* steps='glimpse:1', 3.00 s an answer"),
        ("glimpse:1", 2.9, "routing loses on this machine: .* 3.00 s .* 2.90 s"),
        (None, 4.0, "no policy reaches 0.95 of the large model's accuracy .0.760.: steps stay off"),
    ],
)
def test_the_verdict_says_what_to_do(
    report: StepsReport, chosen: str | None, large_s: float, words: str
) -> None:
    points = (replace(POINT, seconds=large_s), replace(POINT, spec="glimpse:1", seconds=3.0))
    file = replace(report.file, points=points, chosen=chosen, large_accuracy=0.8)
    assert re.match(words, replace(report, file=file).verdict)


def test_its_figures_are_plain_json(report: StepsReport) -> None:
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(found["points"]) == len(report.file.points)
    predicted = {point["spec"]: point["predicted_s"] for point in found["points"]}
    assert predicted["large"] > predicted["small"] > 0
    unknown = replace(report.file, costs={"small": PassCost(), "large": PassCost()})
    assert replace(report, file=unknown).predicted_s(report.file.points[0]) is None


@pytest.mark.parametrize(
    ("value", "end"), [(0.0, 1), (0.7, 1), (1.0, 1), (3.1, 5), (51, 100), (0.04, 0.05)]
)
def test_axes_end_at_round_numbers(value: float, end: float) -> None:
    assert nice_end(value) == pytest.approx(end)


# the journal and the real engine


def test_glances_survive_the_journal() -> None:
    for each in glances(3), [replace(glances(3)[0], hidden=None)]:
        found = from_json(json.loads(json.dumps(to_json(each))))
        for old, new in zip(each, found, strict=True):
            assert (old.index, old.position, old.entropy) == (new.index, new.position, new.entropy)
            assert (old.hidden is None and new.hidden is None) or np.array_equal(
                np.asarray(old.hidden), np.asarray(new.hidden)
            )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models of one vocabulary."""
    folder = tmp_path_factory.mktemp("pair")
    for name, n_layer in (("little", 1), ("big", 3)):
        spec = replace(synth.ARCHITECTURES["llama"], n_layer=n_layer)
        synth.write(spec, folder / f"{name}.gguf")
    return folder / "little.gguf", folder / "big.gguf"


def test_watching_an_answer_is_what_reading_it_gives(pair: tuple[Path, Path]) -> None:
    text = "One two three four five six seven.\n\nEight nine ten eleven twelve thirteen.\n\nEnd"
    task = Task(prompt="Count, please:", answer="x")
    with open_watcher(pair[0], threads=1) as watcher:
        found = watcher.watch(task, text)
        again = watcher.watch(task, text)  # from what is read already
        assert len(found) == len(again) > 1 and found[0].position == 0
        assert [each.index for each in found] == list(range(len(found)))
        for one, other in zip(found, again, strict=True):
            assert one.entropy == pytest.approx(other.entropy, rel=1e-3)
            assert one.hidden is not None and one.hidden.shape == (watcher.n_embd,)
        assert watcher.watch(task, "")[0].entropy == pytest.approx(found[0].entropy, rel=1e-3)


@pytest.mark.parametrize("looks_inside", [False, True])
def test_an_opened_pair_follows_what_its_steps_file_learned(
    pair: tuple[Path, Path], tmp_path: Path, looks_inside: bool
) -> None:
    """Without the file's weights it would be refused; with nothing but a bias one model writes."""
    models = ModelFiles(small=pair[0], large=pair[1], threads=1)
    prints, n = models.fingerprints, len(FEATURES)
    with open_watcher(pair[0], threads=1) as watcher:
        projection = np.ones((watcher.n_embd, 2), np.float32) if looks_inside else None
    n += 2 * looks_inside
    task = Task(prompt="Hello", answer="x", max_tokens=20)
    for bias, writer in ((-30.0, "small"), (30.0, "large")):
        glimpse = LearnedGlimpse(weights=np.zeros(n), bias=bias, mean=np.zeros(n),
                                 scale=np.ones(n), projection=projection)  # fmt: skip
        file = StepsFile(
            small=prints["small"], large=prints["large"], points=(), small_accuracy=0.0,
            large_accuracy=0.0, chosen=None, target=1.0, learned=glimpse.to_dict(),
            costs={"small": PassCost(), "large": PassCost()}, date="2026-01-31", tasks="0" * 64,
        )  # fmt: skip
        file.write(tmp_path / "half.steps.json")
        with models.open(tmp_path / "half.steps.json") as opened:
            found = opened.answer(task, "learned:0.5", 0)
            assert {part.model for part in found.parts} == {writer}
            assert (found.large_passes > 0) == (writer == "large")
            assert found.parts[0].read_small > 0  # which looked
            assert all(cost.known for cost in opened.costs().values())


def test_the_command_calibrates_a_pair(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tasks, page, out = tmp_path / "t.jsonl", tmp_path / "p.html", tmp_path / "pair.steps.json"
    tasks.write_text("".join(
        json.dumps({"prompt": f"Item {i}:", "answer": "e", "form": "contains", "max_tokens": 16})
        + "\n" for i in range(8)
    ))  # fmt: skip
    arguments = ["calibrate", "--steps", str(pair[0]), str(pair[1]), "--tasks", str(tasks),
                 "--threads", "1", "--html", str(page), "--out", str(out), "--json",
                 "--target-accuracy", "0.5"]  # fmt: skip
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    points = {point["spec"]: point for point in found["points"]}
    assert points["small"]["large_share"] == 0 and points["large"]["large_share"] == 1
    assert all(point["n"] == 8 and point["predicted_s"] > 0 for point in points.values())
    assert found["verdict"] in done.stdout and out.is_file() and "<svg" in page.read_text()
    # What was written is what the engine takes.
    flags = ("-m", str(pair[1]), "--small", str(pair[0]), "--raw", "-n", "20", "--threads", "1")
    answer = CliRunner().invoke(cli, ["generate", "Item 3:", *flags, "--steps", "random:0.5",
                                      "--show-steps", "--seed", "1"])  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert re.match(r"\[(small|large)\] ", answer.stdout) and "; steps: " in answer.stderr
