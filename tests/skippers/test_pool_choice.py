"""Who should answer a query: demands, shortfalls, and the order that follows from them."""

import numpy as np
import pytest

from edgeroute.skippers.pool_choice import (
    DIMENSIONS,
    MARGIN,
    MAX_CHARS,
    Candidate,
    demand,
    excerpt,
    hashed_words,
    optimism,
    rank,
    shortfall,
)

ONES = np.ones(len(DIMENSIONS))


def names(candidates: list[Candidate], tolerance: float = 0.1) -> list[str]:
    return [each.name for each, _ in rank(candidates, tolerance)]


def of(name: str, price: float, stated: float, **known: float) -> Candidate:
    return Candidate(name=name, price=price, stated=stated, **known)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("A farmer has 17 sheep, buys 5 and sells 3. How many sheep are left in total?", "math"),
        ("12 * 7 + 3 = ?", "math"),
        ("Write a Python function:\n```python\ndef f(x):\n    return x;\n```", "code"),
        ("Fix this bug: const f = (a) => { return a; }", "code"),
        ("Explain why the sky is blue, and compare that with a sunset.", "reasoning"),
        ("Translate to French: the weather is fine.", "language"),
        ("Как дела сегодня", "language"),
        ("You must use exactly the format below, never more.\n- one\n- two", "instruction"),
    ],
)
def test_a_query_demands_most_of_what_it_is_about(text: str, most: str) -> None:
    assert DIMENSIONS[int(demand(text).argmax())] == most


def test_demands_are_bounded_and_grow_with_the_marks() -> None:
    assert not demand("").any()
    assert not hashed_words("").any()
    short, long = demand("2 + 2"), demand("2 + 2 * 3 - 4 * 5 / 6 ... \x00 \ud800" + "9 + 9 " * 9999)
    assert 0 < short[0] < long[0] < 1
    assert ((long >= 0) & (long < 1)).all()


def test_a_small_talk_demands_little() -> None:
    assert demand("Hello! Tell me about the sea.").max() < 0.15


def test_only_both_ends_of_a_long_query_are_looked_at() -> None:
    middle = "def f(): return 1\n" * 4000
    text = "a" * MAX_CHARS + middle + "b" * MAX_CHARS
    assert len(excerpt(text)) <= MAX_CHARS + 1
    assert demand(text)[DIMENSIONS.index("code")] == 0


def test_words_are_hashed_alike_whatever_their_case() -> None:
    assert np.array_equal(hashed_words("The Sea"), hashed_words("the sea"))
    assert not np.array_equal(hashed_words("the sea"), hashed_words("the sky"))


def test_a_shortfall_sums_what_is_lacking_and_nothing_that_is_left_over() -> None:
    wanted = np.array([0.9, 0.1, 0.5, 0.0, 0.2])
    able = np.array([0.6, 1.0, 0.4, 0.0, 0.3])
    weights = np.array([2.0, 1.0, 0.5, 1.0, 1.0])
    assert shortfall(wanted, able, weights) == pytest.approx(2 * 0.3 + 0.5 * 0.1)
    assert shortfall(wanted, ONES, weights) == 0
    assert shortfall(ONES, 0 * ONES, ONES) == 1  # never more


def test_the_cheapest_is_taken_where_all_are_capable() -> None:
    found = rank([of("l", 9, 0.0), of("s", 1, 0.09), of("m", 3, 0.0)], 0.1)
    assert [each.name for each, _ in found] == ["s", "m", "l"]
    assert {why for _, why in found} == {"cheapest capable"}


def test_a_cheaper_one_that_is_not_capable_comes_after_all_that_are() -> None:
    found = rank([of("l", 9, 0.0), of("s", 1, 0.3), of("m", 3, 0.2)], 0.1)
    assert [(each.name, why) for each, why in found] == [
        ("l", "cheapest capable"), ("m", "least shortfall"), ("s", "least shortfall")
    ]  # fmt: skip


def test_where_none_is_capable_the_one_that_lacks_least_is_taken() -> None:
    assert names([of("s", 1, 0.5), of("m", 3, 0.4), of("l", 9, 0.3)]) == ["l", "m", "s"]


def test_price_decides_between_those_that_lack_about_as_little() -> None:
    assert names([of("l", 9, 0.3), of("m", 3, 0.3 + 0.9 * MARGIN), of("s", 1, 0.9)])[0] == "m"
    assert names([of("l", 9, 0.3), of("m", 3, 0.3 + 1.1 * MARGIN)])[0] == "l"


def test_what_was_learned_overrides_the_profile_both_ways() -> None:
    assert names([of("s", 1, 0.0, learned=-0.6), of("l", 9, 0.0)])[0] == "l"
    assert names([of("s", 1, 0.8, learned=0.75), of("l", 9, 0.0)])[0] == "s"
    assert of("s", 1, 0.8, learned=0.9, trust=5.0).shortfall == 0
    assert of("s", 1, 0.8, learned=-1.0).shortfall == 1


def test_nothing_is_given_on_trust_before_somebody_teaches() -> None:
    assert optimism(0.2, 0) == 0
    assert 0 < optimism(0.2, 10) < optimism(0.2, 1000) < 1


def test_no_model_is_no_choice() -> None:
    with pytest.raises(ValueError, match="without models"):
        rank([], 0.1)
