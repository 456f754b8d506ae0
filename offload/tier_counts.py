"""What a device tier did, layer by layer, beside what the tier below it did for it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from edgeroute.offload.counters import LayerCount, LayerCounters
from edgeroute.offload.expert_pool import ExpertPool


class TierCounters:
    """What page tables do not count, one number per layer. The engine thread owns it.

    `away` were missed and left to the processor; `uploaded` were missed and came, with
    `n_bytes` in `upload_s` seconds.
    """

    __slots__ = ("away", "n_bytes", "n_layer", "upload_s", "uploaded")

    def __init__(self, n_layer: int) -> None:
        """Count from zero."""
        self.n_layer = n_layer
        self.away = [0] * n_layer
        self.uploaded = [0] * n_layer
        self.n_bytes = [0] * n_layer
        self.upload_s = [0.0] * n_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCount:
    """Experts asked for in one layer, or over several, and where they were found.

    `hits` were on the device, `misses` not. Of the misses, `uploaded` came and `away` were
    left to the processor; `dram_hits` were in the DRAM tier, `dram_late` on their way there,
    and `disk_reads` had to be read. Prefetched pages are in none of these.
    """

    hits: int = 0
    misses: int = 0
    uploaded: int = 0
    away: int = 0
    uploaded_bytes: int = 0
    upload_s: float = 0.0
    evictions: int = 0
    dram_hits: int = 0
    dram_late: int = 0
    disk_reads: int = 0

    @property
    def reconciles(self) -> bool:
        """Whether every device miss was found in exactly one place below."""
        return self.misses == self.dram_hits + self.dram_late + self.disk_reads

    @property
    def hit_ratio(self) -> float:
        """Experts found on the device / experts asked for; 0 when none was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Name the counters for `stats` and for JSON."""
        counts: dict[str, int | float] = {name: getattr(self, name) for name in _FIELDS}
        return counts | {"upload_s": round(self.upload_s, 6), "hit_ratio": self.hit_ratio}


_FIELDS = tuple(field.name for field in fields(TierCount))


def count_layer(
    il: int, own: TierCounters, device: LayerCounters, dram: LayerCounters
) -> TierCount:
    """Put together what both tiers counted in a layer."""
    return TierCount(
        hits=device.hits[il], misses=device.misses[il], uploaded=own.uploaded[il],
        away=own.away[il], uploaded_bytes=own.n_bytes[il], upload_s=own.upload_s[il],
        evictions=device.evictions[il], dram_hits=dram.hits[il], dram_late=dram.late[il],
        disk_reads=dram.misses[il],
    )  # fmt: skip


def sum_counts(counts: Iterable[TierCount]) -> TierCount:
    """Sum over layers."""
    several = list(counts)
    return TierCount(**{name: sum(getattr(each, name) for each in several) for name in _FIELDS})


def with_hits(below: LayerCount, pools: Iterable[ExpertPool]) -> LayerCount:
    """Return what experts cost, those that a device had ready counted as hits."""
    tables = [pool.table for pool in pools]
    hits = sum(sum(t.decode.hits) + sum(t.prefill.hits) for t in tables)
    return replace(below, hits=below.hits + hits)
