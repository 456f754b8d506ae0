"""Who computes what a device misses: by costs, by what a cache would have hit, by measured tokens.

A simulated device: one cache per layer, least recently used out first, behind a link; a processor
that computes pages instead; and a clock that only they move.
"""

from statistics import median
from typing import Any

import pytest

from edgeroute.offload.miss_budget import Budget, BudgetParams, Budgets
from edgeroute.offload.miss_cost import Cost
from edgeroute.offload.miss_gate import MissGate, MissParams
from edgeroute.offload.miss_trial import TrialParams
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench.tiers_sim import (
    HOST_BYTES_S,
    PAGE_BYTES,
    Speeds,
    World,
    make_routes,
    say,
    simulate,
)

KINDS = {"even": (0.0, 0.3, 8), "popular": (0.3, 1.0, 12), "recurring": (0.6, 0.5, 12)}
LINKS_BYTES_S = {
    5e7: (0.8, 1.3, 1.05), 3e8: (1.25, 1.1, 1.05), 1e9: (1.25, 1.05, 1.05),
    3e9: (1.25, 1.05, 1.05), 1e10: (1.25, 1.05, 1.05),
}  # fmt: skip
"""With the most time over the better fixed choice's that each span may take."""
SPANS = slice(0, 16), slice(60, None), slice(0, None)
N_TOKEN = 400


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link_bytes_s", LINKS_BYTES_S)
def test_never_much_slower_than_the_better_fixed_choice(kind: str, link_bytes_s: float) -> None:
    """Both fixed choices fill all slots at once; over a slow link this one does it bit by bit."""
    locality, skew, n_slots = KINDS[kind]
    routes = make_routes(N_TOKEN, locality, skew)
    for host_ratio in (0.2, 1.0, 8.0):
        for device_ratio in (0.0, 1.0):
            host_s = PAGE_BYTES / HOST_BYTES_S * host_ratio
            speeds = Speeds(PAGE_BYTES / link_bytes_s, host_s, device_ratio * host_s)
            worlds = {mode: World(speeds, n_slots, mode).run(routes)
                      for mode in ("auto", "on", "off")}  # fmt: skip
            for span, most in zip(SPANS, LINKS_BYTES_S[link_bytes_s], strict=True):
                took = {mode: sum(world.tokens_s[span]) for mode, world in worlds.items()}
                best = min(took["on"], took["off"])
                assert took["auto"] <= most * best, (host_ratio, device_ratio, span, took)


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
    assert gate.away(0, [1, 2, 3], 3) == 3  # by what is known of both costs by now
    gate.computing = False
    assert gate.away(0, [1, 2, 3], 3) == 0  # as the tokens before it
    gate.computing = True
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
    for _ in range(gate.params.review_steps):
        gate.begin(prefill=False)
        assert gate.away(0, [1, 2], 2)
        now[0] += 5.0
        gate.end(elsewhere_s=4.9)
    known = gate.report()
    assert known.compute_step_s is not None and known.compute_step_s == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [
    {"window_steps": 0}, {"max_skip_steps": -1}, {"n_rounds": 0}, {"stop_ratio": 1.0},
    {"clear_ratio": 1.0},
])  # fmt: skip
def test_trials_that_tell_nothing(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="miss gate settings"):
        TrialParams(**bad)


@pytest.mark.parametrize("bad", [
    {"min_gain_ratio": 1.0}, {"doubt_ratio": 1.0}, {"first_doubt_ratio": 1.2},
    {"early_gain_ratio": -0.1}, {"start_ratio": 0.0},
    {"review_steps": 0}, {"first_wait_steps": 0}, {"max_wait_steps": 1}, {"wait_growth": 0.5},
])  # fmt: skip
def test_settings_that_contradict_each_other(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="miss gate settings"):
        MissParams(**bad)


# before anything is measured, and what is paid for later


def test_nothing_is_sent_over_a_slow_link_that_a_short_answer_does_not_pay_back() -> None:
    """A page takes 40 ms to upload and 0.3 ms to compute: free slots stay free."""
    routes = make_routes(40, 0.6, 1.0)
    speeds = Speeds(0.04, 0.0003)
    auto, on = (World(speeds, 16, mode).run(routes) for mode in ("auto", "on"))
    assert auto.gate.upload.n_pages == 0 and not any(auto.caches)
    assert on.gate.upload.n_pages == 32
    assert sum(auto.tokens_s) < 0.7 * sum(on.tokens_s)
    assert auto.gate.state == "compute" and auto.gate.n_trials == 0


def test_free_slots_are_filled_where_hits_soon_bring_it_back() -> None:
    """A page takes 2 ms to upload and 1.5 ms to compute, and is soon asked for again."""
    routes = make_routes(40, 0.6, 1.0)
    world = World(Speeds(0.002, 0.0015), 16, "auto").run(routes[:1])
    assert all(world.caches) and world.gate.computing
    world.run(routes[1:])
    assert [len(cache) for cache in world.caches] == [16, 16]


def test_the_first_way_is_that_of_what_was_tried_at_opening() -> None:
    for upload_s, host_s, first in ((0.001, 0.01, "upload"), (0.01, 0.001, "compute")):
        world = World(Speeds(upload_s, host_s), 8, "auto").run(make_routes(1, 0.0, 0.3))
        assert world.gate.state == first
        assert world.gate.upload.n_pages == (10 if first == "upload" else 0)


def test_short_runs_and_long_ones_over_random_settings() -> None:
    """Other settings than those that the gate was tuned with; figures do not vary."""
    found = simulate(24, seed=4242)
    worst = {"first 16": 1.3, "first 40": 1.3, "all": 1.1}
    assert all(found[span][-1] <= most for span, most in worst.items()), say(found)
    usual = {"first 16": 1.02, "first 40": 1.03, "all": 1.015}
    assert all(median(found[span]) <= most for span, most in usual.items()), say(found)
    assert len(say(found)) == len(found) == 5


def test_a_budget_spends_a_share_of_the_time_and_what_it_saved() -> None:
    budget = Budget(0.1)
    assert not budget.spend(0.01)
    budget.elapsed_s = 1.0
    assert budget.spend(0.06) and not budget.spend(0.06) and budget.spent_s == 0.06
    budget.save(0.05)
    assert budget.spend(0.06)
    budget.save(9.0)
    assert budget.saved_s == budget.spent_s  # it cannot have saved more than it has cost
    assert budget.spend(0.1) and not budget.spend(0.01)


def test_a_hit_saves_its_part_of_the_waits_for_the_disk_too() -> None:
    """Computing is as good as free here, but what the device holds need not be read."""
    upload, compute = Cost(), Cost()
    upload.suppose(1, 0.01)
    compute.suppose(1, 1e-6)
    params = BudgetParams(fill_horizon_steps=0, fill_ratio=0.03)
    without, with_waits = Budgets(params), Budgets(params)
    for _ in range(20):
        without.end_step(0.05, 0.0, 10)
        with_waits.end_step(0.05, 0.02, 10)
    assert without.n_filled(4, upload, compute, 0.3) == 0
    assert with_waits.n_filled(4, upload, compute, 0.3) == 4
    assert with_waits.n_filled(4, upload, compute, 0.3) == 0  # the budget is spent
    for _ in range(10):
        with_waits.end_step(0.05, 0.02, 10)
    assert with_waits.n_filled(4, upload, compute, 0.3) == 1  # it pays for one more
    assert with_waits.n_filled(0, upload, compute, 0.3) == 0


@pytest.mark.parametrize("bad", [
    {"fill_steps": -1.0}, {"fill_horizon_steps": -1}, {"fill_ratio": 1.5},
    {"trial_ratio": -0.1}, {"trial_steps": 0},
])  # fmt: skip
def test_budgets_without_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="miss gate settings"):
        BudgetParams(**bad)


# costs


def test_what_is_supposed_counts_nowhere_and_gives_way_to_what_is_measured() -> None:
    cost = Cost()
    cost.suppose(1, 0.011)
    cost.suppose(5, 0.051)
    assert cost.is_known and cost.n == cost.n_pages == 0 and cost.seconds == 0
    assert cost.of(3) == pytest.approx(0.031) and cost.fixed_s == pytest.approx(0.001)
    report = cost.report()
    assert report is not None and report.n == 0
    for _ in range(3):
        cost.add(2, 0.2)
    assert cost.of(2) == pytest.approx(0.2)


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
