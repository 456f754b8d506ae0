"""What a dense model takes whose layers do not all fit: which stay, which stream."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from edgeroute.loaded import MemoryPlan, plan_memory
from edgeroute.paging_layers import LayerPlan, LayerSource, plan_layers
from edgeroute.runtime.errors import CapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """A dense model within a budget that does not hold all of it. Bytes.

    `parts` are the ledger's entries with as many layers resident as the budget holds, or with
    the fewest where it is too small (`fits` is false); `growing_bytes` of them depend on the
    context. The head counts as a layer. `token_bytes` are read from the disk for every token.
    """

    parts: Mapping[str, int]
    fits: bool
    n_resident: int
    n_streamed: int
    token_bytes: int
    smallest_bytes: int
    growing_bytes: int

    def helps(self, resident: MemoryPlan) -> bool:
        """Whether it takes less than all weights at once; not so with very small models."""
        return self.smallest_bytes < resident.total_bytes


def plan_streaming(source: LayerSource, budget: int, allowance: int) -> Streaming:
    """Split a model's layers as the engine would.

    Args:
        source: the model.
        budget: bytes for all of it.
        allowance: bytes that the engine has loaded when it looks at itself, and we have not.
    """
    hparams, params = source.model.hparams, source.params
    with contextlib.closing(source.base(source.units())) as small:
        growing = plan_memory(hparams, small, params)
    fixed = growing.wants()
    smallest = _smallest(source, fixed)
    fits = smallest + allowance <= budget
    plan = plan_layers(source, fixed, budget - allowance if fits else smallest)
    with contextlib.closing(source.base(plan.streamed)) as base:
        parts = plan_memory(hparams, base, params).wants() | plan.entries
    return Streaming(
        parts=parts | {"allowance for loading": allowance}, fits=fits,
        n_resident=plan.n_units - len(plan.streamed), n_streamed=len(plan.streamed),
        token_bytes=plan.streamed_bytes, smallest_bytes=smallest + allowance,
        growing_bytes=growing.total_bytes,
    )  # fmt: skip


def _smallest(source: LayerSource, fixed: dict[str, int]) -> int:
    """Return the least that the engine would take, this process as it is now included."""
    try:
        plan: LayerPlan = plan_layers(source, fixed, 0)
    except CapacityError as error:
        assert error.smallest_bytes is not None
        return error.smallest_bytes
    return plan.total_bytes
