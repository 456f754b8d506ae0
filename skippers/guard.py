"""The quality guard: does a plan keep, on the running text, the promise it was calibrated with?

At a low rate the full model scores a token that a plan has just scored, and the divergence
between the two is entered here. A plan leaves when the lower end of the interval around the
mean exceeds the promise: not for one bad token, and not before there are enough of them.
"""

import math
import random
from dataclasses import dataclass
from typing import Final, Literal

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.plan import DepthPlan

Verdict = Literal["keep", "disable"]

Z_CALIBRATION: Final = 1.64
"""Standard errors of the calibrated divergence that its promise grants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardParams:
    """How strict the guard is.

    Attributes:
        rate: share of tokens that the full model scores as well.
        margin: part of its divergence by which a plan may exceed it: other texts differ.
        floor: nats that may always be exceeded, so that a plan that changes next to nothing
            is not disabled over next to nothing.
        min_samples: scored tokens before any verdict.
        z: standard errors below the mean. More than for one test: every sample is a test, and
            a plan that keeps its promise must survive thousands.
        memory: samples after which one counts 1/e: the text may change its subject.
    """

    rate: float = 0.02
    margin: float = 0.25
    floor: float = 0.01
    min_samples: int = 32
    z: float = 3.0
    memory: float = 512.0

    def __post_init__(self) -> None:
        bounds = {"rate": (0.0, 1.0), "margin": (0.0, 10.0), "floor": (0.0, 10.0),
                  "min_samples": (2, 1 << 20), "z": (0.0, 10.0), "memory": (1.0, 1e9)}  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also NaN
                raise UsageError(f"guard {name} must be from {low:g} to {high:g}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Divergence on the running text: mean nats, the ends of its interval, samples entered."""

    mean: float
    low: float
    high: float
    n_samples: int


def promise_of(plan: DepthPlan, params: GuardParams) -> float | None:
    """Return the mean divergence that a plan may have, nats; None if it was not calibrated."""
    if plan.kl is None:
        return None
    kl = plan.kl + Z_CALIBRATION * (plan.kl_error or 0.0)
    return kl + max(params.margin * kl, params.floor)


class Guard:
    """The running estimate of one plan. Not thread-safe.

    Once it has said `disable`, it stays with that until `reset`.
    """

    def __init__(self, promise: float, params: GuardParams | None = None, seed: int = 0) -> None:
        """Start without samples.

        Args:
            promise: mean divergence that the plan may have, nats; see `promise_of`.
            params: how strict.
            seed: of the choice which tokens to score.
        """
        if not (math.isfinite(promise) and promise >= 0):
            raise UsageError(f"a plan's promise must be at least 0 nats, got {promise!r}")
        self.promise = promise
        self.params = params or GuardParams()
        self._random = random.Random(seed)
        self._keep = math.exp(-1.0 / self.params.memory)
        self.reset()

    def reset(self) -> None:
        """Forget all samples and the verdict."""
        self._weight = self._weight_squares = self._sum = self._sum_squares = 0.0
        self._n_samples = 0
        self._verdict: Verdict = "keep"

    def wants(self) -> bool:
        """Whether the full model should score the token at hand; ask once per token."""
        return self._verdict == "keep" and self._random.random() < self.params.rate

    def observe(self, kl: float) -> Verdict:
        """Enter the divergence at one token, nats.

        Rounding may make it a little negative. One that is not a number says that a model
        computed nonsense: the plan is disabled at once.
        """
        self._n_samples += 1
        if not math.isfinite(kl):
            self._verdict = "disable"
            return self._verdict
        kl = max(kl, 0.0)
        self._weight = self._weight * self._keep + 1.0
        self._weight_squares = self._weight_squares * self._keep**2 + 1.0
        self._sum = self._sum * self._keep + kl
        self._sum_squares = self._sum_squares * self._keep + kl * kl
        if self._n_samples >= self.params.min_samples and self.estimate.low > self.promise:
            self._verdict = "disable"
        return self._verdict

    @property
    def verdict(self) -> Verdict:
        """What `observe` said last."""
        return self._verdict

    @property
    def estimate(self) -> Estimate:
        """The mean and its interval; from 0 to infinity before two samples."""
        mean = self._sum / self._weight if self._weight else 0.0
        n = self._weight**2 / self._weight_squares if self._weight else 0.0
        if n <= 1.0:
            return Estimate(mean=mean, low=0.0, high=math.inf, n_samples=self._n_samples)
        spread = max(self._sum_squares / self._weight - mean * mean, 0.0) * n / (n - 1.0)
        half = self.params.z * math.sqrt(spread / n)
        return Estimate(mean=mean, low=max(mean - half, 0.0), high=mean + half,
                        n_samples=self._n_samples)  # fmt: skip
