"""Guesses about what comes next: a chain, or a tree in which several stand for one place.

A tree is grown from its likeliest end: of all tokens that may follow what was guessed so far,
the one is added that is likeliest to be got to, its predecessors' chances counted.
Source: Miao et al. 2024, "SpecInfer" (several guesses for one place, verified in one pass);
Li et al. 2024, "EAGLE-2" (which to add, by the draft's own confidence).
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

ROOT: Final = -1
"""Stands for the last token that is known."""
SURE: Final = 0.17
"""Chance of being got to, by the draft's own probabilities, below which nothing is guessed behind
a guess. To look there takes a thirtieth of a pass where layers stream; the best that is found is
half as likely, and takes the place of what is unlikely, but costs no look."""


class Guess(NamedTuple):
    """A token, and the guess that it follows, by its place; those come before it."""

    token: int
    after: int = ROOT


def chain(tokens: Iterable[int]) -> list[Guess]:
    """Guess tokens one behind the other."""
    return [Guess(token, i - 1) for i, token in enumerate(tokens)]


def above(guesses: Sequence[Guess], i: int) -> tuple[int, ...]:
    """Return what guess `i` follows, first to last."""
    found: list[int] = []
    while (i := guesses[i].after) != ROOT:
        found.append(i)
    return tuple(reversed(found))


def next_guess(guesses: Sequence[Guess], after: int, token: int) -> int | None:
    """Return the guess that a token comes behind `after`; None where nobody guessed it."""
    for i in range(after + 1, len(guesses)):
        if guesses[i] == (token, after):
            return i
    return None


def outcome(guesses: Sequence[Guess], kept: Sequence[int], *, ended: bool) -> list[bool | None]:
    """Tell what became of every guess: right or wrong, or None where the answer ended before.

    Args:
        guesses: all of them.
        kept: those that were right, first to last.
        ended: whether nobody knows what would have followed the last one.
    """
    last = kept[-1] if kept else ROOT
    return [
        None if ended and i not in kept and (last == ROOT or last in above(guesses, i))
        else i in kept for i in range(len(guesses))
    ]  # fmt: skip


class Growth:
    """A tree that grows, guess by guess.

    Args:
        most: guesses at most.
        width: guesses for one place at most; 1 grows a chain.
    """

    def __init__(self, most: int, width: int) -> None:
        self.guesses: list[Guess] = []
        self._chances: list[float] = []
        self._most, self._width = most, width
        self._waiting: list[tuple[float, int, Guess]] = []
        self._count = itertools.count()

    def offer(self, after: int, likely: Sequence[tuple[int, float]]) -> None:
        """Say what may follow a guess, or ROOT: tokens with their probabilities, best first."""
        before = 1.0 if after == ROOT else self._chances[after]
        for token, share in likely[: self._width]:
            heapq.heappush(self._waiting, (-before * share, next(self._count), Guess(token, after)))

    def grow(self) -> int | None:
        """Add the likeliest guess; return its place, or None where the tree is complete."""
        if len(self.guesses) >= self._most or not self._waiting:
            return None
        chance, _, guess = heapq.heappop(self._waiting)
        self.guesses.append(guess)
        self._chances.append(-chance)
        return len(self.guesses) - 1

    def bears(self, i: int) -> bool:
        """Whether something behind a guess may be likelier than all that else would be added."""
        left, chance = self._most - len(self.guesses), self._chances[i]
        if left < 1 or chance < SURE:
            return False
        waiting = heapq.nsmallest(left, self._waiting)
        return len(waiting) < left or chance > -waiting[-1][0]
