"""HTML and SVG written as nested calls. Whatever is not markup already is escaped."""

import html
import re
from collections.abc import Iterable

_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufffe\uffff]"
)
"""What XML forbids, what UTF-8 cannot hold, and what turns the direction of the text after it."""
_EMPTY = frozenset(("meta", "link", "path", "line", "rect", "circle", "polygon", "polyline"))


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Return `value` as text that is harmless between tags and between quotes."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_UNSEEN.sub("\ufffd", str(value)), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Return the parts one after the other, escaped where they are not markup."""
    return Markup("".join(map(escape, parts)))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element. `class_` is written class, `font_size` font-size; None is left out.

    Floats are written with one decimal, which is a tenth of a pixel in an image.
    """
    inner = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        return Markup(f"<{name}{inner}/>")
    return Markup(f"<{name}{inner}>{join(children)}</{name}>")


def number(value: float) -> str:
    """Print a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def _value(value: object) -> str:
    return number(value) if isinstance(value, float) else escape(value)
