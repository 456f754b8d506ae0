"""What a task for adapters is, and the ways an answer is scored."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the one right answer to it."""

    prompt: str
    completion: str


Make = Callable[[random.Random], Example]
Score = Callable[[Example, str], float]


def exact(example: Example, answer: str) -> float:
    """Score 1 for the right answer, blank space around it aside, else 0."""
    return float(answer.strip() == example.completion)


def json_fields(example: Example, answer: str) -> float:
    """Score the share of fields that are right: 0 unless it is one JSON object.

    Fields that the right answer has not count as wrong ones.
    """
    try:
        found: Any = json.loads(answer.strip())
    except (ValueError, RecursionError):
        return 0.0
    wanted: dict[str, Any] = json.loads(example.completion)
    if not isinstance(found, dict):
        return 0.0
    right = sum(
        key in found and type(found[key]) is type(value) and found[key] == value
        for key, value in wanted.items()
    )
    return float(right / len(wanted.keys() | found.keys()))


def key_values(separator: str) -> Score:
    """Score the share of `key=value` parts between separators that are right, in any order."""

    def score(example: Example, answer: str) -> float:
        wanted = set(example.completion.split(separator))
        found = {part.strip() for part in answer.strip().split(separator)}
        return len(wanted & found) / len(wanted | found)

    return score


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A generator of examples and the verifier of answers to them.

    Attributes:
        name: letters, digits and underscores.
        summary: what an adapter for it does, for a model card.
        make: draws an example; the same state of the generator gives the same one.
        score: what `verify` returns.
    """

    name: str
    summary: str
    make: Make
    score: Score = exact

    def prompt(self, rng: random.Random) -> Example:
        """Draw an example."""
        return self.make(rng)

    def verify(self, example: Example, answer: str) -> float:
        """Score an answer: 1 is right, 0 is wrong, between them a share of its fields."""
        return self.score(example, answer)
