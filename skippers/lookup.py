"""Prompt look-up: the tokens that followed the last time the text ended as it ends now.

What is quoted, repeated or edited comes again word by word, and finding it costs nothing.
"""

from collections.abc import Iterable
from typing import Final

SUFFIXES: Final = (1, 2, 3, 5, 8)
"""Lengths of the endings that are looked up; the longest one found counts."""
WINDOW: Final = 1 << 16
"""Tokens that are remembered; what is longer ago is forgotten, so that memory is bounded."""


class Lookup:
    """An index of one growing text. A token costs as many dictionary entries as SUFFIXES has."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._tokens: list[int] = []
        self._n_forgotten = 0
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in SUFFIXES]
        """By ending: the place of the token behind its last occurrence, the text's end excepted."""

    def __len__(self) -> int:
        """Tokens so far, forgotten ones included."""
        return self._n_forgotten + len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            place, known = len(self), self._tokens
            for length, ends in zip(SUFFIXES, self._ends, strict=True):
                if len(known) >= length:
                    ends[tuple(known[-length:])] = place
            known.append(token)
        if len(self._tokens) >= 2 * self._window:
            self._forget()

    def match(self) -> int:
        """Return the length of the longest ending that occurred before, 0 for none."""
        return max((length for length, _ in self._matches()), default=0)

    def propose(self, n_tokens: int) -> list[int]:
        """Return what followed the longest such ending: `n_tokens`, or none without a match.

        Where it runs into the text's end it goes on from there: a text that repeats itself
        goes on repeating.
        """
        found = max(self._matches(), default=None)
        if found is None:
            return []
        known, first = self._tokens, found[1] - self._n_forgotten
        draft: list[int] = []
        for i in range(first, first + n_tokens):
            draft.append(known[i] if i < len(known) else draft[i - len(known)])
        return draft

    def _matches(self) -> Iterable[tuple[int, int]]:
        """List endings found: length, and the place behind them."""
        known = self._tokens
        for length, ends in zip(SUFFIXES, self._ends, strict=True):
            place = ends.get(tuple(known[-length:])) if len(known) >= length else None
            if place is None:
                return  # a longer ending contains this one
            if place >= self._n_forgotten:
                yield length, place

    def _forget(self) -> None:
        """Keep the last `window` tokens, and the endings that lead into them."""
        n = len(self._tokens) - self._window
        del self._tokens[:n]
        self._n_forgotten += n
        for i, ends in enumerate(self._ends):
            self._ends[i] = {key: at for key, at in ends.items() if at >= self._n_forgotten}
