"""Teaches the learned glimpse from the outcomes of both models, and from each half of the tasks.

A step's label is whether its answer, all by the small model, went wrong where the large model's
whole answer is right. Which of its steps spoilt an answer is not known, so all have one label.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_learned import MAX_EMBD, MAX_PROJECTION, LearnedGlimpse, fit
from edgeroute.skippers.steps import Floats, Glance

MIN_OUTCOMES: Final = 4
"""Tasks of either label in each half, at least: fewer teach nothing."""
RANK: Final = 16
"""Directions of the hidden state that are looked at, at most."""
GLANCES_PER_RANK: Final = 10
PENALTIES: Final = (1.0, 10.0, 100.0)
SHARE: Final = 0.4
"""Of the steps, that should fall to the large model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What was learned.

    Attributes:
        spec: the policy.
        weights: fitted on all tasks, as the steps file holds them.
        halves: for each half of the tasks, see `halves_of`, fitted on the other one: so nothing
            is measured on what it was fitted to.
    """

    spec: str
    weights: dict[str, object]
    halves: tuple[dict[str, object], dict[str, object]]


def halves_of(harmful: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Return two halves of the tasks, each label in both, else at random with a fixed seed.

    Not the even and the odd ones: kinds of tasks often take turns.
    """
    rng = random.Random(len(harmful))
    order = sorted(range(len(harmful)), key=lambda i: (harmful[i], rng.random()))
    return sorted(order[0::2]), sorted(order[1::2])


def learn(seen: Sequence[Sequence[Glance]], harmful: Sequence[bool]) -> Lesson | str:
    """Fit the learned glimpse, with the penalty and the features that predict the other half best.

    Args:
        seen: by task, what the small model saw at its answer's steps.
        harmful: by task, whether the small model's answer is wrong and the large one's right.

    Returns:
        What was learned, or why nothing can be.
    """
    halves = [([seen[i] for i in half], [harmful[i] for i in half]) for half in halves_of(harmful)]
    for half in halves:
        labels = [label for each, label in zip(*half, strict=True) if each]
        fewest = min(sum(labels), len(labels) - sum(labels))
        if fewest < MIN_OUTCOMES:
            return (f"it learns from tasks that only the large model has right, and from others; "
                    f"of one kind there are {fewest} in a half of the tasks, and {MIN_OUTCOMES} "
                    "are wanted")  # fmt: skip
    hidden = projection_of(list(chain.from_iterable(seen)))
    tried = [
        _try(halves, penalty, projection)
        for projection in ((None,) if hidden is None else (None, hidden)) for penalty in PENALTIES
    ]  # fmt: skip
    found = [each for each in tried if each is not None]
    if not found:
        return "its weights did not converge"
    best = min(found, key=lambda each: each.loss)
    return Lesson(
        spec=f"learned:{_threshold(best.chances):g}",
        weights=_fit(seen, harmful, best.penalty, best.projection).to_dict(),
        halves=(best.models[1].to_dict(), best.models[0].to_dict()),
    )


def projection_of(glances: Sequence[Glance]) -> Floats | None:
    """Return the directions in which hidden states differ most, F32 (n_embd, rank).

    None where there are no hidden states, or too few, or they are too wide for a steps file.
    """
    states = [glance.hidden for glance in glances if glance.hidden is not None]
    if len(states) < len(glances) or not states:
        return None
    rows = np.stack(states).astype(np.float64)
    n, n_embd = rows.shape
    rank = min(RANK, n // GLANCES_PER_RANK, MAX_PROJECTION // n_embd)
    if rank < 1 or n_embd > MAX_EMBD or not np.isfinite(rows).all():
        return None
    rows /= np.sqrt(np.maximum((rows * rows).mean(axis=1, keepdims=True), 1e-12))
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return np.ascontiguousarray(directions[:rank].T, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """A way of fitting: its two models, and how well each predicts the other's half."""

    penalty: float
    projection: Floats | None
    models: tuple[LearnedGlimpse, LearnedGlimpse]
    loss: float
    chances: npt.NDArray[np.float64]


_Half = tuple[list[Sequence[Glance]], list[bool]]


def _try(halves: Sequence[_Half], penalty: float, projection: Floats | None) -> _Tried | None:
    """Fit both halves; None where that does not converge."""
    try:
        first, second = (_fit(*half, penalty, projection) for half in halves)
    except UsageError:
        return None  # the other ways are tried, and that none is left is said
    chances, labels = [], []
    for model, (seen, harmful) in ((second, halves[0]), (first, halves[1])):
        glances, spoilt = _flat(seen, harmful)
        chances += [model.probability(glance) for glance in glances]
        labels += spoilt
    shares, outcomes = np.clip(np.array(chances), 1e-6, 1 - 1e-6), np.array(labels)
    loss = -np.where(outcomes, np.log(shares), np.log(1 - shares)).mean()
    return _Tried(penalty=penalty, projection=projection, models=(first, second),
                  loss=float(loss), chances=shares)  # fmt: skip


def _fit(
    seen: Sequence[Sequence[Glance]], harmful: Sequence[bool], penalty: float,
    projection: Floats | None,
) -> LearnedGlimpse:  # fmt: skip
    glances, labels = _flat(seen, harmful)
    return fit(glances, np.array(labels), penalty, projection)


def _flat(
    seen: Sequence[Sequence[Glance]], harmful: Sequence[bool]
) -> tuple[list[Glance], list[bool]]:
    """Return each step with its answer's label."""
    labels = [label for label, each in zip(harmful, seen, strict=True) for _ in each]
    return list(chain.from_iterable(seen)), labels


def _threshold(chances: npt.NDArray[np.float64]) -> float:
    """Return the probability from which on SHARE of the steps fall to the large model."""
    return round(float(np.quantile(chances, 1 - SHARE)), 3)
