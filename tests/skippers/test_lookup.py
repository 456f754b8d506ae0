"""Prompt look-up: the longest ending counts, the latest occurrence, and memory is bounded."""

import random

import pytest

from edgeroute.skippers.lookup import SUFFIXES, Lookup


def made(tokens: list[int], window: int = 1 << 16) -> Lookup:
    found = Lookup(window)
    found.extend(tokens)
    return found


def slow(tokens: list[int], n_tokens: int) -> tuple[int, list[int]]:
    """The same by looking everywhere."""
    for length in sorted(SUFFIXES, reverse=True):
        end = tokens[-length:]
        for at in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) > length and tokens[at - length : at] == end:
                text = list(tokens)
                for i in range(at, at + n_tokens):
                    text.append(text[i])
                return length, text[len(tokens) :]
    return 0, []


@pytest.mark.parametrize("n_kinds", [2, 5, 40])
def test_as_looking_everywhere(n_kinds: int) -> None:
    rng = random.Random(n_kinds)
    tokens: list[int] = []
    lookup = Lookup()
    for _ in range(300):
        token = rng.randrange(n_kinds)
        tokens.append(token)
        lookup.extend([token])
        length, draft = slow(tokens, 6)
        assert (lookup.match(), lookup.propose(6)) == (length, draft)
        assert len(lookup) == len(tokens)


def test_the_latest_occurrence_and_the_longest_ending() -> None:
    assert made([1, 2, 7, 1, 2, 8, 1, 2]).propose(1) == [8]
    assert made([9, 1, 2, 7, 0, 1, 2, 8, 9, 1, 2]).propose(1) == [7]
    assert made([1, 2, 3]).propose(3) == [] and made([]).match() == 0


def test_what_repeats_itself_goes_on() -> None:
    assert made([1, 2, 3, 1, 2, 3, 1]).propose(8) == [2, 3, 1, 2, 3, 1, 2, 3]
    assert made([5, 5]).propose(3) == [5, 5, 5]


def test_what_is_long_ago_is_forgotten() -> None:
    lookup = made([7, 8, 9], window=16)
    lookup.extend(range(100, 140))
    lookup.extend([7, 8])
    assert lookup.match() == 0
    assert len(lookup) == 45
    rng = random.Random(1)
    for _ in range(3000):
        lookup.extend([rng.randrange(50)])
        draft = lookup.propose(4)
        assert len(draft) in (0, 4)
    assert len(lookup._tokens) < 32 and sum(map(len, lookup._ends)) <= 32 * len(SUFFIXES)
