"""Weights of one file on several devices: each device has what is computed there."""

from collections.abc import Callable, Sequence

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.joints import Joint
from edgeroute.runtime.weights import ResidentWeights, TensorSpec, WeightsPlan, apart

Homes = Callable[[str], Sequence[Device]]
"""Says which devices need a weight, by its name."""


class PlacedWeights(Closing):
    """All weights at once, each on the devices that need it.

    Lifetime: tensors are valid until `close`; `file` must stay open that long.
    """

    def __init__(
        self, file: GGUFFile, specs: Sequence[TensorSpec], homes: Homes, *,
        repack_experts: bool = True,
    ) -> None:  # fmt: skip
        """Plan where each tensor goes; nothing is read yet. See ResidentWeights.

        Raises:
            ModelFileError: see `check_specs`.
        """
        self.file, self.specs = file, list(specs)
        wanted: dict[Device, list[TensorSpec]] = {}
        for spec in specs:
            for device in homes(spec.name):
                wanted.setdefault(device, []).append(spec)
        self.on: dict[Device, ResidentWeights] = {}
        try:
            for device, mine in wanted.items():
                self.on[device] = ResidentWeights(
                    file, device, mine, rows_on_demand=True, repack_experts=repack_experts
                )
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight on the first device that has it."""
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def get(self, name: str) -> Tensor | None:
        """Return a weight on the first device that has it, or None."""
        each = (weights.get(name) for weights in self.on.values())
        return next((tensor for tensor in each if tensor is not None), None)

    def joints(self, names: Sequence[str]) -> list[Joint]:
        """Join neighbours on the first device that has all of these weights."""
        for weights in self.on.values():
            if all(weights.get(name) is not None for name in names):
                return weights.joints(names)
        return apart(self, names)

    @property
    def plan(self) -> WeightsPlan:
        """What loading takes on all devices together."""
        plans = [weights.plan for weights in self.on.values()]
        return WeightsPlan(
            mapped_bytes=sum(plan.mapped_bytes for plan in plans),
            copied_bytes=sum(plan.copied_bytes for plan in plans),
            repacked=frozenset[str]().union(*(plan.repacked for plan in plans)),
        )

    def bytes_on(self, device: Device) -> int:
        """Bytes that loading takes on one device."""
        weights = self.on.get(device)
        return 0 if weights is None else weights.plan.mapped_bytes + weights.plan.copied_bytes

    def load(self) -> None:
        """Place every tensor.

        Raises:
            CapacityError: a device has not enough memory; `close` frees what was allocated.
            DeviceLostError: a device went away meanwhile.
        """
        for device, weights in self.on.items():
            weights.load()
            device.check()

    def close(self) -> None:
        """Free buffers and descriptors; safe to call twice."""
        for weights in self.on.values():
            weights.close()
