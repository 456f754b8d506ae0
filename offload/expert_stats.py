"""What pools of experts have counted, summed for `stats`."""

from collections.abc import Iterable

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
