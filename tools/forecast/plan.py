"""What a model would take, read from its header alone: nothing is loaded."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeroute.config import RunParams
from edgeroute.loaded import MemoryPlan, budget_bytes, kv_shape, plan_memory
from edgeroute.memory_plan import resident_weights
from edgeroute.models.base import Hparams, Model, MoeHparams
from edgeroute.models.registry import describe
from edgeroute.offload.eviction_cliff import CliffReport
from edgeroute.offload.expert_pool import PoolPlan, share_slots
from edgeroute.offload.expert_tier import DEFAULT_POLICY, check_tightest
from edgeroute.paging import VOCABULARY_RATIO, MoeSource, moe_source, plan_paged
from edgeroute.paging_layers import LayerSource
from edgeroute.runtime import machine
from edgeroute.runtime.cells import CELL_BUCKET, round_cells
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.weights import ResidentWeights, TensorSpec
from edgeroute.tools.forecast.plan_layers import Streaming, plan_streaming

_MIN_N_CTX, _MAX_N_CTX = 32, 1 << 20
"""What RunParams allows."""
_NO_LIMIT = 1 << 62
PROGRAM_BYTES = 64 << 20
"""What an engine finds of itself when it opens a model: 56 to 68 MiB, measured on Linux."""
_ENGINE_BYTES = 16 << 20
"""What it may have beyond that, as in a program that has more than edgeroute in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """What a model takes whose experts are paged, whatever the budget. Bytes.

    `fixed` are the ledger's entries of all but the slots. An engine looks at its own size when it
    opens a model; something is allowed for that, so slots are rather more than planned than fewer.
    """

    fixed: Mapping[str, int]
    pools: Sequence[PoolPlan]
    n_expert_used: int

    @property
    def fixed_bytes(self) -> int:
        """All but the slots."""
        return sum(self.fixed.values())

    @property
    def n_pages(self) -> int:
        """Experts over all layers."""
        return sum(pool.n_pages for pool in self.pools)

    @property
    def all_bytes(self) -> int:
        """All experts."""
        return sum(pool.all_bytes for pool in self.pools)

    @property
    def token_pages(self) -> int:
        """Experts that one token uses in all layers: its cycle."""
        return self.n_expert_used * sum(len(pool.layers) for pool in self.pools)

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts that one token uses in all layers."""
        return sum(self.n_expert_used * len(p.layers) * p.page_bytes for p in self.pools)

    @property
    def least_bytes(self) -> int:
        """Slots for the experts that one token uses in one layer of each pool."""
        return self.n_expert_used * sum(pool.slot_bytes for pool in self.pools)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that pages at all."""
        return self.fixed_bytes + self.least_bytes

    @property
    def useful_bytes(self) -> int:
        """The smallest budget whose slots hold one token's cycle: above the LRU cliff."""
        # Each pool gets the same share of its pages; the byte more is for its rounding.
        share = self.all_bytes * self.n_expert_used // self.pools[0].n_expert + 1
        return self.fixed_bytes + min(self.all_bytes, share)

    def helps(self, resident: MemoryPlan) -> bool:
        """Whether it takes less than all weights at once; not so with very small models."""
        return self.smallest_bytes < resident.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlots:
    """What a budget leaves for experts. `policy` is what evicts, `prefetch` when it reads."""

    n_slots: int
    n_bytes: int
    policy: str
    prefetch: str
    cliff: CliffReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model's bytes against a budget. `read_bytes` is what one decoded token must read.

    `memory` is with every weight resident. `paging` is None for a model without experts;
    `slots` only where it is needed and the budget is enough for it. `streaming` is None for a
    model with experts, one that fits, and one too small to gain by it.
    """

    path: Path
    hparams: Hparams
    params: RunParams
    n_params: int
    type_bytes: dict[str, int]
    memory: MemoryPlan
    paging: Paging | None
    slots: ExpertSlots | None
    streaming: Streaming | None
    budget_bytes: int
    available: machine.Memory
    largest_n_ctx: int | None
    weight_read_bytes: int
    kv_cell_bytes: int

    @property
    def is_resident(self) -> bool:
        """Whether all of it would be held at once."""
        return self.memory.total_bytes <= self.budget_bytes

    @property
    def fits(self) -> bool:
        """Whether loading would be let in, experts paged or layers streamed if need be."""
        streams = self.streaming is not None and self.streaming.fits
        return self.is_resident or self.slots is not None or streams

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by owner, as it would be loaded; of what does not fit, in its smallest form."""
        if self.streaming is not None:
            return dict(self.streaming.parts)
        if self.paging is None or self.is_resident or not self.paging.helps(self.memory):
            return self.memory.wants()
        n_bytes = self.paging.least_bytes if self.slots is None else self.slots.n_bytes
        return {**self.paging.fixed, "expert slots": n_bytes}

    @property
    def smallest_budget_bytes(self) -> int:
        """The smallest budget with which loading is let in."""
        if self.streaming is not None:
            return self.streaming.smallest_bytes
        if self.paging is None or not self.paging.helps(self.memory):
            return self.memory.total_bytes
        return self.paging.smallest_bytes

    def read_bytes(self, n_past: int) -> int:
        """Bytes that decoding one token after `n_past` others reads."""
        return self.weight_read_bytes + self.kv_cell_bytes * n_past


def plan_model(path: Path, params: RunParams) -> ModelPlan:
    """Read a model's header and plan its memory; its weights stay on disk.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        UsageError: the device does not exist.
    """
    with GGUFFile.open(path) as file:
        return plan_file(file, params)


def plan_file(file: GGUFFile, params: RunParams) -> ModelPlan:
    """Plan a model's memory by its header, which may be all that is here of the file.

    The same header and settings give the same plan, wherever the header is from, as long as a
    budget is given.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        UsageError: the device does not exist.
    """
    with contextlib.ExitStack() as own:
        model = describe(file)
        device = own.enter_context(Device.open(params.device))
        weights, _ = resident_weights(
            file, device, model, params,
            lambda some: plan_memory(model.hparams, some, params).total_bytes, budget_bytes(params),
        )  # fmt: skip
        own.callback(weights.close)
        if model.hparams.moe is None:
            plan = _plan(file, model, weights, (params, None, weights))
            return plan if plan.is_resident else _streamed(plan, file, device)
        source = dataclasses.replace(
            moe_source(file, device, model, params), program_bytes=PROGRAM_BYTES
        )
        base = source.other_weights()
        own.callback(base.close)
        return _plan(file, model, weights, (params, _paging(source, base), base))


def _plan(
    file: GGUFFile, model: Model, weights: ResidentWeights,
    form: tuple[RunParams, Paging | None, ResidentWeights],
) -> ModelPlan:  # fmt: skip
    """Compare with the budget; `form` is the settings, the paged form and its weights."""
    params, paging, base = form
    type_bytes: dict[str, int] = {}
    for info in file.tensors.values():
        type_bytes[info.type.name] = type_bytes.get(info.type.name, 0) + info.nbytes
    budget, hparams = budget_bytes(params), model.hparams
    memory = plan_memory(hparams, weights, params)
    slots, largest = None, _largest_n_ctx(hparams, weights, params, budget)
    if paging is not None and memory.total_bytes > budget and paging.helps(memory):
        if paging.smallest_bytes <= budget:
            slots = _expert_slots(paging, params, budget)
        # Of what paging takes, only these parts grow with the context.
        growing = plan_memory(hparams, base, params).total_bytes
        largest = _largest_n_ctx(hparams, base, params, budget - paging.smallest_bytes + growing)
    return ModelPlan(
        path=file.path, hparams=hparams, params=params,
        n_params=sum(math.prod(info.ne) for info in file.tensors.values()),
        type_bytes=dict(sorted(type_bytes.items(), key=lambda pair: -pair[1])),
        memory=memory, paging=paging, slots=slots, streaming=None, budget_bytes=budget,
        available=machine.memory(), largest_n_ctx=largest,
        weight_read_bytes=_read_per_token(model, weights),
        kv_cell_bytes=kv_shape(hparams, params).bytes_per_cell,
    )  # fmt: skip


def _streamed(plan: ModelPlan, file: GGUFFile, device: Device) -> ModelPlan:
    """Plan a dense model that does not fit with layers streamed, where that takes less."""
    params, model = plan.params, describe(file)
    source = LayerSource(file=file, device=device, model=model, params=params,
                         program_bytes=PROGRAM_BYTES)  # fmt: skip
    allowance = _ENGINE_BYTES + VOCABULARY_RATIO * file.data_offset
    streaming = plan_streaming(source, plan.budget_bytes, allowance)
    if not streaming.helps(plan.memory):
        return plan
    # Of what streaming takes, only the cache and the compute buffer grow with the context.
    with contextlib.closing(source.base(source.units())) as base:
        left = plan.budget_bytes - streaming.smallest_bytes + streaming.growing_bytes
        largest = _largest_n_ctx(model.hparams, base, params, left)
    return dataclasses.replace(plan, streaming=streaming, largest_n_ctx=largest)


def _paging(source: MoeSource, base: ResidentWeights) -> Paging:
    wants = plan_memory(source.model.hparams, base, source.params).wants()
    plan = plan_paged(source, wants, _NO_LIMIT)
    vocabulary = VOCABULARY_RATIO * source.file.data_offset
    fixed = plan.fixed | {"allowance for loading": _ENGINE_BYTES + vocabulary}
    return Paging(fixed=fixed, pools=plan.pools, n_expert_used=source.moe.n_expert_used)


def _expert_slots(paging: Paging, params: RunParams, budget: int) -> ExpertSlots:
    """Share a budget's slots among the pools, and ask of the tightest whether it is enough."""
    pools, n_used = paging.pools, paging.n_expert_used
    left = min(budget - paging.fixed_bytes, paging.all_bytes)
    counts = share_slots(pools, left, n_used)
    cliff = check_tightest(pools, counts, n_used)
    automatic = cliff.fallback or DEFAULT_POLICY
    prefetch = params.prefetch
    if prefetch == "auto" and cliff.is_below:
        prefetch = "off"
    n_bytes = sum(n * pool.slot_bytes for pool, n in zip(pools, counts, strict=True))
    return ExpertSlots(
        n_slots=sum(counts), n_bytes=n_bytes,
        policy=automatic if params.policy == "auto" else params.policy, prefetch=prefetch,
        cliff=cliff,
    )  # fmt: skip


def _largest_n_ctx(
    hparams: Hparams, weights: ResidentWeights, params: RunParams, budget: int
) -> int | None:
    """Find the longest context, up to the trained one, that fits; None if none does."""

    def fits(n_ctx: int) -> bool:
        changed = dataclasses.replace(params, n_ctx=n_ctx, n_kv=None)
        return plan_memory(hparams, weights, changed).total_bytes <= budget

    most = max(_MIN_N_CTX, min(hparams.n_ctx_train, _MAX_N_CTX))
    if not fits(_MIN_N_CTX):
        return None
    if fits(most):
        return most
    # Bytes grow with whole buckets of cells only.
    low, high = 1, round_cells(most) // CELL_BUCKET
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CELL_BUCKET) else (low, middle)
    return min(low * CELL_BUCKET, most)


def _read_per_token(model: Model, weights: ResidentWeights) -> int:
    """Bytes of weights that one token touches: of a table one row, of experts the chosen."""
    infos, total = weights.infos, 0
    for spec in model.specs():
        info = infos.get(spec.name)
        if info is None:
            continue
        if spec.use == "get_rows":
            total += info.type.row_size(info.ne[0])
        elif (moe := model.hparams.moe) is not None and _is_per_expert(spec, moe):
            total += info.nbytes // moe.n_expert * moe.n_expert_used
        else:
            total += info.nbytes
    return total


def _is_per_expert(spec: TensorSpec, moe: MoeHparams) -> bool:
    """Whether a tensor has a slice, or a row of biases, for each expert."""
    rows = spec.use == "elementwise" and len(spec.ne) == 2 and spec.ne[1] == moe.n_expert
    return rows or spec.use == "mul_mat_id"
