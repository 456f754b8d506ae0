"""Keep control-token texts inside user messages from becoming control tokens.

A chat template is rendered with the real messages, except that an invisible mark is put
before one character of every text that could be read as a control token, or as the
user's half of one. After rendering the marks are taken out again, and any control-token
text that contains a marked character is encoded as plain text.
"""

import functools
import re
import secrets
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

PRIVATE_FIRST, PRIVATE_LAST = 0xF0000, 0xFFFFD
"""Unicode's private plane 15: no template tests for these characters."""

_LOWER = str.maketrans(
    string.ascii_uppercase + "\u212a\u017f\u0131", string.ascii_lowercase + "ksi"
)
"""Letter case that a template's `lower` or `upper` filter could fold into ASCII."""


@dataclass(frozen=True, slots=True)
class _Index:
    """Control-token texts, arranged for looking up whether one begins at a place."""

    starts: re.Pattern[str]
    exact: frozenset[str]
    lowered: frozenset[str]
    heads: frozenset[str]
    tails: frozenset[str]
    lengths: tuple[int, ...]


class Fence:
    """The mark of one rendering, and the texts that it guards against.

    Args:
        control_texts: what the tokenizer would parse as control tokens.
        seen: every string that takes part in the rendering; the mark is in none of them.
    """

    def __init__(self, control_texts: Sequence[str], seen: Iterable[str]) -> None:
        self._index = _index(tuple(control_texts)) if control_texts else None
        self.mark = _fresh_mark(seen)

    def guard(self, text: str) -> str:
        """Mark user text; the characters themselves stay."""
        if self._index is None or not text:
            return text
        lowered = text.translate(_LOWER)
        at = self._edges(lowered)
        for m in self._index.starts.finditer(lowered):
            lengths = [n for _, n in _texts_at(self._index, lowered, m.start(), lower=True)]
            at |= {m.start() + (1 if n > 1 else 0) for n in lengths}
        parts, start = [], 0
        for place in sorted(at):
            parts.append(text[start:place])
            start = place
        parts.append(text[start:])
        return self.mark.join(parts)

    def guard_all(self, value: object) -> object:
        """Mark every string inside JSON-like data, mapping keys included."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, Mapping):
            return {self.guard_all(k): self.guard_all(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard_all(v) for v in value]
        return value

    def plain(self, rendered: str) -> str:
        """The rendering as the user should see it."""
        return rendered.replace(self.mark, "")

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Cut a rendering into (text, is_user) spans that are to be encoded one by one.

        One span comes back when no control-token text contains a marked character.
        """
        chunks = rendered.split(self.mark)
        text = "".join(chunks)
        if len(chunks) == 1 or self._index is None:
            return [(text, False)]
        spans, end = [], 0
        for start, stop in _merge(self._forbidden(self._index, text, chunks)):
            spans += [(text[end:start], False), (text[start:stop], True)]
            end = stop
        spans.append((text[end:], False))
        return [span for span in spans if span[0]] or [("", False)]

    def _forbidden(
        self, index: _Index, text: str, chunks: Sequence[str]
    ) -> Iterator[tuple[int, int]]:
        """Spans of control-token texts that contain a marked character."""
        mark = 0
        for chunk in chunks[:-1]:
            mark += len(chunk)
            for start in range(max(0, mark - index.lengths[-1] + 1), mark + 1):
                for place, n in _texts_at(index, text, start, lower=False):
                    if place + n > mark:
                        yield place, place + n

    def _edges(self, lowered: str) -> set[int]:
        """Places to mark where the template could complete the user's half of a text."""
        index = self._index
        if index is None:
            return set()
        at: set[int] = set()
        left = len(lowered) - len(lowered.lstrip())
        right = len(lowered.rstrip())
        for n in range(1, min(index.lengths[-1] - 1, right - left) + 1):
            if lowered[right - n : right] in index.heads:
                at.add(right - n + (1 if n > 1 else 0))
            if n > 1 and lowered[left : left + n] in index.tails:
                at.add(left + 1)
        return at


def _texts_at(index: _Index, text: str, start: int, *, lower: bool) -> Iterator[tuple[int, int]]:
    """(start, length) of every control-token text that begins at `start`."""
    known = index.lowered if lower else index.exact
    for n in index.lengths:
        if text[start : start + n] in known and start + n <= len(text):
            yield start, n


@functools.lru_cache(maxsize=8)
def _index(texts: tuple[str, ...]) -> _Index:
    lowered = [text.translate(_LOWER) for text in texts]
    begins = sorted({re.escape(text[:2]) for text in lowered})
    return _Index(
        starts=re.compile(f"(?={'|'.join(begins)})"),
        exact=frozenset(texts),
        lowered=frozenset(lowered),
        heads=frozenset(text[:n] for text in lowered for n in range(1, len(text))),
        tails=frozenset(text[-n:] for text in lowered for n in range(1, len(text))),
        lengths=tuple(sorted({len(text) for text in texts})),
    )


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(set(spans)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _fresh_mark(seen: Iterable[str]) -> str:
    """A private character that occurs nowhere and that nobody can guess."""
    texts = list(seen)
    while True:
        mark = chr(PRIVATE_FIRST + secrets.randbelow(PRIVATE_LAST - PRIVATE_FIRST + 1))
        if not any(mark in text for text in texts):
            return mark
