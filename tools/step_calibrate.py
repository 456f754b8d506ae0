"""Calibrates step routing for a pair of models: what every policy is worth on this machine.

Every figure is measured by the engine itself, task by task with all policies in turn, so that
a machine that slows down slows all of them. The models alone come first: what the small one saw
gives the thresholds, and both models' outcomes the labels of the learned glimpse. Results are
kept as they come, so that a stopped run goes on.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from edgeroute.runtime.errors import ContextError, UsageError
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_price import PassCost, Workload
from edgeroute.skippers.steps import WHO, Glance, Who
from edgeroute.steps_file import Point, StepsFile
from edgeroute.tools.accuracy import wilson
from edgeroute.tools.depth_work import FILE_SUFFIX, Work
from edgeroute.tools.step_glances import from_json, to_json
from edgeroute.tools.step_learn import halves_of, learn
from edgeroute.tools.step_pair import Models, Pair, Result, Watch
from edgeroute.tools.step_report import CONTROL, StepsReport, is_control
from edgeroute.tools.step_tasks import Task, digest

Progress = Callable[[str, int, int], None]
"""Takes a phase, how much of it is done, and of how much."""

MIN_TASKS: Final = 8
"""Fewer say nothing: the interval of 8 tasks is more than half of all there is."""
ALONE_PART, CONTROL_PART = 0.25, 0.2
"""Shares of the time for the models alone, before, and for random routing, after the others."""
QUANTILES: Final = (0.4, 0.6, 0.8)
"""Of the entropies that the small model saw, at which thresholds are tried."""
CHECKED: Final = (
    "agree:0:48:1:0.5",
    "agree:0.5:48:1:0.4",
    "verify:-0.3:-1:0:1",
    "verify:-0.6:-5:48",
)
"""From what changes nothing in a greedy answer to lenient checks of several steps together."""
JUDGE: Final = "judge:7"
LEAST_NATS: Final = 0.001
"""A threshold of 0 would give every step to the large model."""
ALONE: Final = WHO
WORK_VERSION: Final = 1
_COSTS: Final = "costs"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateStepsParams:
    """What to calibrate.

    Attributes:
        out: the steps file.
        target: accuracy that a policy should keep, as a share of the large model's.
        budget_minutes: about how long it may take.
    """

    out: Path
    target: float = 0.95
    budget_minutes: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise UsageError(f"a target accuracy is a share of the large model's, above 0 and at "
                             f"most 1, got {self.target}")  # fmt: skip
        if not 0 < self.budget_minutes <= 1 << 16:
            raise UsageError(f"a time budget must be positive, got {self.budget_minutes} minutes")


def calibrate_steps(
    models: Models, tasks: Sequence[Task], params: CalibrateStepsParams, progress: Progress
) -> StepsReport:
    """Measure policies on tasks and write the pair's steps file.

    Raises:
        UsageError: too few tasks, or the file cannot be written.
        EdgerouteError: the models cannot be opened as a pair.
    """
    if len(tasks) < MIN_TASKS:
        raise UsageError(f"{len(tasks)} tasks say nothing of a policy; give at least {MIN_TASKS}")
    began = time.monotonic()
    prints, tasks_digest = models.fingerprints, digest(tasks)
    with Work(params.out.with_name(params.out.name + ".work"), {
        "version": WORK_VERSION, "small": prints["small"], "large": prints["large"],
        "tasks": tasks_digest, "settings": dict(models.settings),
    }) as work:  # fmt: skip
        run = _Run(models, tasks, work, _Clock(progress, began, params.budget_minutes))
        points = run.points()
        best, alone = choose(points, params.target), {point.spec: point for point in points}
        file = StepsFile(
            small=prints["small"], large=prints["large"], points=points,
            small_accuracy=alone["small"].accuracy, large_accuracy=alone["large"].accuracy,
            chosen=None if best is None else best.spec, target=params.target,
            learned=run.learned, costs=run.costs(), date=date.today().isoformat(),
            tasks=tasks_digest,
        )  # fmt: skip
        file.write(params.out)
        work.finish()
    return StepsReport(
        path=params.out, small=models.names["small"], large=models.names["large"], file=file,
        seconds=time.monotonic() - began, notes=tuple(run.notes),
    )  # fmt: skip


def choose(points: Sequence[Point], target: float) -> Point | None:
    """Return the quickest policy that keeps a share of the large model's accuracy.

    None where none does, or where the large model had nothing right. Neither the large model
    alone nor random routing is ever chosen.
    """
    large = next(point for point in points if point.spec == "large")
    good = [
        point for point in points
        if point.spec != "large" and not is_control(point.spec)
        and large.accuracy > 0 and point.accuracy >= target * large.accuracy
    ]  # fmt: skip
    return min(good, key=lambda point: (point.seconds, point.spec), default=None)


def point_of(spec: str, results: Sequence[Result]) -> Point:
    """Return what a policy's answers are worth."""
    n, n_right = len(results), sum(result.right for result in results)
    share, (low, high) = n_right / n, wilson(n_right, n)
    n_tokens = sum(result.n_tokens for result in results)
    return Point(
        spec=spec, n=n, accuracy=share, low=min(low, share), high=max(high, share),
        large_share=sum(result.n_large for result in results) / max(1, n_tokens),
        seconds=sum(result.seconds for result in results) / n, workload=workload_of(results),
    )  # fmt: skip


def workload_of(results: Sequence[Result]) -> Workload:
    """Return what an answer has the models write and read, prompts included, means over answers.

    A model that goes on where it wrote last evaluates one token for each one that it writes. What
    it evaluates beyond that, it reads; and so in one pass, which also gives it the next token.
    """
    each = [_workload(result) for result in results]
    return Workload(**{
        field.name: sum(getattr(one, field.name) for one in each) / len(each)
        for field in fields(Workload)
    })  # fmt: skip


def _workload(result: Result) -> Workload:
    drafted = sum(part.n_refused for part in result.parts) + result.n_tokens - result.n_large
    read_small = sum(part.read_small for part in result.parts)
    read_large = sum(part.read_large for part in result.parts)
    written = sum(
        part.read_large if part.read_large <= part.n_tokens else part.n_tokens - 1
        for part in result.parts if part.model == "large"
    )  # fmt: skip
    read = read_large - written
    return Workload(
        small_written=min(drafted, read_small), small_read=max(0, read_small - drafted),
        large_written=written, large_read=read,
        large_passes=max(result.large_passes - written, 1) if read else 0,
    )  # fmt: skip


def thresholds(entropies: Sequence[float], quantiles: Sequence[float]) -> list[float]:
    """Return thresholds in nats at quantiles of entropies: few digits, rising, each once."""
    found = np.quantile(np.asarray(entropies, np.float64), quantiles)
    return sorted({max(LEAST_NATS, round(float(value), 3)) for value in found})


@dataclass(frozen=True, slots=True)
class _Clock:
    progress: Progress
    began: float
    budget_minutes: float

    def before(self, part: float) -> bool:
        """Tell whether less than a part of the time has gone."""
        return time.monotonic() - self.began < 60 * self.budget_minutes * part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """Tasks to be answered under policies.

    Attributes:
        name: of the phase.
        specs: the policies.
        tasks: which of the tasks.
        until: share of the time that may have gone when the last one begins.
        least: tasks that are answered whatever the time.
        file: the steps file with what a learned policy knows; None for one without.
    """

    name: str
    specs: Sequence[str]
    tasks: Sequence[int]
    until: float
    least: int = MIN_TASKS
    file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Policies, and parts of the tasks, each with what the learned one knows there."""

    specs: Sequence[str]
    parts: tuple[tuple[list[int], Path | None], ...]


class _Run:
    """The phases of one calibration."""

    def __init__(self, models: Models, tasks: Sequence[Task], work: Work, clock: _Clock) -> None:
        self._models, self._tasks, self._work, self._clock = models, tasks, work, clock
        self.learned: dict[str, object] | None = None
        self.notes: list[str] = []

    def points(self) -> tuple[Point, ...]:
        """Return what every policy is worth, all on the same tasks."""
        everything = range(len(self._tasks))
        alone = self._measure(_Phase(
            name="the models alone", specs=ALONE, tasks=everything, until=ALONE_PART
        ))  # fmt: skip
        plan = self._plan(self._watch(alone))
        done = self._routed(plan)
        if len(done) < len(everything):
            self.notes.append(f"there was time for {len(done)} of {len(everything)} tasks")
        found = self._points([*ALONE, *plan.specs], done)
        return (*found, *self._controls(found, done))

    def costs(self) -> dict[Who, PassCost]:
        """Return what passes of the models take on this machine."""
        if not self._work.has(_COSTS):
            with self._models.open(self._draft("plain", None)) as pair:
                self._keep_costs(pair)
        found = cast("dict[Who, dict[str, float]]", self._work.value(_COSTS, dict))
        return {who: PassCost(**cost) for who, cost in found.items()}

    # phases

    def _watch(self, done: Sequence[int]) -> list[list[Glance]]:
        """Return what the small model saw at the start of each step of its own answers."""
        found: list[list[Glance]] = []
        with contextlib.ExitStack() as stack:
            watch: Watch | None = None
            for i in done:
                if not self._work.has(f"{i} seen") and watch is None:
                    watch = stack.enter_context(self._models.watch())
                value = self._work.value(f"{i} seen", functools.partial(self._see, watch, i))
                found.append(from_json(cast("list[dict[str, Any]]", value)))
                self._clock.progress("what the small model saw", len(found), len(done))
        return found

    def _plan(self, seen: Sequence[Sequence[Glance]]) -> _Plan:
        """Return what is to be measured, from what the small model saw."""
        everything = [glance.entropy for each in seen for glance in each]
        first = [each[0].entropy for each in seen if each]
        specs = [*CHECKED, JUDGE]
        if everything:
            specs += [f"glimpse:{nats:g}" for nats in thresholds(everything, QUANTILES)]
            specs += [f"query:{nats:g}" for nats in thresholds(first, [0.5])]
        specs = [parse_steps(spec).spec for spec in specs]
        labels = [
            not self._result(i, "small").right and self._result(i, "large").right
            for i in range(len(seen))
        ]
        lesson = learn(seen, labels)
        if isinstance(lesson, str):
            self.notes.append(f"no learned glimpse: {lesson}")
            return _Plan(specs=specs, parts=((list(range(len(seen))), None),))
        self.learned = lesson.weights
        files = (self._draft(f"half-{i}", weights) for i, weights in enumerate(lesson.halves))
        return _Plan(specs=[*specs, lesson.spec],
                     parts=tuple(zip(halves_of(labels), files, strict=True)))  # fmt: skip

    def _routed(self, plan: _Plan) -> list[int]:
        """Measure policies on each part of the tasks, equally many of each."""
        done: list[int] = []
        n_parts, most = len(plan.parts), len(self._tasks)
        for part, (tasks, file) in enumerate(plan.parts, 1):
            share = (1 - ALONE_PART - CONTROL_PART) * part / n_parts
            answered = self._measure(_Phase(
                name=f"policies, part {part} of {n_parts}", specs=plan.specs,
                tasks=tasks[:most], until=ALONE_PART + share, least=MIN_TASKS // n_parts, file=file,
            ))  # fmt: skip
            most = len(answered)
            done += answered
        return sorted(done)

    def _controls(self, found: Sequence[Point], done: Sequence[int]) -> list[Point]:
        """Route at random, with as many tokens by the large model as each glimpse gave it."""
        shares = {float(f"{point.large_share:.2g}") for point in found
                  if point.spec.startswith("glimpse:")}  # fmt: skip
        specs = [parse_steps(f"{CONTROL}:{share:g}").spec for share in sorted(shares)
                 if 0 < share < 1]  # fmt: skip
        if not specs:
            return []
        finished = self._measure(_Phase(
            name="random routing, the control", specs=specs, tasks=done, until=1.0, least=0
        ))  # fmt: skip
        if len(finished) < len(done):
            self.notes.append(f"random routing had answered {len(finished)} of {len(done)} tasks "
                              "when the time was over, and is left out")  # fmt: skip
            return []
        return self._points(specs, done)

    # answers

    def _measure(self, phase: _Phase) -> list[int]:
        """Have the pair answer tasks while there is time; return which it answered.

        A run that goes on answers those for which there once was time.
        """
        key, done = f"tasks: {phase.name}", list[int]()
        decided = self._work.has(key)
        wanted = cast("list[int]", self._work.value(key, list)) if decided else phase.tasks
        with contextlib.ExitStack() as stack:
            pair: Pair | None = None
            for i in wanted:
                late = len(done) >= phase.least and not self._clock.before(phase.until)
                if late and not decided:
                    break
                for spec in phase.specs:
                    if pair is None and not self._work.has(f"{i} {spec}"):
                        file = phase.file or self._draft("plain", None)
                        pair = stack.enter_context(self._models.open(file))
                    self._work.value(f"{i} {spec}",
                                     functools.partial(self._answer, pair, i, spec))  # fmt: skip
                done.append(i)
                self._clock.progress(phase.name, len(done), len(wanted))
            if pair is not None:
                self._keep_costs(pair)
        return cast("list[int]", self._work.value(key, lambda: done))

    def _answer(self, pair: Pair | None, i: int, spec: str) -> object:
        assert pair is not None
        task = self._tasks[i]
        try:
            found = pair.answer(task, spec, i)
        except ContextError:
            raise  # of the task, not of the policy
        except UsageError as error:
            if spec in ALONE:
                raise
            return {"refused": str(error)}
        return Result(
            right=task.is_right(found.text), text=found.text, seconds=found.seconds,
            parts=found.parts, large_passes=found.large_passes,
        ).to_json()  # fmt: skip

    def _see(self, watch: Watch | None, i: int) -> object:
        assert watch is not None
        return to_json(watch(self._tasks[i], self._result(i, "small").text))

    def _result(self, i: int, spec: str) -> Result:
        return Result.from_json(self._found(i, spec))

    def _found(self, i: int, spec: str) -> dict[str, Any]:
        key = f"{i} {spec}"
        assert self._work.has(key)
        return cast("dict[str, Any]", self._work.value(key, dict))

    def _points(self, specs: Sequence[str], done: Sequence[int]) -> list[Point]:
        """Return what policies are worth, less those that this pair cannot follow."""
        points: list[Point] = []
        for spec in specs:
            refused = next(
                (why for i in done if (why := self._found(i, spec).get("refused"))), None
            )
            if refused is None:
                points.append(point_of(spec, [self._result(i, spec) for i in done]))
            else:
                self.notes.append(f"{spec} is left out: {refused}")
        return points

    def _keep_costs(self, pair: Pair) -> None:
        """Keep what passes took while the models were first measured."""
        self._work.value(_COSTS, lambda: {who: pair.costs()[who].to_dict() for who in WHO})

    def _draft(self, name: str, learned: dict[str, object] | None) -> Path:
        """Write a steps file of just what a learned policy knows.

        The pair is opened with one in any case: an old file of it may be for other models.
        """
        path = self._work.folder / f"{name}{FILE_SUFFIX}"
        prints = self._models.fingerprints
        StepsFile(
            small=prints["small"], large=prints["large"], points=(), small_accuracy=0.0,
            large_accuracy=0.0, chosen=None, target=1.0, learned=learned,
            costs={who: PassCost() for who in WHO}, date=date.today().isoformat(),
            tasks=digest(self._tasks),
        ).write(path)  # fmt: skip
        return path
