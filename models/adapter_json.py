"""JSON that nobody vouches for: an adapter's settings, or the header of its safetensors file."""

from typing import Final

from edgeroute.runtime import untrusted_json
from edgeroute.runtime.errors import AdapterFileError

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
    return untrusted_json.parse_object(raw, what, AdapterFileError)


def one_line(text: object) -> str:
    """Make what a file says about itself safe to print: one line of bounded length."""
    if not isinstance(text, str):
        return ""
    clean = "".join(char if char.isprintable() else " " for char in text[: 4 * MAX_DESCRIPTION])
    return " ".join(clean.split())[:MAX_DESCRIPTION]
