"""Signals against plain arithmetic in double precision; nonsense in gives the least sure answer."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_signals import N_TOP, entropy, glance, margin, top_entropy

F32 = npt.NDArray[np.float32]


def logits(n: int, spread: float, seed: int = 1) -> F32:
    return (np.random.default_rng(seed).normal(size=n) * spread).astype(np.float32)


def plain_entropy(values: npt.NDArray[np.floating]) -> float:
    shares = np.exp(values.astype(np.float64) - values.max())
    shares /= shares.sum()
    return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum())


@pytest.mark.parametrize("n", [2, 19, 20, 21, 64, 1279, 1280, 1345, 5000, 151_936])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0])
def test_they_are_what_the_words_say(n: int, spread: float) -> None:
    values = logits(n, spread)
    ranked = np.sort(values)[::-1]
    assert entropy(values) == pytest.approx(plain_entropy(values), abs=2e-5)
    assert top_entropy(values) == pytest.approx(plain_entropy(ranked[:N_TOP]), abs=2e-5)
    assert top_entropy(values, 3) == pytest.approx(plain_entropy(ranked[:3]), abs=2e-5)
    assert margin(values) == pytest.approx(float(ranked[0] - ranked[1]), abs=2e-5)


def test_a_glance_holds_all_of_them() -> None:
    values, hidden = logits(3000, 2.0), np.ones(4, np.float32)
    seen = glance(values, 3, 41, hidden)
    assert (seen.index, seen.position) == (3, 41) and seen.hidden is hidden
    assert seen.entropy == entropy(values)
    assert seen.top_entropy == pytest.approx(top_entropy(values), abs=1e-6)
    assert seen.margin == margin(values)


def test_known_values() -> None:
    assert entropy(np.zeros(1000, np.float32)) == pytest.approx(math.log(1000), abs=1e-5)
    assert top_entropy(np.zeros(1000, np.float32)) == pytest.approx(math.log(20), abs=1e-5)
    one = np.full(1000, -50, np.float32)
    one[7] = 50
    assert 0 <= entropy(one) < 1e-6 and 0 <= top_entropy(one) < 1e-6 and margin(one) == 80


def test_tokens_ruled_out_count_nothing() -> None:
    values = logits(500, 2.0)
    ruled = np.concatenate([values, np.full(4000, -math.inf, np.float32)])
    assert entropy(ruled) == pytest.approx(entropy(values), abs=1e-6)
    assert top_entropy(ruled) == pytest.approx(top_entropy(values), abs=1e-6)
    only = np.full(40, -math.inf, np.float32)
    only[3] = 1.0
    assert entropy(only) < 1e-6 and margin(only) == 80


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_the_least_sure(bad: float) -> None:
    values = logits(300, 2.0)
    values[17] = bad
    for broken in (values, np.full(300, -math.inf, np.float32)):
        seen = glance(broken, 0, 0)
        assert seen.entropy == entropy(broken) == math.log(300)
        assert seen.top_entropy == top_entropy(broken) == math.log(20)
        assert seen.margin == margin(broken) == 0


def test_other_shapes_are_refused() -> None:
    for values in (np.zeros(1, np.float32), np.zeros((2, 5), np.float32)):
        with pytest.raises(UsageError, match="n_vocab"):
            glance(values, 0, 0)
