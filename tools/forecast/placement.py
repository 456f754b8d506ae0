"""Where a model's weights would be under a budget: the part of a plan that a forecast needs."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgeroute.bridges import DRAFTING
from edgeroute.config import RunParams
from edgeroute.loaded import MemoryPlan, budget_bytes, plan_memory
from edgeroute.memory_plan import resident_weights
from edgeroute.models.base import Model
from edgeroute.models.registry import describe
from edgeroute.offload.expert_pool import share_slots
from edgeroute.paging import moe_source, plan_paged
from edgeroute.paging_layers import FIRST_KEPT, LayerSource, plan_layers
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.forecast.plan import ModelPlan

Verdict = Literal["FITS", "PAGES", "REFUSED"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A model under a budget. Bytes.

    `needed_bytes` is what all of it would take, `smallest_bytes` the least budget that would do.
    `n_slots` of `n_pages` experts are in memory at once; `streamed` are the numbers of the units
    that stream, layers and behind them the head, in the order of use.
    """

    verdict: Verdict
    pages: Literal["experts", "layers"] | None
    budget_bytes: int
    needed_bytes: int
    smallest_bytes: int
    n_slots: int = 0
    n_pages: int = 0
    prefetches: bool = False
    """Whether experts may be read before they are asked for."""
    streamed: tuple[int, ...] = ()
    repacks: bool = True
    """Whether resident experts, or where there are none all matrices, may be repacked."""


def place(file: GGUFFile, params: RunParams, *, smallest: bool = True) -> Placement:
    """Plan a model as the engine would in this process as it is now; nothing is loaded.

    Without `smallest`, which takes as long again, the least budget that would do is not looked
    for: `smallest_bytes` is then what all of it takes.

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
        whole, budget = plan_memory(model.hparams, weights, params), budget_bytes(params)
        found = Placement(
            verdict="FITS", pages=None, budget_bytes=budget, needed_bytes=whole.total_bytes,
            smallest_bytes=whole.total_bytes, repacks=params.repack_experts,
        )  # fmt: skip
        return _Splitter(file, device, model, params, whole).split(found, smallest=smallest)


class _Splitter:
    """Splits a model that does not fit as the engine does."""

    def __init__(
        self, file: GGUFFile, device: Device, model: Model, params: RunParams, whole: MemoryPlan
    ) -> None:
        self._file, self._device, self._model = file, device, model
        self._params, self._whole = params, whole

    def split(self, found: Placement, *, smallest: bool) -> Placement:
        """Place it in part where it does not fit whole; say what would be the least anyhow."""
        cut = self._experts if self._model.hparams.moe is not None else self._layers
        if smallest:
            try:
                cut(found, 0)
            except CapacityError as error:
                least = min(found.needed_bytes, error.smallest_bytes or found.needed_bytes)
                found = replace(found, smallest_bytes=least)
        if found.needed_bytes <= found.budget_bytes:
            return found
        try:
            return cut(found, found.budget_bytes)
        except CapacityError:
            return replace(found, verdict="REFUSED")

    def _experts(self, found: Placement, budget: int) -> Placement:
        source = moe_source(self._file, self._device, self._model, self._params)
        with contextlib.closing(source.other_weights()) as base:
            fixed = plan_memory(self._model.hparams, base, self._params).wants()
        plan = plan_paged(source, fixed, budget)
        counts = share_slots(plan.pools, plan.slots_bytes, source.moe.n_expert_used)
        return replace(found, verdict="PAGES", pages="experts", n_slots=sum(counts),
                        n_pages=sum(pool.n_pages for pool in plan.pools))  # fmt: skip

    def _layers(self, found: Placement, budget: int) -> Placement:
        source = LayerSource(file=self._file, device=self._device, model=self._model,
                             params=self._params)  # fmt: skip
        with contextlib.closing(source.base(source.units())) as small:
            fixed = plan_memory(self._model.hparams, small, self._params).wants()
        plan = plan_layers(source, fixed, budget)
        return replace(found, verdict="PAGES", pages="layers",
                        streamed=tuple(unit.number for unit in plan.streamed))  # fmt: skip


def streamed_units(n_streamed: int, n_layer: int, *, drafting: bool) -> tuple[int, ...]:
    """Say which units stream if so many do, as the engine splits them: see `plan_layers`."""
    if n_streamed > n_layer:
        return tuple(range(n_layer + 1))
    if drafting:
        first = min(FIRST_KEPT, n_layer - n_streamed)
        return tuple(range(first, first + n_streamed))
    return tuple((2 * j + 1) * n_layer // (2 * n_streamed) for j in range(n_streamed))


def from_plan(plan: ModelPlan) -> Placement:
    """Take what a forecast needs from a plan of `edgeroute plan`."""
    experts, streaming = plan.slots, plan.streaming
    streamed: Sequence[int] = ()
    if not plan.is_resident and streaming is not None and streaming.fits:
        drafting = plan.params.speculate in DRAFTING
        streamed = streamed_units(streaming.n_streamed, plan.hparams.n_layer, drafting=drafting)
    verdict: Verdict = "FITS" if plan.is_resident else "PAGES" if plan.fits else "REFUSED"
    pages: Literal["experts", "layers"] | None = None
    if verdict == "PAGES":
        pages = "experts" if experts is not None else "layers"
    return Placement(
        verdict=verdict, pages=pages, budget_bytes=plan.budget_bytes,
        needed_bytes=plan.memory.total_bytes, smallest_bytes=plan.smallest_budget_bytes,
        n_slots=0 if experts is None else experts.n_slots,
        n_pages=0 if plan.paging is None else plan.paging.n_pages,
        prefetches=experts is not None and experts.prefetch != "off",
        streamed=tuple(streamed), repacks=plan.params.repack_experts,
    )  # fmt: skip
