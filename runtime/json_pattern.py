"""A JSON schema's `pattern`, a regular expression, as GBNF inside a JSON string."""

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.gbnf import MAX_REPEAT

MAX_CHARS = 2000
MAX_DEPTH = 20
_LAST = 0x10FFFF
_SETS = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x20, 0x20), (0xA0, 0xA0)],
}
_CONTROLS = {"n": 0x0A, "t": 0x09, "r": 0x0D, "f": 0x0C}
_FORBIDDEN = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]
"""What a JSON string carries escaped, or never."""

Ranges = list[tuple[int, int]]


def pattern_to_gbnf(pattern: object, where: str) -> str:
    """Translate a pattern; without ^ or $ any text may come before or after.

    Raises:
        GrammarError: not a pattern, or one that needs look-around, back-references, word
            boundaries or flags.
    """
    if not isinstance(pattern, str) or len(pattern) > MAX_CHARS:
        raise GrammarError(f"schema {where}: pattern must be a text of at most {MAX_CHARS}")
    return _Pattern(pattern, where).whole()


class _Pattern:
    """Recursive descent, bounded by MAX_DEPTH."""

    def __init__(self, pattern: str, where: str) -> None:
        self.text = pattern
        self.where = where
        self.at = 0
        self.depth = 0
        self.n_choices = 1
        self.is_ended = False

    def fail(self, problem: str) -> GrammarError:
        return GrammarError(
            f"schema {self.where}: pattern {self.text[:60]!r}, character {self.at}: {problem}"
        )

    def take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def whole(self) -> str:
        is_begun = self.take("^")
        body = self.choices()
        if self.at < len(self.text):
            raise self.fail("unbalanced )")
        if self.n_choices > 1 and (is_begun or self.is_ended):
            raise self.fail("^ or $ beside a choice; put the choice in a group")
        before, after = "" if is_begun else "char* ", "" if self.is_ended else " char*"
        return f"{before}({body}){after}"

    def choices(self) -> str:
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        if self.depth == 0:
            self.n_choices = len(found)
        return " | ".join(found)

    def sequence(self) -> str:
        parts: list[str] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if self.take("$"):
                if self.depth or self.at < len(self.text):
                    raise self.fail("$ is supported at the end only")
                self.is_ended = True
                break
            atom = self.atom()
            parts.append(atom + self.quantifier())
        return " ".join(parts) or '""'

    def quantifier(self) -> str:
        found = ""
        for sign in "*+?":
            if self.take(sign):
                found = sign
                break
        if not found and self.take("{"):
            end = self.text.find("}", self.at)
            low, comma, high = self.text[self.at : max(end, self.at)].partition(",")
            if end < 0 or not low.isdecimal() or (high and not high.isdecimal()):
                raise self.fail("a quantifier must be {n}, {n,} or {n,m}")
            if max(int(low[:9]), int(high[:9] or 0)) > MAX_REPEAT:
                raise self.fail(f"more than {MAX_REPEAT} repetitions")
            self.at = end + 1
            found = f"{{{int(low)}{comma}{high}}}"
        if found:
            self.take("?")  # laziness does not change what matches
            if self.at < len(self.text) and self.text[self.at] in "*+{":
                raise self.fail("a quantifier follows another")
        return found

    def atom(self) -> str:
        c = self.text[self.at]
        if c == "(":
            return self.group()
        if c == "[":
            return self.char_class()
        if c in "*+?{^":
            raise self.fail(f"{c!r} is not supported here")
        self.at += 1
        if c == ".":
            return _class(_invert([(0x0A, 0x0A), (0x0D, 0x0D)]))
        return _class(self.escape() if c == "\\" else [(ord(c), ord(c))])

    def group(self) -> str:
        self.at += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail(f"groups are nested more than {MAX_DEPTH} deep")
        if self.take("?") and not self.take(":"):
            raise self.fail("look-around and named groups are not supported")
        body = self.choices()
        if not self.take(")"):
            raise self.fail("unbalanced (")
        self.depth -= 1
        return f"({body})"

    def escape(self) -> Ranges:
        if self.at >= len(self.text):
            raise self.fail("it ends with a backslash")
        c = self.text[self.at]
        self.at += 1
        if c.lower() in _SETS:
            found = _SETS[c.lower()]
            if c.lower() == "s":
                found = [*found, (0x09, 0x0D)]
            return found if c.islower() else _invert(found)
        if c in _CONTROLS:
            return [(_CONTROLS[c], _CONTROLS[c])]
        if c in "xu":
            n = 2 if c == "x" else 4
            digits = self.text[self.at : self.at + n]
            if len(digits) < n or any(d not in "0123456789abcdefABCDEF" for d in digits):
                raise self.fail(f"\\{c} needs {n} hexadecimal digits")
            self.at += n
            return [(int(digits, 16), int(digits, 16))]
        if c.isalnum():
            raise self.fail(f"\\{c} is not supported")
        return [(ord(c), ord(c))]

    def char_class(self) -> str:
        self.at += 1
        is_negated = self.take("^")
        ranges: Ranges = []
        while not self.take("]"):
            low = self.member()
            if not self.text.startswith("-]", self.at) and self.take("-"):
                high = self.member()
                if len(low) > 1 or len(high) > 1 or low[0][0] > high[0][0]:
                    raise self.fail("a range in [] is not one character to a later one")
                low = [(low[0][0], high[0][0])]
            ranges += low
        return _class(_invert(ranges) if is_negated else ranges)

    def member(self) -> Ranges:
        if self.at >= len(self.text):
            raise self.fail("unbalanced [")
        c = self.text[self.at]
        self.at += 1
        if c != "\\":
            return [(ord(c), ord(c))]
        if self.take("b"):
            return [(8, 8)]
        return self.escape()


def _invert(ranges: Ranges) -> Ranges:
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    if start <= _LAST:
        found.append((start, _LAST))
    return found


def _class(ranges: Ranges) -> str:
    """One character as a JSON string spells it: itself, or an escape."""
    plain = _intersect(ranges, _invert(_FORBIDDEN))
    escapes = [
        f'"\\\\{escape}"'
        for code, escape in (
            (0x22, '\\"'), (0x5C, "\\\\"), (0x0A, "n"), (0x09, "t"), (0x0D, "r"),
            (0x08, "b"), (0x0C, "f"),
        )
        if any(low <= code <= high for low, high in ranges)
    ]  # fmt: skip
    parts = []
    if plain:
        parts.append("[" + "".join(map(_range, plain)) + "]")
    parts += escapes
    if not parts:  # a control character without a short escape
        raise GrammarError("a pattern asks for a character that JSON text cannot carry")
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _intersect(one: Ranges, other: Ranges) -> Ranges:
    found = []
    for low, high in one:
        for start, end in other:
            if max(low, start) <= min(high, end):
                found.append((max(low, start), min(high, end)))
    return sorted(set(found))


def _range(pair: tuple[int, int]) -> str:
    low, high = (f"\\U{code:08X}" for code in pair)
    return low if pair[0] == pair[1] else f"{low}-{high}"
