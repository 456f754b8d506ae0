"""Read an answer's calls to tools while it is written: text, names and arguments, piece by piece.

Nothing depends on where the text is cut: what could still become a call's beginning is held
back until it is one, or is text.
"""

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from edgeroute.server.tool_styles import Style, parts_of
from edgeroute.server.tool_tags import Forms, TagArguments

MAX_SPACE: Final = 64
"""White space in a row that may stand inside a call's syntax."""

_SPACE: Final = " \t\r\n"
_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_NAME_HERE: Final = ""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins; calls of an answer are numbered from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Part = TextPart | CallBegin | CallArguments


class ToolReader:
    """Takes one answer apart. White space around calls belongs to neither text nor call.

    A call is told once its name is one of the known ones and its arguments begin; what breaks
    off before is text. Arguments that break off stay as they came.

    Args:
        style: syntax of calls.
        names: functions that may be called.
        parallel: read several calls; otherwise all behind the first is dropped.
        forms: of the functions' arguments, by name; needed where these have tags.
    """

    def __init__(
        self, style: Style, names: Sequence[str], *, parallel: bool,
        forms: Mapping[str, Forms] | None = None,
    ) -> None:  # fmt: skip
        self.n_calls = 0
        self._style = self._current = style
        self._heads = [(_head(each, each.begin), each) for each in style.free]
        if style.marker:
            self._heads.append(([style.marker, *_head(style, style.begin)], style))
        self._names = tuple(names)
        self._parallel = parallel
        self._forms = forms or {}
        self._parts: list[Part] = []
        self._run: list[str] = []
        self._space: list[str] = []
        self._is_text = self._behind_call = False
        self._held = ""
        self._alternatives: list[_Match] = []
        self._reading: _Arguments | None = None
        self._done = False

    @property
    def done(self) -> bool:
        """Whether nothing of what may follow is of interest."""
        return self._done

    def push(self, text: str) -> list[Part]:
        """Add text; return the parts that are certain now, perhaps none."""
        todo = deque(text)
        while todo and not self._done:
            c = todo.popleft()
            if self._reading is not None:
                self._argument(c, self._reading)
            elif self._alternatives or self._may_begin(c):
                back = self._try(c)
                todo.extendleft(reversed(back))
            else:
                self._plain(c)
        self._end_run()
        return self._take()

    def finish(self) -> list[Part]:
        """End the answer: return what was held back."""
        if not self._done and self._reading is None:
            inside = self.n_calls and self._alternatives and not self._alternatives[0].is_first
            if not inside:
                for c in self._held:
                    self._plain(c)
            if not self.n_calls:
                self._run += self._space
            self._end_run()
        self._done = True
        return self._take()

    def _may_begin(self, c: str) -> bool:
        """Whether a call may begin with this character; prepares for reading it."""
        fresh = not self._is_text and not self.n_calls
        self._alternatives = [
            _Match(parts, self._names, style, is_first=True)
            for parts, style in self._heads
            if parts[0][0] == c and (fresh or style.marker)
        ]
        return bool(self._alternatives)

    def _try(self, c: str) -> str:
        """Go on in what may be a call's syntax; return what is to be read again as text."""
        self._held += c
        left = [each for each in self._alternatives if each.feed(c)]
        whole = next((each for each in left if each.is_whole), None)
        if whole is not None:
            self._held, self._alternatives = "", []
            if whole.name is not None:
                self._current = whole.style
                self._begin_call(whole.name)
            else:
                self._between_calls(whole)
            return ""
        self._alternatives = left
        if left:
            return ""
        held, self._held = self._held, ""
        self._plain(held[0])
        return held[1:]

    def _begin_call(self, name: str) -> None:
        self._behind_call = True
        self._space.clear()
        self._end_run()
        call_id = f"call_{secrets.token_hex(12)}"
        self._parts.append(CallBegin(self.n_calls, call_id, name))
        self.n_calls += 1
        tagged = self._current.tagged
        self._reading = TagArguments(self._forms[name]) if tagged else _JsonEnd()
        self._run.append(self._reading.begin())

    def _argument(self, c: str, reading: "_Arguments") -> None:
        self._run.append(reading.feed(c))
        if not reading.done:
            return
        self._end_run()
        self._reading = None
        after = parts_of(self._current.after)
        if after:
            self._alternatives = [_Match(after, self._names, self._current)]
        else:
            self._done = not self._parallel

    def _between_calls(self, closed: "_Match") -> None:
        """A call's end was read, or the end of all."""
        style = closed.style
        if not self._parallel or style.between is None or closed.is_last:
            self._done = not self._parallel
        elif style.end:
            self._alternatives = [
                _Match(_head(style, style.between), self._names, style),
                _Match(parts_of(style.end), self._names, style, is_last=True),
            ]

    def _plain(self, c: str) -> None:
        """A character of text; white space waits for what follows it."""
        if c in _SPACE:
            self._space.append(c)
            return
        if not self._behind_call:
            self._run += self._space
        self._run.append(c)
        self._is_text, self._behind_call = True, False
        self._space.clear()

    def _end_run(self) -> None:
        """Make a part of the characters of one kind that came."""
        text = "".join(self._run)
        self._run.clear()
        if not text:
            return
        inside = self._reading is not None
        self._parts.append(CallArguments(self.n_calls - 1, text) if inside else TextPart(text))

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts


class _Arguments(Protocol):
    """Reads a call's arguments, and writes them as JSON."""

    done: bool

    def begin(self) -> str:
        """Return how the JSON text begins."""

    def feed(self, c: str) -> str:
        """Take a character; return what there is more of the JSON text."""


class _Match:
    """Compares characters with a call's syntax; between its parts there may be white space."""

    def __init__(
        self, parts: Sequence[str], names: Sequence[str], style: Style, *,
        is_first: bool = False, is_last: bool = False,
    ) -> None:  # fmt: skip
        self.style = style
        self.is_first = is_first
        self.is_last = is_last
        self.name: str | None = None
        self._parts = parts
        self._names = names
        self._at = self._n = self._n_space = 0
        self._read = ""

    @property
    def is_whole(self) -> bool:
        return self._at == len(self._parts)

    def feed(self, c: str) -> bool:
        """Whether the character fits."""
        part = self._parts[self._at]
        if part == _NAME_HERE:
            if c in _NAME:
                self._read += c
                return any(name.startswith(self._read) for name in self._names)
            if self._read not in self._names:
                return False
            self.name = self._read
            self._at += 1
            return self.feed(c)
        if c in _SPACE and self._n == 0:
            self._n_space += 1
            follows_quote = self._at and self._parts[self._at - 1] == _NAME_HERE
            at_begin = self._at == 0 and self.is_first
            return self._n_space <= MAX_SPACE and not (follows_quote or at_begin)
        if part[self._n] != c:
            return False
        self._n, self._n_space = self._n + 1, 0
        if self._n == len(part):
            self._at, self._n = self._at + 1, 0
        return True


class _JsonEnd:
    """Passes a JSON object on, up to its end."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_text = self._escaped = False

    def begin(self) -> str:
        """Return its first character, which was read with the call's name."""
        return self.feed("{")

    def feed(self, c: str) -> str:
        """Take a character of it, and return that."""
        if self._escaped:
            self._escaped = False
        elif self._in_text:
            self._escaped = c == "\\"
            self._in_text = c != '"'
        elif c == '"':
            self._in_text = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        return c


def _head(style: Style, begin: str) -> list[str]:
    """The parts of a call's syntax up to its arguments, with the first character of JSON."""
    first = [] if style.tagged else ["{"]
    return [*parts_of(begin + style.before), _NAME_HERE, *parts_of(style.middle), *first]
