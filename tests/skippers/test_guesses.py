"""Trees of guesses: what grows where, and what becomes of every guess."""

import random

import pytest

from edgeroute.skippers.guesses import ROOT, Growth, Guess, above, chain, next_guess, outcome


def test_a_chain_is_guess_behind_guess() -> None:
    found = chain([5, 6, 7])
    assert [above(found, i) for i in range(3)] == [(), (0,), (0, 1)]
    assert [guess.token for guess in found] == [5, 6, 7]


def test_next_guess_goes_by_token_and_place() -> None:
    tree = [Guess(5), Guess(6), Guess(6, 0), Guess(7, 1), Guess(7, 2)]
    assert next_guess(tree, ROOT, 6) == 1
    assert next_guess(tree, 0, 6) == 2
    assert next_guess(tree, 2, 7) == 4
    assert next_guess(tree, 1, 8) is None
    assert next_guess(tree, 4, 7) is None


def test_outcome_knows_nothing_behind_the_end_of_an_answer() -> None:
    tree = [Guess(5), Guess(6), Guess(6, 0), Guess(7, 1), Guess(7, 2)]
    assert outcome(tree, [0], ended=False) == [True, False, False, False, False]
    assert outcome(tree, [0], ended=True) == [True, False, None, False, None]
    assert outcome(tree, [], ended=True) == [None] * 5
    assert outcome(tree, [0, 2, 4], ended=True) == [True, False, True, False, True]


@pytest.mark.parametrize("seed", range(20))
def test_growth_takes_what_is_likeliest_to_be_got_to(seed: int) -> None:
    """Against all candidates of a random world, sorted."""
    rng = random.Random(seed)
    growth, chances, shares = Growth(8, 3), dict[int, float](), dict[tuple[int, int], float]()
    at: int | None = ROOT
    while at is not None:
        if at == ROOT or growth.bears(at):
            likely = sorted((rng.random() / 3 for _ in range(3)), reverse=True)
            shares |= {(at, token): share for token, share in enumerate(likely)}
            growth.offer(at, list(enumerate(likely)))
        at = growth.grow()
        if at is not None:
            token, after = growth.guesses[at]
            chances[at] = shares[after, token] * (1.0 if after == ROOT else chances[after])
    order = [chances[i] for i in range(len(growth.guesses))]
    assert order == sorted(order, reverse=True)
    taken = {(guess.after, guess.token) for guess in growth.guesses}
    others = [
        share * (1.0 if after == ROOT else chances[after])
        for (after, token), share in shares.items()
        if (after, token) not in taken
    ]
    assert not others or max(others) <= min(order)
    assert all(guess.after < i for i, guess in enumerate(growth.guesses))


def test_nothing_grows_behind_what_is_unlikely() -> None:
    growth = Growth(4, 2)
    growth.offer(ROOT, [(1, 0.16), (2, 0.15), (3, 0.14)])
    assert growth.grow() == 0
    assert not growth.bears(0), "less than SURE"
    assert growth.grow() == 1
    assert growth.grow() is None, "the third is beyond the width"
    assert [guess.token for guess in growth.guesses] == [1, 2]


def test_nothing_is_asked_that_could_not_be_added() -> None:
    growth = Growth(2, 4)
    growth.offer(ROOT, [(1, 0.4), (2, 0.39)])
    assert growth.grow() == 0
    assert growth.bears(0), "what follows may be likelier than the other one"
    growth.offer(0, [(3, 0.99)])
    assert growth.grow() == 1
    assert growth.guesses[1] == Guess(3, 0)
    assert not growth.bears(1), "the tree is complete"
