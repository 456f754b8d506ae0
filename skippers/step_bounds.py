"""Where the steps of an answer end, found on the bytes of its tokens.

A step ends with a blank line, which is almost never a token of its own: `.\\n\\n` is one token,
`\\n` and `\\n` are two, `\\n \\n` holds a space. Blank lines inside a code fence end nothing. A
line is a step by itself where the text since the last end began with a list marker.

How the text is cut into tokens changes nothing but the place where an end can be told: after
the first token that completes it.
"""

import codecs
import copy
import re
from typing import Final, Self

MIN_TOKENS: Final = 8
"""Shorter steps go on: a switch costs more than they take."""
MAX_TOKENS: Final = 512
"""Source: GlimpRouter, arXiv 2601.05110, the length of a step."""

_MARKER: Final = r"(?:[-*]|[0-9]{1,9}[.)])[ \t]"
_LIST: Final = re.compile(rf"\s*{_MARKER}")
_FENCE: Final = re.compile(rf"\s*(?:{_MARKER}\s*)?(`{{3,}}(?=[^`]*$)|~{{3,}})")
"""Opens a block of code; what follows backticks must hold none, or it is code within a line."""


class StepBounds:
    """Reads an answer token by token and tells where its steps end.

    Args:
        min_tokens: of a step, at least; a shorter one goes on over its blank line.
        max_tokens: of a step, where it has not ended by itself and its characters are whole.
    """

    __slots__ = ("_blank", "_due", "_fence", "_line", "_listed", "_max", "_min", "_n_tokens",
                 "_pending", "_said")  # fmt: skip

    def __init__(self, *, min_tokens: int = MIN_TOKENS, max_tokens: int = MAX_TOKENS) -> None:
        self._min, self._max = min_tokens, max_tokens
        self._n_tokens = 0
        self._blank = True  # of the step, which a short blank line does not end
        self._due = False  # an end was found, but a character is not whole yet
        self._pending = b""  # the bytes of that character
        self._line = ""  # of the text, so far
        self._said = False  # whether full lines since the text's last end hold anything
        self._listed = False  # whether the first of them began with a list marker
        self._fence = ""  # that opened the block of code which the text is in

    @property
    def n_tokens(self) -> int:
        """Tokens of the step in progress."""
        return self._n_tokens

    @property
    def blank(self) -> bool:
        """Whether the step in progress holds nothing but whitespace.

        What the last step's last token carried after its blank line counts as this step's.
        """
        return self._blank

    @property
    def whole(self) -> bool:
        """Whether the text so far ends with a whole character."""
        return not self._pending

    def copy(self) -> Self:
        """Return one that goes on from here by itself, for a draft that may be dropped."""
        return copy.copy(self)

    def push(self, piece: bytes) -> bool:
        """Read one more token.

        Args:
            piece: its bytes; none for a token without text. They may begin or end within a
                character. Bytes that are no UTF-8 count as a character each.

        Returns:
            Whether a step ends after it. A step of nothing but whitespace never does, and none
            ends within a character.
        """
        data = self._pending + piece
        text, n_read = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[n_read:]
        self._n_tokens += 1
        self._blank = self._blank and not text.strip()
        ended = self._read(text)
        self._due |= ended and self._n_tokens >= self._min and not self._blank
        too_long = self._n_tokens >= self._max and not self._blank
        if self._pending or not (self._due or too_long):
            return False
        self._blank = self._rest_blank() if self._due else True
        self._due, self._n_tokens = False, 0
        return True

    def _read(self, text: str) -> bool:
        """Go on with the text; return whether it has an end in there."""
        head, *tail = text.split("\n")
        self._line += head
        ended = False
        for part in tail:
            ended |= self._end_line()
            self._line = part
        return ended

    def _end_line(self) -> bool:
        """Close the line at its newline; return whether an end of the text is there."""
        line = self._line
        is_blank = not line.strip()
        if not is_blank and not self._said:
            self._said, self._listed = True, _LIST.match(line) is not None
        if self._fence:
            if not line.strip().strip(self._fence[0]) and self._fence in line:
                self._fence = ""
        elif (match := _FENCE.match(line)) is not None:
            self._fence = match[1]
        if self._fence or not self._said or not (is_blank or self._listed):
            return False
        self._said = False
        return True

    def _rest_blank(self) -> bool:
        """Whether the text since its last end is whitespace."""
        return not self._said and not self._line.strip()
