"""Experts in slots, answered for as a model's weights are: what every holder of them has."""

from collections.abc import Sequence

from edgeroute.offload.expert_pool import ExpertPool, PoolPlan
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.joints import Joint
from edgeroute.runtime.weights import Weights


class SlottedWeights(Closing):
    """Pools of slots over weights that are always there. Engine thread only.

    Lifetime: owns its slots; `base` must outlive it.
    """

    def __init__(
        self, base: Weights, device: Device, plans: Sequence[PoolPlan], counts: Sequence[int],
        policy: str,
    ) -> None:  # fmt: skip
        """Reserve the slots; nothing is loaded yet.

        Args:
            base: answers what is no expert.
            device: where to.
            plans: of the pools.
            counts: slots of each.
            policy: that evicts.

        Raises:
            CapacityError: the device holds too little.
            UsageError: no such policy.
        """
        self._base = base
        self._n_expert = plans[0].n_expert
        self.pools: list[ExpertPool] = []
        try:
            for plan, n_slots in zip(plans, counts, strict=True):
                self.pools.append(ExpertPool(device, plan, n_slots, policy))
        except BaseException:
            self._close_pools()
            raise
        self._pool_of = {layer.il: pool for pool in self.pools for layer in pool.plan.layers}
        self._tensors: dict[str, Tensor] = {}
        for pool in self.pools:
            self._tensors |= pool.tensors()

    def __getitem__(self, name: str) -> Tensor:
        found = self._tensors.get(name)
        return self._base[name] if found is None else found

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None where the file has none of that name."""
        found = self._tensors.get(name)
        return self._base.get(name) if found is None else found

    def joints(self, names: Sequence[str]) -> list[Joint]:
        """Join fixed weights; see Weights."""
        return self._base.joints(names)

    @property
    def slots_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.table.n_slots * pool.slots.slot_bytes for pool in self.pools)

    def _close_pools(self) -> None:
        for pool in self.pools:
            pool.close()
