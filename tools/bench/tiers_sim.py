"""`auto` against both fixed choices in simulated time: a device, its link and a processor.

One cache per layer, least recently used out first, behind a link; a processor that computes pages
instead; and a clock that only they move. The same settings give the same figures everywhere:

    python -m edgeroute.tools.bench.tiers_sim [--settings 300] [--seed 1]
"""

import random
import statistics
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click
import numpy as np

from edgeroute.offload.miss_gate import HostExpertsMode, MissGate

N_LAYER, N_EXPERT, N_USED, PAGE_BYTES = 2, 48, 5, 3.5e6
HOST_BYTES_S: Final = 8e9
TOPIC_TOKENS: Final = 150
N_TOKEN: Final = 800
SPANS: Final = {
    "first 16": slice(0, 16), "first 40": slice(0, 40), "first 100": slice(0, 100),
    "after 100": slice(100, None), "all": slice(0, None),
}  # fmt: skip
"""Tokens that are compared, counted from the opening of the model."""
MODES: Final[tuple[HostExpertsMode, ...]] = ("auto", "on", "off")
Routes = list[list[list[int]]]


@dataclass(slots=True)
class Speeds:
    """Seconds: per page uploaded and computed, on the device too; fixed parts; a token's rest."""

    upload_s: float
    host_s: float
    device_s: float = 0.0
    upload_fixed_s: float = 0.0003
    host_fixed_s: float = 0.0004
    rest_s: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How experts are chosen, and how many slots a layer has: see `make_routes`."""

    locality: float
    skew: float
    n_slots: int


KINDS: Final = (
    Kind(locality=0.0, skew=0.3, n_slots=8), Kind(locality=0.3, skew=1.0, n_slots=12),
    Kind(locality=0.6, skew=0.5, n_slots=12), Kind(locality=0.6, skew=1.0, n_slots=16),
    Kind(locality=0.9, skew=1.2, n_slots=16),
)  # fmt: skip


class World:
    """A device tier as the gate sees it, in simulated time."""

    def __init__(self, speeds: Speeds, n_slots: int, mode: HostExpertsMode) -> None:
        """Open it: pages each way tell what uploading and computing cost."""
        self.now = 0.0
        self.speeds, self.n_slots = speeds, n_slots
        self.caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(N_LAYER)]
        self.gate = MissGate(n_slots, mode, clock=lambda: self.now)
        self.rng = random.Random(5)
        self.tokens_s: list[float] = []
        self.n_hits = self.n_asked = 0
        for n in (1, N_USED):
            self.gate.upload.suppose(n, self._take(speeds.upload_fixed_s + n * speeds.upload_s))
            self.gate.compute.suppose(n, self._take(speeds.host_fixed_s + n * speeds.host_s))

    def run(self, routes: Routes) -> "World":
        """Decode tokens that take these routes."""
        for token in routes:
            began = self.now
            self.gate.begin(prefill=False)
            for il, experts in enumerate(token):
                self._layer(il, experts)
            self.gate.end()
            self.tokens_s.append(self.now - began)
        return self

    def _layer(self, il: int, experts: Sequence[int]) -> None:
        speeds, cache = self.speeds, self.caches[il]
        missing = [e for e in experts if e not in cache]
        self.n_asked += len(experts)
        self.n_hits += len(experts) - len(missing)
        for e in experts:
            if e in cache:
                cache.move_to_end(e)
        n_away = self.gate.away(il, experts, len(missing), max(0, self.n_slots - len(cache)))
        assert 0 <= n_away <= len(missing)
        sent, away = missing[: len(missing) - n_away], missing[len(missing) - n_away :]
        if sent:
            took = self._take(speeds.upload_fixed_s + len(sent) * speeds.upload_s)
            self.now += took
            self.gate.uploaded(len(sent), took)
            self._insert(cache, sent, experts)
        here_s = speeds.device_s * (len(experts) - len(away))
        if away:
            took = self._take(speeds.host_fixed_s + len(away) * speeds.host_s)
            self.gate.computed(len(away), len(away), took)
            here_s = max(here_s, took)
        self.now += here_s + self._take(speeds.rest_s / N_LAYER)

    def _insert(self, cache: OrderedDict[int, None], sent: Sequence[int], held: Any) -> None:
        cache.update(dict.fromkeys(sent))
        for page in [page for page in cache if page not in held]:
            if len(cache) <= self.n_slots:
                break
            del cache[page]

    def _take(self, seconds: float) -> float:
        """Disturb a time: a little always, and very much now and then."""
        disturbed = 1 + abs(self.rng.gauss(0, 0.03))
        return seconds * (disturbed + 3 * (self.rng.random() < 0.01))


def make_routes(n_token: int, locality: float, skew: float, seed: int = 1) -> Routes:
    """Draw routes whose experts come again soon, and of which some are popular; topics change."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, N_EXPERT + 1) ** skew
    weights /= weights.sum()
    found: Routes = []
    for t in range(n_token):
        if t % TOPIC_TOKENS == 0:
            ranks = [rng.permutation(N_EXPERT) for _ in range(N_LAYER)]
        token = []
        for il in range(N_LAYER):
            fresh = rng.choice(N_EXPERT, N_USED, replace=False, p=weights[ranks[il]]).tolist()
            kept = [e for e in found[-1][il] if rng.random() < locality] if found else []
            token.append([*kept, *(e for e in fresh if e not in kept)][:N_USED])
        found.append(token)
    return found


def draw(rng: random.Random) -> tuple[Speeds, Kind]:
    """Draw a setting: a link of 50 MB/s to 10 GB/s, a processor a tenth to ten times the usual."""
    host_s = PAGE_BYTES / HOST_BYTES_S * 10 ** rng.uniform(-1, 1)
    speeds = Speeds(
        upload_s=PAGE_BYTES / 10 ** rng.uniform(7.7, 10), host_s=host_s,
        device_s=host_s * rng.choice([0.0, 0.3, 1.0]), upload_fixed_s=10 ** rng.uniform(-4, -3),
        host_fixed_s=10 ** rng.uniform(-4, -2.7), rest_s=10 ** rng.uniform(-2.3, -1.3),
    )  # fmt: skip
    return speeds, rng.choice(KINDS)


def compare(speeds: Speeds, n_slots: int, routes: Routes) -> dict[str, float]:
    """Return the time of `auto` over the better fixed choice's, for each of the spans."""
    took = {mode: World(speeds, n_slots, mode).run(routes).tokens_s for mode in MODES}
    return {
        name: sum(took["auto"][span]) / min(sum(took["on"][span]), sum(took["off"][span]))
        for name, span in SPANS.items()
    }


def simulate(n_settings: int, seed: int) -> dict[str, list[float]]:
    """Return those ratios of random settings, for each span from the least on."""
    rng = random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in SPANS}
    for i in range(n_settings):
        speeds, kind = draw(rng)
        routes = make_routes(N_TOKEN, kind.locality, kind.skew, seed * 100_003 + i)
        for name, ratio in compare(speeds, kind.n_slots, routes).items():
            found[name].append(ratio)
    return {name: sorted(ratios) for name, ratios in found.items()}


def say(found: Mapping[str, Sequence[float]]) -> list[str]:
    """Put the ratios of each span into a line."""
    return [
        f"{name:>9} tokens: median {statistics.median(ratios):.3f}, 9 of 10 below "
        f"{ratios[int(0.9 * len(ratios))]:.3f}, worst {ratios[-1]:.3f}"
        for name, ratios in found.items()
    ]


@click.command()
@click.option("--settings", "n_settings", default=300, show_default=True,
              type=click.IntRange(1, 100_000), help="Random settings.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Other ones by another seed.")
def main(n_settings: int, seed: int) -> None:
    """Print the time of `auto` over the better fixed choice's, over random settings."""
    click.echo("\n".join(say(simulate(n_settings, seed))))


if __name__ == "__main__":
    main()
