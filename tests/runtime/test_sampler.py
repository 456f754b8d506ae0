"""Sampling against plain numpy references."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeroute.runtime.errors import ComputeError, GrammarError, UsageError
from edgeroute.runtime.records import SamplingParams
from edgeroute.runtime.sampler import Sampler, logprob

F32 = NDArray[np.float32]


class FakeGrammar:
    """Admits a fixed set of tokens and counts what it was asked."""

    def __init__(self, admitted: set[int]) -> None:
        self.admitted = admitted
        self.n_masks = 0
        self.accepted: list[int] = []
        self.is_closed = False

    def allows(self, token_id: int) -> bool:
        return token_id in self.admitted

    def mask(self, logits: F32) -> None:
        self.n_masks += 1
        for i in range(len(logits)):
            if i not in self.admitted:
                logits[i] = -np.inf

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def close(self) -> None:
        self.is_closed = True


class FakeTokenizer:
    def __init__(self, n_vocab: int, grammar: FakeGrammar | None = None) -> None:
        self._n_vocab = n_vocab
        self._grammar = grammar

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    def constraint(self, params: SamplingParams) -> FakeGrammar | None:
        return self._grammar


def sampler(
    n_vocab: int, prompt: Sequence[int] = (), grammar: FakeGrammar | None = None, **params: Any
) -> Sampler:
    return Sampler(SamplingParams(**params), FakeTokenizer(n_vocab, grammar), prompt)


def frequencies(s: Sampler, logits: F32, n: int = 4000) -> dict[int, float]:
    counts = Counter(s.sample(logits) for _ in range(n))
    return {token: count / n for token, count in counts.items()}


def softmax(x: F32, temperature: float = 1.0) -> F32:
    w = np.exp((x - x.max()) / temperature)
    result: F32 = w / w.sum()
    return result


def test_greedy_takes_the_strongest_and_the_lowest_of_equals() -> None:
    logits = np.array([0, 3, 1, 3, -2], dtype=np.float32)
    assert sampler(5).sample(logits) == 1


def test_greedy_without_adjustments_copies_nothing() -> None:
    logits = np.array([0, 3, 1], dtype=np.float32)
    logits.setflags(write=False)
    assert sampler(3)._adjust(logits) is logits


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-39, 1e-31, 1e-20, 1e-6])
def test_a_temperature_next_to_none_draws_the_strongest(temperature: float) -> None:
    """As F32 the smallest of them are 0, and the logits divided by them no numbers."""
    logits = np.array([-100.0, 3.0, 2.99, 0.0], np.float32)
    assert sampler(4, temperature=temperature, seed=1).sample(logits.copy()) == 1


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_p": 0.5, "repeat_penalty": 2.0}])
def test_the_caller_s_logits_stay_as_they_are(params: dict[str, Any]) -> None:
    logits = np.linspace(-3, 3, 50, dtype=np.float32)
    logits.setflags(write=False)
    grammar = FakeGrammar({4})
    assert sampler(50, [1, 2], grammar, logit_bias={7: 1.0}, **params).sample(logits) == 4


def test_draws_follow_the_softmax() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0], dtype=np.float32)
    got = frequencies(sampler(4, temperature=0.7, seed=5), logits)
    for token, expected in enumerate(softmax(logits, 0.7)):
        # four standard deviations of a binomial over 4000 draws
        assert abs(got.get(token, 0) - expected) < 4 * np.sqrt(expected / 4000) + 1e-3


def kept(logits: F32, **params: Any) -> set[int]:
    """Tokens drawn at a temperature high enough to see all that are left."""
    s = sampler(len(logits), temperature=100.0, seed=1, **params)
    return set(frequencies(s, logits, 600))


def test_top_k_keeps_k_and_breaks_ties_by_id() -> None:
    logits = np.array([1, 5, 3, 3, 3, 0], dtype=np.float32)
    assert kept(logits, top_k=3) == {1, 2, 3}
    assert kept(logits, top_k=1) == {1}
    assert kept(logits, top_k=100) == set(range(6))


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.1], dtype=np.float32))
    assert kept(logits, top_p=0.4) == {1}
    assert kept(logits, top_p=0.6) == {1, 2}
    assert kept(logits, top_p=0.85) == {0, 1, 2}
    assert kept(logits, top_p=0.0) == {1}
    assert kept(logits, top_k=2, top_p=0.99) == {1, 2}


def test_min_p_is_relative_to_the_strongest() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.1], dtype=np.float32))
    assert kept(logits, min_p=0.5) == {1, 2}
    assert kept(logits, min_p=1.0) == {1}


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=300),
    top_p=st.floats(0.01, 0.999),
)
def test_top_p_against_a_full_sort(values: list[float], top_p: float) -> None:
    from edgeroute.runtime.sampler import _nucleus

    weights = np.exp(np.array(values, dtype=np.float32) - np.float32(max(values)))
    order = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    n = int(np.searchsorted(cumulative, top_p * weights.sum(dtype=np.float64))) + 1
    assert abs(len(_nucleus(weights, top_p)) - min(n, len(values))) <= 1  # rounding of the sum
    strongest = set(order[: max(1, n - 1)].tolist())
    assert strongest <= set(_nucleus(weights, top_p).tolist())


def test_penalties_are_those_of_llama_cpp() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], dtype=np.float32)
    params: dict[str, Any] = {
        "repeat_penalty": 2.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
    }
    got = sampler(4, [0, 0, 1], **params)._adjust(logits)
    expected = [2.0 / 2 - 2 * 0.5 - 0.25, -2.0 * 2 - 0.5 - 0.25, 1.0, 0.5]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_penalties_forget_what_left_the_window() -> None:
    s = sampler(4, [3, 3, 0], repeat_penalty=2.0, repeat_last_n=2)
    s.accept(1)
    logits = np.ones(4, dtype=np.float32)
    np.testing.assert_allclose(s._adjust(logits), [0.5, 0.5, 1, 1])
    off = sampler(4, [3, 3, 0], repeat_penalty=2.0, repeat_last_n=0)
    assert off._adjust(logits) is logits


def test_bias_is_added_and_can_ban() -> None:
    logits = np.array([0, 1, 2], dtype=np.float32)
    assert sampler(3, logit_bias={0: 5.0}).sample(logits) == 0
    assert sampler(3, logit_bias={2: float("-inf")}).sample(logits) == 1


@pytest.mark.parametrize("bias", [{9: 1.0}, {-1: 1.0}, {0: float("nan")}, {0: float("inf")}])
def test_bad_bias_is_refused(bias: Mapping[int, float]) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        sampler(3, logit_bias=bias)


def test_one_seed_gives_one_sequence_and_two_give_two() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed: int | None) -> list[int]:
        s = sampler(1000, temperature=1.0, seed=seed)
        return [s.sample(logits) for _ in range(20)]

    assert draw(7) == draw(7) != draw(8)


def test_a_drawn_seed_is_told_and_repeats_the_sequence() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    first = sampler(1000, temperature=1.0)
    again = sampler(1000, temperature=1.0, seed=first.seed)
    assert [first.sample(logits) for _ in range(9)] == [again.sample(logits) for _ in range(9)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(value: float, temperature: float) -> None:
    logits = np.zeros(8, dtype=np.float32)
    logits[5] = value
    with pytest.raises(ComputeError, match="token 5"):
        sampler(8, temperature=temperature).sample(logits)


def test_all_minus_infinity_and_a_wrong_shape_are_errors() -> None:
    with pytest.raises(ComputeError):
        sampler(8).sample(np.full(8, -np.inf, dtype=np.float32))
    with pytest.raises(ComputeError, match="8 logits"):
        sampler(8).sample(np.zeros(9, dtype=np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_is_never_drawn(temperature: float) -> None:
    logits = np.full(8, -np.inf, dtype=np.float32)
    logits[[2, 6]] = 0
    assert set(frequencies(sampler(8, temperature=temperature, seed=1), logits, 200)) <= {2, 6}


def test_grammar_masks_only_when_the_choice_is_refused() -> None:
    grammar = FakeGrammar({1, 2})
    s = sampler(4, grammar=grammar)
    assert s.sample(np.array([0, 3, 1, 2], dtype=np.float32)) == 1
    assert grammar.n_masks == 0
    assert s.sample(np.array([5, 0, 3, 4], dtype=np.float32)) == 2
    assert grammar.n_masks == 1
    s.accept(2)
    s.close()
    assert grammar.accepted == [2] and grammar.is_closed


def test_a_grammar_without_a_way_on_is_an_error() -> None:
    with pytest.raises(GrammarError, match="no token"):
        sampler(4, grammar=FakeGrammar(set())).sample(np.zeros(4, dtype=np.float32))


def test_logprobs_are_a_log_softmax_of_the_raw_logits() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0], dtype=np.float32)
    s = sampler(4, logprobs=2, logit_bias={0: 9.0})
    assert s.sample(logits) == 0
    assert s.last_logprob is not None
    expected = np.log(softmax(logits))
    assert s.last_logprob.token_id == 0
    assert s.last_logprob.logprob == pytest.approx(float(expected[0]), rel=1e-5)
    assert [i for i, _ in s.last_logprob.top] == [3, 0]
    assert [p for _, p in s.last_logprob.top] == pytest.approx(expected[[3, 0]].tolist(), rel=1e-5)
    assert logprob(logits, 2, 0).top == ()


def test_no_logprobs_unless_asked() -> None:
    s = sampler(2)
    s.sample(np.zeros(2, dtype=np.float32))
    assert s.last_logprob is None
