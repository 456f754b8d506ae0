"""The fast half of POLAR: which adapter serves a prompt, given what is resident now.

An adapter's score is its predicted reward plus a confidence width, less the known cost of
paging it where it is not resident. The cost is measured and never part of the reward that
is learned. A miss is a bypass: the adapter is loaded into a transient slot, and only the
controller's plan, once per epoch, changes the resident set.

Subtracting the cost starves adapters that are not resident of plays: the router locks in.
Forced plays (POLAR+, the default) or a large `alpha` cure that.

Source: POLAR, arXiv 2604.16583; see polar_controller for what is a reconstruction.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgeroute.offload.linucb import MAX_D, Arm, LinUCB
from edgeroute.offload.polar_candidates import MAX_NAME_CHARS, Candidates
from edgeroute.offload.polar_controller import (
    EpochController,
    EpochParams,
    SetProblem,
    greedy_set,
    order_by_use,
)
from edgeroute.offload.polar_state import PolarState, PolarStateError, SavedArm
from edgeroute.runtime.errors import UsageError

Vector = NDArray[np.float64]
_MAX_NORM: Final = 16.0  # of a context: beyond, one request would outweigh hundreds


@dataclass(frozen=True, slots=True, kw_only=True)
class PolarParams:
    """How an AdapterRouter weighs and learns.

    Attributes:
        d: features of a context, at most MAX_D.
        alpha: width of the confidence bounds; how much is tried that is not known.
        ridge: weight of "no reward" against what was seen.
        utility_per_s: reward that a second of paging is worth; 0.1 says that ten seconds
            cancel a perfect answer.
        cost_smoothing: weight of the latest measurement in a paging cost.
        first_load_s: cost of an adapter of which nothing is known.
        base_arm: whether the base model without adapter is a candidate.
        space: names the features; what was learned in another space is refused.
        epochs: the controller's.

    Raises:
        UsageError: a value outside its range.
    """

    d: int = 16
    alpha: float = 0.7
    ridge: float = 1.0
    utility_per_s: float = 0.1
    cost_smoothing: float = 0.2
    first_load_s: float = 0.1
    base_arm: bool = True
    space: str = ""
    epochs: EpochParams = field(default_factory=EpochParams)

    def __post_init__(self) -> None:
        good = (
            1 <= self.d <= MAX_D
            and 0 <= self.alpha < math.inf
            and 0 < self.ridge < math.inf
            and 0 <= self.utility_per_s < math.inf
            and 0 < self.cost_smoothing <= 1
            and 0 <= self.first_load_s < math.inf
            and len(self.space) <= MAX_NAME_CHARS
        )
        if not good:
            raise UsageError(f"router settings are out of range: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which adapter serves a request (`arm`; None is the base model), and why.

    Attributes:
        resident: it can be used now; the base model always can.
        bypass: it must be loaded into a transient slot first, at `cost`.
        forced: it was chosen to be learned about, not for its score.
        score, mean, width, cost: score = mean + alpha × width - cost, in reward units.
    """

    arm: Arm
    resident: bool
    bypass: bool
    forced: bool
    score: float
    mean: float
    width: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentPlan:
    """Adapters that should be resident from now on, most useful first.

    `load` are those that were not when last told, `evict` those that need not be any more.
    """

    names: tuple[str, ...]
    load: tuple[str, ...]
    evict: tuple[str, ...]
    n_epochs: int


class AdapterRouter:
    """Chooses adapters by context, learns from rewards, and plans the resident set.

    Per request: `choose`, then `paid` if it was a bypass, `learn` once a reward is known
    (now, later or never), and `wanted`, whose plan the caller carries out when it can. A
    caller that cannot carry it out just goes on telling `choose` what is resident.

    Not thread-safe: the engine's thread owns it.

    Args:
        params: how it weighs and learns.
        names: adapters to choose among; more can be added.
        n_resident: adapters that can be resident together.
        seed: of the order in which adapters equally good are tried.

    Raises:
        UsageError: a name is empty, too long or comes twice, or `n_resident` is negative.
    """

    def __init__(
        self, params: PolarParams, names: Sequence[str], n_resident: int, seed: int
    ) -> None:
        if n_resident < 0:
            raise UsageError(f"{n_resident} adapters cannot be resident; 0 is the least")
        self.params = params
        self.n_resident = n_resident
        self._bandit = LinUCB(params.d, params.ridge)
        self._candidates = Candidates(self._bandit, params.utility_per_s, seed)
        self._controller = EpochController(params.epochs, params.d)
        self._resident: frozenset[str] = frozenset()
        self._n_chosen = self._n_bypassed = self._n_forced = self._n_learned = 0
        self._n_learned_before = 0
        if params.base_arm:
            self._candidates.restore(SavedArm(name=None), 0)
        for name in names:
            self.add(name, params.first_load_s)
        self._saved_resident: tuple[str, ...] = ()
        self._planned = False
        self._begin_exploration()

    def add(self, name: str, load_s: float, identity: str = "") -> None:
        """Make an adapter a candidate; it is owed plays at once.

        Args:
            name: of the adapter.
            load_s: what paging it is expected to take, until `paid` measures it.
            identity: of its file (a hash, say); a saved state knows the adapter by both.

        Raises:
            UsageError: the name is a candidate's or not a name, or load_s not a duration.
        """
        self._candidates.add(name, load_s, identity, self._controller.plays_owed)

    def remove(self, name: str) -> None:
        """Forget an adapter. Added again, it starts anew: also how one is replaced.

        Raises:
            UsageError: there is no such adapter.
        """
        self._candidates.remove(name)
        self._resident -= {name}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are candidates."""
        return self._candidates.names

    def choose(self, x: Vector, resident: Collection[str]) -> Choice:
        """Choose what serves a request.

        Args:
            x: its context, F64 (d,), of norm at most 16; about 1 is best.
            resident: adapters usable without paging; names that are no candidates are
                ignored.

        Raises:
            UsageError: x is not such a context, or there is no candidate. Nothing changed.
        """
        x = self._context(x)
        if not self._bandit.names:
            raise UsageError("there is no adapter to choose and the base model is no candidate")
        means, widths = self._bandit.score(x)
        costs = self._candidates.costs(resident)
        optimistic = means + self.params.alpha * widths + self._candidates.tie
        forced = self._forced_row(means, widths, optimistic)
        row = int((optimistic - costs).argmax()) if forced is None else forced
        self._resident = frozenset(name for name in resident if name in self._candidates)
        arm = self._bandit.names[row]
        is_resident = arm is None or arm in self._resident
        self._n_chosen += 1
        self._n_bypassed += not is_resident
        self._controller.observe(x, float(means.max() - (means - costs).max()))
        return Choice(
            arm=arm, resident=is_resident, bypass=not is_resident, forced=forced is not None,
            score=float(optimistic[row] - costs[row]), mean=float(means[row]),
            width=float(widths[row]), cost=float(costs[row]),
        )  # fmt: skip

    def utilities(self, x: Vector, names: Collection[str]) -> dict[str, float]:
        """Predict the rewards of some adapters in context x, F64 (d,); others are left out.

        Raises:
            UsageError: x is not such a context.
        """
        means, _ = self._bandit.score(self._context(x))
        pairs = zip(self._bandit.names, means.tolist(), strict=True)
        return {name: mean for name, mean in pairs if name is not None and name in names}

    def _forced_row(self, means: Vector, widths: Vector, optimistic: Vector) -> int | None:
        """The adapter to be learned about with this request, None where none is promising.

        Those owed plays compete with wide bounds and their paging waived. Playing them on
        whatever comes would teach that a specialist is useless, by prompts not its own.
        """
        owed = self._candidates.owed
        if not self._controller.may_force or not owed.any():
            return None
        alpha = max(self.params.alpha, self.params.epochs.forced_alpha)
        wide = means + alpha * widths + self._candidates.tie
        row = int(np.where(owed > 0, wide, optimistic).argmax())
        if owed[row] == 0:
            return None
        owed[row] -= 1
        self._controller.forced()
        self._n_forced += 1
        return row

    def learn(self, x: Vector, arm: Arm, reward: float) -> None:
        """Enter what an adapter, or the base model, earned in context x.

        Args:
            x: the context that `choose` had, F64 (d,).
            arm: which served it; it need not have been this router's choice.
            reward: 0 (useless) to 1 (perfect), paging not counted.

        Raises:
            UsageError: no such candidate, no such context, or a reward outside 0 to 1.
                Nothing was learned.
        """
        x = self._context(x)
        row = self._bandit.row(arm)
        if row is None:
            raise UsageError(f"nothing can be learned about {arm!r}, which is no candidate")
        if isinstance(reward, bool) or not isinstance(reward, int | float | np.floating):
            raise UsageError(f"a reward is a number from 0 to 1, not {reward!r}")
        if not 0.0 <= reward <= 1.0:
            raise UsageError(f"reward {reward} is outside 0 to 1; scale it")
        seasoned = self._bandit.n_plays[row] >= self.params.d
        shortfall = float(self._bandit.predict(row, x)) - reward
        self._bandit.learn(arm, x, float(reward))
        self._n_learned += 1
        if seasoned and self._controller.learn(shortfall):
            self._bandit.forget(self.params.epochs.keep_on_drift)

    def paid(self, name: str, seconds: float) -> None:
        """Enter what paging an adapter just took: its load and the prefill it made again.

        Raises:
            UsageError: there is no such adapter, or `seconds` is not a duration.
        """
        self._candidates.paid(name, seconds, self.params.cost_smoothing)

    def wanted(self) -> ResidentPlan | None:
        """Plan the resident set where an epoch has ended; None where nothing should change.

        The first call plans those that were resident when the state was saved, or, with
        nothing known yet, the adapters that were added first.
        """
        if not self._planned:
            self._planned = True
            saved = [name for name in self._saved_resident if name in self._candidates]
            return self._plan((saved or list(self.names))[: self.n_resident])
        if not self._controller.due:
            return None
        horizon = self._controller.close_epoch()
        names = self._best_set(horizon)
        self._begin_exploration()
        return self._plan(order_by_use(self._resident, names, self.n_resident))

    def _best_set(self, horizon: int) -> list[str]:
        contexts = self._controller.contexts.rows()
        names = self.names
        rows = np.array([self._bandit.row(name) for name in names], dtype=np.int64)
        if not len(contexts) or not len(rows):
            return []
        means = np.clip(self._bandit.means(contexts), 0.0, 1.0)
        base = self._bandit.row(None)
        chosen = greedy_set(SetProblem(
            utilities=means[:, rows],
            floor=np.zeros(len(contexts)) if base is None else means[:, base],
            costs=self._candidates.costs(())[rows],
            loads=self._candidates.costs(self._resident)[rows],
            n_resident=self.n_resident,
            horizon=horizon,
        ))  # fmt: skip
        return [names[i] for i in chosen]

    def _begin_exploration(self) -> None:
        """Owe plays for the epoch, unless the last one's choices were never rewarded."""
        if not self.params.epochs.forced:
            return
        unanswered = self._n_chosen > 0 and self._n_learned == self._n_learned_before
        self._n_learned_before = self._n_learned
        if unanswered:
            self._candidates.owed[:] = 0
            return
        self._candidates.owe(self._controller.begin_exploration(self._bandit.n_plays))

    def _plan(self, names: list[str]) -> ResidentPlan | None:
        if set(names) == self._resident:
            return None
        self._controller.resident_changed()
        return ResidentPlan(
            names=tuple(names),
            load=tuple(name for name in names if name not in self._resident),
            evict=tuple(sorted(self._resident.difference(names))),
            n_epochs=self._controller.n_epochs,
        )

    def _context(self, x: Vector) -> Vector:
        found = np.asarray(x, dtype=np.float64)
        if found.shape != (self.params.d,):
            raise UsageError(f"a context has shape ({self.params.d},), not {found.shape}")
        norm = math.sqrt(float(found @ found))
        if not norm <= _MAX_NORM:  # also where it is not a number
            raise UsageError(f"a context's norm is at most {_MAX_NORM}, not {norm}")
        return found

    def to_state(self) -> PolarState:
        """Copy all that must survive a restart."""
        return PolarState(
            d=self.params.d, space=self.params.space, arms=self._candidates.saved(),
            contexts=self._controller.contexts.rows(), counts=self._controller.counts(),
            resident=tuple(sorted(self._resident)),
        )  # fmt: skip

    @classmethod
    def from_state(
        cls, params: PolarParams, state: PolarState, identities: Mapping[str, str],
        n_resident: int, seed: int,
    ) -> "AdapterRouter":  # fmt: skip
        """Go on from a saved state with the adapters that there are now.

        Args:
            params: may differ from the saved router's, except in `d` and `space`.
            state: as `to_state` gave it.
            identities: of the adapters there are now, by name. One that the state does not
                know, or knows by another identity, starts anew; one only in the state is
                dropped.
            n_resident, seed: as for a new router.

        Raises:
            PolarStateError: it was learned with other features.
            UsageError: as for a new router.
        """
        if (state.d, state.space) != (params.d, params.space):
            raise PolarStateError(
                f"the router's state was learned in the feature space {state.space[:80]!r} of "
                f"{state.d}, and this is {params.space[:80]!r} of {params.d}; start afresh"
            )
        router = cls(params, (), n_resident, seed)
        router._controller.resume(state.counts, state.contexts)
        known = {arm.name: arm for arm in state.arms}
        if params.base_arm and None in known:
            router._bandit.remove(None)
            router._bandit.add(None, known[None].statistics)
        for name, identity in identities.items():
            saved = known.get(name)
            if saved is not None and saved.identity == identity:
                router._candidates.restore(saved, router._controller.plays_owed)
            else:
                router.add(name, params.first_load_s, identity)
        router._saved_resident = state.resident
        return router

    def stats(self) -> dict[str, object]:
        """What it has done: counts of requests, epochs and drifts, and per adapter."""
        return {
            "n_chosen": self._n_chosen,
            "n_bypassed": self._n_bypassed,
            "n_forced": self._n_forced,
            "n_learned": self._n_learned,
            "controller": asdict(self._controller.counts()),
            "adapters": self._candidates.stats(self._resident),
        }
