"""One answer in steps: where it stands, and the account of who wrote what at which cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.steps import StepPart, StepRun, Who
from edgeroute.step_reader import Follower, Reader

if TYPE_CHECKING:
    from edgeroute.remote import RemoteStep
    from edgeroute.runtime.sampler import Sampler

Phase = Literal["choose", "look", "write", "draft", "check", "call"]
"""What the engine does next for an answer: have the writer named, let the small model glimpse a
step's first token, decode, decode what counts only later, check that, ask a remote model."""

Reads = Callable[[], tuple[int, int]]
"""Tokens that the small and the large model evaluated for this answer so far."""


class Account:
    """Parts of steps as they are written. Every token and every pass is in exactly one."""

    def __init__(self, reads: Reads) -> None:
        self.parts: list[StepPart] = []
        self.index = 0
        self._reads = reads
        self._mark = (0, 0)
        self._since = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._who: Who | None = None
        self._n_tokens = self._n_refused = 0
        self._entropy: float | None = None
        self._score: float | None = None
        self._fallback = False

    def looked(self, entropy: float) -> None:
        """Note what the small model saw before the step."""
        self._entropy = entropy

    def checked(self, score: float | None, n_refused: int) -> None:
        """Note what a check said of a draft, if anything new, and tokens that it refused."""
        self._score = self._score if score is None else score
        self._n_refused += n_refused

    def fell_back(self) -> None:
        """Note that the step's writer is not the one that was wanted."""
        self._fallback = True

    def wrote(self, who: Who) -> StepPart | None:
        """Count a token; return the part that ends where the writer changes within a step."""
        ended = self.close(who) if self._who not in (None, who) else None
        self._who = who
        self._n_tokens += 1
        return ended

    def close(self, default: Who) -> StepPart | None:
        """End the part in progress; None where nothing happened since the last one.

        Args:
            default: whose it is if nobody wrote anything.
        """
        reads, now = self._reads(), time.perf_counter()
        read_small, read_large = (new - old for new, old in zip(reads, self._mark, strict=True))
        if not (self._n_tokens or read_small or read_large or self._n_refused):
            return None
        part = StepPart(
            index=self.index, model=self._who or default, n_tokens=self._n_tokens,
            n_refused=self._n_refused, read_small=read_small, read_large=read_large,
            seconds=round(now - self._since, 6), entropy_nats=self._entropy, score=self._score,
            reason="fallback" if self._fallback else None,
        )  # fmt: skip
        self.parts.append(part)
        self._mark, self._since = reads, now
        self._clear()
        return part


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """Steps that the small model wrote, and that are no part of the answer yet.

    Attributes:
        bounds: where steps end, running ahead of the answer's.
        steps: tokens of each, in the small model's vocabulary; the last may be in progress.
        ended: whether the last token ends the answer.
    """

    bounds: StepBounds
    steps: list[list[int]] = field(default_factory=lambda: [[]])
    ended: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens drafted."""
        return sum(map(len, self.steps))


@dataclass(slots=True, kw_only=True, eq=False)
class StepState:
    """An answer in steps. The engine thread owns it.

    Attributes:
        run: its decisions.
        main: cells of the model that the answer belongs to.
        other: the local model beside it; None where the other one is remote.
        sampler: draws drafts and, where vocabularies differ, whatever the other model writes.
        bounds: where the answer's steps end.
        text: the answer's bytes.
        fix_left: tokens that the large model still writes before the small one drafts on; None
            for all up to the step's end.
        heard: text of a remote model's step, as far as it came.
    """

    run: StepRun
    main: Reader
    other: Follower | None
    account: Account
    bounds: StepBounds
    sampler: "Sampler | None" = None
    text: bytearray = field(default_factory=bytearray)
    phase: Phase = "choose"
    who: Who = "large"
    draft: Draft | None = None
    fix_left: int | None = None
    call: "RemoteStep | None" = None
    heard: bytearray = field(default_factory=bytearray)
    asked: float = 0.0
    n_samplers: int = 0
    """Of the other model's, made anew."""
    switched: bool = False
    """Whether the writer has just changed within a step: it draws before it is asked again."""
    ended: bool = False
    small_lost: bool = False
    """Whether the small model cannot follow any more, so that the large one writes the rest."""
