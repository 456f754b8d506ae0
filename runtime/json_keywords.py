"""The keywords of a JSON schema: which are known here, and what kind of value each is about."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgeroute.runtime.errors import GrammarError

TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
_ANNOTATIONS = (
    "title description default examples deprecated readOnly writeOnly discriminator "
    "$schema $id $comment $defs definitions"
)
ANNOTATIONS = frozenset(_ANNOTATIONS.split())
COMBINERS = frozenset(("$ref", "anyOf", "oneOf", "allOf"))
_OF_TYPE = {
    "string": "minLength maxLength pattern format",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "object": "properties required additionalProperties minProperties maxProperties",
    "array": "items prefixItems minItems maxItems uniqueItems",
}
KEYWORDS = {word: kind for kind, words in _OF_TYPE.items() for word in words.split()}
KNOWN = ANNOTATIONS | COMBINERS | KEYWORDS.keys() | {"type", "const", "enum"}


def meaningful(schema: Mapping[str, Any], where: str) -> list[str]:
    """Keywords that constrain; unknown ones are refused, because ignoring them is not safe."""
    words = []
    for word in schema:
        if word not in KNOWN and not word.startswith("x-"):
            raise unsupported(where, word)
        if word in KNOWN - ANNOTATIONS:
            words.append(word)
    return words


def kinds_of(schema: Mapping[str, Any], words: Sequence[str], where: str) -> list[str]:
    """The types a schema allows, taken from its keywords where it names none."""
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    else:
        kinds = sorted({KEYWORDS[word] for word in words})
        if len(kinds) > 1:
            raise unsupported(where, f"keywords of several types without type ({words})")
    if not all(kind in TYPES for kind in kinds) or ("type" in schema and not kinds):
        raise GrammarError(f"schema {where}: type must be among {', '.join(TYPES)}, got {kinds!r}")
    return list(dict.fromkeys(kinds))


def unsupported(where: str, what: str) -> GrammarError:
    """The error to raise where a schema says what no grammar here can."""
    return GrammarError(f"schema {where}: {what} is not supported; nothing was generated")
