"""What a pool of slots did, counted per layer: cheap to bump, summed only when asked.

The engine thread bumps the lists of `LayerCounters` directly; anybody else reads a snapshot.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from edgeroute.runtime.errors import UsageError

MAX_LAYERS = 1 << 16


class LayerCounters:
    """One number per layer and event. Not thread-safe: the engine thread owns it.

    `hits` were resident when asked for, `late` were on their way, `misses` had to be
    loaded; the three sum to the pages asked for. A prefetch that was asked for is `useful`,
    one whose layer passed without it, or that was dropped or evicted unused, is `wasted`.
    """

    __slots__ = (
        "demand_bytes",
        "evictions",
        "hits",
        "late",
        "misses",
        "n_layer",
        "page_bytes",
        "prefetch_bytes",
        "prefetch_issued",
        "prefetch_useful",
        "prefetch_wasted",
        "stall_s",
    )

    def __init__(self, n_layer: int, page_bytes: int = 0) -> None:
        """Count from zero.

        Raises:
            UsageError: a negative size, or more layers than any model has.
        """
        if not 0 < n_layer <= MAX_LAYERS or page_bytes < 0:
            raise UsageError(
                f"cannot count {n_layer} layers of {page_bytes} B pages; "
                f"give 1 to {MAX_LAYERS} layers and a byte count of 0 or more"
            )
        self.n_layer = n_layer
        self.page_bytes = page_bytes
        self.hits = [0] * n_layer
        self.late = [0] * n_layer
        self.misses = [0] * n_layer
        self.evictions = [0] * n_layer
        self.prefetch_issued = [0] * n_layer
        self.prefetch_useful = [0] * n_layer
        self.prefetch_wasted = [0] * n_layer
        self.demand_bytes = [0] * n_layer
        self.prefetch_bytes = [0] * n_layer
        self.stall_s = [0.0] * n_layer

    def stalled(self, layer: int, seconds: float) -> None:
        """Add compute time lost waiting for this layer's pages."""
        self.stall_s[layer] += seconds

    def snapshot(self) -> "CounterSnapshot":
        """Copy the counters as they are now."""
        return CounterSnapshot(
            layers=tuple(
                LayerCount(**{name: getattr(self, name)[il] for name in _FIELDS})
                for il in range(self.n_layer)
            ),
            page_bytes=self.page_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCount:
    """Events of one layer, or their sum over several."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    evictions: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_wasted: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    stall_s: float = 0.0

    @property
    def requests(self) -> int:
        """Pages asked for."""
        return self.hits + self.late + self.misses

    @property
    def hit_ratio(self) -> float:
        """Pages found resident / pages asked for; 0 when none was."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def prefetch_useful_ratio(self) -> float:
        """Prefetched and asked for / prefetched; 0 when none was."""
        return self.prefetch_useful / self.prefetch_issued if self.prefetch_issued else 0.0

    def since(self, before: "LayerCount") -> "LayerCount":
        """Return what was counted after an earlier reading."""
        return LayerCount(**{name: getattr(self, name) - getattr(before, name) for name in _FIELDS})

    def to_dict(self) -> dict[str, int | float]:
        """Name the counters and ratios for `stats` and for JSON."""
        counts: dict[str, int | float] = {name: getattr(self, name) for name in _FIELDS}
        return counts | {
            "hit_ratio": self.hit_ratio,
            "prefetch_useful_ratio": self.prefetch_useful_ratio,
        }


_FIELDS = tuple(field.name for field in fields(LayerCount))


def total(counts: Iterable[LayerCount]) -> LayerCount:
    """Sum over layers, pools or kinds of step."""
    several = list(counts)
    return LayerCount(**{name: sum(getattr(count, name) for count in several) for name in _FIELDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterSnapshot:
    """Counters at one moment, indexed by layer."""

    layers: tuple[LayerCount, ...]
    page_bytes: int

    @property
    def total(self) -> LayerCount:
        """Sum over all layers."""
        return total(self.layers)

    def to_dict(self) -> dict[str, object]:
        """Name the totals, and beside them each layer that was asked for anything."""
        per_layer = {
            il: count.to_dict()
            for il, count in enumerate(self.layers)
            if count.requests or count.prefetch_issued or count.evictions
        }
        return {**self.total.to_dict(), "page_bytes": self.page_bytes, "layers": per_layer}
