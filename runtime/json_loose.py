"""Drop from a JSON schema what no grammar can express, so that the rest can be enforced."""

from collections.abc import Mapping
from typing import Any, Final

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.gbnf import MAX_REPEAT
from edgeroute.runtime.json_keywords import KEYWORDS
from edgeroute.runtime.json_pattern import pattern_to_gbnf
from edgeroute.runtime.json_scalars import FORMATS
from edgeroute.runtime.json_schema import load_schema

_DEFINITIONS: Final = ("$defs", "definitions")
_NEVER: Final = frozenset(("multipleOf", "minProperties", "maxProperties", "uniqueItems"))
_LIMITS: Final = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
_COUNTS: Final = ("minLength", "maxLength", "minItems", "maxItems")


def loosen(schema: Mapping[str, object] | str) -> Any:
    """Return a schema that admits all that the given one does, and may well admit more.

    Keywords that are malformed stay: the translation refuses them.

    Raises:
        GrammarError: beyond the limits that any schema has here.
    """
    return _loose(load_schema(schema))


def _loose(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    kept = _one_of(schema)
    for word in _DEFINITIONS:
        if isinstance(schema.get(word), Mapping):
            kept[word] = {name: _loose(each) for name, each in schema[word].items()}
    return kept


def _one_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the one kind of constraint that says most."""
    kind = {"type": schema["type"]} if "type" in schema else {}
    for word in ("const", "enum"):
        if word in schema:
            return {word: schema[word], **kind}
    if kind or "properties" in schema:
        return _typed(schema)
    if "$ref" in schema:
        ref = schema["$ref"]
        is_remote = isinstance(ref, str) and not ref.startswith("#")
        return {} if is_remote else {"$ref": ref}
    for word in ("anyOf", "oneOf", "allOf"):
        listed = schema.get(word)
        if word == "allOf" and isinstance(listed, list) and listed:
            return {word: [_loose(listed[0])]}
        if isinstance(listed, list):
            return {"anyOf": [_loose(each) for each in listed]}
    return _typed(schema)


def _typed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what can be enforced for the types of a schema, which may be those of its keywords."""
    named = schema.get("type", "object" if "properties" in schema else None)
    kinds = {KEYWORDS[word] for word in schema if word in KEYWORDS}
    if named is None and len(kinds) != 1:
        return {}
    types = named if isinstance(named, list) else sorted(kinds) if named is None else [named]
    wanted = {"number" if each == "integer" else each for each in types if isinstance(each, str)}
    kept = {} if named is None else {"type": named}
    for word, value in schema.items():
        is_kept = KEYWORDS.get(word) in wanted and word not in _NEVER and not _beyond(word, value)
        if is_kept:
            kept[word] = value
    _drop_limits(kept, types)
    _drop_from_text(kept)
    _loosen_parts(kept)
    return kept


def _beyond(word: str, value: Any) -> bool:
    """Whether a length or a number of items is more than a grammar can count."""
    return word in _COUNTS and isinstance(value, int) and value > MAX_REPEAT


def _drop_limits(kept: dict[str, Any], types: list[Any]) -> None:
    """Drop ranges of fractions, except that they are not negative."""
    limits = {word: kept[word] for word in _LIMITS & kept.keys()}
    if "number" in types and limits != {"minimum": 0}:
        for word in limits:
            del kept[word]


def _drop_from_text(kept: dict[str, Any]) -> None:
    """Keep one of pattern, format and lengths."""
    if isinstance(kept.get("pattern"), str):
        try:
            pattern_to_gbnf(kept["pattern"], "#")
        except GrammarError:
            del kept["pattern"]
    if isinstance(kept.get("format"), str) and kept["format"] not in FORMATS:
        del kept["format"]
    for word in ("format", "minLength", "maxLength"):
        if "pattern" in kept or (word != "format" and "format" in kept):
            kept.pop(word, None)


def _loosen_parts(kept: dict[str, Any]) -> None:
    """Loosen what a schema is made of."""
    if isinstance(kept.get("properties"), Mapping):
        kept["properties"] = {name: _loose(each) for name, each in kept["properties"].items()}
    if "additionalProperties" in kept:
        kept["additionalProperties"] = _loose(kept["additionalProperties"])
    if isinstance(kept.get("prefixItems"), list):
        n, items = len(kept["prefixItems"]), kept["prefixItems"]
        if kept.get("minItems", 0) == n == kept.get("maxItems", n):
            kept["prefixItems"] = [_loose(each) for each in items]
        else:
            del kept["prefixItems"]
            kept.pop("items", None)
    if isinstance(kept.get("items"), list):  # what prefixItems was called before
        del kept["items"]
    elif "items" in kept:
        kept["items"] = _loose(kept["items"])
