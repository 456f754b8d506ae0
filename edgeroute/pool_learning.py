"""What feedback teaches a pool: how far each model is from its profile, on which queries.

The bandit that chooses adapters learns here what a model earned beyond what its profile
promises. With no evidence that is nothing, and the profile stands; with evidence it overrides
the profile, by a ridge that weighs as much as RIDGE plays.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.features import PromptFeatures
from edgeroute.offload.linucb import LinUCB
from edgeroute.offload.polar_controller import EpochCounts
from edgeroute.offload.polar_state import PolarState, SavedArm, read_state, write_state
from edgeroute.pool_config import PoolParams, Profile
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.pool_choice import (
    DIMENSIONS,
    N_BUCKETS,
    Candidate,
    demand,
    hashed_words,
    optimism,
    relative,
    shortfall,
)

Vector = npt.NDArray[np.float64]

ALPHA: Final = 0.2
"""Confidence widths that a model is given on trust; see `optimism`."""
RIDGE: Final = 2.0
D_WORDS: Final = 9
"""Directions of the hashed words; beside them a query has its demands, its length and a bias."""
SPACE: Final = f"demands {', '.join(DIMENSIONS)}; {D_WORDS} directions of {N_BUCKETS} buckets; 1"
"""Of saved states; the number changes with what `demand` estimates."""
FORGET_EVERY, KEEP = 32, 0.95
"""Rewards after which all that is known weighs KEEP of before: models, queries and tastes change.
About 640 rewards count, and a model that was given up is tried again in time."""
COST_SMOOTHING: Final = 0.2
"""Weight of the newest answer in a model's seconds per token."""
ENERGY_SMOOTHING: Final = 0.05
"""The same for joules, which differ more from answer to answer; the first ones weigh alike."""
SAVE_EVERY: Final = 64
"""Rewards between two saves, beside the one at the end."""
NO_ENERGIES: Final[Mapping[str, float]] = MappingProxyType({})
_CHARS_PER_TOKEN: Final = 4
"""For the length of a query that no model's vocabulary has seen yet."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """A query as the choice sees it: demands F64 (n_dimensions,), context F64 (d,)."""

    demand: Vector
    x: Vector


class PoolLearner:
    """Judges models for queries, and learns from rewards. Not thread-safe.

    Args:
        params: the pool's models.
        state: where what was learned is kept; None keeps it nowhere. What was learned of a
            model with another file or other capabilities is dropped.
        alpha: confidence widths that a model is given on trust, see `optimism`.

    Raises:
        OSError: the state cannot be read, or a damaged one not be set aside.
    """

    def __init__(self, params: PoolParams, state: Path | None = None, alpha: float = ALPHA) -> None:
        self._params, self._state, self._alpha = params, state, alpha
        self._words = PromptFeatures(N_BUCKETS, D_WORDS + 2)
        self.d = len(DIMENSIONS) + D_WORDS + 2
        self._bandit = LinUCB(self.d, RIDGE)
        self._identities = {each.name: _identity(each) for each in params.models.values()}
        self._cost_s: dict[str, float] = {}
        self._energy: dict[str, tuple[float, float, int]] = {}  # joules, tokens, answers
        self._energy_source: object = None
        self._n_learned = 0
        self._unsaved = False
        self._n_unsaved = 0
        self._restore(None if state is None else read_state(state, set_aside=True))

    def _restore(self, saved: PolarState | None) -> None:
        alike = saved is not None and (saved.d, saved.space) == (self.d, SPACE)
        known = {arm.name: arm for arm in saved.arms} if saved is not None and alike else {}
        for name, identity in self._identities.items():
            arm = known.get(name)
            mine = arm is not None and arm.identity == identity
            self._bandit.add(name, arm.statistics if arm is not None and mine else None)
            if arm is not None and mine and arm.cost_s > 0:
                self._cost_s[name] = arm.cost_s

    def look(self, text: str) -> Query:
        """Return what the choice sees of a query's text; any thread may ask."""
        n_tokens = max(1, len(text) // _CHARS_PER_TOKEN)
        words = self._words(hashed_words(text), n_tokens)
        demanded = demand(text)
        return Query(demand=demanded, x=np.concatenate((demanded, words)))

    def candidates(
        self, query: Query, prices: Mapping[str, float], energies: Mapping[str, float] = NO_ENERGIES
    ) -> list[Candidate]:
        """Judge every model for a query, in the order of the configuration.

        Args:
            query: from `look`.
            prices: seconds that each model's answer is expected to take, by name.
            energies: joules per token of each model's answer, where they count.
        """
        shares = relative(energies)
        means, widths = self._bandit.score(query.x)
        trust = optimism(self._alpha, float(self._bandit.n_plays.sum()))
        rows = {name: i for i, name in enumerate(self._bandit.names)}
        return [
            Candidate(
                name=name, price=prices[name], stated=self._stated(name, query),
                learned=float(np.clip(means[rows[name]], -1.0, 1.0)),
                trust=trust * float(widths[rows[name]]), energy=shares.get(name, 0.0),
            )
            for name in self._params.models
        ]  # fmt: skip

    def _stated(self, name: str, query: Query) -> float:
        profile = self._params.models[name]
        return shortfall(query.demand, profile.capabilities, self._params.weights)

    def learn(self, name: str, query: Query, reward: float) -> None:
        """Enter what a model's answer was worth.

        Raises:
            UsageError: the reward is not a number from 0 to 1; nothing was learned.
        """
        if isinstance(reward, bool) or not isinstance(reward, int | float | np.floating):
            raise UsageError(f"a reward is a number from 0 to 1, not {reward!r:.80}")
        if not 0.0 <= reward <= 1.0:
            raise UsageError(f"reward {reward} is outside 0 to 1; scale it")
        self._bandit.learn(name, query.x, float(reward) - (1.0 - self._stated(name, query)))
        self._n_learned += 1
        if self._n_learned % FORGET_EVERY == 0:
            self._bandit.forget(KEEP)
        self._unsaved = True
        self._n_unsaved += 1

    @property
    def due(self) -> bool:
        """Whether so much was learned since the last time that it should be saved."""
        return self._n_unsaved >= SAVE_EVERY

    def paid(self, name: str, s_per_token: float) -> None:
        """Enter what an answer took per token, waiting and loading aside."""
        if not 0.0 < s_per_token < math.inf:
            return
        before = self._cost_s.get(name, s_per_token)
        self._cost_s[name] = before + COST_SMOOTHING * (s_per_token - before)
        self._unsaved = True

    def cost_s(self, name: str) -> float | None:
        """Return a model's seconds per token: given, or measured, or None."""
        given = self._params.models[name].cost_s
        return self._cost_s.get(name) if given is None else given

    def used(self, name: str, energy: Mapping[str, object] | None, n_tokens: int) -> None:
        """Enter what an answer took, `energy` as of its statistics.

        Joules of another source mean something else: with the first of them, all begin anew. They
        are not saved, since the next process may have another source.
        """
        joules = None if energy is None else energy.get("joules")
        if energy is None or not isinstance(joules, int | float) or n_tokens < 1:
            return
        if not 0.0 <= joules < math.inf:
            return
        source = energy.get("source"), energy.get("scope")
        if source != self._energy_source:
            self._energy.clear()
            self._energy_source = source
        # Joules and tokens apart: else a short answer to a long prompt would weigh too much.
        mean_j, mean_n, n = self._energy.get(name, (0.0, 0.0, 0))
        part = max(ENERGY_SMOOTHING, 1 / (n + 1))
        mean_j, mean_n = mean_j + part * (joules - mean_j), mean_n + part * (n_tokens - mean_n)
        self._energy[name] = mean_j, mean_n, n + 1

    def joules_per_token(self, name: str) -> float | None:
        """Return what a model's answers took per token, their prompts included; None: unknown."""
        found = self._energy.get(name)
        return None if found is None else found[0] / found[1]

    def energies(self, costs_s: Mapping[str, float]) -> dict[str, float]:
        """Return joules per token of every model; of those not known, as their seconds suggest.

        Args:
            costs_s: seconds per token of each.
        """
        known = {name: self.joules_per_token(name) for name in costs_s}
        watts = [j / costs_s[name] for name, j in known.items() if j and costs_s[name] > 0]
        typical = sum(watts) / len(watts) if watts else 1.0
        return {name: typical * costs_s[name] if j is None else j for name, j in known.items()}

    def n_plays(self, name: str) -> float:
        """Return how many rewards are known of a model, less what was forgotten."""
        row = self._bandit.row(name)
        return 0.0 if row is None else float(self._bandit.n_plays[row])

    def save(self) -> None:
        """Write what was learned since the last time.

        Raises:
            OSError: it could not be written; the old file is untouched.
        """
        if self._state is None or not self._unsaved:
            return
        arms = tuple(
            SavedArm(
                name=name, identity=identity, cost_s=self._cost_s.get(name, 0.0),
                statistics=self._bandit.statistics(name),
            )
            for name, identity in self._identities.items()
        )  # fmt: skip
        self._state.parent.mkdir(parents=True, exist_ok=True)
        write_state(self._state, PolarState(
            d=self.d, space=SPACE, arms=arms, contexts=np.zeros((0, self.d)),
            counts=_NO_EPOCHS, resident=(),
        ))  # fmt: skip
        self._unsaved, self._n_unsaved = False, 0


_NO_EPOCHS: Final = EpochCounts(
    n_epochs=0, epoch=0, n_in_epoch=0, n_reward_drifts=0, n_popularity_drifts=0, owed_total=0.0
)
"""A pool has no epochs; its state's format has room for them."""


def _identity(profile: Profile) -> str:
    """Tell a model from one of the same name: by its file's name and size, and its profile.

    Rewards are learned beyond the profile, so that they mean nothing with another.
    """
    stated = (profile.path.name, profile.path.stat().st_size, profile.capabilities.tolist())
    run = sorted(profile.settings.items())
    text = repr(stated) + (repr(run) if run else "")
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
