"""JSON that nobody vouches for: an adapter's settings, or the header of its safetensors file."""

import json
from typing import Final, Never

from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.gguf_metadata import quote

MAX_DESCRIPTION: Final = 500
"""Characters of a description that are kept."""


def parse_object(raw: bytes, what: str) -> dict[str, object]:
    """Parse a JSON object; keys that appear twice, NaN and deep nesting are refused.

    Args:
        raw: the text, already bounded in size by the caller.
        what: how messages name it.

    Raises:
        AdapterFileError: it is no such object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise AdapterFileError(f"{what} has the key {quote(key)} twice; it is damaged")
            found[key] = value
        return found

    def constant(text: str) -> Never:
        raise AdapterFileError(f"{what} contains {text}, which is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise AdapterFileError(f"{what} nests its values too deeply; it is damaged") from error
    except ValueError as error:  # also bad UTF-8 and endless digits
        reason = str(error).split("\n")[0][:120]
        raise AdapterFileError(f"{what} is not JSON: {reason}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{what} is a JSON {type(value).__name__}, but an object is wanted")
    return value


def show(value: object) -> str:
    """Print a JSON value for a message: scalars short, containers by their kind."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return quote(value) if isinstance(value, str) else repr(value)


def one_line(text: object) -> str:
    """Make what a file says about itself safe to print: one line of bounded length."""
    if not isinstance(text, str):
        return ""
    clean = "".join(char if char.isprintable() else " " for char in text[: 4 * MAX_DESCRIPTION])
    return " ".join(clean.split())[:MAX_DESCRIPTION]
