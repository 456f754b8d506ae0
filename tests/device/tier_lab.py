"""A paged lab's model over three tiers: disk -> DRAM slots -> slots of a device."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.paged import PagedForward
from edgeroute.offload import device_tier, expert_tier
from edgeroute.offload.device_tier import DeviceTier, TierParams
from edgeroute.offload.disk import Disk, DiskFile
from edgeroute.offload.expert_store import ExpertParams, ExpertStore
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.device import Device
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.tensor import get_range
from edgeroute.runtime.weights import ResidentWeights
from tests.edgeroute import paged_lab

_check_cliff = functools.cache(expert_tier.check_cliff)  # a simulation of 0.2 s


@dataclass(frozen=True, slots=True, kw_only=True)
class TieredParams:
    """How a lab's model is held: shares of its experts in DRAM and on the device."""

    dram: float = 0.25
    slots: float = 0.1
    policy: str = "auto"
    prefetch: str = "none"
    forced: bool = False
    host_experts: Any = "off"
    wrap: Callable[[Disk], Disk] = lambda disk: disk


def share_bytes(lab: Any, share: float) -> int:
    """Bytes of slots for a share of all experts, but at least those of one token."""
    least: int = lab.slots_bytes(None)
    return max(least, math.ceil(share * sum(pool.all_bytes for pool in lab.pools)))


class Tiers:
    """Both tiers over a lab's file, without anything that computes."""

    def __init__(
        self, lab: Any, device: Device, params: TieredParams, own: contextlib.ExitStack
    ) -> None:
        self.lab, self.device, self.params = lab, device, params
        self.dram_bytes = share_bytes(lab, params.dram)
        self.device_bytes = share_bytes(lab, params.slots)
        paged = {name for il in range(lab.n_layer) for name in lab.model.expert_tensors(il)}
        specs = [spec for spec in lab.model.specs() if spec.name not in paged]
        base = ResidentWeights(lab.file, device, specs)
        own.callback(base.close)
        base.load()
        self.disk: Any = params.wrap(DiskFile.open(lab.file.path))
        self.transfer = Transfer([self.disk], 2, 1 << 16, 1 << 22)
        own.callback(self.transfer.close)
        how = ExpertParams(
            slots_bytes=self.dram_bytes, n_expert_used=lab.n_used, policy=params.policy,
            prefetch=params.prefetch, forced=params.forced, overlap=False,
        )  # fmt: skip
        above = TierParams(
            slots_bytes=self.device_bytes, n_expert_used=lab.n_used, policy=params.policy,
            host_experts=params.host_experts,
        )  # fmt: skip
        with mock.patch.object(expert_tier, "check_cliff", _check_cliff):
            self.below = ExpertStore(base, lab.device, lab.pools, self.transfer, how)
            own.callback(self.below.close)
            self.below._next_reading = math.inf  # what else runs here must not take slots away
            self.tier = DeviceTier(base, device, self.below, above)
        own.callback(self.tier.close)

    def check(self) -> None:
        """Nothing is held once a pass has ended; both tiers' books agree, and so do counters."""
        for pool in (*self.tier.pools, *self.below.pools):
            pool.table.check()
            assert pool.table.n_pinned == 0
        assert not self.below._loads and not self.tier._held
        self.check_counters()
        self.check_budgets()

    def check_counters(self) -> None:
        for prefill in (False, True):
            for il, count in self.tier.layers(prefill=prefill).items():
                assert count.reconciles, (il, prefill, count)
                assert count.uploaded + count.away <= count.misses

    def check_budgets(self) -> None:
        """Slots are within their budgets, what aligns the first of each part apart."""
        slack = 4096 * sum(len(pool.slots._infos) for pool in self.tier.pools)
        assert self.tier.slots_bytes <= self.device_bytes + slack
        assert self.below.slots_bytes <= self.dram_bytes
        for pool in (*self.tier.pools, *self.below.pools):
            table = pool.table
            assert len(table.resident()) + table.n_loading + table.n_free == table.n_slots

    def settle(self) -> None:
        """Wait for prefetches under way."""
        for ticket in list(self.below._ahead.coming.values()):
            with ticket.finished:
                pass
        self.tier.begin(prefill=True)
        self.tier.end()
        assert not self.below._ahead.coming
        self.check()

    def bytes_of(self, page: int) -> list[bytes]:
        """An expert's parts as the file has them."""
        il, expert = divmod(page, self.lab.pools[0].n_expert)
        found = []
        with self.lab.file.path.open("rb") as file:
            for info in self.below.pool(il).infos(il):
                n = info.nbytes // info.ne[2]
                file.seek(info.offset + expert * n)
                found.append(file.read(n))
        return found

    def on_device(self, page: int) -> list[bytes]:
        """An expert's parts as the device has them."""
        il = page // self.lab.pools[0].n_expert
        pool = self.tier._pool_of[il]
        slot = pool.table.slot_of(page)
        assert slot is not None
        found = []
        infos = pool.infos(il)
        for part, (tensor, info) in enumerate(zip(pool.slots.tensors(infos), infos, strict=True)):
            data = np.empty(info.nbytes // info.ne[2], np.uint8)
            get_range(tensor, data, pool.slots.offset(slot, part))
            found.append(data.tobytes())
        return found

    def check_bytes(self) -> int:
        """Every expert on the device has the file's bytes; returns how many there are."""
        pages = [page for pool in self.tier.pools for page in pool.table.resident()]
        for page in pages:
            assert self.on_device(page) == self.bytes_of(page), page
        return len(pages)


class Tiered(Tiers):
    """Both tiers, and a model on the device that computes with them."""

    def __init__(
        self, lab: Any, device: Device, params: TieredParams, own: contextlib.ExitStack
    ) -> None:
        super().__init__(lab, device, params, own)
        self.kv = KvCache(device, kv_shape(lab.model.hparams, RunParams()), paged_lab.N_CELLS)
        own.callback(self.kv.close)
        n_tokens = paged_lab.N_TOKENS
        self.forward = PagedForward(lab.model, device, self.tier, self.kv, n_tokens)
        own.callback(self.forward.close)
        self.forward.reserve(n_tokens, 512)

    def run(self, steps: Sequence[Any]) -> Any:
        found = paged_lab.play(self.forward, steps)
        self.check()
        assert self.kv.n_free_cells == self.kv.n_cells
        return found


@contextlib.contextmanager
def tiers(lab: Any, device: Device, **params: Any) -> Iterator[Tiers]:
    """Open the tiers alone."""
    with contextlib.ExitStack() as own:
        yield Tiers(lab, device, TieredParams(**params), own)


@contextlib.contextmanager
def tiered(lab: Any, device: Device, **params: Any) -> Iterator[Tiered]:
    """Open the tiers and the model on them."""
    with contextlib.ExitStack() as own:
        yield Tiered(lab, device, TieredParams(**params), own)


__all__ = ["Tiered", "TieredParams", "Tiers", "device_tier", "tiered", "tiers"]
