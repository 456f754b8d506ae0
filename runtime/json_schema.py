"""Turn a JSON schema into a GBNF grammar, or refuse it by name.

What the grammar admits is always valid under the schema: a keyword that cannot be
expressed is an error, never ignored. Where the schema leaves a choice (extra properties,
their order) the grammar takes the narrower one: named properties only, in their order.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.json_disjoint import are_disjoint
from edgeroute.runtime.json_keywords import COMBINERS, KEYWORDS, kinds_of, meaningful, unsupported
from edgeroute.runtime.json_scalars import bounds, is_of, literal, number_rule, string_rule

MAX_CHARS = 1 << 17
MAX_DEPTH = 40
MAX_NODES = 4000
MAX_ENUM = 1000
MAX_CHOICES = 200

PRIMITIVES = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "fraction": '("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "number": "integer fraction",
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": '"{" ws (string ":" ws value ("," ws string ":" ws value)*  ws)? "}"',
    "array": '"[" ws (value ("," ws value)* ws)? "]"',
    "value": "object | array | string | number | boolean | null",
}


def to_gbnf(schema: Mapping[str, object] | str) -> str:
    """Translate a schema, given as data or as JSON text.

    Raises:
        GrammarError: not a schema, beyond a limit, or a keyword that is not supported; the
            message gives the place and the keyword.
    """
    top, rules = schema_rules(schema)
    return "\n".join(f"{k} ::= {v}" for k, v in {"root": top, **rules, **PRIMITIVES}.items())


def schema_rules(
    schema: Mapping[str, object] | str, prefix: str = "s-"
) -> tuple[str, dict[str, str]]:
    """Translate a schema that is a part of a larger grammar.

    Args:
        schema: as `to_gbnf`.
        prefix: what the rules' names begin with.

    Returns:
        The name of the rule that matches an instance, and the rules by name. They refer to
        PRIMITIVES, which the grammar must have too.

    Raises:
        GrammarError: as `to_gbnf`.
    """
    root = load_schema(schema)
    converter = _Converter(root, prefix)
    return converter.rule(root, "#", 0), converter.rules


def load_schema(schema: Mapping[str, object] | str) -> Any:
    """Return a schema as data, once it is known to be of a sane size.

    Raises:
        GrammarError: not JSON, or beyond a limit.
    """
    root = _load(schema)
    _check_size(root)
    return root


def _load(schema: Mapping[str, object] | str) -> Any:
    if isinstance(schema, str):
        if len(schema) > MAX_CHARS:
            raise GrammarError(f"the schema has {len(schema)} characters, limit {MAX_CHARS}")
        try:
            return json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"a schema must be an object, got {type(schema).__name__}")
    return schema


def _check_size(root: object) -> None:
    """Bound nodes, depth and text before anything recurses."""
    todo: list[tuple[object, int]] = [(root, 0)]
    n_nodes = n_chars = 0
    while todo:
        node, depth = todo.pop()
        n_nodes += 1
        children: list[object] = []
        if isinstance(node, str):
            n_chars += len(node)
        elif isinstance(node, Mapping):
            if not all(isinstance(key, str) for key in node):
                raise GrammarError("the schema has a key that is not a text")
            children = [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple):
            children = list(node)
        elif not isinstance(node, bool | int | float | None):
            raise GrammarError(f"the schema contains a {type(node).__name__}, which is not JSON")
        if depth > MAX_DEPTH or n_nodes > 4 * MAX_NODES or n_chars > MAX_CHARS:
            raise GrammarError(
                f"the schema is too large: nested {depth} deep (limit {MAX_DEPTH}), at least "
                f"{n_nodes} values (limit {4 * MAX_NODES}), {n_chars} characters "
                f"(limit {MAX_CHARS})"
            )
        todo += [(child, depth + 1) for child in children]


class _Converter:
    """One rule per schema; a schema reached by `$ref` has one rule however often it is used."""

    def __init__(self, root: Any, prefix: str) -> None:
        self.root = root
        self.prefix = prefix
        self.rules: dict[str, str] = {}
        self.refs: dict[str, str] = {}
        self.n_nodes = 0

    def add(self, where: str, body: str) -> str:
        """Name a rule after its place in the schema."""
        stem = self.prefix + (re.sub(r"[^a-zA-Z0-9]+", "-", where).strip("-")[:60] or "root")
        name, n = stem, 1
        while name in self.rules:
            n += 1
            name = f"{stem}-{n}"
        self.rules[name] = body
        return name

    def rule(self, schema: Any, where: str, depth: int) -> str:
        """The name of a rule that matches a schema's instances."""
        self.n_nodes += 1
        if depth > MAX_DEPTH or self.n_nodes > MAX_NODES:
            raise GrammarError(
                f"schema {where}: more than {MAX_NODES} parts, or {MAX_DEPTH} levels"
            )
        if schema is True:
            return "value"
        if not isinstance(schema, Mapping):
            raise GrammarError(f"schema {where}: expected a schema that can be met, got {schema!r}")
        words = meaningful(schema, where)
        combiner = next((w for w in words if w in COMBINERS), None)
        if combiner is not None:
            if len(words) > 1:
                others = ", ".join(w for w in words if w != combiner)
                raise unsupported(where, f"{combiner} beside {others}")
            return self.combined(combiner, schema[combiner], where, depth)
        if "const" in schema or "enum" in schema:
            return self.add(where, self.literals(schema, where))
        kinds = kinds_of(schema, words, where)
        bodies = [self.kind(kind, schema, where, depth) for kind in kinds]
        return self.add(where, " | ".join(bodies)) if kinds else "value"

    def combined(self, word: str, value: Any, where: str, depth: int) -> str:
        if word == "$ref":
            return self.reference(value, where, depth)
        if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
            raise GrammarError(f"schema {where}: {word} must list 1 to {MAX_CHOICES} schemas")
        if word == "allOf" and len(value) > 1:
            raise unsupported(where, "allOf with more than one schema")
        if word == "oneOf" and not are_disjoint(value):
            raise unsupported(
                where, "oneOf whose schemas may overlap; use anyOf, or one type or const each"
            )
        names = [self.rule(s, f"{where}/{word}/{i}", depth + 1) for i, s in enumerate(value)]
        return self.add(where, " | ".join(names))

    def reference(self, ref: Any, where: str, depth: int) -> str:
        """The rule of a local reference; remote ones are never fetched."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise unsupported(where, f"$ref to {ref!r} (only '#/...' inside the schema)")
        if ref not in self.refs:
            target = _resolve(self.root, ref, where)
            # Named before it is visited, so that a schema may contain itself.
            name = self.refs[ref] = self.add(ref, "")
            self.rules[name] = self.rule(target, ref, depth + 1)
        return self.refs[ref]

    def literals(self, schema: Mapping[str, Any], where: str) -> str:
        """The alternatives of `const` or `enum`, without those that `type` excludes."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or len(values) > MAX_ENUM:
            raise GrammarError(f"schema {where}: enum must be a list of at most {MAX_ENUM} values")
        extra = schema.keys() & KEYWORDS.keys()
        if extra or ("const" in schema and "enum" in schema):
            raise unsupported(where, "const or enum beside other constraints")
        if "type" in schema:
            kinds = kinds_of(schema, ["type"], where)
            values = [v for v in values if any(is_of(v, kind) for kind in kinds)]
        if not values:
            raise GrammarError(f"schema {where}: no value is allowed by enum and type together")
        return " | ".join(dict.fromkeys(literal(v, where) for v in values))

    def kind(self, kind: str, schema: Mapping[str, Any], where: str, depth: int) -> str:
        if kind == "string":
            return string_rule(schema, where)
        if kind in ("number", "integer"):
            return number_rule(kind, schema, where)
        if kind == "object":
            return self.object(schema, where, depth)
        if kind == "array":
            return self.array(schema, where, depth)
        return kind

    def object(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        for word in ("minProperties", "maxProperties"):
            if word in schema:
                raise unsupported(where, word)
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise GrammarError(f"schema {where}: properties or required is malformed")
        if not all(isinstance(name, str) for name in required):
            raise GrammarError(f"schema {where}: required must be a list of names")
        missing = [name for name in required if name not in properties]
        if missing and extra is False:
            raise GrammarError(f"schema {where}: {missing[0]!r} is required but not allowed")
        members = {**properties, **{name: extra for name in missing}}
        if not members:
            return self.open_object(extra, where, depth)
        pairs = [
            (self.member(name, s, where, depth), name in required) for name, s in members.items()
        ]
        return f'"{{" ws {self.members(pairs, where)} "}}"'

    def open_object(self, extra: Any, where: str, depth: int) -> str:
        if extra is False:
            return '"{" ws "}"'
        if extra is True:
            return "object"
        value = self.rule(extra, f"{where}/additionalProperties", depth + 1)
        pair = f'string ":" ws {value}'
        return f'"{{" ws ({pair} ("," ws {pair})* ws)? "}}"'

    def member(self, name: str, schema: Any, where: str, depth: int) -> str:
        place = f"{where}/properties/{name}"
        return f'{literal(name, where)} ":" ws {self.rule(schema, place, depth + 1)}'

    def members(self, pairs: Sequence[tuple[str, bool]], where: str) -> str:
        """Properties in order, the optional ones left out at will, with commas between."""
        after, first = "ws", ""
        for body, is_required in reversed(pairs):
            here = self.add(f"{where}/member", body)
            begun, fresh = f'"," ws {here} {after}', f"{here} {after}"
            if not is_required:
                fresh = f"{fresh} | {first}" if first else f"({fresh})?"
                begun = f"{begun} | {after}"
            after, first = self.add(f"{where}/more", begun), self.add(f"{where}/first", fresh)
        return first

    def array(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        if schema.get("uniqueItems", False) is not False:
            raise unsupported(where, "uniqueItems")
        low, high = bounds(schema, "minItems", "maxItems", where)
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        if not isinstance(prefix, list):
            raise GrammarError(f"schema {where}: prefixItems must be a list")
        if prefix:
            if low > len(prefix) or (high is not None and high < len(prefix)):
                raise unsupported(where, "prefixItems of another length than minItems..maxItems")
            parts = [
                self.rule(s, f"{where}/prefixItems/{i}", depth + 1) for i, s in enumerate(prefix)
            ]
            listed = ' "," ws '.join(parts)
            return f'"[" ws {listed} ws "]"'
        if items is False or high == 0:
            if low:
                raise GrammarError(f"schema {where}: minItems {low} of nothing cannot be met")
            return '"[" ws "]"'
        item = self.rule(items, f"{where}/items", depth + 1)
        more = f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        body = f'{item} ("," ws {item}){more} ws'
        return f'"[" ws {body} "]"' if low else f'"[" ws ({body})? "]"'


def _resolve(root: Any, ref: str, where: str) -> Any:
    target = root
    for part in ref.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            raise GrammarError(f"schema {where}: $ref {ref!r} leads nowhere")
    return target
