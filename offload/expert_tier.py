"""What every tier of experts has: pools of slots, the tensors that stand for them, policies.

A policy that was not asked for by name is chosen anew from the tier's own latest routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeroute.offload.eviction_cliff import CliffReport, CycleShape, check_cliff
from edgeroute.offload.expert_pool import PoolPlan, share_slots
from edgeroute.offload.paging_log import writing
from edgeroute.offload.policy_choice import MIN_GAIN, change_policies, latest
from edgeroute.offload.slotted_weights import SlottedWeights
from edgeroute.offload.trace import TraceRecorder
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.weights import Weights

DEFAULT_POLICY, OFF_POLICY = "lfru", "lru"
WATCHED_GAIN = 0.02
"""Hit rate by which another policy must be better than the one that was asked for."""
FIRST_CHOICE = 24
"""Decoded tokens after which the eviction policy is chosen anew, and then at four times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotParams:
    """What a tier may hold: bytes for slots, and which expert leaves them.

    `policy` "auto" begins with the default, or with what does not collapse below the LRU
    cliff. A named policy that is `watched` gives way to one that would have hit `WATCHED_GAIN`
    more.
    """

    slots_bytes: int
    n_expert_used: int
    policy: str = "auto"
    watched: bool = False


class ExpertTier(SlottedWeights):
    """Slots for experts on one device, over weights that are always there. Engine thread only.

    Lifetime: owns its slots; `base` must outlive it.
    """

    def __init__(
        self, base: Weights, device: Device, plans: Sequence[PoolPlan], how: SlotParams
    ) -> None:
        """Reserve the slots; nothing is loaded yet.

        Raises:
            CapacityError: the budget or the device holds too little.
            UsageError: no such policy.
        """
        counts = share_slots(plans, how.slots_bytes, how.n_expert_used)
        self.cliff = check_tightest(plans, counts, how.n_expert_used)
        self.tier_policy = how.policy
        if how.policy == "auto":
            self.tier_policy = self.cliff.fallback or DEFAULT_POLICY
        super().__init__(base, device, plans, counts, self.tier_policy)
        self._n_used = how.n_expert_used
        self._chooses = how.policy == "auto" or (how.watched and how.policy != OFF_POLICY)
        self._chooses = self._chooses and self.cliff.fallback is None
        self._min_gain = MIN_GAIN if how.policy == "auto" else WATCHED_GAIN
        self._n_steps = 0
        self._next_choice = FIRST_CHOICE if how.policy == "auto" else 4 * FIRST_CHOICE
        self.recorder: TraceRecorder | None = None

    def here(self, il: int) -> npt.NDArray[np.bool_]:
        """Mark the experts of a layer that are here or on their way: bool (n_expert,)."""
        table, first = self._pool_of[il].table, il * self._n_expert
        pages = range(first, first + self._n_expert)
        return np.fromiter(map(table.has, pages), np.bool_, self._n_expert)

    def mark(self, label: str) -> None:
        """Enter into the trace's file that a sequence begins, of a domain `label`.

        Raises:
            UsageError: no file is recorded or can be written, or the label is too long.
        """
        if self.recorder is None:
            raise UsageError("no trace is recorded here; open the Runtime with trace=FILE")
        with writing():
            self.recorder.mark(label)

    @property
    def cannot_wait(self) -> bool:
        """Whether the policy should be chosen anew though an answer is under way.

        The first time only: a few steps are replayed in some hundredths of a second.
        """
        return self._chooses and self._n_steps == FIRST_CHOICE == self._next_choice

    def _change_policies(self) -> bool:
        """Take the policies that would have served the latest tokens best; True if any is new."""
        if not self._chooses or self.recorder is None or self._n_steps < self._next_choice:
            return False
        trace = latest(self.recorder.trace())
        if trace is None:
            return False
        self._next_choice = 4 * self._n_steps
        changed = change_policies(self.pools, trace, self._min_gain)
        self.tier_policy = "+".join(sorted({pool.table.policy.name for pool in self.pools}))
        return changed


def check_tightest(pools: Sequence[PoolPlan], counts: Sequence[int], n_used: int) -> CliffReport:
    """Ask of the pool with the fewest slots per layer whether it can hold a token's experts."""
    tightest = min(range(len(pools)), key=lambda i: counts[i] / len(pools[i].layers))
    plan = pools[tightest]
    shape = CycleShape(n_layer=len(plan.layers), n_expert=plan.n_expert, n_expert_used=n_used)
    return check_cliff(counts[tightest], shape)
