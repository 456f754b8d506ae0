"""The stacked regressions against numpy's own, with arms coming and going."""

import numpy as np
import pytest

from edgeroute.offload.linucb import MAX_D, LinUCB
from edgeroute.runtime.errors import UsageError

D = 5


def _played(n_plays: int, ridge: float = 0.7, reinvert_every: int = 256):
    rng = np.random.default_rng(3)
    bandit = LinUCB(D, ridge, reinvert_every)
    history: dict[str, list[tuple[np.ndarray, float]]] = {}
    for i in range(11):  # beyond the first room for 8
        bandit.add(f"a{i}")
        history[f"a{i}"] = []
    for _ in range(n_plays):
        arm, x, y = f"a{rng.integers(11)}", rng.standard_normal(D), float(rng.random())
        bandit.learn(arm, x, y)
        history[arm].append((x, y))
    return bandit, history


def _check(bandit: LinUCB, history, ridge: float = 0.7) -> None:
    x = np.linspace(-1, 1, D)
    means, widths = bandit.score(x)
    assert set(bandit.names) == set(history)
    for row, arm in enumerate(bandit.names):
        a = ridge * np.eye(D) + sum((np.outer(v, v) for v, _ in history[arm]), np.zeros((D, D)))
        b = sum((y * v for v, y in history[arm]), np.zeros(D))
        assert means[row] == pytest.approx(np.linalg.solve(a, b) @ x, abs=1e-9)
        assert widths[row] == pytest.approx(np.sqrt(x @ np.linalg.solve(a, x)), abs=1e-9)
        assert bandit.predict(row, x) == pytest.approx(means[row])
        assert bandit.n_plays[row] == len(history[arm])


@pytest.mark.parametrize("reinvert_every", [1, 7, 10**6])
def test_it_equals_a_ridge_regression_per_arm(reinvert_every: int) -> None:
    bandit, history = _played(600, reinvert_every=reinvert_every)
    _check(bandit, history)
    x = np.random.default_rng(0).standard_normal((4, D))
    rows = np.array([bandit.score(one).means for one in x])
    assert np.allclose(bandit.means(x), rows)


def test_arms_come_and_go_without_touching_the_others() -> None:
    bandit, history = _played(300)
    for arm in ("a0", "a10", "a5"):  # the first, the last and one between
        bandit.remove(arm)
        del history[arm]
        _check(bandit, history)
    bandit.add("a5")
    history["a5"] = []
    _check(bandit, history)
    with pytest.raises(UsageError, match="no arm 'a0'"):
        bandit.learn("a0", np.ones(D), 1.0)
    with pytest.raises(UsageError, match="already"):
        bandit.add("a5")


def test_the_inverse_does_not_wear_out() -> None:
    """Large contexts that hardly differ are the worst case for rank-one updates."""
    rng = np.random.default_rng(1)
    drifts = {}
    for every in (64, 10**9):
        bandit = LinUCB(D, 1e-3, every)
        bandit.add("a")
        for _ in range(20_000):
            bandit.learn("a", 10 * np.ones(D) + 1e-3 * rng.standard_normal(D), 0.5)
        drifts[every] = bandit.drift("a")
    assert drifts[64] < 1e-4
    assert drifts[64] < drifts[10**9]


def test_statistics_carry_an_arm_to_another_router() -> None:
    bandit, history = _played(200)
    other = LinUCB(D, 0.7)
    for arm in history:
        other.add(arm, bandit.statistics(arm))
    _check(other, history)
    with pytest.raises(UsageError, match="5 features, not 4"):
        LinUCB(4).add("a", bandit.statistics("a1"))


def test_forgetting_widens_the_bounds_and_keeps_the_ridge_whole() -> None:
    bandit, _ = _played(400)
    x = np.ones(D)
    before = bandit.score(x).widths
    bandit.forget(0.25)
    after = bandit.score(x).widths
    assert np.all(after > before)
    assert bandit.n_plays.sum() == pytest.approx(100)
    bandit.forget(0.0)
    assert np.allclose(bandit.score(x).widths, np.sqrt(D / 0.7))
    assert np.allclose(bandit.score(x).means, 0)


@pytest.mark.parametrize("d, ridge", [(0, 1.0), (MAX_D + 1, 1.0), (4, 0.0), (4, float("nan"))])
def test_impossible_sizes_are_refused(d: int, ridge: float) -> None:
    with pytest.raises(UsageError):
        LinUCB(d, ridge)
