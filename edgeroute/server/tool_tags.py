"""Calls with a tag for each argument instead of JSON: their grammar, and their arguments as JSON.

    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>

A value of text stands there as it is, over as many lines as it has; any other one as JSON. Which
of both it is, follows from its schema alone, so that grammar and reader agree.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.json_keywords import ANNOTATIONS
from edgeroute.runtime.json_pattern import pattern_to_gbnf
from edgeroute.runtime.json_scalars import FORMATS
from edgeroute.runtime.json_schema import load_schema, schema_rules
from edgeroute.server.gbnf_text import literal, text_rules

Kind = Literal["text", "body", "json"]

MAX_HOPS: Final = 40
"""References that are followed one after the other."""
MAX_OPEN: Final = 64
"""Arguments of a call whose schema names none."""
_BEGIN, _NAMED, _END, _CLOSE = "<parameter=", ">", "\n</parameter>", "</function>"
_NULL: Final = "null"
_DEFINITIONS: Final = ("$defs", "definitions")
_OPEN_NAME: Final = "[a-zA-Z0-9_-]{1,64}"


@dataclass(frozen=True, slots=True)
class Form:
    """How a value is written.

    Attributes:
        kind: `text` as it is; `body` as between the quotes of a JSON text, for what a pattern or
            a format admits; `json`.
        nullable: whether the text `null` is no text.
    """

    kind: Kind
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Forms:
    """Those of a function's arguments by their names, and of others that it may have."""

    named: Mapping[str, Form]
    others: Form

    def __getitem__(self, name: str) -> Form:
        return self.named.get(name, self.others)


def forms_of(parameters: Mapping[str, Any]) -> Forms:
    """Tell how the arguments of a function are written, from the schema of all of them."""
    members, extra = _members(parameters)
    named = {name: _choose(each, parameters)[0] for name, each in members.items()}
    return Forms(named, _choose(extra, parameters)[0])


def tag_rules(parameters: Mapping[str, Any] | str, prefix: str) -> tuple[str, dict[str, str]]:
    """Return the rule of a call's arguments with all that ends the call, and what it needs.

    Args:
        parameters: JSON schema of an object.
        prefix: what the rules' names begin with.

    Raises:
        GrammarError: as `schema_rules`; a name that no tag can have; a reference to what only a
            whole schema has.
    """
    root = load_schema(parameters)
    schema_rules(root, prefix)  # refuses what it cannot express of all of them
    writer = _Writer(root, prefix)
    return writer.arguments(), writer.rules


class _Writer:
    """Writes the rules of one function's arguments.

    Args:
        root: JSON schema of all of them.
        prefix: what the rules' names begin with.
    """

    def __init__(self, root: Mapping[str, Any], prefix: str) -> None:
        self._root, self._prefix = root, prefix
        self.rules: dict[str, str] = {}

    def arguments(self) -> str:
        """Return the name of the rule of all arguments, in order, and of the end."""
        members, extra = _members(self._root)
        after = literal(_CLOSE)
        if not members and extra is not False:
            pair = self._add("any", self._pair(_OPEN_NAME, extra, "x"))
            return self._add("all", f"{pair}{{0,{MAX_OPEN}}} {after}")
        required = self._root.get("required", [])
        for i, (name, schema) in reversed(list(enumerate(members.items()))):
            if not name or not name.isprintable() or set(name) & set("<>"):
                raise GrammarError(f"the argument {name!r:.80} cannot be named in this model's "
                                   "syntax of calls, <parameter=NAME>; rename it")  # fmt: skip
            pair = f"{self._pair(literal(name), schema, str(i))} {after}"
            after = self._add(f"from-{i}", pair if name in required else f"{pair} | {after}")
        return self._add("all", after)

    def _add(self, name: str, body: str) -> str:
        self.rules[self._prefix + name] = body
        return self._prefix + name

    def _pair(self, name: str, schema: Any, at: str) -> str:
        """An argument: its tag and name, its value, and its end."""
        value = self._value(schema, f"{self._prefix}{at}-")
        return f'{literal(_BEGIN)} {name} {literal(_NAMED)} "\\n" {value} "\\n"'

    def _value(self, schema: Any, prefix: str) -> str:
        """A value and the tag that ends it."""
        form, core = _choose(schema, self._root)
        if form.kind == "json":
            return f"{self._json(schema, prefix)} {literal(_END)}"
        text = _text(core)
        if text is None:
            self.rules |= text_rules(f"{self._prefix}text", _END)
            return f"{self._prefix}text-0"
        null = f" | {literal(_NULL)}" if form.nullable else ""
        return f"({text}{null}) {literal(_END)}"

    def _json(self, schema: Any, prefix: str) -> str:
        if isinstance(schema, bool):
            return "value"
        named = {word: self._root[word] for word in _DEFINITIONS if word in self._root}
        top, rules = schema_rules({**named, **schema}, prefix)
        self.rules |= rules
        return top


def _members(root: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """Schemas of the arguments that have a name, in order, and that of any other."""
    extra = root.get("additionalProperties", True)
    properties = root.get("properties", {})
    missing = {name: extra for name in root.get("required", []) if name not in properties}
    return {**properties, **missing}, extra


def _text(core: Mapping[str, Any]) -> str | None:
    """What a text may be; None: anything that does not end it."""
    if "const" in core or "enum" in core:
        return " | ".join(literal(each) for each in _texts(core))
    if "pattern" in core:
        return pattern_to_gbnf(core["pattern"], "pattern")
    if "format" in core:
        return FORMATS[core["format"]]
    if "minLength" in core or "maxLength" in core:  # one line, for the end would be counted too
        return rf"[^\x00-\x1F\x7F]{{{core.get('minLength', 0)},{core.get('maxLength', '')}}}"
    return None


def _choose(schema: Any, root: Mapping[str, Any]) -> tuple[Form, Mapping[str, Any]]:
    """Tell how a value is written, and the schema of its text where it is one."""
    found, nullable = _followed(schema, root), False
    if found is not None:
        found, nullable = _without_null(found, root)
    if found is None or not _is_text(found):
        return Form("json"), {}
    is_body = "pattern" in found or "format" in found
    return Form("body" if is_body else "text", nullable), found


def _followed(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Follow references; None where that leads to no schema with keywords."""
    for _ in range(MAX_HOPS):
        if not isinstance(schema, Mapping):
            return None
        words = schema.keys() - ANNOTATIONS
        if words == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
            schema = schema["allOf"][0]
        elif words == {"$ref"}:
            schema = _target(schema["$ref"], root)
        else:
            return schema
    return None


def _target(ref: Any, root: Mapping[str, Any]) -> Any:
    found: Any = root if isinstance(ref, str) and ref.startswith("#/") else None
    for part in str(ref).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _without_null(
    schema: Mapping[str, Any], root: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, bool]:
    """Take the null out of a choice between it and one other; tell whether it was there."""
    word = next((each for each in ("anyOf", "oneOf") if isinstance(schema.get(each), list)), None)
    if word is not None and len(schema[word]) == 2:
        pair = [_followed(each, root) for each in schema[word]]
        nulls = [each is not None and each.get("type") == _NULL for each in pair]
        if sum(nulls) == 1:
            return pair[nulls.index(False)], True
    kinds = schema.get("type")
    if isinstance(kinds, list) and _NULL in kinds and len(kinds) == 2:
        (kind,) = (each for each in kinds if each != _NULL) if kinds[0] != kinds[1] else ("",)
        return {**schema, "type": kind}, True
    return schema, False


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a schema admits texts only, all of which can be written as they are."""
    if "const" in schema or "enum" in schema:
        texts = _texts(schema)
        fit = all(isinstance(each, str) and each.isprintable() for each in texts)
        return bool(texts) and fit and schema.get("type", "string") == "string"
    return schema.get("type") == "string"


def _texts(schema: Mapping[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema["enum"])


class TagArguments:
    """Reads the arguments of a call up to its end, and writes them as JSON while they come.

    Args:
        forms: of the function's arguments.
    """

    def __init__(self, forms: Forms) -> None:
        self.done = False
        self._forms = forms
        self._form: Form | None = None
        self._held = ""
        self._n = 0
        self._fresh = self._begun = False

    def begin(self) -> str:
        """Return how the JSON text begins."""
        return "{"

    def feed(self, c: str) -> str:
        """Take a character; return what there is more of the JSON text."""
        return self._between(c) if self._form is None else self._inside(self._form, c)

    def _between(self, c: str) -> str:
        """Before an argument, or at the end of all."""
        self._held = (self._held + c).lstrip()
        if self._held == _CLOSE:
            self.done = True
            return "}"
        if not (self._held.startswith(_BEGIN) and self._held.endswith(_NAMED)):
            return ""
        name = self._held[len(_BEGIN) : -len(_NAMED)]
        self._form, self._held, self._fresh, self._begun = self._forms[name], "", True, False
        self._n += 1
        return f"{', ' if self._n > 1 else ''}{json.dumps(name, ensure_ascii=False)}: "

    def _inside(self, form: Form, c: str) -> str:
        """In a value, behind the name; its first line begins in the next one."""
        fresh, self._fresh = self._fresh, False
        if fresh and c == "\n":
            return ""
        self._held += c
        if self._held.endswith(_END):
            return self._close(form)
        if form.nullable and not self._begun and (_NULL + _END).startswith(self._held):
            return ""
        return self._written(form, self._sure())

    def _sure(self) -> str:
        """Take what cannot belong to the end of the value out of what is held."""
        at = self._held.rfind(_END[0])
        keep = self._held[at:] if at >= 0 and _END.startswith(self._held[at:]) else ""
        sure = self._held[: len(self._held) - len(keep)]
        self._held = keep
        return sure

    def _written(self, form: Form, text: str) -> str:
        if not text or form.kind == "json":
            return text
        begun, self._begun = self._begun, True
        body = text if form.kind == "body" else json.dumps(text, ensure_ascii=False)[1:-1]
        return body if begun else f'"{body}'

    def _close(self, form: Form) -> str:
        """A value's end was read."""
        text, self._held, self._form = self._held[: -len(_END)], "", None
        if form.nullable and not self._begun and text == _NULL:
            return _NULL
        if form.kind == "json":
            return text
        written = self._written(form, text)
        return f'{written}"' if self._begun else '""'
