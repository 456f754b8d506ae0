"""Who writes the next step of an answer: the records that policies and the engine share.

An answer is written in steps. At a step's start the small model may glimpse its first token;
a policy then names the writer. Some policies have the small model draft steps that the large
one checks in one pass before anybody sees them.
Source: GlimpRouter, arXiv 2601.05110; SpecReason, arXiv 2504.07891.
"""

from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

Who = Literal["small", "large"]
"""A model of the pair."""

WHO: Final[tuple[Who, Who]] = ("small", "large")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Glance:
    """What the small model knows about a step before it is written.

    Attributes:
        index: steps of the answer before this one.
        position: tokens of the answer before this step.
        entropy: of its first token, in nats, over the whole vocabulary.
        top_entropy: in nats over its 20 likeliest tokens, renormalised.
        margin: of the likeliest token's log-probability over the second's, in nats.
        hidden: F32 (n_embd,), the last layer's output for the newest token; None where the
            policy does not want it.
    """

    index: int
    position: int
    entropy: float
    top_entropy: float
    margin: float
    hidden: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """What one model wrote of one step, and what that took.

    A step of which the large model kept a part and rewrote the rest has two parts.

    Attributes:
        index: the step's place in the answer.
        model: who wrote the tokens that were kept.
        n_tokens: of those; an end-of-answer token is one.
        n_refused: tokens that the small model drafted here and the large one refused.
        read_small, read_large: tokens that each model evaluated meanwhile, catching up included.
        seconds: of it, catching up, checking and waiting included.
        entropy_nats: of the step's first token as the small model saw it; None unless it looked.
        score: what a check said of the draft: its mean log-probability in nats under the large
            model, or a judge's expected mark; None unless one was made.
        reason: why the writer was not the one that the policy named: `fallback` where a remote
            model failed; else None.
    """

    index: int
    model: Who
    n_tokens: int
    n_refused: int = 0
    read_small: int = 0
    read_large: int = 0
    seconds: float = 0.0
    entropy_nats: float | None = None
    score: float | None = None
    reason: Literal["fallback"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How far the small model drafts, and how much of a refused step the large one writes.

    Attributes:
        defer: tokens to be drafted before the large model looks, at the end of the step that
            reaches them; 0 looks at every step.
        fix: tokens that the large model writes where it refused one, before the small one
            drafts on; 0 writes the rest of the step.
        sure: probability below which the small model ends its draft with a token, to have it
            looked at before more is built on it; 0 never does.
    """

    defer: int = 0
    fix: int = 0
    sure: float = 0.0


UNCHECKED: Final = Drafting()
"""Of drafts that all count: steps of a model with another vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Drafting):
    """The large model's probabilities for drafted tokens decide how many of them stay.

    Attributes:
        mean: least mean log-probability of a step's tokens, in nats.
        least: least log-probability of any token, in nats.
    """

    mean: float
    least: float

    def n_kept(self, logprobs: Floats, ends: tuple[int, ...] = ()) -> int:
        """Return how many leading tokens stay.

        A step ends before its first token below `least`. One whose tokens are all above, but
        whose mean is below `mean`, ends before the weakest of them.

        Args:
            logprobs: F32 (n,), of the drafted tokens under the large model, in nats.
            ends: where steps within the draft end, rising; the last step ends with the draft.
        """
        start = 0
        for end in (*ends, len(logprobs)):
            step = logprobs[start:end]
            if not len(step):
                continue
            weak = np.flatnonzero(~(step >= self.least))  # a NaN is below every limit
            if len(weak):
                return start + int(weak[0])
            if not float(step.mean(dtype=np.float64)) >= self.mean:
                return start + int(step.argmin())
            start = end
        return len(logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agree(Drafting):
    """Drafted tokens stay while the large model would have written nearly the same.

    With a gap of 0 a greedy answer is the large model's own: what is refused is what it would
    not have written, and that is put in its place.

    Attributes:
        gap: nats by which the large model's own choice may be likelier than a drafted token.
    """

    gap: float
    fix: int = 1

    def n_kept(self, logprobs: Floats, best: Floats) -> int:
        """Return how many leading tokens stay.

        Args:
            logprobs: F32 (n,), of the drafted tokens under the large model, in nats.
            best: F32 (n,), of its own choices in their places.
        """
        far = np.flatnonzero(~(best - logprobs <= self.gap))  # a NaN is far
        return int(far[0]) if len(far) else len(logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge(Drafting):
    """The large model marks a drafted step from 0 to 9 and writes it anew below a mark.

    Attributes:
        least: the least expected mark that keeps a step.
    """

    least: float = 7.0


Check = Verify | Agree | Judge


class StepRun(Protocol):
    """A policy's decisions for one answer. The engine asks in the answer's order."""

    @property
    def looks(self) -> bool:
        """Whether `choose` wants a glance at the step that begins."""

    @property
    def wants_hidden(self) -> bool:
        """Whether that glance needs the small model's hidden state."""

    @property
    def watches(self) -> bool:
        """Whether `at_token` is to be asked before every token inside a step."""

    @property
    def check(self) -> Check | None:
        """How what the small model writes is checked before it counts; None: it is not."""

    def choose(self, glance: Glance | None) -> Who:
        """Name the writer of the step that begins."""

    def at_token(self, writer: Who, logits: Floats) -> Who:
        """Name the writer of the next token inside a step, from the writer's own logits for it.

        Args:
            writer: who has written so far.
            logits: F32 (n_vocab,) of that model.
        """

    def note(self, part: StepPart) -> None:
        """Learn from a part that was written."""


class StepPolicy(Protocol):
    """Decides for many answers; what it learns is shared by them."""

    @property
    def spec(self) -> str:
        """The text that `parse_steps` makes this policy of."""

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer; the same seed gives the same ones."""
