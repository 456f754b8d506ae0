"""Which missing experts a token does without: against definitions tried one by one."""

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.skippers.misses import MissLevers, dropped, swapped

N, K, N_EXPERT = 200, 6, 20


def some_weights() -> npt.NDArray[np.float32]:
    """Rows flat and sharp, with ties and zeros, not all falling."""
    rng = np.random.default_rng(3)
    raw = np.exp(rng.standard_normal((N, K)) * np.linspace(0, 5, N)[:, None]).round(2)
    raw[::7, 3] = raw[::7, 2]
    raw[5::9, -1] = 0
    return np.asarray(raw / raw.sum(axis=1, keepdims=True), np.float32)


def by_hand(weights: list[float], here: list[bool], share: float) -> list[bool]:
    """HOBBIT's rule, an expert at a time."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    limit, before, out = (1 - share) * sum(weights), 0.0, [False] * len(weights)
    for rank, i in enumerate(order):
        out[i] = rank > 0 and not here[i] and before > limit + 1e-12
        before += weights[i]
    return out


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_dropped_is_the_cumulative_rule(share: float) -> None:
    weights = some_weights()
    here = np.random.default_rng(4).random((N, K)) < 0.5
    found = dropped(weights, here, share)
    wanted = [by_hand(w, h, share) for w, h in zip(weights.astype(np.float64).tolist(),
                                                   here.tolist(), strict=True)]  # fmt: skip
    assert np.array_equal(found, wanted) if share else not found.any()
    assert not (found & here).any()
    heaviest = weights == weights.max(axis=1, keepdims=True)
    assert (heaviest & ~found).any(axis=1).all()
    lost = np.where(found, weights, 0).sum(axis=1, dtype=np.float64)
    assert (lost <= share + 1e-6).all()


def test_a_whole_share_leaves_the_best_and_what_is_here() -> None:
    weights = np.array([[0.5, 0.3, 0.2]], np.float32)
    here = np.array([[False, True, False]])
    assert dropped(weights, here, 1.0).tolist() == [[False, False, True]]
    assert not dropped(np.zeros((1, 3), np.float32), here, 1.0)[0, 0]


@pytest.mark.parametrize("worth", [np.nan, np.inf])
def test_broken_weights_drop_nothing_that_is_best(worth: float) -> None:
    found = dropped(np.full((2, 3), worth, np.float32), np.zeros((2, 3), np.bool_), 0.5)
    assert not found.all(axis=1).any()


def again(row: list[int], nats: list[float], here: list[bool], margin: float) -> set[int]:
    """Fill the places of near ties: who is here by rating, then who is not."""
    last = nats[row[-1]]
    near = {e for e in range(len(nats)) if abs(nats[e] - last) <= margin}
    fixed = [e for e in row if e not in near or e == row[0]]
    ties = [e for e in near if e not in fixed]
    ties.sort(key=lambda e: (not here[e], -nats[e], e))
    return {*fixed, *ties[: len(row) - len(fixed)]}


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.2, 1.0, 50.0])
def test_swapped_takes_near_ties_that_are_here(margin: float) -> None:
    rng = np.random.default_rng(5)
    nats = (rng.standard_normal((N, N_EXPERT)) * np.linspace(0.01, 3, N)[:, None]).astype(
        np.float32
    )
    numbers = np.argsort(-nats, axis=1, kind="stable")[:, :K].astype(np.int32)
    n_swapped = 0
    for at in range(N):  # residency of its own for each token
        here = rng.random(N_EXPERT) < 0.5
        row, rated = numbers[at : at + 1], nats[at : at + 1]
        found = swapped(row, rated, here, margin)
        precise = rated[0].astype(np.float64).tolist()
        if margin:
            assert set(found[0].tolist()) == again(row[0].tolist(), precise, here.tolist(), margin)
        assert found[0, 0] == row[0, 0]
        assert (np.diff(rated[0][found[0]]) <= 0).all()  # best rated first
        assert set(found[0].tolist()) - set(row[0].tolist()) <= set(np.flatnonzero(here).tolist())
        if set(found[0].tolist()) == set(row[0].tolist()):
            assert np.array_equal(found, row)
        n_swapped += not np.array_equal(found, row)
    assert (n_swapped > 0) == (margin > 0)


def test_one_expert_a_token_and_broken_ratings_stay() -> None:
    here = np.zeros(4, np.bool_)
    here[3] = True
    one = np.array([[2]], np.int32)
    assert swapped(one, np.zeros((1, 4), np.float32), here, 9.0).tolist() == [[2]]
    two = np.array([[2, 1]], np.int32)
    assert swapped(two, np.full((1, 4), np.nan, np.float32), here, 9.0).tolist() == [[2, 1]]


def test_levers_count_by_layer() -> None:
    levers = MissLevers(drop_misses=0.1)
    assert not levers.reads_scores and MissLevers(prefer_resident=0.1).reads_scores
    levers.count(3, replaced=1, dropped=2, saved=2)
    levers.count(3, replaced=0, dropped=1, saved=0)
    assert (levers.replaced, levers.dropped, dict(levers.saved)) == (1, 3, {3: 2})


def test_copies_stand_for_what_is_not_dropped() -> None:
    """HOBBIT's T1 = 0.6 and T2 = 0.9: in full up to the first, left out from the second on."""
    levers = MissLevers(drop_misses=0.1, degrade_misses=0.4)
    weights = np.array([[0.5, 0.25, 0.2, 0.05]], np.float32)
    here = np.zeros((1, 4), np.bool_)
    assert levers.drop(weights, here).tolist() == [[False, False, False, True]]
    assert levers.degrade(weights, here).tolist() == [[False, False, True, True]]
    here[0, 2:] = True
    assert not levers.degrade(weights, here).any()
    assert not MissLevers().degrade(weights, ~here).any()
    levers.count(3, degraded=2)
    levers.count(4, degraded=1)
    assert (levers.degraded, levers.dropped, dict(levers.saved)) == (3, 0, {3: 0, 4: 0})
