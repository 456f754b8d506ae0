"""Step policies that were tried in the study and that the engine does not have.

`exact[:DEFER[:SURE]]` refuses every token that the large model would not have written itself, and
has it put that one in its place: plain speculative decoding by steps, the control of all checked
policies. `handover:MEAN:LEAST` leaves the rest of the answer to the large model from the first
refused token on. `offset:NATS` compares entropies with those that steps of the same place have
on average.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.steps import (
    Agree,
    Check,
    Floats,
    Glance,
    StepPart,
    StepPolicy,
    StepRun,
    Verify,
    Who,
)

USUAL_ENTROPIES: Final = (2.37, 1.13, 0.82, 1.01, 0.35)
"""Nats, by a step's place; the last is that of all behind. Source: experiments-steps, Study A."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """Decisions for one answer of any policy here."""

    check: Check | None = None
    sticks: bool = False
    least: float | None = None
    lost: bool = False

    @property
    def looks(self) -> bool:
        return self.least is not None

    @property
    def wants_hidden(self) -> bool:
        return False

    @property
    def watches(self) -> bool:
        return False

    def choose(self, glance: Glance | None) -> Who:
        if self.least is not None and glance is not None:
            usual = USUAL_ENTROPIES[min(glance.index, len(USUAL_ENTROPIES) - 1)]
            return "large" if glance.entropy - usual >= self.least else "small"
        return "large" if self.lost else "small"

    def at_token(self, writer: Who, logits: Floats) -> Who:
        return writer

    def note(self, part: StepPart) -> None:
        self.lost = self.lost or (self.sticks and part.model == "large")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """A policy made of its text."""

    spec: str
    check: Check | None = None
    sticks: bool = False
    least: float | None = None

    def begin(self, seed: int) -> StepRun:
        return _Run(check=self.check, sticks=self.sticks, least=self.least)


def parse_tried(text: str) -> StepPolicy:
    """Return the policy that a text stands for, one of the engine's or one of those tried here.

    Raises:
        UsageError: there is no such policy, or its numbers are not those that it takes.
    """
    name, *rest = text.split(":")
    takes = {"exact": (0, 2), "handover": (2, 2), "offset": (1, 1)}
    if name not in takes:
        return parse_steps(text)
    try:
        numbers = [float(number) for number in rest]
    except ValueError as error:
        raise UsageError(f"{text!r} holds something that is no number") from error
    low, high = takes[name]
    if not low <= len(numbers) <= high or not np.isfinite(numbers).all():
        raise UsageError(f"{name} takes {low} to {high} numbers, got {text!r}")
    if name == "offset":
        return _Tried(spec=text, least=numbers[0])
    if name == "handover":
        return _Tried(spec=text, check=Verify(mean=numbers[0], least=numbers[1]), sticks=True)
    defer, sure = [*numbers, 0.0, 0.0][:2]
    return _Tried(spec=text, check=Agree(gap=0, defer=int(defer), sure=sure))
