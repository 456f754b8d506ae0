"""JSON that nobody vouches for: parsed strictly, and shown in messages at a bounded length."""

import json
from typing import Never

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.gguf_metadata import quote


def parse_json(raw: str | bytes, what: str, refused: type[EdgerouteError]) -> object:
    """Parse JSON; keys that appear twice, NaN and deep nesting are refused.

    Args:
        raw: the text, already bounded in size by the caller.
        what: how messages name it.
        refused: the error to raise.

    Raises:
        EdgerouteError: it is no such JSON; of the class `refused`.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise refused(f"{what} has the key {quote(key)} twice; it is damaged")
            found[key] = value
        return found

    def constant(text: str) -> Never:
        raise refused(f"{what} contains {text}, which is not JSON")

    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        parsed: object = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise refused(f"{what} nests its values too deeply; it is damaged") from error
    except ValueError as error:  # also bad UTF-8 and endless digits
        reason = str(error).split("\n")[0][:120]
        raise refused(f"{what} is not JSON: {reason}") from error
    return parsed


def parse_object(raw: str | bytes, what: str, refused: type[EdgerouteError]) -> dict[str, object]:
    """Parse a JSON object, as `parse_json`.

    Raises:
        EdgerouteError: it is no such object; of the class `refused`.
    """
    value = parse_json(raw, what, refused)
    if not isinstance(value, dict):
        raise refused(f"{what} is {show(value)}, but a JSON object is wanted")
    return value


def show(value: object) -> str:
    """Print a JSON value for a message: scalars short, containers by their kind."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return quote(value) if isinstance(value, str) else repr(value)
