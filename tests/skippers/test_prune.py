"""The choice of tokens in plain numbers, and the steps that ask for it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.token_choice import BY_ATTENTION, MIN_TOKENS, TokenRule, ranked_rule
from edgeroute.skippers import prune

RULES = [BY_ATTENTION, prune.BY_POSITION, prune.at_random(3)]


@given(
    st.integers(1, 700), st.integers(1, 100), st.integers(0, 2000), st.integers(0, 60),
    st.sampled_from(RULES), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_so_many_are_kept_and_some_always(
    n: int, keep: int, pos: int, n_out: int, rule: TokenRule, seed: int
) -> None:
    n_out = min(n, n_out)
    attention = np.random.default_rng(seed).random(n).astype(np.float32)
    ids = prune.choose(rule, attention, keep, pos=pos, n_out=n_out)
    assert (np.diff(ids) > 0).all() and ids.min() >= 0 and ids.max() == n - 1
    n_kept = rule.n_kept(n, keep, n_out)
    if n_kept is None:
        assert len(ids) == n
        assert keep == 100 or n < MIN_TOKENS or keep * n > 100 * (n - 1) or n_out > n - 5
        return
    assert len(ids) == n_kept >= keep * n / 100
    first = set(range(max(0, rule.n_first - pos)))
    last = set(range(n - max(rule.n_recent, n_out), n))
    assert first | last <= set(ids.tolist())


def test_attention_decides_by_its_rank_alone() -> None:
    attention = np.random.default_rng(1).random(300).astype(np.float32)
    ids = prune.choose(BY_ATTENTION, attention, 40)
    assert np.array_equal(ids, prune.choose(BY_ATTENTION, attention**3, 40))
    free = np.arange(BY_ATTENTION.n_first, 300 - BY_ATTENTION.n_recent)
    kept = free[np.isin(free, ids)]
    left_out = free[~np.isin(free, ids)]
    assert len(left_out) and attention[kept].min() > attention[left_out].max()


def test_position_keeps_the_latest_and_chance_differs_between_passes() -> None:
    nothing = np.zeros(300, np.float32)
    assert prune.choose(prune.BY_POSITION, nothing, 40).tolist()[4:] == list(range(184, 300))
    rule = prune.at_random(3)
    one, same = (prune.choose(rule, nothing, 40) for _ in range(2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, prune.choose(rule, nothing, 40, pos=300))
    assert not np.array_equal(one, prune.choose(prune.at_random(4), nothing, 40))


def test_the_four_factors() -> None:
    known = prune.factors(np.array([0.5, 2.0, 0.0, 1.0], np.float32), 4, 30)
    assert known[:, 0] == pytest.approx([5 / 8, 6 / 8, 7 / 8, 1])
    assert known[:, 1] == pytest.approx(np.tanh([0.5, 2, 0, 1]))
    assert known[:, 2].tolist() == [0.5, 0, 0.75, 0.25]
    assert known[:, 3] == pytest.approx([0.7] * 4)


@given(st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_ranked_rule_is_a_weighted_sum(weights: list[float], seed: int) -> None:
    known = np.random.default_rng(seed).random((20, 4)).astype(np.float32)
    found = prune.scores(ranked_rule(*weights), known)
    assert found == pytest.approx(known[:, :3] @ np.array(weights), abs=1e-4)


def test_steps_from_a_layer_on_keep_a_part() -> None:
    plan = (*all_run(range(3)), Step(2, repeat=1))
    assert [step.keep for step in prune.pruned(plan, 40, 2)] == [100, 100, 40, 40]
    assert prune.pruned(plan, 100, 0) == plan
    for keep in (0, 101, -5):
        with pytest.raises(UsageError):
            prune.pruned(plan, keep, 0)


def bad_rules() -> list[dict[str, object]]:
    good = {"hidden": BY_ATTENTION.hidden, "bias": BY_ATTENTION.bias, "out": BY_ATTENTION.out}
    changes: list[dict[str, object]] = [
        {"hidden": np.zeros((2, 3), np.float32)}, {"bias": np.zeros(3, np.float32)},
        {"out": np.zeros((2, 1), np.float32)}, {"out": np.array([np.nan, 0], np.float32)},
        {"hidden": np.zeros((2, 4))}, {"n_first": 0}, {"n_recent": MIN_TOKENS + 1},
        {"n_probe": 0}, {"noise": float("inf")}, {"noise": -1.0},
    ]  # fmt: skip
    return [good | change for change in changes]


@pytest.mark.parametrize("rule", bad_rules())
def test_a_rule_that_does_not_fit_is_refused(rule: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        TokenRule(**rule)  # type: ignore[arg-type]
