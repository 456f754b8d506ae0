"""What pools of experts have counted, summed for `stats`."""

from collections.abc import Iterable, Mapping

from edgeroute.offload.counters import LayerCount, total
from edgeroute.offload.expert_pool import ExpertPool


def spent(pools: Iterable[ExpertPool]) -> LayerCount:
    """Return what the experts cost so far, decode and prefill together."""
    tables = [pool.table for pool in pools]
    return total(counters.snapshot().total for t in tables for counters in (t.decode, t.prefill))


def by_kind(pools: Iterable[ExpertPool]) -> dict[str, dict[str, int | float]]:
    """Return what they cost in decode, and in prefill."""
    tables = [pool.table for pool in pools]
    return {
        "decode": total(table.decode.snapshot().total for table in tables).to_dict(),
        "prefill": total(table.prefill.snapshot().total for table in tables).to_dict(),
    }


def bytes_of(pools: Iterable[ExpertPool], n_by_layer: Mapping[int, int]) -> int:
    """Return what so many experts of each layer have in the file."""
    return sum(
        n_by_layer.get(layer.il, 0) * pool.plan.page_bytes
        for pool in pools
        for layer in pool.plan.layers
    )
