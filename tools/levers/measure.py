"""Alternating runs of levers and their off, each in a process of its own."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from edgeroute.lever_proofs import Proof
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench.limit import MemoryLimit, drop_page_cache
from edgeroute.tools.bench.pairs import NOISY_CORES, OthersProbe, Probe
from edgeroute.tools.bench.text import TEXT
from edgeroute.tools.bench.workers import Engine, Worker
from edgeroute.tools.levers.candidates import Candidate
from edgeroute.tools.levers.gain import MIN_PAIRS, Gain, gain_of, verdict_of
from edgeroute.tools.levers.runner import (
    LINES,
    LONG_CHARS,
    N_CTX,
    PARAGRAPHS,
    Judge,
    LeverRunner,
    Sample,
    Work,
)

T = TypeVar("T")
Progress = Callable[[str], None]
FIRST_TOKENS: Final = 16
"""Of each answer in the run that tells how many tokens fill the seconds asked for."""
TOKENS: Final = (8, 192)
KEPT_PAIRS: Final = 5
KEPT_SECONDS: Final = 1.0
_OFF: Final = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeverParams:
    """What is measured, beside the model.

    Attributes:
        settings: of every run: a budget, adapters.
        small: a small model, for the levers that take one.
        pairs: alternating pairs of each lever.
        seconds: of decoding in a run, about.
        limit_bytes: the kernel's limit on each run; None for none.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    small: str | None = None
    pairs: int = 6
    seconds: float = 4.0
    limit_bytes: int | None = None

    @property
    def says_enough(self) -> bool:
        """Whether so many pairs, so long, may decide what Runtimes do from now on.

        Three pairs of a third of a second once called a lever a loser that wins by 9 %.
        """
        return self.pairs >= KEPT_PAIRS and self.seconds >= KEPT_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was measured of a candidate.

    Attributes:
        decode, prefill: gains in seconds per decoded token and per prompt token.
        off_s, on_s: seconds per token by pair, of what the candidate is judged by.
        n_noisy: runs that others disturbed.
        kl: nats per token; None where it was not measured.
        same: whether all answers were those of the first run without the lever.
        error: why it could not be run; empty where it could.
    """

    candidate: Candidate
    decode: Gain | None
    prefill: Gain | None
    off_s: tuple[float, ...]
    on_s: tuple[float, ...]
    n_noisy: int = 0
    kl: float | None = 0.0
    same: bool = True
    error: str = ""

    @property
    def gain(self) -> Gain | None:
        """What it is judged by."""
        return self.prefill if self.candidate.prefill else self.decode


class Bench:
    """The runs of one bench of levers."""

    def __init__(
        self, path: Path, params: LeverParams, progress: Progress, probe: Probe | None = None
    ) -> None:
        self.path, self.params, self._progress = path, params, progress
        self._probe = probe or OthersProbe()
        self.note = "no limit by the kernel"
        self._peak_bytes = 0
        self.paged = False
        """Whether a prompt reads much of the model from disk: then short ones are taken."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is answered in a run."""
        return LINES if self.paged else PARAGRAPHS

    def ask(self, method: str, *args: object) -> Any:
        """Have a process of its own answer a question of Judge."""
        settings = {"n_ctx": N_CTX, "levers": "asked", **self.params.settings}
        with Worker(Judge, self.path, settings) as worker:
            return worker.call(method, *args)

    def measure(self, group: Sequence[Candidate]) -> Iterator[Outcome]:
        """Measure candidates that share their off, in turn with it.

        Ctrl-C ends it; what was measured in whole pairs until then is yielded before.
        """
        runs = _Runs(self, group)
        interrupted = False
        try:
            runs.all()
        except KeyboardInterrupt:
            interrupted = True
        for candidate in group:
            if not interrupted or runs.n_pairs(candidate) >= MIN_PAIRS:
                yield self._judged(runs, candidate, interrupted)
        if interrupted:
            raise KeyboardInterrupt

    def _judged(self, runs: "_Runs", candidate: Candidate, interrupted: bool) -> Outcome:
        outcome = runs.outcome(candidate)
        if candidate.quality != "measured" or outcome.error or interrupted:
            return outcome
        self._progress(f"{candidate.name}: divergence on text kept apart")
        try:
            kl = self.ask("divergence", dict(candidate.off), dict(candidate.settings))
        except EdgerouteError as error:
            return _failed(candidate, error)
        return _with_kl(outcome, kl)

    def run(self, settings: Mapping[str, Any], work: Work, options: Mapping[str, Any]) -> Sample:
        """Make one run in a fresh process, under the limit if there is one."""
        with contextlib.ExitStack() as own:
            worker = self.opened(own, LeverRunner, settings)
            found: Sample = worker.call("run", work, dict(options))
            return found

    def opened(
        self, own: contextlib.ExitStack, factory: Callable[..., Engine],
        settings: Mapping[str, Any],
    ) -> Worker:  # fmt: skip
        """Open the model in a fresh process, under the limit if there is one; `own` ends it.

        Raises:
            UsageError: this system lets nobody, or not us, set such a limit.
            EdgerouteError: the model cannot be opened so.
        """
        given = {"n_ctx": N_CTX, **self.params.settings, **settings}
        if self.params.limit_bytes is None:
            return own.enter_context(Worker(factory, self.path, given))
        dropped = drop_page_cache(self.path).note
        limit = own.enter_context(MemoryLimit(self.params.limit_bytes))
        own.callback(self._note_limit, limit, dropped)
        own.enter_context(limit.explaining())
        return own.enter_context(Worker(*limit.factory(factory, self.path, given)))

    def _note_limit(self, limit: MemoryLimit, dropped: str) -> None:
        """Say how near a process came to the limit that the kernel held it under."""
        self._peak_bytes = max(self._peak_bytes, limit.peak_bytes or 0)
        peak = format_bytes(self._peak_bytes) if self._peak_bytes else "unknown"
        self.note = (f"each run in a control group of {format_bytes(limit.n_bytes)}, most used "
                     f"{peak}; {dropped}")  # fmt: skip

    def probed(self, action: Callable[[], T]) -> tuple[T, bool]:
        """Run something; second, whether others disturbed it."""
        self._probe.start()
        found = action()
        return found, self._probe.stop() > NOISY_CORES

    def say(self, line: str) -> None:
        """Show progress."""
        self._progress(line)


class _Runs:
    """Runs of a group, round by round; the order turns around each round."""

    def __init__(self, bench: Bench, group: Sequence[Candidate]) -> None:
        self._bench, self._group = bench, list(group)
        self._off: list[Sample] = []
        self._on: dict[str, list[Sample]] = {each.name: [] for each in group}
        self._noisy: dict[str, int] = dict.fromkeys((_OFF, *self._on), 0)
        self._errors: dict[str, EdgerouteError] = {}

    def all(self) -> None:
        """Make all rounds."""
        pairs = self._bench.params.pairs
        work = self._work()
        for round_ in range(pairs):
            names = [_OFF, *self._on]
            shown = []
            for name in names if round_ % 2 == 0 else names[::-1]:
                if name in self._errors:
                    continue
                sample = self._one(name, work)
                if sample is not None:
                    shown.append(f"{name} {1e3 * self._seconds(sample):.4g}")
            lever = self._group[0].lever
            self._bench.say(f"{lever} {round_ + 1}/{pairs}, ms a token: {'; '.join(shown)}")

    def _one(self, name: str, work: Work) -> Sample | None:
        first = self._group[0]
        if name == _OFF:
            settings, options = first.off, first.off_options
        else:
            on = next(each for each in self._group if each.name == name)
            settings, options = on.settings, on.options
        asked = {"levers": "asked", **settings}
        try:
            sample, noisy = self._bench.probed(lambda: self._bench.run(asked, work, options))
        except EdgerouteError as error:
            if name == _OFF:
                raise
            self._errors[name] = error
            return None
        (self._off if name == _OFF else self._on[name]).append(sample)
        self._noisy[name] += noisy
        return sample

    def _work(self) -> Work:
        """Take as many tokens as fill the seconds asked for."""
        first, seconds = self._group[0], self._bench.params.seconds
        if first.prefill:
            return Work(prompts=(TEXT[:LONG_CHARS],), n_tokens=4, n_warm=2)
        prompts = self._bench.prompts
        trial = Work(prompts=prompts, n_tokens=FIRST_TOKENS)
        asked = {"levers": "asked", **first.off}
        sample = self._bench.run(asked, trial, first.off_options)
        low, high = TOKENS
        n_tokens = int(seconds / max(sample.token_s, 1e-6) / len(prompts))
        return Work(prompts=prompts, n_tokens=max(low, min(high, n_tokens)))

    def _seconds(self, sample: Sample) -> float:
        return sample.prompt_token_s if self._group[0].prefill else sample.token_s

    def n_pairs(self, candidate: Candidate) -> int:
        """Return how many whole pairs were measured."""
        return min(len(self._off), len(self._on[candidate.name]))

    def outcome(self, candidate: Candidate) -> Outcome:
        """Compare a candidate's runs with those of its off in the same rounds."""
        error = self._errors.get(candidate.name)
        if error is not None:
            return _failed(candidate, error)
        n = self.n_pairs(candidate)
        off, on = self._off[:n], self._on[candidate.name][:n]
        if n < MIN_PAIRS:
            return _failed(candidate, EdgerouteError(f"only {n} pairs were measured"))
        first = off[0].token_ids
        return Outcome(
            candidate=candidate, decode=gain_of([s.token_s for s in off], [s.token_s for s in on]),
            prefill=gain_of([s.prompt_token_s for s in off], [s.prompt_token_s for s in on]),
            off_s=tuple(map(self._seconds, off)), on_s=tuple(map(self._seconds, on)),
            n_noisy=self._noisy[_OFF] + self._noisy[candidate.name],
            kl=0.0 if candidate.quality == "same" else None,
            same=all(sample.token_ids == first for sample in on),
        )  # fmt: skip


def _failed(candidate: Candidate, error: EdgerouteError) -> Outcome:
    return Outcome(candidate=candidate, decode=None, prefill=None, off_s=(), on_s=(), kl=None,
                   same=False, error=str(error)[:200])  # fmt: skip


def _with_kl(outcome: Outcome, kl: float) -> Outcome:
    return replace(outcome, kl=kl if math.isfinite(kl) else None)


def _portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the small model's path: a proof must not name files, see lever_proofs."""
    return {name: value for name, value in settings.items() if name != "small"}


def kept_as(candidate: Candidate) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a proof of a candidate says of its settings, and of what it is against."""
    return (_portable({**candidate.settings, **candidate.options}),
            _portable({**candidate.off, **candidate.off_options}))  # fmt: skip


def proof_of(outcome: Outcome, when: int) -> Proof:
    """Make what is kept of an outcome."""
    candidate, gain = outcome.candidate, outcome.gain
    settings, off = kept_as(candidate)
    note = outcome.error
    if gain is None:
        return Proof(lever=candidate.lever, settings=settings, off=off, gain=0.0, low=0.0,
                     high=0.0, kl=0.0, verdict="failed", n_pairs=0, when=when,
                     note=note)  # fmt: skip
    kl, n_pairs = outcome.kl or 0.0, len(outcome.on_s)
    verdict = verdict_of(gain, kl, n_pairs)
    if outcome.n_noisy > n_pairs:  # of twice as many runs: nothing to switch a lever on for
        verdict = "level" if verdict == "wins" else verdict
        note = f"others used the machine during {outcome.n_noisy} of {2 * n_pairs} runs"
    if candidate.quality == "same" and not outcome.same:
        verdict, note = "failed", "its answers differ from those without it"
    elif candidate.quality == "other":
        note = "its answers may differ; how good they are was not measured here"
    return Proof(lever=candidate.lever, settings=settings, off=off, gain=gain.value, low=gain.low,
                 high=gain.high, kl=kl, verdict=verdict, n_pairs=n_pairs, when=when,
                 note=note)  # fmt: skip
