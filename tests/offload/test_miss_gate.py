"""Who computes what a device misses: by costs, by what a cache would have hit, by measured tokens.

A simulated device: one cache per layer, least recently used out first, behind a link; a processor
that computes pages instead; and a clock that only they move.
"""

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from edgeroute.offload.miss_cost import Cost
from edgeroute.offload.miss_gate import HostExpertsMode, MissGate, MissParams
from edgeroute.offload.miss_trial import TrialParams
from edgeroute.runtime.errors import UsageError

N_LAYER, N_EXPERT, N_USED, PAGE_BYTES = 2, 48, 5, 3.5e6
HOST_BYTES_S = 8e9
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


class World:
    """A device tier as the gate sees it, in simulated time."""

    def __init__(self, speeds: Speeds, n_slots: int, mode: HostExpertsMode) -> None:
        self.now = 0.0
        self.speeds, self.n_slots = speeds, n_slots
        self.caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(N_LAYER)]
        self.gate = MissGate(n_slots, mode, clock=lambda: self.now)
        self.rng = random.Random(5)
        self.tokens_s: list[float] = []
        self.n_hits = self.n_asked = 0

    def run(self, routes: Routes) -> "World":
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
        n_free = max(0, self.n_slots - len(cache))
        rest = missing[n_free:]
        n_away = self.gate.away(il, experts, len(rest))
        assert 0 <= n_away <= len(rest)
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
        if t % 150 == 0:
            ranks = [rng.permutation(N_EXPERT) for _ in range(N_LAYER)]
        token = []
        for il in range(N_LAYER):
            fresh = rng.choice(N_EXPERT, N_USED, replace=False, p=weights[ranks[il]]).tolist()
            kept = [e for e in found[-1][il] if rng.random() < locality] if found else []
            token.append([*kept, *(e for e in fresh if e not in kept)][:N_USED])
        found.append(token)
    return found


KINDS = {"even": (0.0, 0.3, 8), "popular": (0.3, 1.0, 12), "recurring": (0.6, 0.5, 12)}
LINKS_BYTES_S = (5e7, 3e8, 1e9, 3e9, 1e10)
N_WARM, N_TOKEN = 60, 400


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link_bytes_s", LINKS_BYTES_S)
def test_never_much_slower_than_the_better_fixed_choice(kind: str, link_bytes_s: float) -> None:
    """Within 5 % once the first tokens have told what things cost; and those cost little."""
    locality, skew, n_slots = KINDS[kind]
    routes = make_routes(N_TOKEN, locality, skew)
    for host_ratio in (0.2, 1.0, 8.0):
        for device_ratio in (0.0, 1.0):
            host_s = PAGE_BYTES / HOST_BYTES_S * host_ratio
            speeds = Speeds(PAGE_BYTES / link_bytes_s, host_s, device_ratio * host_s)
            worlds = {mode: World(speeds, n_slots, mode).run(routes)
                      for mode in ("auto", "on", "off")}  # fmt: skip
            for first, most in ((N_WARM, 1.05), (0, 1.1)):
                took = {mode: sum(world.tokens_s[first:]) for mode, world in worlds.items()}
                best = min(took["on"], took["off"])
                assert took["auto"] <= most * best, (host_ratio, device_ratio, took)


@pytest.mark.parametrize(("link_bytes_s", "state"), [(1e8, "compute"), (2e10, "upload")])
def test_what_costs_say_is_chosen(link_bytes_s: float, state: str) -> None:
    """A slow link leaves misses to the processor, a fast one and a slow processor do not."""
    routes = make_routes(200, 0.6, 1.0)
    world = World(Speeds(PAGE_BYTES / link_bytes_s, 0.002), 16, "auto").run(routes)
    report = world.gate.report()
    assert world.gate.state == report.state == state
    assert (report.n_computed > report.n_uploaded) == (state == "compute")
    assert report.upload is not None and report.compute is not None
    assert report.upload.each_s == pytest.approx(PAGE_BYTES / link_bytes_s, rel=0.2)
    assert report.compute.each_s == pytest.approx(0.002, rel=0.2)


def test_uploads_pay_later() -> None:
    """One upload costs thrice what computing does; its page hits so often that uploads win."""
    routes = make_routes(300, 0.9, 1.2)
    speeds = Speeds(0.006, 0.002)
    off, auto = (World(speeds, 16, mode).run(routes) for mode in ("off", "auto"))
    on = World(speeds, 16, "on").run(routes)
    assert off.n_hits > 1.5 * on.n_hits
    assert sum(off.tokens_s) < sum(on.tokens_s)
    assert auto.gate.state == "upload"


def test_a_drift_is_followed() -> None:
    """The link collapses and comes back: seen by uploads now and then, without a prompt."""
    routes = make_routes(1600, 0.5, 0.8)
    speeds = Speeds(PAGE_BYTES / 2e10, 0.003)
    world = World(speeds, 12, "auto").run(routes[:300])
    assert world.gate.state == "upload"
    speeds.upload_s = PAGE_BYTES / 5e7
    world.run(routes[300:400])
    assert world.gate.state == "compute"
    speeds.upload_s = PAGE_BYTES / 2e10
    world.run(routes[400:1600])
    assert not world.gate.computing


def test_forced_choices() -> None:
    routes = make_routes(40, 0.5, 0.5)
    on = World(Speeds(0.001, 1.0), 8, "on").run(routes).gate
    off = World(Speeds(1.0, 0.001), 8, "off").run(routes).gate
    assert on.state == "on" and on.report().n_computed_leases == on.report().n_leases > 0
    assert off.state == "off" and off.report().n_computed == off.report().n_trials == 0


def test_prompts_go_the_quicker_way_and_are_no_trials() -> None:
    gate = MissGate(8, "auto", clock=lambda: 0.0)
    for _ in range(100):
        gate.begin(prefill=True)
        assert gate.away(0, [1, 2, 3], 3) == gate.away(0, [1, 2, 3], 3, n_pairs=3) == 0
        gate.uploaded(3, 0.1)
        gate.end()
    assert gate.report().n_leases == gate.n_trials == 0 and gate.upload.n_pages == 300
    for _ in range(4):
        gate.begin(prefill=False)
        gate.computed(3, 3, 0.012)
        gate.end()
    gate.begin(prefill=True)
    assert gate.away(0, [1, 2, 3], 3) == 0  # as the tokens before it
    gate.computing = True
    assert gate.away(0, [1, 2, 3], 3) == 3
    assert [gate.away(0, [1, 2, 3], 3, n_pairs=n) for n in (20, 30)] == [3, 0]
    gate.computed(3, 30, 0.04)  # ten pairs each read their page once
    assert [gate.away(0, [1, 2, 3], 3, n_pairs=n) for n in (30, 90)] == [3, 0]
    assert gate.compute.of(3) == pytest.approx(0.012) and gate.report().n_computed == 15


def test_forced_computing_takes_prompts_too() -> None:
    gate = MissGate(8, "on", clock=lambda: 0.0)
    gate.begin(prefill=True)
    assert gate.away(0, [1, 2, 3], 2, n_pairs=100) == 2


def test_few_missing_pages_are_uploaded_where_the_fixed_part_weighs_more() -> None:
    """Computing is decided on; a lease that misses one page alone is quicker uploaded."""
    gate = MissGate(4, "auto", clock=lambda: 0.0)
    gate.begin(prefill=False)
    for n in (1, 4, 1, 4, 1, 4):
        gate.uploaded(n, 0.010 * n)
        gate.computed(n, n, 0.020 + 0.001 * n)
    gate.computing, gate._n_usual = True, 4
    assert [gate.away(0, range(8), n) for n in (4, 3, 1, 0)] == [4, 3, 0, 0]


def test_disk_waits_are_not_held_against_a_way() -> None:
    now = [0.0]
    gate = MissGate(4, "auto", clock=lambda: now[0])
    gate.begin(prefill=False)
    gate.uploaded(1, 0.01)
    gate.computed(1, 1, 0.001)
    gate.away(0, [1, 2], 2)
    now[0] = 5.0
    gate.end(elsewhere_s=4.9)
    known = gate.report()
    assert known.upload_step_s is not None and known.upload_step_s == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [
    {"window_steps": 0}, {"max_skip_steps": -1}, {"n_rounds": 0}, {"stop_ratio": 1.0},
    {"clear_ratio": 1.0},
])  # fmt: skip
def test_trials_that_tell_nothing(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="miss gate settings"):
        TrialParams(**bad)


@pytest.mark.parametrize("bad", [
    {"min_gain_ratio": 1.0}, {"doubt_ratio": 1.0}, {"first_doubt_ratio": 1.2},
    {"early_gain_ratio": -0.1},
    {"review_steps": 0}, {"first_wait_steps": 0}, {"max_wait_steps": 1}, {"wait_growth": 0.5},
])  # fmt: skip
def test_settings_that_contradict_each_other(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="miss gate settings"):
        MissParams(**bad)


# costs


def test_a_cost_finds_both_its_parts() -> None:
    cost = Cost()
    assert cost.report() is None and not cost.is_known and cost.of(3) == 0
    for i in range(40):
        n = 1 + i % 6
        cost.add(n, 0.002 + 0.01 * n + (0.5 if i == 17 else 0))
    cost.add(0, 9.0)
    found = cost.report()
    assert found is not None and found.n == 40 and cost.n_pages == sum(1 + i % 6 for i in range(40))
    assert found.each_s == pytest.approx(0.01, rel=0.05)
    assert found.fixed_s == pytest.approx(0.002, rel=0.25)
    assert cost.of(0) == 0 and cost.of(4) == pytest.approx(0.042, rel=0.05)


def test_one_number_of_pages_tells_no_fixed_part() -> None:
    cost = Cost()
    for _ in range(5):
        cost.add(4, 0.2)
    assert cost.of(1) == pytest.approx(0.05) and cost.of(8) == pytest.approx(0.4)


def test_a_lasting_change_is_believed_and_a_single_one_is_not() -> None:
    cost = Cost()
    for _ in range(30):
        cost.add(2, 0.02)
    cost.add(2, 0.5)
    cost.add(2, 0.5)
    assert cost.is_doubtful
    cost.add(2, 0.02)
    assert not cost.is_doubtful and cost.of(2) == pytest.approx(0.02)
    for _ in range(3):
        cost.add(1, 0.2)
    assert cost.of(1) == pytest.approx(0.2)
