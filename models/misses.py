"""Missing experts that a pass does without: the chosen ones are read, changed and written back.

Decisions are a `MissRule`'s; here they become numbers and weights in the carry, so that the next
stage computes them. Weights of tokens that nothing changes for keep their bits.
"""

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import MoeHparams
from edgeroute.models.carry import Carry, Choice
from edgeroute.models.moe import MIN_WEIGHT_SUM, THRESHOLDS, Routing, n_ranked
from edgeroute.runtime.depth import Step
from edgeroute.runtime.experts import MissRule

_TINY = np.finfo(np.float32).tiny

Numbers = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Marks = npt.NDArray[np.bool_]


class DoingWithout:
    """Lets a rule change what tokens of a model chose.

    Args:
        rule: decides.
        carry: holds the choice, and all ratings where the rule reads them.
        moe: the model's counts.
        routing: the family's.
    """

    def __init__(self, rule: MissRule, carry: Carry, moe: MoeHparams, routing: Routing) -> None:
        self._rule, self._carry, self._moe, self._routing = rule, carry, moe, routing

    def reads_ratings(self, step: Step | None) -> bool:
        """Whether all experts' ratings are wanted: none are swapped for one a rule left out."""
        if step is None or step.expert_rule in THRESHOLDS:
            return False
        return self._rule.reads_scores

    def choose(self, step: Step, choice: Choice, here: Marks) -> Choice:
        """Choose again for one layer, in the carry as well.

        Args:
            step: the layer's.
            choice: as it was read.
            here: experts of the layer in memory or on their way, bool (n_expert,).

        Returns:
            The same choice where nothing changes, else a packed one.
        """
        missing = {expert for expert in choice.computed() if not here[expert]}
        if not missing:
            return choice
        n = len(choice.ids) // choice.k
        before, weights = self._carry.read_routes(
            n, n_ranked(self._moe, step.expert_rule, step.expert_value)
        )
        numbers = before
        if self.reads_ratings(step):
            probs, ranked = self._carry.read_ratings(n)
            numbers = self._rule.swap(before, nats_of(ranked, self._routing), here)
            weights = reweighed((before, numbers), weights, probs, self._routing)
        gone = np.zeros(weights.shape, np.bool_)
        if step.expert_rule in THRESHOLDS:
            gone = weights == 0
            gone[:, 0] = False
        dropped = self._rule.drop(weights, here[numbers]) & ~gone
        n_replaced = _n_new(before, numbers)
        if not (n_replaced or dropped.any()):
            return choice
        again = self._write(numbers, weights, dropped | gone)
        self._rule.count(step.il, replaced=n_replaced, dropped=int(dropped.sum()),
                         saved=len(missing - set(again.ids)))  # fmt: skip
        return again

    def degrade(self, step: Step, choice: Choice, here: Marks, most: int) -> list[int]:
        """Say which missing experts of one layer are computed from copies of fewer bits.

        An expert that any token of the pass wants in full is read, and serves all of them.

        Args:
            step: the layer's.
            choice: what is computed.
            here: experts of the layer in memory or on their way, bool (n_expert,).
            most: how many copies there is room for.
        """
        wanted = dict.fromkeys(expert for expert in choice.computed() if not here[expert])
        if not wanted:
            return []
        n, k = len(choice.ids) // choice.k, choice.k
        ranked = n_ranked(self._moe, step.expert_rule, step.expert_value)
        numbers, weights = self._carry.read_routes(n, ranked)
        numbers, weights = numbers[:, :k], weights[:, :k]
        low = self._rule.degrade(weights, here[numbers])
        out = np.zeros((n, k), np.bool_)
        if choice.left_out is not None:
            out |= choice.left_out.reshape(n, k)
        full = set(numbers[~(low | out)].tolist())
        found = [expert for expert in wanted if expert not in full][-most:]
        if found:
            n_pairs = int((np.isin(numbers, found) & ~out).sum())
            self._rule.count(step.il, degraded=n_pairs)
        return found

    def _write(self, numbers: Numbers, weights: Floats, out: Marks) -> Choice:
        numbers, weights = packed(numbers, weights, out, self._routing)
        self._carry.write_routes(numbers, weights)
        k = int((~out).sum(axis=1).max())
        found = np.ascontiguousarray(numbers[:, :k]).ravel()
        return Choice(found, found.tolist(), k, packed=True)


def _n_new(before: Numbers, numbers: Numbers) -> int:
    """Count the experts that a token did not choose at first."""
    rows = np.flatnonzero((numbers != before).any(axis=1))
    return sum(len(set(numbers[row].tolist()) - set(before[row].tolist())) for row in rows)


def nats_of(ranked: Floats, routing: Routing) -> Floats:
    """Turn what experts are ranked by into logarithms, whose differences are ratios."""
    if routing.gating == "softmax_weight":
        return ranked
    return np.log(np.maximum(ranked, _TINY))


def reweighed(
    chosen: tuple[Numbers, Numbers], weights: Floats, probs: Floats, routing: Routing
) -> Floats:
    """Weigh tokens' experts that were chosen again as the family's router does.

    Args:
        chosen: numbers as the router chose, and as they are now, I32 (n, k).
        weights: of the former, F32 (n, k).
        probs: of all experts, F32 (n, n_expert).
        routing: the family's.

    Returns:
        F32 (n, k); rows in which no number changed are the given ones.
    """
    before, numbers = chosen
    rows = np.flatnonzero((numbers != before).any(axis=1))
    if not len(rows):
        return weights
    found = weights.copy()
    new = np.take_along_axis(probs[rows], numbers[rows].astype(np.intp), axis=1)
    if routing.gating == "softmax_weight":
        new = np.exp(new - new.max(axis=1, keepdims=True))
        new /= new.sum(axis=1, keepdims=True)
    if routing.norm_w:
        new = new / np.maximum(new.sum(axis=1, keepdims=True), np.float32(MIN_WEIGHT_SUM))
    scale = routing.w_scale or 1.0
    found[rows] = new * np.float32(scale)
    return found


def packed(
    numbers: Numbers, weights: Floats, out: Marks, routing: Routing
) -> tuple[Numbers, Floats]:
    """Put a token's computed experts first; behind them stands its first one, weighing nothing.

    What is left weighs as much as all did, where the family divides weights by their sum.

    Args:
        numbers: I32 (n, k), best first, and their weights F32 (n, k).
        weights: the same.
        out: bool (n, k), which do not compute; never all of a row.
        routing: the family's.
    """
    order = np.argsort(out, axis=1, kind="stable")
    numbers = np.take_along_axis(numbers, order, axis=1)
    left = np.where(out, np.float32(0), weights)
    if routing.norm_w or routing.gating == "softmax_weight":
        less = out.any(axis=1) & (left != weights).any(axis=1)
        sums = left.sum(axis=1, keepdims=True)
        grown = left * (weights.sum(axis=1, keepdims=True) / np.where(sums > 0, sums, 1))
        left = np.where(less[:, None] & (sums > 0), grown, left)
    left = np.take_along_axis(left, order, axis=1)
    behind = np.take_along_axis(out, order, axis=1)
    numbers = np.where(behind, numbers[:, :1], numbers)
    return np.ascontiguousarray(numbers, np.int32), np.ascontiguousarray(left, np.float32)
