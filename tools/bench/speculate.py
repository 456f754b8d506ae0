"""Speculation by each source of drafts against plain decoding, under the kernel's memory limit.

Each run is a process of its own in a fresh control group, with the files dropped from the page
cache before, that answers the same prompts greedily. All runs share one limit and one budget: what
a small model takes is missing for the large one's layers. Texts must be equal, token by token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from edgeroute.engine import Runtime, Settings
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.disk_rate import limited
from edgeroute.tools.bench.experts import ExpertsParams
from edgeroute.tools.bench.layers import BUDGET_RATIO, N_UBATCH
from edgeroute.tools.bench.limit import drop_page_cache
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain, spread
from edgeroute.tools.bench.text import PROMPTS
from edgeroute.tools.bench.workers import Worker

SOURCES: Final = ("lookup", "self", "small", "auto")
DEFAULT_SOURCES: Final = ("lookup", "self", "auto")
OFF: Final = "off"
N_CTX: Final = 512
TARGETS: Final[Mapping[str, float]] = {"self": 1.8, "small": 2.0, "auto": 0.98}
"""Demanded speed over plain decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculateParams:
    """What this benchmark is told beyond BenchParams.

    Attributes:
        limit: the kernel's limit: bytes, text such as `2GiB`, or a share of the file (`60%`);
            None for none, and all in memory.
        memory: edgeroute's own budget; None is 0.98 of the limit.
        sources: who drafts.
        small: path of the small model; where it is given, `auto` has it, too.
        disk_rate: bytes a second that are read at most; None is what the disk gives.
        n_prompts: how many prompts are answered in a run.
    """

    limit: str | int | None = "60%"
    memory: str | int | None = None
    sources: tuple[str, ...] = DEFAULT_SOURCES
    small: Path | None = None
    disk_rate: str | int | None = None
    n_prompts: int = 4
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown:
            raise UsageError(f"there is no source {unknown[0]!r}; there are {', '.join(SOURCES)}")
        if "small" in self.sources and self.small is None:
            raise UsageError("the source small needs a small model; name one by --small")
        if self.disk_rate is not None and self.limit is None:
            raise UsageError("where all is in memory no disk is read; give --limit, too")

    def limit_bytes(self, path: Path) -> int | None:
        """The limit for this model."""
        if self.limit is None:
            return None
        return ExpertsParams(limit=self.limit).limit_bytes(path.stat().st_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one process answered: tokens by prompt, seconds of decoding, and the counters."""

    texts: tuple[tuple[int, ...], ...]
    decode_s: float
    speculation: Mapping[str, Any]
    layers: Mapping[str, Any]

    @property
    def tok_s(self) -> float:
        """Tokens behind the first of each answer, per second."""
        return sum(len(text) - 1 for text in self.texts) / self.decode_s


class Answerer:
    """A Runtime that answers prompts, one after the other."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._runtime = Runtime(path, **settings)

    def answer(self, prompts: Sequence[str], n_tokens: int) -> Answers:
        """Answer greedily; a short answer goes first that is not counted."""
        self._runtime.generate(prompts[0], max_tokens=3, prefix="off")
        before = self._counters()
        found = [self._runtime.generate(p, max_tokens=n_tokens, prefix="off") for p in prompts]
        after = self._counters()
        counted = {name: after[name] - before.get(name, 0) for name in after}
        layers: Any = self._runtime.stats().get("layers", {})
        return Answers(
            texts=tuple(each.token_ids for each in found), speculation=counted, layers=layers,
            decode_s=sum(each.stats.decode_s for each in found),
        )  # fmt: skip

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()

    def _counters(self) -> dict[str, float]:
        stats: Any = self._runtime.stats()["speculation"]
        names = ("passes", "drafted", "accepted", "draft_s")
        return {name: stats[name] for name in names if name in stats}


class _Bench:
    """The runs, and what they left beside the speed that is alternated."""

    def __init__(self, params: BenchParams, wanted: SpeculateParams) -> None:
        self.params, self.wanted = params, wanted
        self.limit_bytes = wanted.limit_bytes(params.path)
        self.memory: int | None = None
        if self.limit_bytes is not None:
            share = int(BUDGET_RATIO * self.limit_bytes)
            self.memory = share if wanted.memory is None else parse_bytes(wanted.memory)
        self.answers: dict[str, list[Answers]] = {}
        self.note = "no limit: all in memory"

    def runners(self) -> dict[str, pairs.Runner]:
        """One runner per source, plain decoding first."""
        return {name: self._runner(name) for name in (OFF, *self.wanted.sources)}

    def _runner(self, name: str) -> pairs.Runner:
        def run() -> float:
            prompts = PROMPTS[: self.wanted.n_prompts]
            found = self._live(self._settings(name), prompts)
            self.answers.setdefault(name, []).append(found)
            return found.tok_s

        return run

    def _settings(self, name: str) -> dict[str, object]:
        settings: dict[str, object] = {
            "n_ctx": N_CTX, "n_ubatch": N_UBATCH, "threads": self.params.threads,
            "speculate": name, "memory": self.memory,
        }  # fmt: skip
        if self.limit_bytes is not None:  # the kernels of what streams, also where all fits
            settings["repack_experts"] = False
        if self.wanted.small is not None and name in ("small", "auto"):
            settings["small"] = str(self.wanted.small)
        return settings | dict(self.wanted.settings)

    def _live(self, settings: dict[str, object], prompts: Sequence[str]) -> Answers:
        args = (prompts, self.params.tokens)
        if self.limit_bytes is None:
            with Worker(Answerer, self.params.path, settings) as worker:
                return _answers(worker.call("answer", *args))
        for path in (self.params.path, self.wanted.small):
            if path is not None:
                self.note = drop_page_cache(path).note
        engine = (Answerer, self.params.path, settings)
        with (
            limited(self.limit_bytes, self.wanted.disk_rate, self.params.path, engine) as made,
            Worker(*made) as worker,
        ):
            return _answers(worker.call("answer", *args))


def run(params: BenchParams, progress: pairs.Progress, wanted: SpeculateParams) -> Report:
    """Alternate plain decoding and every source, and compare speeds and texts.

    Raises:
        UsageError: no control group can be made here, or the limit cannot be read.
        EdgerouteError: a run failed, or an answer differs from the plain one.
    """
    bench = _Bench(replace(params, warmup=0), wanted)
    if bench.limit_bytes is not None and bench.memory is not None:
        progress(f"limit {format_bytes(bench.limit_bytes)}, budget {format_bytes(bench.memory)}")
    speeds = pairs.alternate(bench.runners(), bench.params.plan, progress)
    gains = {name: _gain(speeds[name], speeds[OFF]) for name in speeds}
    equal = {name: _n_equal(bench.answers, name) for name in speeds}
    layers = bench.answers[OFF][-1].layers
    where = (f"{layers['resident']} layers stay, {layers['streamed']} stream when plain"
             if layers else "nothing streams")  # fmt: skip
    n_texts = len(bench.answers[OFF]) * wanted.n_prompts
    return Report(
        bench="speculate", params=bench.params,
        columns=("drafts by", "tok/s", "over plain", "accepted", "tokens a pass", "draft s/pass",
                 "equal texts"),
        rows=tuple(_row(name, speeds[name], gains[name], bench.answers[name], equal[name])
                   for name in speeds),
        results=[_result(name, speeds[name], gains[name], bench.answers[name], equal[name])
                 for name in speeds],
        criteria=tuple(_criteria(gains, equal, n_texts, resident=not layers)),
        notes=(f"{wanted.n_prompts} prompts, {params.tokens} tokens each; {where}; gains are "
               "medians over pairs of neighbouring runs, with quartiles", bench.note),
    )  # fmt: skip


def _gain(ours: Series, off: Series) -> Series:
    """Pair runs of one round."""
    ratios = tuple(a / b for a, b in zip(ours.values, off.values, strict=True))
    return Series(values=ratios, others=ours.others)


def _n_equal(answers: Mapping[str, Sequence[Answers]], name: str) -> int:
    """Count texts that are those of the first plain run."""
    expected = answers[OFF][0].texts
    return sum(
        text == right for each in answers[name]
        for text, right in zip(each.texts, expected, strict=True)
    )  # fmt: skip


def _sums(answers: Sequence[Answers]) -> dict[str, float]:
    names = ("passes", "drafted", "accepted", "draft_s")
    return {name: sum(each.speculation.get(name, 0) for each in answers) for name in names}


def _row(
    name: str, speed: Series, gain: Series, answers: Sequence[Answers], n_equal: int
) -> tuple[str, ...]:
    n = _sums(answers)
    drafted, passes = n["drafted"], n["passes"]
    n_texts = sum(len(each.texts) for each in answers)
    return (
        name, spread(speed, 2), spread(gain, 2),
        f"{n['accepted'] / drafted:.0%} of {drafted:.0f}" if drafted else "",
        f"{(passes + n['accepted']) / passes:.2f}" if passes else "1.00",
        f"{n['draft_s'] / passes:.3f}" if passes else "", f"{n_equal} of {n_texts}",
    )  # fmt: skip


def _result(
    name: str, speed: Series, gain: Series, answers: Sequence[Answers], n_equal: int
) -> dict[str, object]:
    return {
        "source": name, "tok_s": speed.to_dict(), "gain": gain.to_dict(), "n_equal": n_equal,
        "layers": [dict(each.layers) for each in answers],
    } | {key: plain(value) for key, value in _sums(answers).items()}  # fmt: skip


def _criteria(
    gains: Mapping[str, Series], equal: Mapping[str, int], n_texts: int, *, resident: bool
) -> list[Criterion]:
    found = [
        Criterion(what=f"texts equal to plain ones, {name}", value=n, limit=n_texts)
        for name, n in equal.items()
    ]
    for name, gain in gains.items():
        if name in TARGETS and (name == "auto" or not resident):
            found.append(Criterion(what=f"{name} over plain", value=gain.median,
                                   limit=TARGETS[name]))  # fmt: skip
    return found


def _answers(found: object) -> Answers:
    assert isinstance(found, Answers)
    return found
