"""Policies of step routing, and the texts that name them.

A text is NAME, or NAME:NUMBER and further numbers; `parse_steps` reads it, `spec` writes it.
Policies that learn while they run are in `step_targets`.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_learned import Learned, LearnedGlimpse
from edgeroute.skippers.step_random import Random
from edgeroute.skippers.step_runs import GlanceRun, PlainRun, number_text, seen
from edgeroute.skippers.step_signals import margin
from edgeroute.skippers.step_targets import TargetAccuracy, TargetPace, TargetShare
from edgeroute.skippers.steps import (
    Agree,
    Check,
    Floats,
    Glance,
    Judge,
    StepPart,
    StepPolicy,
    StepRun,
    Verify,
    Who,
)

N_SURE: Final = 4
"""Tokens in a row of which the large model must be sure before it hands back."""
MAX_DEFER: Final = 4096
MAX_TEXT: Final = 200
"""Characters of a policy's text: more than any needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Always:
    """One model writes everything."""

    writer: Who

    @property
    def spec(self) -> str:
        """The policy's text."""
        return self.writer

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        return PlainRun(self.writer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """The large model writes the steps whose first token the small one is unsure of.

    Attributes:
        nats: entropy from which on it does.
        top: whether the entropy is that of the 20 likeliest tokens, as in the paper.

    Source: GlimpRouter, arXiv 2601.05110.
    """

    nats: float
    top: bool = False

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"{'glimpse20' if self.top else 'glimpse'}:{number_text(self.nats)}"

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        return _GlimpseRun(self)


class _GlimpseRun(GlanceRun):
    def __init__(self, policy: Glimpse) -> None:
        super().__init__()
        self._policy = policy
        self.looks = 0 < policy.nats < math.inf  # else nothing that is seen changes anything

    def choose(self, glance: Glance | None) -> Who:
        if not self.looks:
            return "small" if self._policy.nats else "large"
        it = seen(glance)
        unsure = it.top_entropy if self._policy.top else it.entropy
        return "large" if unsure >= self._policy.nats else "small"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The entropy of the answer's first token decides who writes all of it.

    Attributes:
        nats: entropy from which on the large model does.
    """

    nats: float

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"query:{number_text(self.nats)}"

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        return _QueryRun(self.nats)


class _QueryRun(PlainRun):
    looks = True

    def __init__(self, nats: float) -> None:
        super().__init__()
        self._nats = nats

    def choose(self, glance: Glance | None) -> Who:
        if self.looks:
            self.looks = False
            self._writer = "large" if seen(glance).entropy >= self._nats else "small"
        return self._writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """The large model takes over at a token of which the small one is unsure.

    It hands back when it was sure itself of N_SURE tokens in a row. Whoever wrote last goes on
    in the next step, whose first token is not watched.

    Attributes:
        low: the small model's margin below which it is unsure, in nats.
        high: the large model's margin from which on it is sure, in nats.
    """

    low: float
    high: float

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"margin:{number_text(self.low)}:{number_text(self.high)}"

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        return _MarginRun(self)


class _MarginRun(PlainRun):
    watches = True

    def __init__(self, policy: Margin) -> None:
        super().__init__()
        self._policy = policy
        self._n_sure = 0

    def at_token(self, writer: Who, logits: Floats) -> Who:
        if writer == "small":
            self._n_sure = 0
            unsure = margin(logits) < self._policy.low
            self._writer = "large" if unsure else "small"
            return self._writer
        self._n_sure = self._n_sure + 1 if margin(logits) >= self._policy.high else 0
        self._writer = "small" if self._n_sure >= N_SURE else "large"
        return self._writer

    def note(self, part: StepPart) -> None:
        if part.n_tokens:  # a failed remote model wrote none, whatever was named
            self._writer = part.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The small model drafts every step and the large one checks it.

    Attributes:
        how: the check. Source of Judge: SpecReason, arXiv 2504.07891.
    """

    how: Check

    @property
    def spec(self) -> str:
        """The policy's text."""
        if isinstance(self.how, Judge):
            return f"judge:{number_text(self.how.least)}"
        how = self.how
        if isinstance(how, Agree):
            name, needed, usual = "agree", [how.gap], [(how.defer, 0), (how.fix, 1), (how.sure, 0)]
        else:
            name, needed, usual = "verify", [how.mean, how.least], [(how.defer, 0), (how.fix, 0)]
        while usual and usual[-1][0] == usual[-1][1]:
            usual.pop()
        return ":".join([name, *map(number_text, [*needed, *(value for value, _ in usual)])])

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        return PlainRun("small", self.how)


# texts


class _Number(NamedTuple):
    """One number of a policy's text: what it is and where it may lie."""

    what: str
    low: float
    high: float
    whole: bool = False


class _Form(NamedTuple):
    """How a policy is written, and what makes it of its numbers."""

    example: str
    make: Callable[[Sequence[float], LearnedGlimpse | None], StepPolicy]
    numbers: tuple[_Number, ...] = ()
    n_optional: int = 0


_NATS: Final = _Number("entropy in nats", 0.0, math.inf)
_SHARE: Final = _Number("share of the tokens", 0.0, 1.0)
_LOGPROB: Final = -math.inf, 0.0

_FORMS: Final[Mapping[str, _Form]] = {
    "small": _Form("small", lambda n, _: Always(writer="small")),
    "large": _Form("large", lambda n, _: Always(writer="large")),
    "random": _Form("random:0.3", lambda n, _: Random(share=n[0]), (_SHARE,)),
    "glimpse": _Form("glimpse:1.2", lambda n, _: Glimpse(nats=n[0]), (_NATS,)),
    "glimpse20": _Form("glimpse20:1", lambda n, _: Glimpse(nats=n[0], top=True), (_NATS,)),
    "query": _Form("query:1.5", lambda n, _: Query(nats=n[0]), (_NATS,)),
    "verify": _Form(
        "verify:-0.5:-4",
        lambda n, _: Draft(how=Verify(mean=n[0], least=n[1], **_whole(n[2:], ("defer", "fix")))),
        (
            _Number("mean log-probability in nats", *_LOGPROB),
            _Number("least log-probability in nats", *_LOGPROB),
            _Number("number of tokens to defer by", 0, MAX_DEFER, whole=True),
            _Number("number of tokens to correct", 0, MAX_DEFER, whole=True),
        ),
        n_optional=2,
    ),
    "agree": _Form(
        "agree:0:48",
        lambda n, _: Draft(how=_agree(*n)),
        (
            _Number("gap in nats", 0.0, math.inf),
            _Number("number of tokens to defer by", 0, MAX_DEFER, whole=True),
            _Number("number of tokens to correct", 0, MAX_DEFER, whole=True),
            _Number("probability of the small model", 0.0, 1.0),
        ),
        n_optional=3,
    ),
    "judge": _Form(
        "judge:7", lambda n, _: Draft(how=Judge(least=n[0])), (_Number("mark", 0.0, 9.0),)
    ),
    "margin": _Form(
        "margin:0.5:2",
        lambda n, _: Margin(low=n[0], high=n[1]),
        (
            _Number("small model's margin in nats", 0.0, math.inf),
            _Number("large model's margin in nats", 0.0, math.inf),
        ),
    ),
    "target": _Form("target:0.3", lambda n, _: TargetShare(n[0]), (_SHARE,)),
    "pace": _Form(
        "pace:0.05", lambda n, _: TargetPace(n[0]), (_Number("seconds per token", 1e-6, 3600.0),)
    ),
    "accuracy": _Form(
        "accuracy:0.9", lambda n, _: TargetAccuracy(n[0]), (_Number("mean reward", 0.0, 1.0),)
    ),
    "learned": _Form(
        "learned:0.3",
        lambda n, learned: Learned(probability=n[0], glimpse=_trained(learned)),
        (_Number("probability", 0.0, 1.0),),
    ),
}

_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?|\.[0-9]+|inf)")


def _agree(gap: float, defer: float = 0, fix: float = 1, sure: float = 0.0) -> Agree:
    return Agree(gap=gap, defer=int(defer), fix=int(fix), sure=sure)


def _whole(numbers: Sequence[float], names: Sequence[str]) -> dict[str, int]:
    """Name the optional numbers that were given."""
    return {name: int(number) for name, number in zip(names, numbers, strict=False)}


def parse_steps(
    text: str, learned: LearnedGlimpse | Mapping[str, object] | None = None
) -> StepPolicy:
    """Make a policy of its text.

    Args:
        text: NAME, or NAME:NUMBER and further numbers, as in `glimpse:1.2`.
        learned: weights of the learned glimpse, as `LearnedGlimpse.to_dict` gave them; read only
            for the policy `learned`.

    Raises:
        UsageError: there is no such policy, a number is missing, too much or out of bounds, or
            the weights are missing or malformed.
    """
    if not isinstance(text, str):
        raise UsageError(f"a step policy is a text such as 'glimpse:1.2', got {text!r:.{MAX_TEXT}}")
    name, *words = text[:MAX_TEXT].split(":")
    form = _FORMS.get(name)
    if form is None:
        raise UsageError(_unknown(name))
    least = len(form.numbers) - form.n_optional
    if not least <= len(words) <= len(form.numbers):
        wanted = " or ".join(str(n) for n in range(least, len(form.numbers) + 1))
        raise UsageError(
            f"step policy {name!r} takes {wanted} number{'' if wanted == '1' else 's'}, "
            f"{text[:MAX_TEXT]!r} has {len(words)}; "
            f"write for example steps={form.example!r}"
        )
    numbers = [_read(word, number, form) for word, number in zip(words, form.numbers, strict=False)]
    if name == "learned" and isinstance(learned, Mapping):
        learned = LearnedGlimpse.from_dict(learned)
    return form.make(numbers, learned if isinstance(learned, LearnedGlimpse) else None)


def _trained(learned: LearnedGlimpse | None) -> LearnedGlimpse:
    if learned is None:
        raise UsageError(
            "the step policy 'learned' needs weights, and no steps file holds any for this pair; "
            "make one by `edgeroute calibrate --steps SMALL LARGE`, or write for example "
            "steps='glimpse:1.2'"
        )
    return learned


def _read(word: str, number: _Number, form: _Form) -> float:
    value = float(word) if _NUMBER.fullmatch(word) else math.nan
    if number.low <= value <= number.high and not (number.whole and value % 1):  # NaN is outside
        return value + 0.0  # no -0.0
    kind = "a whole number" if number.whole else "a number"
    raise UsageError(
        f"the {number.what} of a step policy must be {kind} from {number.low:g} to "
        f"{number.high:g}, got {word!r}; write for example steps={form.example!r}"
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _FORMS, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_FORMS)}"
    return f"there is no step policy {name!r}; {hint}"
