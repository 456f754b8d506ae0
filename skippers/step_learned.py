"""The learned glimpse: how likely the small model is to spoil an answer with its next step.

A logistic regression on what a glance says. It is trained on outcomes: glances at steps that
the small model wrote, and whether the answer was wrong with its step and right with the large
model's. Entropy alone tells wording from error badly; position, index and the hidden state at
the boundary tell more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_numbers import MAX_NUMBER, broken, check_keys, number, numbers, whole
from edgeroute.skippers.step_runs import GlanceRun, number_text, seen
from edgeroute.skippers.steps import Floats, Glance, StepRun, Who

Doubles = npt.NDArray[np.float64]

FEATURES: Final = (
    "entropy", "top_entropy", "margin", "log_entropy", "log_margin",
    "first", "index", "log_index", "position", "log_position",
)  # fmt: skip
"""In the order of the weights; `first` is 1 at an answer's start; coordinates of the projected
hidden state follow."""
MAX_EMBD: Final = 1 << 16
MAX_RANK: Final = 256
MAX_PROJECTION: Final = 1 << 16
"""Numbers of a projection; what a steps file holds in one list."""
_FLATTEST: Final = 1e-6
_MAX_ROUNDS: Final = 100
_TOLERANCE: Final = 1e-8
_LEAST_POWER: Final = 1e-12
_FARTHEST: Final = 10.0
"""Standard deviations from the mean that a feature counts for at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnedGlimpse:
    """Weights of the regression.

    Attributes:
        weights: F64 (n_features,), of standardised features.
        bias: added to their sum.
        mean, scale: F64 (n_features,), of the features in training.
        projection: F32 (n_embd, rank), of the hidden state divided by its root mean square;
            None where it is not looked at.
    """

    weights: Doubles
    bias: float
    mean: Doubles
    scale: Doubles
    projection: Floats | None = None

    @property
    def wants_hidden(self) -> bool:
        """Whether glances need the hidden state."""
        return self.projection is not None

    def features(self, glance: Glance) -> Doubles:
        """Return what is weighed of a glance, F64 (n_features,), not yet standardised.

        Raises:
            UsageError: its hidden state is needed and missing, or is of another width.
        """
        return features(glance, self.projection)

    def probability(self, glance: Glance) -> float:
        """Return how likely the small model's step is to spoil the answer.

        1 where the glance or its hidden state is not a number.

        Raises:
            UsageError: its hidden state is needed and missing, or is of another width.
        """
        scaled = np.clip((self.features(glance) - self.mean) / self.scale, -_FARTHEST, _FARTHEST)
        score = float((scaled * self.weights).sum()) + self.bias
        return 0.5 * (1.0 + math.tanh(0.5 * score)) if math.isfinite(score) else 1.0

    def to_dict(self) -> dict[str, object]:
        """Return all numbers as plain JSON types; `from_dict` makes an equal one."""
        found: dict[str, object] = {
            "features": list(FEATURES), "weights": self.weights.tolist(), "bias": self.bias,
            "mean": self.mean.tolist(), "scale": self.scale.tolist(),
        }  # fmt: skip
        if self.projection is not None:
            n_embd, rank = self.projection.shape
            flat = [float(str(value)) for value in self.projection.ravel()]  # as short as F32 is
            found |= {"n_embd": n_embd, "rank": rank, "projection": flat}
        return found

    @classmethod
    def from_dict(cls, given: Mapping[str, object]) -> Self:
        """Read weights that nobody vouches for.

        Raises:
            UsageError: a key is missing or unknown, or a number or a length is out of bounds.
        """
        hidden = {"n_embd", "rank", "projection"} if "projection" in given else set[str]()
        check_keys(given, {"features", "weights", "bias", "mean", "scale"} | hidden)
        if given["features"] != list(FEATURES):
            raise broken(f"is for other features than {', '.join(FEATURES)}")
        projection = _read_projection(given) if hidden else None
        n = len(FEATURES) + (0 if projection is None else projection.shape[1])
        return cls(
            weights=np.array(numbers(given["weights"], "weights", n)),
            bias=number(given["bias"], "bias", -MAX_NUMBER, MAX_NUMBER),
            mean=np.array(numbers(given["mean"], "mean", n)),
            scale=np.array(numbers(given["scale"], "scale", n, _FLATTEST)),
            projection=projection,
        )


def features(glance: Glance, projection: Floats | None = None) -> Doubles:
    """Return what a regression weighs of a glance, F64 (n_features,); see FEATURES.

    Args:
        glance: at a step.
        projection: F32 (n_embd, rank), of its hidden state.

    Raises:
        UsageError: the hidden state is needed and missing, or is of another width.
    """
    plain = [
        glance.entropy, glance.top_entropy, glance.margin,
        math.log1p(glance.entropy), math.log1p(glance.margin),
        float(glance.index == 0), glance.index, math.log1p(glance.index),
        glance.position, math.log1p(glance.position),
    ]  # fmt: skip
    if projection is None:
        return np.array(plain, np.float64)
    hidden = glance.hidden
    if hidden is None or hidden.shape != projection.shape[:1]:
        shape = None if hidden is None else hidden.shape
        raise UsageError(
            f"the learned glimpse needs a hidden state of {len(projection)} values, got {shape}: "
            "the steps file was made for another small model"
        )
    state = hidden.astype(np.float64)
    state /= math.sqrt(max(float((state * state).mean()), _LEAST_POWER))
    return np.concatenate([np.array(plain, np.float64), state @ projection])


def fit(
    glances: Sequence[Glance], harmful: npt.NDArray[np.bool_], l2: float = 1.0,
    projection: Floats | None = None,
) -> LearnedGlimpse:  # fmt: skip
    """Train on outcomes, by Newton's method with halved steps; equal input gives equal weights.

    Args:
        glances: at steps.
        harmful: (n,), whether the small model's step spoilt the answer.
        l2: half of this times the squared weights is added to the loss, which is the sum of
            negative log-likelihoods; the bias is free.
        projection: F32 (n_embd, rank), of the glances' hidden states.

    Raises:
        UsageError: the lengths differ, only one outcome occurs, a feature is not finite, `l2`
            is not positive, or it did not converge.
    """
    labels = np.asarray(harmful, np.float64)
    if labels.shape != (len(glances),) or not 0 < labels.sum() < len(labels):
        raise UsageError(
            f"{len(glances)} glances and {labels.shape} outcomes, {int(labels.sum())} of them "
            "harmful, cannot be learned from: as many of both are wanted, with both outcomes"
        )
    if not 0 < l2 < math.inf:
        raise UsageError(f"l2 must be a number above 0, got {l2!r}")
    rows = np.stack([features(glance, projection) for glance in glances])
    if not np.isfinite(rows).all():
        raise UsageError("a glance to learn from is not a number in every feature")
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale[scale < _FLATTEST] = 1.0
    rows = np.clip((rows - mean) / scale, -_FARTHEST, _FARTHEST)
    found = _newton(np.column_stack([rows, np.ones(len(rows))]), labels, l2)
    return LearnedGlimpse(weights=found[:-1], bias=float(found[-1]), mean=mean, scale=scale,
                          projection=projection)  # fmt: skip


def _newton(rows: Doubles, labels: Doubles, l2: float) -> Doubles:
    """Minimise the regularised loss; the last column of `rows` is the free bias."""
    penalty = np.full(rows.shape[1], l2)
    penalty[-1] = 0.0
    at = np.zeros(rows.shape[1])
    loss = _loss(rows, labels, penalty, at)
    for _ in range(_MAX_ROUNDS):
        chance = 0.5 * (1.0 + np.tanh(0.5 * (rows @ at)))
        slope = rows.T @ (chance - labels) + penalty * at
        if float(np.abs(slope).max()) <= _TOLERANCE * len(rows):
            return at
        curve = (rows.T * (chance * (1.0 - chance))) @ rows + np.diag(penalty + 1e-12)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while (below := _loss(rows, labels, penalty, at - size * step)) > loss and size > 1e-10:
            size /= 2
        at, loss = at - size * step, below
    raise UsageError(f"the learned glimpse did not converge in {_MAX_ROUNDS} rounds from "
                     f"{len(rows)} glances; give a larger l2 than {l2:g}")  # fmt: skip


def _loss(rows: Doubles, labels: Doubles, penalty: Doubles, at: Doubles) -> float:
    score = rows @ at
    return float((np.logaddexp(0.0, score) - labels * score).sum() + 0.5 * (penalty * at) @ at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The large model writes the steps that the small one is likely to spoil the answer with.

    Attributes:
        probability: from which on it does.
        glimpse: trained on outcomes.
    """

    probability: float
    glimpse: LearnedGlimpse

    @property
    def spec(self) -> str:
        """The policy's text; the trained weights go beside it."""
        return f"learned:{number_text(self.probability)}"

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        return _LearnedRun(self)


class _LearnedRun(GlanceRun):
    def __init__(self, policy: Learned) -> None:
        super().__init__()
        self._policy = policy
        self.wants_hidden = policy.glimpse.wants_hidden

    def choose(self, glance: Glance | None) -> Who:
        spoils = self._policy.glimpse.probability(seen(glance))
        return "large" if spoils >= self._policy.probability else "small"


def _read_projection(given: Mapping[str, object]) -> Floats:
    n_embd = whole(given["n_embd"], "n_embd", MAX_EMBD)
    rank = whole(given["rank"], "rank", MAX_RANK)
    if n_embd * rank > MAX_PROJECTION:
        raise broken(f"projects {n_embd} values to {rank}: of {n_embd * rank} numbers, "
                     f"{MAX_PROJECTION} are allowed")  # fmt: skip
    flat = np.array(numbers(given["projection"], "projection", n_embd * rank), np.float32)
    return flat.reshape(n_embd, rank)
