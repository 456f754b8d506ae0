"""Guesses that are judged without a pass: what would have been drafted, beside what came.

A source that guesses for nothing, as look-up does, is asked at every pass. Its guesses are
kept until the answer has got to them. So its acceptance is known before it ever drafts, and
keeps being known while another source does: no pass is spent on trying it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

MOST_GUESSES: Final = 8
"""Tokens of a guess that are kept."""
MOST_KEPT: Final = 16
"""Guesses of one request that wait for its answer; older ones are judged by what there is."""


@dataclass(frozen=True, slots=True)
class _Guess:
    """What a source guessed would follow the first `at` tokens."""

    source: str
    at: int
    tokens: Sequence[int]


class Shadows:
    """Guesses of requests under way.

    Args:
        learn: takes a source, how many of its guesses were compared, and how many of these,
            from the first one on, were right.
    """

    def __init__(self, learn: Callable[[str, int, int], None]) -> None:
        self._learn = learn
        self._kept: dict[str, list[_Guess]] = {}

    def note(self, request: str, source: str, at: int, tokens: Sequence[int]) -> None:
        """Keep a guess about what follows the first `at` tokens of a request."""
        self._kept.setdefault(request, []).append(_Guess(source, at, tokens[:MOST_GUESSES]))

    def judge(self, request: str, tokens: Sequence[int]) -> None:
        """Compare the guesses for a request with its tokens so far."""
        waiting = self._kept.get(request, [])
        late = len(waiting) - MOST_KEPT
        left: list[_Guess] = []
        for i, guess in enumerate(waiting):
            came = tokens[guess.at : guess.at + len(guess.tokens)]
            n_right = next((j for j, token in enumerate(came) if token != guess.tokens[j]), None)
            if n_right is not None:
                self._learn(guess.source, n_right + 1, n_right)
            elif len(came) == len(guess.tokens) or (i < late and came):
                self._learn(guess.source, len(came), len(came))
            elif i >= late:
                left.append(guess)
        if waiting:
            self._kept[request] = left

    def end(self, request: str) -> None:
        """Forget a request; safe to call for one that is unknown."""
        self._kept.pop(request, None)
