"""Composes a model whose experts do not all fit a device: disk -> DRAM -> the device's slots."""

import contextlib
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from edgeroute.memory_plan import MemoryPlan
from edgeroute.models.embedder import Embedder
from edgeroute.models.host_experts import HostExperts, HostWeights
from edgeroute.models.paged import MAX_INLINE_TOKENS, PagedForward
from edgeroute.models.paged_pairs import MAX_PAIRS
from edgeroute.offload.device_tier import DeviceTier, TierParams
from edgeroute.offload.expert_pool import PoolPlan, plan_pools
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.offload.miss_gate import HostExpertsMode
from edgeroute.offload.tier_link import suppose
from edgeroute.offload.trace import TraceRecorder
from edgeroute.paging import (
    MoeSource,
    PagedPlan,
    compute_bytes,
    make_store,
    open_store,
    pairs_bytes,
    plan_paged,
    program_bytes,
    recorder,
    staging_bytes,
    trace_meta,
)
from edgeroute.runtime.device import Device, DeviceInfo
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.experts import MissRule
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.ledger import COMPUTE_BUFFER, Ledger
from edgeroute.runtime.slots import BLOCK_BYTES
from edgeroute.runtime.units import format_bytes
from edgeroute.runtime.upload import STAGING_BYTES
from edgeroute.runtime.weights import ResidentWeights

STAGED_CYCLES: Final = 4
"""DRAM slots where DRAM is no cache: so many times what a token uses of a layer. One group of a
prompt is sent while others are read."""
HOST_ENTRIES: Final = frozenset({"session staging"})
"""Parts of a MemoryPlan that are never on a device."""
SLOTS, DRAM = "expert slots", "expert slots (DRAM)"
SHARED = "on a device that shares this memory"
CARRIED, HOST_COMPUTE = "expert compute", "experts computed here"

_MODES: Final[dict[str, HostExpertsMode]] = {"auto": "auto", "on": "on", "off": "off"}

Tiers = Literal["in place", "staged", "cached"]


def tiers_of(info: DeviceInfo) -> Tiers:
    """Decide how experts come to a device.

    - "in place": its memory is the machine's, and the host can write its buffers: the slots are
      in them, and a read from disk ends where the device computes. Nothing is copied, and a
      second copy in DRAM would take memory from the slots.
    - "staged": its memory is the machine's, but buffers are written through the backend only. A
      cache in DRAM would hold in the same memory what slots hold more usefully, so that DRAM is
      what reads go through, and no more.
    - "cached": it has memory of its own. DRAM is larger and quicker than the disk: a cache.
    """
    if info.unified:
        return "in place" if info.host_pointers else "staged"
    return "cached"


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One memory that a plan divides: entries by owner that must be there, and its budget."""

    fixed: dict[str, int]
    budget_bytes: int
    name: str
    setting: str

    def left_for(self, least: int) -> int:
        """Return the bytes left for slots.

        Raises:
            CapacityError: they are fewer than `least`, the experts of one token.
        """
        left = self.budget_bytes - sum(self.fixed.values())
        if left >= least:
            return left
        parts = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in self.fixed.items() if n)
        smallest = sum(self.fixed.values()) + least
        raise CapacityError(
            f"{parts} and the experts of one token, {format_bytes(least)}, are over the "
            f"{format_bytes(self.budget_bytes)} that may be used of {self.name}; raise "
            f"{self.setting} to at least {math.ceil(100 * smallest / 2**30) / 100:.2f} GiB, or "
            "lower n_ctx or n_ubatch",
            smallest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """A model's memory in both tiers.

    Attributes:
        pools: its experts.
        host, device: ledger entries by owner, slots included.
        dram_bytes, slots_bytes: the slots in each.
        staging_bytes: what reads go through.
        upload_bytes: what uploads go through.
    """

    pools: tuple[PoolPlan, ...]
    host: dict[str, int]
    device: dict[str, int]
    dram_bytes: int
    slots_bytes: int
    staging_bytes: int
    upload_bytes: int


def plan_tiers(source: MoeSource, host: Half, device: Half) -> TierPlan:
    """Divide the budgets of a device and of the machine between what must stay and slots.

    Args:
        source: the model; its device is the one that computes.
        host: entries of what is in the machine's memory for this model beside its experts.
        device: entries of the other weights, KV cache and compute buffer there.

    Raises:
        CapacityError: one of them does not hold the experts of one token; names the smallest
            budget.
    """
    info, params = source.device.info, source.params
    pools = tuple(plan_pools(source.layers(), source.moe.n_expert))
    staging = staging_bytes(pools)
    upload = STAGING_BYTES if info.asynchronous and info.events and not info.unified else 0
    least = source.moe.n_expert_used * sum(pool.slot_bytes for pool in pools)
    most = sum(pool.all_bytes for pool in pools)
    there = replace(device, fixed=device.fixed | {CARRIED: compute_bytes(source)})
    aligning = BLOCK_BYTES * sum(len(pool.layers[0].infos) for pool in pools)
    slots = min(most, there.left_for(least + aligning) - aligning)
    computing = {} if params.host_experts == "off" else {
        HOST_COMPUTE: pairs_bytes(source, _host_pairs(source))
    }  # fmt: skip
    here = replace(host, fixed=host.fixed | computing | {
        "expert staging": staging, "upload staging": upload,
        "program and vocabulary": program_bytes(source),
    })  # fmt: skip
    if tiers_of(info) == "staged":
        there_bytes = sum(there.fixed.values()) + aligning
        one = replace(here, fixed=here.fixed | {SHARED: there_bytes + least})
        left = one.left_for(least)  # beside the least there
        dram = min(left, STAGED_CYCLES * least)
        slots = min(slots, least + left - dram)
        here = replace(here, fixed=here.fixed | {SHARED: there_bytes + slots})
    else:
        dram = min(most, here.left_for(least))
    return TierPlan(
        pools=pools, host=here.fixed | {DRAM: dram},
        device=there.fixed | {SLOTS: slots + aligning}, dram_bytes=dram, slots_bytes=slots,
        staging_bytes=staging, upload_bytes=upload,
    )  # fmt: skip


def _host_pairs(source: MoeSource) -> int:
    """Bound the pairs that the processor computes at once; prompts are computed there if asked."""
    if source.params.host_experts == "on":
        return MAX_PAIRS
    return MAX_INLINE_TOKENS * source.moe.n_expert_used


def open_tiers(
    own: contextlib.ExitStack, source: MoeSource, cpu: Device, base: ResidentWeights, plan: TierPlan
) -> DeviceTier:
    """Open the disk and reserve the slots of both tiers; `own` frees them.

    Args:
        own: what they are closed with.
        source: the model; its device is the one that computes.
        cpu: the processor's device, whose memory the DRAM tier is in.
        base: the other weights, on the device.
        plan: their bytes.

    Raises:
        CapacityError: the machine or the device has too little memory.
        ModelFileError: the file was changed since its header was read.
    """
    params = source.params
    below = make_store(own, replace(source, device=cpu), base, PagedPlan(
        pools=plan.pools, fixed={}, staging_bytes=plan.staging_bytes,
        slots_bytes=plan.dram_bytes, overlaps=False,
    ))  # fmt: skip
    below.recorder = TraceRecorder(trace_meta(source, plan.pools))
    tier = DeviceTier(base, source.device, below, TierParams(
        slots_bytes=plan.slots_bytes, n_expert_used=source.moe.n_expert_used,
        policy=params.policy, watched=params.levers == "proven",
        host_experts=_MODES[params.host_experts], staging_bytes=plan.upload_bytes,
    ))  # fmt: skip
    own.callback(tier.close)
    if params.host_experts == "auto":
        tier.measure_link()
    tier.recorder = recorder(own, source, plan.pools)
    return tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TierLoad:
    """A model with experts that is being opened, beside what runs beside it.

    Attributes:
        source: the model; its device is the one that computes.
        cpu: the processor.
        host, device: the accounts of this process's memory, and of the device's own.
        beside: entries of `host` that belong to what is open already.
        plan_memory: plans KV cache, compute buffer and the like beside given weights.
        make_pool: makes the KV cache on a device, and has it closed.
        misses: says which missing experts tokens do without.
    """

    source: MoeSource
    cpu: Device
    host: Ledger
    device: Ledger
    beside: dict[str, int]
    plan_memory: Callable[[ResidentWeights], MemoryPlan]
    make_pool: Callable[[Device], KvCache]
    misses: MissRule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTiers:
    """A model that computes on one device, its experts paged."""

    plan: MemoryPlan
    experts: DeviceTier | ExpertStore
    forward: PagedForward


def load_tiers(own: contextlib.ExitStack, load: TierLoad) -> LoadedTiers:
    """Place a model on a device, but its experts, and make slots for as many as it holds.

    `own` frees everything but the forward pass, which the caller closes before, and enters what
    its compute buffer on the device really takes.

    Raises:
        CapacityError: a memory is too small, with the smallest budget that would do.
        ModelFileError: the file was changed since its header was read.
        DeviceLostError: the device went away meanwhile.
    """
    source, cpu = load.source, load.cpu
    base, rows = _weights(own, source, cpu)
    memory = load.plan_memory(base)
    opening = _reserve(own, load, memory, base)
    base.load()
    rows.load()
    source.device.check()
    kv = load.make_pool(source.device)
    experts = opening()
    forward = PagedForward(
        source.model, source.device, experts, kv, source.params.n_ubatch, load.misses
    )
    own.callback(forward.close)
    forward.embedder = Embedder(source.model, cpu, rows, kv)
    own.callback(forward.embedder.close)
    if isinstance(experts, DeviceTier):
        load.device.replace(CARRIED, forward.carry_bytes)
        load.device.replace(SLOTS, experts.slots_bytes)
        if source.params.host_experts != "off":
            forward.host = _host_experts(own, source, cpu, (experts, kv))
            load.host.replace(HOST_COMPUTE, forward.host.n_bytes)
    else:
        forward.copies = experts.copies
        load.host.replace(CARRIED, forward.carry_bytes)
    return LoadedTiers(plan=memory, experts=experts, forward=forward)


def _reserve(
    own: contextlib.ExitStack, load: TierLoad, memory: MemoryPlan, base: ResidentWeights
) -> Callable[[], DeviceTier | ExpertStore]:
    """Divide the budgets and enter the parts; return what opens the tiers then."""
    source, info = load.source, load.source.device.info
    wants, beside = memory.wants(), load.beside
    if tiers_of(info) == "in place":
        paged = plan_paged(source, wants | beside, load.host.budget_bytes)
        load.host.reserve(_less(paged.wants(), beside))
        return lambda: open_store(own, source, base, paged)
    # Whoever computes enters its buffer where the memory is: here, if there is one for both.
    mine = HOST_ENTRIES | {COMPUTE_BUFFER} if info.unified else HOST_ENTRIES
    near = {owner: n for owner, n in wants.items() if owner in mine}
    plan = plan_tiers(
        source,
        Half(fixed=near | beside, budget_bytes=load.host.budget_bytes,
             name="this machine's memory", setting="the memory budget"),
        Half(fixed=_less(wants, near), budget_bytes=load.device.free_bytes,
             name=f"{info.name}'s memory", setting="device_memory"),
    )  # fmt: skip
    load.host.reserve(_less(plan.host, beside))
    load.device.reserve(plan.device)
    return lambda: open_tiers(own, source, load.cpu, base, plan)


def _weights(
    own: contextlib.ExitStack, source: MoeSource, cpu: Device
) -> tuple[ResidentWeights, ResidentWeights]:
    """Describe all weights but the experts: those on the device, and tables looked up by rows."""
    rows = [spec for spec in source.other_specs() if spec.use == "get_rows"]
    others = [spec for spec in source.other_specs() if spec.use != "get_rows"]
    base = ResidentWeights(source.file, source.device, others)
    own.callback(base.close)
    near = ResidentWeights(source.file, cpu, rows, rows_on_demand=True)
    own.callback(near.close)
    return base, near


def _less(entries: dict[str, int], others: Container[str]) -> dict[str, int]:
    return {owner: n for owner, n in entries.items() if owner not in others and n}


def _host_experts(
    own: contextlib.ExitStack, source: MoeSource, cpu: Device, parts: tuple[DeviceTier, KvCache]
) -> HostExperts:
    """Open what computes experts that stay in DRAM."""
    tier, kv = parts
    weights = HostWeights(source.model, source.file, cpu, tier.below)
    host = HostExperts(source.model, cpu, weights, kv)
    own.callback(host.close)
    host.told = tier.gate.computed
    host.reserve(_host_pairs(source))
    if source.params.host_experts == "auto":
        _measure_host(source, tier, host)
    return host


def _measure_host(source: MoeSource, tier: DeviceTier, host: HostExperts) -> None:
    """Learn what computing here costs before there is anything to compute.

    What is in the slots does not matter; what the device adds to it is learned by doing.
    """
    il, n_embd = tier.pools[0].plan.layers[0].il, source.model.hparams.n_embd

    def compute(n_pairs: int) -> None:
        slots = np.arange(n_pairs, dtype=np.int32)
        host.compute(il, np.ones((n_pairs, n_embd), np.float32), slots, slots)

    suppose(tier.gate.compute, compute, min(source.moe.n_expert_used, tier.max_at_once(il)))
