"""Answers in steps by policy against each model alone, under the kernel's memory limit.

Each run is a process of its own in a fresh control group, with the files dropped from the page
cache before, that answers the same questions greedily. All share one limit and one budget: what the
small model takes is missing for the large one's layers, which then stream. The pair at `glimpse:0`
and `glimpse:inf` writes what one model alone does, so that what routing itself costs is seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.engine import Runtime, Settings
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.tools.accuracy import Doubles, bootstrap, wilson
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.disk_rate import limited
from edgeroute.tools.bench.experts import ExpertsParams
from edgeroute.tools.bench.layers import BUDGET_RATIO, N_UBATCH
from edgeroute.tools.bench.limit import drop_page_cache
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.remote_large import RemoteLarge
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, spread
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.questions import Draw, Question, is_right, make_questions

LARGE, SMALL = "large alone", "small alone"
TWINS: Final[Mapping[str, str]] = {"glimpse:0": LARGE, "glimpse:inf": SMALL}
"""Policies that leave all to one model, and that model alone."""
LEAST_SPEED: Final = 0.97
"""Of the pair where one model writes everything, over that model alone."""
MOST_TIME: Final = 0.5
LEAST_ACCURACY: Final = 0.95
"""Over the large model alone, of the best policy where the large model streams."""
N_CTX: Final = 768


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsParams:
    """What this benchmark is told beyond BenchParams.

    Attributes:
        small: path of the small model.
        policies: texts of step policies.
        limit: the kernel's limit: bytes, text such as `1GiB`, or a share of the large file
            (`90%`); None for none, and both in memory.
        memory: edgeroute's own budget; None is 0.98 of the limit.
        disk_rate: bytes per second that are read from the disk, to play a slower one; None for as
            fast as it is.
        latency_s: where it is given, the large model is behind an endpoint with this latency,
            and the small one asks it for steps.
        n_questions, kinds, seed: what is asked, see tools/questions.
        settings: of every Runtime beyond that.
    """

    small: Path
    policies: tuple[str, ...]
    limit: str | int | None = None
    memory: str | int | None = None
    disk_rate: str | int | None = None
    latency_s: float | None = None
    n_questions: int = 12
    kinds: tuple[str, ...] | None = None
    seed: int = 7
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for spec in self.policies:
            parse_steps(spec)
        if not self.policies:
            raise UsageError("no policy was given; name at least one, as glimpse:1.2")
        if self.disk_rate is not None and self.limit is None:
            raise UsageError("where all is in memory no disk is read; give --limit, too")
        if self.latency_s is not None and self.limit is not None:
            raise UsageError("a remote large model takes no memory here; leave --limit out")

    def limit_bytes(self, path: Path) -> int | None:
        """The limit for this large model."""
        if self.limit is None:
            return None
        return ExpertsParams(limit=self.limit).limit_bytes(path.stat().st_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer: its tokens, whether it is right, its seconds, and who wrote what.

    `n_written` and `n_large` count the tokens that ended it, and are 0 of one model alone.
    """

    tokens: tuple[int, ...]
    right: bool
    seconds: float
    n_written: int
    n_large: int
    n_refused: int
    read_small: int
    read_large: int


class Run(NamedTuple):
    """What one process answered, and what its Runtime said of layers, steps and memory after."""

    answers: list[Answer]
    stats: dict[str, Any]


class Answerer:
    """A Runtime that answers questions, one after the other."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._runtime = Runtime(path, **settings)

    def answer(self, questions: Sequence[Question]) -> Run:
        """Answer greedily; a short answer goes first that is not counted."""
        self._one(questions[0], 3)
        found = [self._one(question, question.max_tokens) for question in questions]
        stats = self._runtime.stats()
        return Run(found, {name: stats.get(name) for name in ("layers", "steps", "memory_bytes")})

    def _one(self, question: Question, n_tokens: int) -> Answer:
        found = self._runtime.generate(
            messages=question.messages, max_tokens=n_tokens, stop=[question.stop], prefix="all"
        )
        parts = found.stats.steps or ()
        return Answer(
            tokens=found.token_ids, right=is_right(question, found.text),
            seconds=found.stats.ttft_s + found.stats.decode_s,
            n_written=sum(part.n_tokens for part in parts),
            n_large=sum(part.n_tokens for part in parts if part.model == "large"),
            n_refused=sum(part.n_refused for part in parts),
            read_small=sum(part.read_small for part in parts),
            read_large=sum(part.read_large for part in parts),
        )  # fmt: skip

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()


class _Bench:
    """The runs, and what they left beside the seconds that are alternated."""

    def __init__(self, params: BenchParams, wanted: StepsParams) -> None:
        self.params, self.wanted = params, wanted
        self.limit_bytes = wanted.limit_bytes(params.path)
        self.memory: int | None = None
        if self.limit_bytes is not None:
            share = int(BUDGET_RATIO * self.limit_bytes)
            self.memory = share if wanted.memory is None else parse_bytes(wanted.memory)
        draw = Draw(split="test", form="steps")
        self.questions = make_questions(wanted.n_questions, wanted.seed, wanted.kinds, draw)
        self.answers: dict[str, list[Answer]] = {}
        self.stats: dict[str, dict[str, Any]] = {}
        self.note = "no limit: both in memory"

    def runners(self) -> dict[str, pairs.Runner]:
        """One runner per policy, each model alone first."""
        return {name: self._runner(name) for name in (LARGE, SMALL, *self.wanted.policies)}

    def _runner(self, name: str) -> pairs.Runner:
        def run() -> float:
            answers, self.stats[name] = self._live(name)
            self.answers.setdefault(name, []).extend(answers)
            return sum(answer.seconds for answer in answers) / len(answers)

        return run

    def _settings(self, name: str) -> dict[str, object]:
        settings: dict[str, object] = {
            "n_ctx": N_CTX, "n_ubatch": N_UBATCH, "threads": self.params.threads,
            "memory": self.memory, "speculate": "off", "steps_state": "off",
        }  # fmt: skip
        if self.limit_bytes is not None:  # the kernels of what streams, also where all fits
            settings["repack_experts"] = False
        if name == SMALL or (name == LARGE and self.wanted.latency_s is None):
            return settings | dict(self.wanted.settings)
        if self.wanted.latency_s is None:
            settings |= {"small": str(self.wanted.small), "steps": name}
        else:
            settings["steps"] = "large" if name == LARGE else name
        return settings | dict(self.wanted.settings)

    def _live(self, name: str) -> Run:
        latency_s, settings = self.wanted.latency_s, self._settings(name)
        small = name == SMALL or latency_s is not None
        path = self.wanted.small if small else self.params.path
        if latency_s is not None and name != SMALL:
            far = {"n_ctx": N_CTX, "n_ubatch": N_UBATCH, "threads": self.params.threads}
            with Worker(RemoteLarge, self.params.path, far, latency_s) as server:
                settings["remote"] = server.call("address")
                with Worker(Answerer, path, settings) as worker:
                    return _run_of(worker.call("answer", self.questions))
        if self.limit_bytes is None:
            with Worker(Answerer, path, settings) as worker:
                return _run_of(worker.call("answer", self.questions))
        for each in (self.params.path, self.wanted.small):
            self.note = drop_page_cache(each).note
        engine = (Answerer, path, settings)
        with (
            limited(self.limit_bytes, self.wanted.disk_rate, path, engine) as made,
            Worker(*made) as worker,
        ):
            return _run_of(worker.call("answer", self.questions))


def run(params: BenchParams, progress: pairs.Progress, wanted: StepsParams) -> Report:
    """Alternate each model alone and every policy, and compare seconds, answers and bytes.

    Raises:
        UsageError: no control group can be made here, or the limit cannot be read.
        EdgerouteError: a run failed.
    """
    bench = _Bench(replace(params, warmup=0), wanted)
    if bench.limit_bytes is not None and bench.memory is not None:
        progress(f"limit {format_bytes(bench.limit_bytes)}, budget {format_bytes(bench.memory)}")
    seconds = pairs.alternate(bench.runners(), bench.params.plan, progress)
    times = {name: _ratio(seconds[name], seconds[LARGE]) for name in seconds}
    layers = bench.stats[LARGE].get("layers")
    where = (f"alone the large model keeps {layers['resident']} layers and streams "
             f"{layers['streamed']}" if layers else "nothing streams")  # fmt: skip
    return Report(
        bench="steps", params=bench.params,
        columns=("written by", "right", "95 %", "large tokens", "s an answer", "time of large",
                 "95 %", "right of large", "95 %", "refused", "read by large", "MB a token",
                 "as large"),
        rows=tuple(_row(name, bench, seconds[name], times[name]) for name in seconds),
        results=[_result(name, bench, seconds[name], times[name]) for name in seconds],
        criteria=tuple(_criteria(bench, seconds, times)),
        notes=(f"{wanted.n_questions} questions, seed {wanted.seed}; {where}; s an answer is the "
               "mean over the questions, medians and quartiles are over runs, intervals over "
               "resampled questions", bench.note),
    )  # fmt: skip


def _ratio(ours: Series, theirs: Series) -> Series:
    """Pair runs of one round."""
    ratios = tuple(a / b for a, b in zip(ours.values, theirs.values, strict=True))
    return Series(values=ratios, others=ours.others)


def _row(name: str, bench: _Bench, seconds: Series, time: Series) -> tuple[str, ...]:
    found = _result(name, bench, seconds, time)
    low, high = wilson(found["n_right"], found["n"])
    return (
        name, f"{found['n_right']} of {found['n']}", f"{low:.2f} to {high:.2f}",
        f"{found['large_share']:.0%}", spread(seconds, 2), spread(time, 3),
        _within(found["time_95"]), f"{found['right_ratio']:.2f}", _within(found["right_95"]),
        f"{found['n_refused']}", f"{found['read_large']}",
        f"{found['bytes_per_token'] / 1e6:.1f}", f"{found['n_equal']} of {found['n']}",
    )  # fmt: skip


def _result(name: str, bench: _Bench, seconds: Series, time: Series) -> dict[str, Any]:
    answers, stats = bench.answers[name], bench.stats[name]
    n_tokens = sum(len(answer.tokens) for answer in answers)
    n_written = sum(answer.n_written for answer in answers)
    large_share = sum(answer.n_large for answer in answers) / max(1, n_written)
    layers = stats.get("layers") or {}
    per_run = n_tokens / len(seconds.values)
    theirs = bench.answers[LARGE]
    both = zip(answers, theirs, strict=True)
    took, took_95 = _over(*(_by_question(bench, each, "seconds") for each in (answers, theirs)))
    right, right_95 = _over(*(_by_question(bench, each, "right") for each in (answers, theirs)))
    return {
        "policy": name, "n": len(answers), "n_right": sum(answer.right for answer in answers),
        "n_equal": sum(ours.tokens == theirs.tokens for ours, theirs in both),
        "n_tokens": n_tokens, "large_share": large_share if n_written else float(name == LARGE),
        "n_refused": sum(answer.n_refused for answer in answers),
        "read_small": sum(answer.read_small for answer in answers),
        "read_large": sum(answer.read_large for answer in answers),
        "bytes_per_token": layers.get("bytes", 0) / max(1.0, per_run), "layers": layers,
        "steps": stats.get("steps"), "seconds": seconds.to_dict(), "time": time.to_dict(),
        "time_ratio": took, "time_95": took_95, "right_ratio": right, "right_95": right_95,
    }  # fmt: skip


def _by_question(bench: _Bench, answers: Sequence[Answer], what: str) -> Doubles:
    """Sum one of the answers' figures up over the runs: F64 (n_questions,)."""
    found = np.array([getattr(each, what) for each in answers], np.float64)
    return np.asarray(found.reshape(-1, bench.wanted.n_questions).sum(axis=0), np.float64)


def _over(ours: Doubles, theirs: Doubles) -> tuple[float, tuple[float, float]]:
    """Return our sum over theirs, and its 95 % interval; 1 where theirs is none."""

    def ratio(some: npt.NDArray[np.int64]) -> Doubles:
        below = theirs[some].sum(axis=1)
        shares: Doubles = ours[some].sum(axis=1) / np.where(below > 0, below, np.nan)
        return np.nan_to_num(shares, nan=1.0)

    return float(ratio(np.arange(len(ours))[None])[0]), bootstrap(ratio, len(ours))


def _within(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _criteria(
    bench: _Bench, seconds: Mapping[str, Series], times: Mapping[str, Series]
) -> list[Criterion]:
    found: list[Criterion] = []
    twins = {} if bench.wanted.latency_s is not None else TWINS
    for spec, alone in twins.items():
        if spec in seconds:
            speed = _ratio(seconds[alone], seconds[spec])
            found.append(Criterion(what=f"speed of {spec} over {alone}", value=speed.median,
                                   limit=LEAST_SPEED))  # fmt: skip
            both = zip(bench.answers[spec], bench.answers[alone], strict=True)
            same = [ours.tokens == theirs.tokens for ours, theirs in both]
            found.append(Criterion(what=f"answers of {spec} equal to {alone}", value=sum(same),
                                   limit=len(same)))  # fmt: skip
    policies = [name for name in bench.wanted.policies if name not in TWINS]
    if policies and bench.stats[LARGE].get("layers"):
        least = LEAST_ACCURACY * sum(answer.right for answer in bench.answers[LARGE])
        enough = [n for n in policies if sum(a.right for a in bench.answers[n]) >= least]
        best = max((1 / times[name].median for name in enough), default=0.0)
        found.append(Criterion(
            what=f"speed over large alone at {LEAST_ACCURACY:g} of its accuracy, best policy",
            value=best, limit=1 / MOST_TIME,
        ))  # fmt: skip
    return found


def _run_of(found: object) -> Run:
    assert isinstance(found, Run)
    return found
