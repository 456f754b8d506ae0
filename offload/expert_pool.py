"""A pool: experts of equal shape and type, over all layers that have such, and their slots."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from edgeroute.offload.eviction import PolicyParams, PoolShape
from edgeroute.offload.eviction_registry import make_policy
from edgeroute.offload.load_plan import Extent, LoadJob, n_reads
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.sidecar import Sidecar, padded
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, ModelFileError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.slots import Slots, stride_bytes
from edgeroute.runtime.units import format_bytes

PAGES_FILE = 0
"""Number of the file that has the pages among those that a Transfer reads."""


class ExpertLayer(NamedTuple):
    """A layer's expert tensors, [n_in, n_out, n_expert] each, under the model's names."""

    il: int
    infos: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """Layers whose experts can share slots, known from the header alone.

    `sidecar` says where their pages are, if not in the model's own file; `file` is the number of
    the one that has them, among those that a Transfer reads.
    """

    layers: tuple[ExpertLayer, ...]
    n_expert: int
    sidecar: Sidecar | None = None
    file: int = PAGES_FILE

    @property
    def page_bytes(self) -> int:
        """Bytes of one expert in the file."""
        return sum(info.nbytes // self.n_expert for info in self.layers[0].infos)

    @property
    def slot_bytes(self) -> int:
        """Bytes that one expert takes in memory, at most."""
        return sum(stride_bytes(info.nbytes // self.n_expert) for info in self.layers[0].infos)

    @property
    def n_pages(self) -> int:
        """Experts over all layers."""
        return len(self.layers) * self.n_expert

    @property
    def all_bytes(self) -> int:
        """Bytes of slots for all experts."""
        return self.n_pages * self.slot_bytes


def plan_pools(
    layers: Iterable[ExpertLayer], n_expert: int, sidecar: Sidecar | None = None,
    file: int = PAGES_FILE,
) -> list[PoolPlan]:  # fmt: skip
    """Group layers by the shapes and types of their expert tensors."""
    groups: dict[tuple[object, ...], list[ExpertLayer]] = {}
    for layer in layers:
        key = tuple((info.type, info.ne) for info in layer.infos)
        groups.setdefault(key, []).append(layer)
    return [
        PoolPlan(layers=tuple(group), n_expert=n_expert, sidecar=sidecar, file=file)
        for group in groups.values()
    ]


def in_sidecar(pools: Iterable[PoolPlan], sidecar: Sidecar) -> list[PoolPlan]:
    """Have pages read from a sidecar of the model.

    Raises:
        ModelFileError: it lacks some.
    """
    found = []
    for pool in pools:
        if sidecar.header.n_expert != pool.n_expert:
            raise ModelFileError(
                f"the sidecar has {sidecar.header.n_expert} experts a layer, not {pool.n_expert}; "
                "write it again with `edgeroute convert pack --force`, or delete it"
            )
        layers = tuple(ExpertLayer(il, sidecar.moved(il, infos)) for il, infos in pool.layers)
        found.append(replace(pool, layers=layers, sidecar=sidecar))
    return found


def spares_reads(pools: Iterable[PoolPlan], read_bytes: int) -> bool:
    """Whether pages in one piece take fewer reads than in parts, over all experts."""
    spared = 0
    for pool in pools:
        parts = [info.nbytes // pool.n_expert for info in pool.layers[0].infos]
        apart = sum(n_reads(nbytes, read_bytes) for nbytes in parts)
        spared += pool.n_pages * (apart - n_reads(sum(map(padded, parts)), read_bytes))
    return spared > 0


def share_slots(pools: Sequence[PoolPlan], budget_bytes: int, n_used: int) -> list[int]:
    """Divide a budget so that each pool holds the same share of its pages.

    Args:
        pools: all pools of a model.
        budget_bytes: for slots.
        n_used: slots that every pool gets at least, the experts that a token uses in a layer.

    Raises:
        CapacityError: it does not hold those.
    """
    least = n_used * sum(pool.slot_bytes for pool in pools)
    if budget_bytes < least:
        raise CapacityError(
            f"{format_bytes(max(0, budget_bytes))} are left for experts, but those that one token "
            f"uses in a layer take {format_bytes(least)}; raise the memory budget by at least "
            f"{format_bytes(least - budget_bytes)}"
        )
    share = budget_bytes / sum(pool.all_bytes for pool in pools)
    counts = [max(n_used, min(pool.n_pages, int(pool.n_pages * share))) for pool in pools]
    over = sum(n * pool.slot_bytes for n, pool in zip(counts, pools, strict=True)) - budget_bytes
    for i in sorted(range(len(pools)), key=lambda i: -counts[i]):
        while over > 0 and counts[i] > n_used:
            counts[i] -= 1
            over -= pools[i].slot_bytes
    return counts


class ExpertPool(Closing):
    """Slots, and the book of what they hold. Engine thread only."""

    def __init__(self, device: Device, plan: PoolPlan, n_slots: int, policy: str) -> None:
        """Reserve the slots.

        Raises:
            CapacityError: the device has no room for them.
            UsageError: no such policy.
        """
        self.plan = plan
        first = plan.layers[0].il
        last = max(layer.il for layer in plan.layers)
        n = plan.n_expert
        pages = [layer.il * n + e for layer in plan.layers for e in range(n)]
        whole = len(pages) == (last - first + 1) * n
        self.shape = PoolShape(
            pages=range(first * n, (last + 1) * n) if whole else pages,
            n_expert=n, page_bytes=plan.page_bytes,
        )  # fmt: skip
        self.table = PageTable(
            n_slots, make_policy(policy, self.shape, n_slots, PolicyParams()), self.shape
        )
        self.slots = Slots(device, [layer.infos for layer in plan.layers], n_slots)
        self._infos = {layer.il: layer.infos for layer in plan.layers}

    def tensors(self) -> dict[str, Tensor]:
        """Return the slot tensors by every name that they stand for."""
        return {
            info.name: tensor
            for infos in self._infos.values()
            for info, tensor in zip(infos, self.slots.tensors(infos), strict=True)
        }

    def infos(self, il: int) -> tuple[TensorInfo, ...]:
        """Return the tensors of a layer's experts in the file, one per part."""
        return self._infos[il]

    def job(self, page: int, slot: int) -> LoadJob:
        """Describe the load of a page into a slot."""
        infos = self._infos[page // self.plan.n_expert]
        return LoadJob(
            id=page, extents=self._extents(page, infos), sink=self.slots.sink(slot, infos)
        )

    def _extents(self, page: int, infos: Sequence[TensorInfo]) -> list[Extent]:
        sidecar, expert = self.plan.sidecar, page % self.plan.n_expert
        if sidecar is not None:
            return sidecar.extents(self.plan.file, page, [info.name for info in infos])
        extents = []
        for part, info in enumerate(infos):
            nbytes = info.nbytes // self.plan.n_expert
            extents.append(Extent(self.plan.file, info.offset + expert * nbytes, nbytes, part))
        return extents

    def resize(self, n_slots: int) -> int:
        """Give slots up or take them back, up to as many as there were at first.

        Returns:
            The bytes given back to the system.
        """
        done = self.table.resize(min(max(1, n_slots), self.slots.n_slots))
        return self.slots.give_back(done.retired)

    def close(self) -> None:
        """Free the slots; safe to call twice."""
        self.slots.close()
