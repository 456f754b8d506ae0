"""Schemas with what no grammar can express: the rest of them is enforced."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime import gbnf
from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.json_keywords import KNOWN
from edgeroute.runtime.json_loose import loosen
from edgeroute.runtime.json_schema import to_gbnf

TEXT, OBJECT = {"type": "string"}, {"type": "object"}

LOOSENED: dict[str, tuple[Any, Any]] = {
    "unknown format": (TEXT | {"format": "email"}, TEXT),
    "known format": (
        TEXT | {"format": "date", "maxLength": 10}, TEXT | {"format": "date"}
    ),
    "hard pattern": (
        TEXT | {"pattern": "(?=a)b", "minLength": 2}, TEXT | {"minLength": 2}
    ),
    "pattern and length": (TEXT | {"pattern": "^a$", "minLength": 1}, TEXT | {"pattern": "^a$"}),
    "long": (TEXT | {"minLength": 1, "maxLength": 10**6}, TEXT | {"minLength": 1}),
    "fraction": ({"type": "number", "minimum": 0, "maximum": 1}, {"type": "number"}),
    "not negative": ({"type": "number", "minimum": 0}, {"type": "number", "minimum": 0}),
    "integer": (
        {"type": "integer", "minimum": 1, "maximum": 9, "multipleOf": 2},
        {"type": "integer", "minimum": 1, "maximum": 9},
    ),
    "unique": (
        {"type": "array", "items": TEXT | {"format": "uri"}, "uniqueItems": True},
        {"type": "array", "items": TEXT},
    ),
    "old tuple": ({"type": "array", "items": [TEXT], "minItems": 1},
                  {"type": "array", "minItems": 1}),
    "open tuple": ({"type": "array", "prefixItems": [TEXT], "minItems": 0, "maxItems": 3},
                   {"type": "array", "minItems": 0, "maxItems": 3}),
    "tuple": ({"type": "array", "prefixItems": [TEXT | {"format": "x"}], "minItems": 1},
              {"type": "array", "prefixItems": [TEXT], "minItems": 1}),
    "object": (
        OBJECT | {"properties": {"a": {"not": {}}}, "required": ["a"], "maxProperties": 3,
                  "patternProperties": {}, "if": {}, "description": "d"},
        OBJECT | {"properties": {"a": {}}, "required": ["a"]},
    ),
    "map": (OBJECT | {"additionalProperties": TEXT | {"format": "ip"}},
            OBJECT | {"additionalProperties": TEXT}),
    "choice beside type": (OBJECT | {"anyOf": [{"required": ["a"]}]}, OBJECT),
    "overlap": ({"oneOf": [TEXT, TEXT | {"format": "x"}]}, {"anyOf": [TEXT, TEXT]}),
    "all of": ({"allOf": [OBJECT, TEXT]}, {"allOf": [OBJECT]}),
    "remote": ({"$ref": "https://example.com/s"}, {}),
    "beside $ref": (
        {"$ref": "#/$defs/t", "minLength": 3, "$defs": {"t": TEXT | {"format": "x"}}},
        {"$ref": "#/$defs/t", "$defs": {"t": TEXT}},
    ),
    "beside enum": (TEXT | {"enum": ["a"], "minLength": 1}, TEXT | {"enum": ["a"]}),
    "mixed": ({"minLength": 1, "minimum": 2}, {}),
    "untyped": ({"minLength": 1, "format": "x"}, {"minLength": 1}),
    "types": ({"type": ["string", "null"], "format": "x", "minimum": 2},
              {"type": ["string", "null"]}),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "expected"), LOOSENED.values(), ids=LOOSENED.keys())
def test_what_is_left(schema: Any, expected: Any) -> None:
    assert loosen(schema) == expected
    assert gbnf.parse(to_gbnf(expected))


@pytest.mark.parametrize("schema", [
    {"type": "word"}, {"$ref": "#/nowhere"}, TEXT | {"minLength": "x"}, {"enum": []},
    OBJECT | {"required": 3, "properties": {"a": {}}}, {"anyOf": []}, '{"a"',
    {"type": "array", "items": {"properties": 7}},
])  # fmt: skip
def test_what_is_malformed_stays_so(schema: Any) -> None:
    with pytest.raises(GrammarError):
        to_gbnf(loosen(schema))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.sampled_from(
        ["string", "integer", "number", "object", "array", "#", "#/$defs/a", "^a+$", "date", "["]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*sorted(KNOWN), "not", "a"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from([*sorted(KNOWN), "not"]), VALUES, max_size=4))
def test_any_data_is_loosened_and_what_was_fine_stays_fine(schema: dict[str, Any]) -> None:
    try:
        to_gbnf(schema)
        is_fine = True
    except GrammarError:
        is_fine = False
    try:
        to_gbnf(loosen(schema))
    except GrammarError:
        assert not is_fine
