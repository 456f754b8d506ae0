"""The GBNF of JSON values that hold no others: literals, strings and numbers."""

import json
from collections.abc import Mapping
from typing import Any

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.gbnf import MAX_REPEAT
from edgeroute.runtime.json_keywords import KEYWORDS, unsupported
from edgeroute.runtime.json_pattern import pattern_to_gbnf
from edgeroute.runtime.json_ranges import integer_range

_DAYS = '"0" [1-9] | "1" [0-9] | "2" [0-8]'
_DATE = (
    f'[0-9]{{4}} "-" ("02-" ({_DAYS}) | ("04" | "06" | "09" | "11") "-" ({_DAYS} | "29" | "30") '
    f'| ("01" | "03" | "05" | "07" | "08" | "10" | "12") "-" ({_DAYS} | "29" | "3" [01]))'
)
_TIME = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    '("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}


def string_rule(schema: Mapping[str, Any], where: str) -> str:
    """The GBNF of the strings that a schema allows."""
    low, high = bounds(schema, "minLength", "maxLength", where)
    has_length = low > 0 or high is not None
    special = [word for word in ("pattern", "format") if word in schema]
    if len(special) + has_length > 1:
        raise unsupported(where, "more than one of pattern, format and a length")
    if "pattern" in schema:
        return rf'"\"" {pattern_to_gbnf(schema["pattern"], where)} "\""'
    if "format" in schema:
        if not isinstance(schema["format"], str) or schema["format"] not in FORMATS:
            raise unsupported(where, f"format {schema['format']!r} (known: {', '.join(FORMATS)})")
        return rf'"\"" {FORMATS[schema["format"]]} "\""'
    if not has_length:
        return "string"
    return rf'"\"" char{{{low},{"" if high is None else high}}} "\""'


def number_rule(kind: str, schema: Mapping[str, Any], where: str) -> str:
    """The GBNF of the numbers, or integers, that a schema allows."""
    words = [w for w, of in KEYWORDS.items() if of == "number" and w in schema]
    if not words:
        return kind
    if "multipleOf" in words:
        raise unsupported(where, "multipleOf")
    limits = {w: schema[w] for w in words}
    for word, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GrammarError(f"schema {where}: {word} must be a number, got {value!r}")
    if kind == "number":
        if limits == {"minimum": 0}:
            return '("0" | [1-9] [0-9]{0,15}) fraction'
        raise unsupported(where, f"{', '.join(words)} on a number; use integer, or minimum 0")
    return integer_range(limits, where)


def bounds(
    schema: Mapping[str, Any], low_word: str, high_word: str, where: str
) -> tuple[int, int | None]:
    """The least and the most of a count that two keywords set; None where nothing bounds it."""
    low, high = schema.get(low_word, 0), schema.get(high_word)
    for word, value in ((low_word, low), (high_word, high)):
        if word not in schema:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEAT:
            raise GrammarError(
                f"schema {where}: {word} must be between 0 and {MAX_REPEAT}, got {value!r}"
            )
    if high is not None and high < low:
        raise GrammarError(f"schema {where}: {low_word} {low} is above {high_word} {high}")
    return low, high


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of one of the TYPES."""
    if isinstance(value, bool):
        return kind == "boolean"
    classes = {"string": str, "number": int | float, "integer": int, "null": type(None)}
    return isinstance(value, classes.get(kind, Mapping if kind == "object" else list))


def literal(value: Any, where: str) -> str:
    """The GBNF literal of a value's JSON text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        raise GrammarError(f"schema {where}: {value!r} has no JSON text ({error})") from None
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\x7F")
    return f'"{escaped}"'
