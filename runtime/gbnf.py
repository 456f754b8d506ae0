"""Read a GBNF grammar and refuse what llama.cpp's parser or matcher could not survive.

llama.cpp's parser recurses per group, its left-recursion check per rule, and its matcher
keeps every possible parse apart; none of them has a limit. Everything is bounded here,
before any C call.

Source: the syntax in llama.cpp grammars/README.md and src/llama-grammar.cpp.
"""

from dataclasses import dataclass, field

from edgeroute.runtime.errors import GrammarError

MAX_CHARS = 1 << 18
MAX_DEPTH = 64
MAX_RULES = 10_000
MAX_ELEMENTS = 200_000
MAX_REPEAT = 2000
"""llama.cpp reads a larger upper bound as no bound at all."""

MAX_COPIES = 16
"""Longer mandatory repetitions are shortened: what is checked here does not depend on them."""

ROOT = "root"
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX = {"x": 2, "u": 4, "U": 8}
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS = frozenset("0123456789")


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of (or, negated, outside) inclusive code point ranges."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def matches(self, code: int) -> bool:
        return any(low <= code <= high for low, high in self.ranges) is not self.negated


ANY = Chars(((0, 0x10FFFF),))

Symbol = Chars | int
"""A character class, or the index of a rule."""

Sequence = tuple[Symbol, ...]


@dataclass(slots=True)
class Rules:
    """A grammar as alternatives of symbol sequences; generated rules carry their owner's name."""

    names: list[str] = field(default_factory=list)
    alternatives: list[list[Sequence]] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    n_elements: int = 0

    def reference(self, name: str) -> int:
        """The index of a named rule, defined or not yet."""
        if name not in self.ids:
            self.ids[name] = self.generate(name)
        return self.ids[name]

    def generate(self, owner: str) -> int:
        """Add a rule without a name of its own."""
        if len(self.names) >= MAX_RULES:
            raise GrammarError(
                f"the grammar has more than {MAX_RULES} rules and groups; make it smaller"
            )
        self.names.append(owner)
        self.alternatives.append([])
        return len(self.names) - 1

    def spend(self, n: int) -> None:
        """Account for elements that llama.cpp will allocate."""
        self.n_elements += n
        if self.n_elements > MAX_ELEMENTS:
            raise GrammarError(
                f"the grammar expands to more than {MAX_ELEMENTS} elements; "
                "use fewer or smaller repetitions"
            )


def parse(text: str) -> Rules:
    """Parse a grammar; every referenced rule is defined and `root` exists.

    Raises:
        GrammarError: not GBNF, or beyond a limit; the message says where and why.
    """
    if not isinstance(text, str):
        raise GrammarError(f"a grammar must be a text, got {type(text).__name__}")
    if len(text) > MAX_CHARS:
        raise GrammarError(f"the grammar has {len(text)} characters, the limit is {MAX_CHARS}")
    if "\0" in text:
        raise GrammarError("the grammar contains a NUL character; llama.cpp would stop reading")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"the grammar has a lone surrogate at {error.start}") from None
    parser = _Parser(text)
    parser.grammar()
    rules = parser.rules
    for name, index in rules.ids.items():
        if not rules.alternatives[index]:
            raise GrammarError(f"the grammar refers to a rule {name!r} that it does not define")
    if ROOT not in rules.ids:
        raise GrammarError(f"the grammar has no rule named {ROOT!r}, where matching begins")
    return rules


class _Parser:
    """Recursive descent, bounded by MAX_DEPTH."""

    def __init__(self, text: str) -> None:
        self.text = text + "\0"
        self.at = 0
        self.depth = 0
        self.rules = Rules()
        self.owner = ""

    def fail(self, problem: str) -> GrammarError:
        line = self.text.count("\n", 0, self.at) + 1
        near = self.text[self.at : self.at + 20].rstrip("\0")
        return GrammarError(f"grammar line {line}: {problem} at {near!r}")

    def peek(self) -> str:
        return self.text[self.at]

    def expect(self, token: str) -> None:
        if not self.text.startswith(token, self.at):
            raise self.fail(f"expected {token!r}")
        self.at += len(token)

    def space(self, newline: bool) -> None:
        blank = " \t\r\n" if newline else " \t"
        while True:
            if self.peek() in blank:
                self.at += 1
            elif self.peek() == "#":
                while self.peek() not in "\0\r\n":
                    self.at += 1
            else:
                return

    def grammar(self) -> None:
        self.space(newline=True)
        while self.peek() != "\0":
            self.owner = self.name()
            index = self.rules.reference(self.owner)
            if self.rules.alternatives[index]:
                raise self.fail(f"rule {self.owner!r} is defined twice")
            self.space(newline=False)
            self.expect("::=")
            self.space(newline=True)
            self.rules.alternatives[index] = self.choices(nested=False)
            if self.peek() not in "\0\r\n":
                raise self.fail("expected a new line or the end")
            self.space(newline=True)

    def name(self) -> str:
        start = self.at
        while self.peek() in _NAME:
            self.at += 1
        if start == self.at:
            raise self.fail("expected a rule name (letters, digits and '-')")
        return self.text[start : self.at]

    def choices(self, nested: bool) -> list[Sequence]:
        found = [self.sequence(nested)]
        while self.peek() == "|":
            self.at += 1
            self.space(newline=True)
            found.append(self.sequence(nested))
        return found

    def sequence(self, nested: bool) -> Sequence:
        done: list[Symbol] = []
        item: Sequence = ()
        self.rules.spend(2)
        while True:
            c = self.peek()
            if c in "*+?{":
                if not item:
                    raise self.fail("nothing to repeat")
                item = self.repeat(item)
            elif c in '"[.(' or c in _NAME:
                done += item
                item = self.item()
            elif c in "<!":
                raise self.fail("token references are not supported; spell the text out")
            else:
                return (*done, *item)
            self.space(newline=nested)

    def item(self) -> Sequence:
        c = self.peek()
        self.rules.spend(1)
        if c == '"':
            return self.literal()
        if c == "[":
            return (self.char_class(),)
        if c == ".":
            self.at += 1
            return (ANY,)
        if c == "(":
            return (self.group(),)
        return (self.rules.reference(self.name()),)

    def group(self) -> int:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail(f"groups are nested more than {MAX_DEPTH} deep")
        self.at += 1
        self.space(newline=True)
        index = self.rules.generate(self.owner)
        self.rules.alternatives[index] = self.choices(nested=True)
        self.expect(")")
        self.depth -= 1
        return index

    def literal(self) -> Sequence:
        self.at += 1
        found: list[Symbol] = []
        while self.peek() != '"':
            code = self.char()
            found.append(Chars(((code, code),)))
        self.at += 1
        self.rules.spend(len(found))
        return tuple(found)

    def char_class(self) -> Chars:
        self.at += 1
        negated = self.peek() == "^"
        self.at += negated
        ranges = []
        while self.peek() != "]":
            low = high = self.char()
            if self.peek() == "-" and self.text[self.at + 1] != "]":
                self.at += 1
                high = self.char()
            if low > high:
                raise self.fail(f"the range U+{low:04X}-U+{high:04X} is empty")
            ranges.append((low, high))
        self.at += 1
        if not ranges:
            raise self.fail("a character class is empty")
        self.rules.spend(2 * len(ranges))
        return Chars(tuple(ranges), negated)

    def char(self) -> int:
        c = self.peek()
        if c == "\0":
            raise self.fail("the grammar ends inside a literal or character class")
        self.at += 1
        if c != "\\":
            return ord(c)
        kind = self.peek()
        self.at += 1
        if kind in _ESCAPES:
            return ord(_ESCAPES[kind])
        if kind not in _HEX:
            raise self.fail(f"unknown escape \\{kind}")
        digits = self.text[self.at : self.at + _HEX[kind]]
        if len(digits) < _HEX[kind] or any(d not in "0123456789abcdefABCDEF" for d in digits):
            raise self.fail(f"expected {_HEX[kind]} hexadecimal digits")
        self.at += len(digits)
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self.fail(f"{code:#x} is not a character")
        return code

    def number(self) -> int:
        start = self.at
        while self.peek() in _DIGITS:
            self.at += 1
        digits = self.text[start : self.at]
        if not digits:
            raise self.fail("expected a number")
        if len(digits) > 6 or int(digits) > MAX_REPEAT:
            raise self.fail(f"{digits[:12]} repetitions exceed the limit of {MAX_REPEAT}")
        self.space(newline=True)
        return int(digits)

    def bounds(self) -> tuple[int, int | None]:
        kind = self.peek()
        self.at += 1
        if kind != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[kind]
        self.space(newline=True)
        low = self.number()
        high: int | None = low
        if self.peek() == ",":
            self.at += 1
            self.space(newline=True)
            high = self.number() if self.peek() in _DIGITS else None
        self.expect("}")
        if high is not None and high < low:
            raise self.fail(f"the repetition {{{low},{high}}} is empty")
        return low, high

    def repeat(self, item: Sequence) -> Sequence:
        """Rewrite a repetition; long ones are shortened, the cost is that of the real one."""
        low, high = self.bounds()
        n_optional = 1 if high is None else high - low
        self.rules.spend(len(item) * low + n_optional * (len(item) + 3))
        head = item * min(low, MAX_COPIES)
        if n_optional == 0:
            return head
        index = self.rules.generate(self.owner)
        again: Sequence = () if n_optional == 1 and high is not None else (index,)
        self.rules.alternatives[index] = [(*item, *again), ()]
        return (*head, index)
