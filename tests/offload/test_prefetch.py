"""Predictors by what they learn, and the gate that lets prefetch run only while it wins."""

import random

import pytest

from edgeroute.offload.eviction_cliff import CycleShape, cyclic_trace
from edgeroute.offload.prefetch import PREDICTORS, Eam, Guess, make_predictor
from edgeroute.offload.prefetch_gate import GateParams, PrefetchGate, StepCost
from edgeroute.offload.replay import replay_predictor
from edgeroute.offload.trace import TraceError
from edgeroute.runtime.errors import UsageError

N_LAYER, N_EXPERT = 4, 10


def test_none_names_nothing() -> None:
    predictor = make_predictor("none", N_LAYER, N_EXPERT)
    predictor.begin_step()
    assert not predictor.predict(0, [1], [2])
    predictor.end_sequence()


def test_gate_passes_the_guess_on_votes_first_then_rank() -> None:
    predictor = make_predictor("gate", N_LAYER, N_EXPERT)
    ranked = predictor.predict(1, [0], [7, 3, 5, 3])
    assert [guess.page for guess in ranked] == [23, 27, 25]
    assert [guess.score for guess in ranked] == sorted((g.score for g in ranked), reverse=True)
    assert not predictor.predict(1, [0], None)
    assert not predictor.predict(N_LAYER - 1, [0], [1])


def test_frequency_ranks_what_was_chosen_more_often_and_lately() -> None:
    predictor = make_predictor("frequency", N_LAYER, N_EXPERT)
    for ids in ([4, 5], [4, 6], [4, 6]):
        predictor.begin_step()
        predictor.predict(0, [0], None)
        predictor.predict(1, ids, None)
    predictor.begin_step()
    assert [guess.page for guess in predictor.predict(0, [0], None)] == [14, 16, 15]
    assert not predictor.predict(N_LAYER - 1, [0], None)


def _route(kind: int, layer: int) -> list[int]:
    """Two experts per layer; kinds of sequences share none."""
    return [(2 * kind + layer) % N_EXPERT, (2 * kind + layer + 1) % N_EXPERT]


def _run_sequence(predictor: Eam, kind: int, n_tokens: int) -> list[list[list[int]]]:
    """What it named at each token and layer."""
    named = []
    for _ in range(n_tokens):
        predictor.begin_step()
        named.append(
            [
                [guess.page for guess in predictor.predict(layer, _route(kind, layer), None)[:2]]
                for layer in range(N_LAYER)
            ]
        )
    predictor.end_sequence()
    return named


def test_eam_recognises_a_sequence_from_its_first_layer() -> None:
    """The first token already gets a signal: the layers run so far take part in the match."""
    predictor = Eam(N_LAYER, N_EXPERT)
    first = _run_sequence(predictor, 0, 3)
    assert first[0][0] == [] and len(first[1][0]) == 2  # nothing kept: its own counts answer
    for kind in (1, 2, 3):
        _run_sequence(predictor, kind, 3)
    for kind in (3, 0, 2):
        named = _run_sequence(predictor, kind, 2)
        for token in named:
            for layer in range(N_LAYER - 1):
                expected = [(layer + 1) * N_EXPERT + e for e in _route(kind, layer + 1)]
                assert sorted(token[layer]) == sorted(expected)
            assert token[N_LAYER - 1] == []


def test_eam_keeps_a_bounded_diverse_collection() -> None:
    predictor = Eam(N_LAYER, N_EXPERT)
    predictor.capacity = 3
    for kind in (0, 1, 1, 1, 1, 2, 2, 2):
        _run_sequence(predictor, kind, 1)
    named = {kind: _run_sequence(predictor, kind, 1)[0][0] for kind in (0, 1, 2)}
    for kind, pages in named.items():
        assert sorted(pages) == sorted(N_EXPERT + expert for expert in _route(kind, 1))
    predictor.end_sequence()  # an empty sequence is not kept


def test_eam_looks_several_layers_ahead_nearest_first() -> None:
    predictor = Eam(N_LAYER, N_EXPERT)
    predictor.n_ahead = 3
    _run_sequence(predictor, 0, 2)
    predictor.begin_step()
    ranked = predictor.predict(0, _route(0, 0), None)
    assert [guess.page // N_EXPERT for guess in ranked] == [1, 1, 2, 2, 3, 3]
    assert all(isinstance(guess, Guess) for guess in ranked)


def test_predictors_are_judged_by_a_trace() -> None:
    """On a repeating route every learner is right; a random one gives the base rate."""
    shape = CycleShape(n_layer=6, n_expert=20, n_expert_used=2)
    still = cyclic_trace(shape, 50, 1.0)
    noise = cyclic_trace(shape, 200, 0.0)
    for name in ("eam", "frequency"):
        found = replay_predictor(still, make_predictor(name, 6, 20), 2)
        assert found.n_needed == 50 * 5 * 2
        assert found.recall == 0.98  # all but the first token
        assert found.precision == 1.0
        assert replay_predictor(noise, make_predictor(name, 6, 20), 2).recall < 0.2
    assert replay_predictor(still, make_predictor("none", 6, 20), 2).precision == 0.0
    with pytest.raises(TraceError):
        one = CycleShape(n_layer=1, n_expert=4, n_expert_used=1)
        replay_predictor(cyclic_trace(one, 5, 1.0), make_predictor("none", 1, 4), 1)


def test_unknown_predictors_and_sizes_are_refused() -> None:
    assert sorted(PREDICTORS) == ["eam", "frequency", "gate", "none", "random"]
    with pytest.raises(UsageError, match="no predictor is called 'oracle'"):
        make_predictor("oracle", 1, 1)
    for name in PREDICTORS:
        with pytest.raises(UsageError, match="0 x 4"):
            make_predictor(name, 0, 4)
        with pytest.raises(UsageError, match="at most"):
            make_predictor(name, 1 << 12, 1 << 12)


PARAMS = GateParams(
    window_steps=4,
    skip_steps=1,
    n_rounds=2,
    warmup_steps=3,
    first_wait_steps=10,
    wait_growth=2.0,
    max_wait_steps=45,
    step_budget_bytes=100,
)


def run_gate(gate: PrefetchGate, n_steps: int, on_s: float, useful: int = 100) -> str:
    """Steps that cost 1 s off and `on_s` on; which ones were on, as `.` and `+`."""
    shown = ""
    for _ in range(n_steps):
        on = gate.begin_step()
        cost = StepCost(stall_s=1.0)
        if on:
            cost = StepCost(stall_s=on_s, prefetched_bytes=100, useful_bytes=useful)
        gate.end_step(cost)
        shown += "+" if on else "."
    return shown


def test_prefetch_stays_on_while_it_wins_and_is_tested_again() -> None:
    gate = PrefetchGate(PARAMS)
    trial = "....++++....++++"
    assert run_gate(gate, 19, 0.5) == "..." + trial
    report = gate.report()
    assert (report.state, report.n_trials, report.n_wins) == ("on", 1, 1)
    assert (report.stall_on_s, report.stall_off_s, report.useful_ratio) == (0.5, 1.0, 1.0)
    assert run_gate(gate, 26, 0.5) == "+" * 10 + trial
    assert gate.report().next_trial_steps == 20


def test_prefetch_that_loses_is_off_and_tested_ever_more_rarely() -> None:
    gate = PrefetchGate(PARAMS)
    trial = "....++++....++++"
    expected = "..." + "".join(trial + "." * wait for wait in (10, 20, 40, 45, 45))
    assert run_gate(gate, len(expected), 1.2) == expected
    assert gate.report().n_wins == 0 and gate.report().state == "off"


@pytest.mark.parametrize(("on_s", "wins"), [(0.98, 1), (0.995, 0), (1.0, 0), (float("nan"), 0)])
def test_an_equal_or_hardly_better_result_is_no_win(on_s: float, wins: int) -> None:
    gate = PrefetchGate(PARAMS)
    run_gate(gate, 19, on_s)
    assert gate.report().n_wins == wins


def test_a_window_of_vain_bytes_ends_a_trial_and_an_on_state_at_once() -> None:
    gate = PrefetchGate(PARAMS)
    assert run_gate(gate, 14, 0.5, useful=49) == "..." + "....++++" + "..."
    assert gate.report().state == "off" and gate.report().useful_ratio == 0.49
    gate = PrefetchGate(PARAMS)
    run_gate(gate, 19, 0.5)
    assert run_gate(gate, 6, 0.5, useful=10) == "++++.."
    assert gate.report().state == "off"


def test_a_trial_without_any_prefetch_proves_nothing() -> None:
    gate = PrefetchGate(PARAMS)
    for _ in range(19):
        gate.end_step(StepCost(stall_s=0.1 if gate.begin_step() else 1.0))
    assert gate.report().state == "off" and gate.report().useful_ratio is None


def test_forbidden_prefetch_is_never_tried() -> None:
    gate = PrefetchGate(PARAMS, allowed=False)
    assert run_gate(gate, 100, 0.1) == "." * 100
    assert gate.report().state == "forbidden" and gate.report().n_trials == 0


def test_a_step_may_take_its_byte_budget_and_no_more() -> None:
    gate = PrefetchGate(PARAMS)
    gate.begin_step()
    assert not gate.take(1)  # off
    run_gate(gate, 19, 0.5)
    for _ in range(2):
        assert gate.begin_step()
        assert gate.take(60) and not gate.take(41) and gate.take(40) and not gate.take(1)


def test_trials_cost_a_small_share_of_all_steps_when_prefetch_loses() -> None:
    """The promise of at most 2 % is kept by steps, whatever they cost up to twice."""
    gate = PrefetchGate()
    shown = run_gate(gate, 20_000, 1.5)
    assert 0 < shown.count("+") * 0.5 < 0.005 * len(shown)


def lasting_gate(seed: int, on_s: float, n_steps: int = 600) -> tuple[bool, int]:
    """Steps of widely scattered cost: whether it is on at the end, and how often it was."""
    draw, gate, n_on = random.Random(seed), PrefetchGate(), 0
    for _ in range(n_steps):
        on = gate.begin_step()
        n_on += on
        cost = draw.lognormvariate(0.0, 0.3) * (on_s if on else 1.0)
        moved = 100 if on else 0
        gate.end_step(StepCost(stall_s=cost, prefetched_bytes=moved, useful_bytes=moved))
    return gate.report().state == "on", n_on


def test_a_small_gain_is_found_and_a_small_loss_left_among_scattered_steps() -> None:
    """A tenth among steps that scatter by a third: one short trial would be a coin thrown."""
    gains = [lasting_gate(seed, 0.9) for seed in range(60)]
    losses = [lasting_gate(seed, 1.1) for seed in range(60)]
    assert sum(on for on, _ in gains) >= 48
    assert sum(on for on, _ in losses) <= 6
    assert sum(n_on for _, n_on in losses) * 0.1 < 0.02 * 60 * 600


def test_a_sure_loss_ends_a_trial_early_and_is_not_repeated_soon() -> None:
    gate = PrefetchGate()
    assert run_gate(gate, 16 + 16 + 512, 2.0) == "." * 16 + "." * 8 + "+" * 8 + "." * 512


def test_contradicting_settings_are_refused() -> None:
    for wrong in (
        {"skip_steps": 8},
        {"n_rounds": 0},
        {"wait_growth": 0.5},
        {"warmup_steps": -1},
        {"n_open": -1},
        {"open_wait_steps": 0},
    ):
        with pytest.raises(UsageError, match="contradict"):
            GateParams(**wrong)  # type: ignore[arg-type]


def test_the_gate_follows_a_workload_that_changes() -> None:
    gate = PrefetchGate(PARAMS)
    run_gate(gate, 500, 1.3)
    assert gate.report().n_wins == 0
    assert run_gate(gate, 200, 0.6).count("+") > 60
    assert gate.report().n_wins > 0
