"""What may be spent on what pays later, or never: filling free slots, and trials.

A page is uploaded into a free slot although computing it is quicker now, as its hits save time.
How many more steps there will be nobody knows: an answer may be short. So only a part of the time
is spent on what does not come back within a few steps, and nothing on what takes very long.
"""

from dataclasses import dataclass

from edgeroute.offload.miss_cost import Cost
from edgeroute.runtime.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetParams:
    """What may be spent.

    Slots are filled at once where hits are expected to bring back what that costs within
    `fill_steps`. What comes back later, within `fill_horizon_steps` and as many steps as there
    have been, is filled bit by bit: within `fill_ratio` of the time so far and what hits have
    saved since. A fixed choice fills all at once, so that this is not behind it even at first.
    What takes longer to come back is left. Trials may cost `trial_ratio`
    of the time so far, if the other way is taken for `trial_steps`.

    Raises:
        UsageError: a value outside its range.
    """

    fill_steps: float = 8.0
    fill_horizon_steps: int = 200
    fill_ratio: float = 0.2
    trial_ratio: float = 0.04
    trial_steps: int = 8

    def __post_init__(self) -> None:
        ratios = self.fill_ratio, self.trial_ratio
        steps = self.fill_steps, self.fill_horizon_steps, self.trial_steps - 1
        if min(steps) < 0 or not all(0 <= ratio <= 1 for ratio in ratios):
            raise UsageError(f"miss gate settings contradict each other: {self}")


class Budget:
    """Seconds that may be spent: a `ratio` of the time so far, and what they have saved."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self.elapsed_s = self.spent_s = self.saved_s = 0.0

    def spend(self, price_s: float) -> bool:
        """Spend so much, if that may be; whether it was."""
        if self.spent_s + price_s > self._ratio * self.elapsed_s + self.saved_s:
            return False
        self.spent_s += price_s
        return True

    def save(self, seconds: float) -> None:
        """Enter what was saved by what was spent; it cannot have saved more than that."""
        self.saved_s = min(self.spent_s, self.saved_s + seconds)


class Budgets:
    """The budgets of one gate, by the time of its decode steps."""

    def __init__(self, params: BudgetParams) -> None:
        self._params = params
        self._fills, self._trials = Budget(params.fill_ratio), Budget(params.trial_ratio)
        self.n_steps = self._n_missed = 0
        self._stalled_s = 0.0

    def end_step(self, seconds: float, stalled_s: float, n_missed: int) -> None:
        """Enter a decode step, beside which the disk was waited for, and what it missed."""
        self.n_steps += 1
        self._n_missed += n_missed
        self._stalled_s += stalled_s
        self._fills.elapsed_s += seconds + stalled_s
        self._trials.elapsed_s += seconds + stalled_s

    def hit(self, n_hits: int, compute: Cost) -> None:
        """Enter hits of a lease whose misses are computed here."""
        self._fills.save(n_hits * self._hit_s(compute))

    def _hit_s(self, compute: Cost) -> float:
        """Return what a hit saves: computing, and its part of the reads from disk."""
        return compute.each_s + self._stalled_s / max(1, self._n_missed)

    def n_filled(self, n_most: int, upload: Cost, compute: Cost, hits_per_page: float) -> int:
        """Return how many free slots to fill with pages that are computed more quickly now.

        Args:
            n_most: missing pages that there are free slots for.
            upload: what uploading costs, and `compute` computing.
            hits_per_page: how often a step asks for a page that is held.
        """
        for n in (n_most, 1):
            price_s = upload.of(n) - n * compute.each_s
            back_s = n * hits_per_page * self._hit_s(compute)
            if not n or price_s <= self._params.fill_steps * back_s:
                return n
            n_steps = self._params.fill_horizon_steps + self.n_steps
            if price_s <= n_steps * back_s and self._fills.spend(price_s):
                return n
        return 0

    def may_try(self, loss_s: float, filling_s: float) -> bool:
        """Spend what a trial costs, if that may be: `loss_s` a step, and slots it would fill."""
        return self._trials.spend(max(0.0, loss_s) * self._params.trial_steps + filling_s)
