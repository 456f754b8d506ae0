"""Grammars in which an answer calls tools: the syntax of a model family, arguments by schema.

Free text is part of the grammar: any text that does not contain the calls' marker, as a
chain of rules with one rule for each part of the marker that may have begun. So nothing has
to be switched on when a marker comes, whichever tokens it is made of. Calls that some models
write without a marker are found where an answer begins, by a function's name in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.json_loose import loosen
from edgeroute.runtime.json_schema import PRIMITIVES, schema_rules
from edgeroute.server.gbnf_text import class_char, literal, text_rules
from edgeroute.server.tool_styles import Style, parts_of
from edgeroute.server.tool_tags import Forms, forms_of, tag_rules

MAX_CALLS: Final = 32
"""Calls of one answer: a weak model would go on as long as it may."""

MAX_NAME_CHARS: Final = 2000
"""Of all functions together; beyond that, calls without a marker are not looked for."""

_SPACE: Final = " \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A tool as it may be called.

    Attributes:
        name: 1 to 64 letters, digits, underscores and dashes.
        description: for the model.
        parameters: JSON schema of an object.
        strict: whether a schema that cannot be enforced as a whole is an error, instead of
            being enforced as far as that goes.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def told(self) -> dict[str, Any]:
        """Return it as chat templates expect it."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": told}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What an answer may be.

    Attributes:
        style: syntax of calls.
        functions: those that may be called, one at least.
        required: whether there is no answer without a call.
        many: whether an answer may have several calls.
        answer_schema: what an answer without a call has to match; None: any text.
    """

    style: Style
    functions: Sequence[Function]
    required: bool
    many: bool
    answer_schema: Mapping[str, Any] | str | None = None


def function_rules(
    function: Function, index: int, *, tagged: bool = False
) -> tuple[str, dict[str, str]]:
    """Return the rule of a function's arguments, and the rules it needs.

    What no grammar can express is left out where the function is not strict.

    Args:
        function: what may be called.
        index: its number, for the rules' names.
        tagged: whether each argument has a tag of its own.

    Raises:
        GrammarError: the schema is malformed, or strict and cannot be expressed.
    """
    rules_of, prefix = tag_rules if tagged else schema_rules, f"f{index}-"
    try:
        return rules_of(function.parameters, prefix)
    except GrammarError:
        if function.strict:
            raise
    return rules_of(loosen(function.parameters), prefix)


def tag_forms(function: Function) -> Forms:
    """Tell how the arguments are written in which `function_rules` has tags; errors as there."""
    try:
        tag_rules(function.parameters, "")
    except GrammarError:
        if function.strict:
            raise
        return forms_of(loosen(function.parameters))
    return forms_of(function.parameters)


def call_grammar(calls: Calls) -> str:
    """Write the grammar of an answer.

    Raises:
        GrammarError: a schema is malformed or cannot be expressed.
    """
    return _Writer(calls).grammar()


@dataclass(slots=True)
class _Node:
    """How far a text has come in the syntax of calls without a marker.

    Attributes:
        next: nodes by characters.
        spaced: whether white space may stand here.
        rule: of what may follow, once that is known.
    """

    next: dict[str, "_Node"] = field(default_factory=dict)
    spaced: bool = False
    rule: str | None = None


class _Writer:
    """Writes one grammar.

    Args:
        calls: what an answer may be.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._rules: dict[str, str] = {}
        self._n_nodes = 0

    def grammar(self) -> str:
        """Return the grammar's text."""
        calls = self._calls
        for i, function in enumerate(calls.functions):
            top, rules = function_rules(function, i, tagged=calls.style.tagged)
            self._rules |= {**rules, f"args-{i}": top}
        whole = f"{literal(calls.style.marker)} {self._all_calls(calls.style)}"
        if calls.required:
            root = whole
        elif calls.answer_schema is not None:
            top, rules = schema_rules(calls.answer_schema, "answer-")
            self._rules |= rules
            root = f"{top} | {whole}"
        else:
            root = self._free_text(calls.style)
        rules = {"root": root, **self._rules, **PRIMITIVES}
        return "\n".join(f"{name} ::= {body}" for name, body in rules.items())

    def _all_calls(self, style: Style) -> str:
        """The rule of all that follows the marker up to the end of the answer."""
        pairs = enumerate(self._calls.functions)
        named = [f"{literal(f.name + style.middle)} args-{i}" for i, f in pairs]
        self._rules["named"] = " | ".join(named)
        self._rules["call"] = f"named {literal(style.after)}"
        # Some vocabularies put a space between the marker and the list.
        begin = f'" "? {literal(style.begin)}' if style.begin else ""
        more = ""
        if style.between is not None and self._calls.many:
            again = f"{literal(style.between + style.before)} call"
            more = f"({again}){{0,{MAX_CALLS - 1}}}"
        self._rules["calls"] = f"{begin} {literal(style.before)} call {more} {literal(style.end)}"
        return "calls"

    def _free_text(self, style: Style) -> str:
        """The rule of text, of calls, or of text and then calls."""
        if style.marker:
            calls = self._all_calls(style)
            self._rules |= text_rules("text", style.marker, calls, may_end=True)
        else:
            self._rules["text-0"] = ".*"
        n_chars = sum(len(f.name) for f in self._calls.functions)
        if not style.free or (style.marker and n_chars > MAX_NAME_CHARS):
            return "text-0"
        root, names = _Node(spaced=True), _Node()
        for i, function in enumerate(self._calls.functions):
            _way(names, [function.name, style.free[0].middle[0]]).rule = f"rest-{i}"
        for other in style.free:
            *parts, last = parts_of(other.begin + other.before)
            node = _way(root, parts, spaced=True)
            node.spaced = True
            node.next[last] = names
        self._free_calls(style.free[0])
        return self._node(root, style.marker)

    def _free_calls(self, style: Style) -> None:
        """Add the rules of what follows a function's name and its quote, without a marker."""
        middle, after = _spaced(style.middle[1:]), _spaced(style.after)
        pairs = list(enumerate(self._calls.functions))
        for i, _ in pairs:
            self._rules[f"rest-{i}"] = f"{middle} ws args-{i} {after} tail"
        ways = [_spaced(style.end), '""'] if style.end else ['""']
        if style.between is not None and self._calls.many:
            named = (f"{literal(f.name + style.middle[0])} rest-{i}" for i, f in pairs)
            self._rules["again"] = " | ".join(named)
            ways.append(f"{literal(style.between + style.before)} again")
        self._rules["tail"] = " | ".join(ways)

    def _node(self, node: _Node, marker: str) -> str:
        """The rule of a text that begins as a call may begin; it may turn out to be none."""
        if node.rule is not None:
            return node.rule
        node.rule = name = f"b{self._n_nodes}"
        self._n_nodes += 1
        spaces = _SPACE if node.spaced else ""
        ways = ['""', *(f"{literal(c)} {self._node(n, marker)}" for c, n in node.next.items())]
        if spaces:
            ways.append(f"[{''.join(map(class_char, spaces))}] {name}")
        others = [*node.next, *spaces]
        if marker and marker[0] not in others:
            others.append(marker[0])
            ways.append(f"{literal(marker[0])} text-1")
        ways.append(f"[^{''.join(map(class_char, others))}] text-0")
        self._rules[name] = " | ".join(ways)
        return name


def _way(node: _Node, parts: Sequence[str], *, spaced: bool = False) -> _Node:
    """Add the way from a node along some characters; return where it ends."""
    for part in parts:
        node.spaced = node.spaced or spaced
        for c in part:
            node = node.next.setdefault(c, _Node())
    return node


def _spaced(syntax: str) -> str:
    """Syntax with white space at will before each of its parts."""
    return " ".join(f"ws {literal(part)}" for part in parts_of(syntax))
