"""The plots of the report as PNG files, in the light theme, each with its sentence above it."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.extras import check_extra
from edgeroute.tools.profile.figures import Figure
from edgeroute.tools.profile.html import figures_of
from edgeroute.tools.profile.markup import Markup, join, tag
from edgeroute.tools.profile.plots import words
from edgeroute.tools.profile.scales import text_width
from edgeroute.tools.profile.strokes import outline
from edgeroute.tools.profile.style import LIGHT, drawing_css
from edgeroute.tools.profile.view import view_of

_FAMILIES = "Inter, Noto Sans, DejaVu Sans, Liberation Sans, Segoe UI, Helvetica, Arial, sans-serif"
_ZOOM = 2.0
_BORDER_PX = 24
_BROAD_PX, _PLAIN_PX = 1000, 640


def write_png(profile: Mapping[str, Any], folder: Path, *, system_fonts: bool = True) -> list[Path]:
    """Write every plot of `Profile.to_dict()` as `KEY.png` into `folder`, which is made.

    Text is drawn with the machine's fonts. Where it has none (or `system_fonts` is off) it is
    drawn with an alphabet of strokes, so that no label is ever missing.

    Raises:
        UsageError: it is no profile, the extra `report` is not installed, or the folder cannot
            be written.
    """
    draw = _renderer()
    view = view_of(profile)
    fonts = system_fonts and _has_fonts()
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _, figures in figures_of(view):
            for one in figures:
                path = folder / f"{one.key}.png"
                path.write_bytes(draw(image(one, fonts=fonts)))
                written.append(path)
    except OSError as error:
        raise UsageError(f"cannot write the plots to {folder}: {error}") from error
    return written


def image(one: Figure, *, fonts: bool = True) -> str:
    """Return a plot as a whole SVG file, with its sentence and what it shows above it."""
    drawing = one.draw(_BROAD_PX if one.broad else _PLAIN_PX)
    parts: list[Markup] = []
    y = 0.0
    for text, px, classes in ((one.headline, 16, "strong"), (one.about, 12, "soft")):
        for line in _wrap(text, min(drawing.width, 760), px * (1.1 if px > 12 else 1.0)):
            y += px * 1.35
            parts.append(words(0, y, line, classes, px=px))
        y += 4
    y += 12
    width, height = drawing.width + 2 * _BORDER_PX, drawing.height + y + 2 * _BORDER_PX
    svg = tag(
        "svg",
        tag("style", Markup(drawing_css(LIGHT))),
        tag("rect", width=width, height=height, fill=LIGHT["face"]),
        tag(
            "g",
            join(parts),
            tag("g", drawing.body, transform=f"translate(0 {y:.0f})"),
            transform=f"translate({_BORDER_PX} {_BORDER_PX})",
        ),
        xmlns="http://www.w3.org/2000/svg",
        width=float(width),
        height=float(height),
        font_family=_FAMILIES,
    )
    return svg if fonts else outline(svg, LIGHT)


def _wrap(text: str, width: float, px: float) -> list[str]:
    """Break text into lines of at most `width` pixels, ten at most."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, px) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:10]


def _renderer() -> Callable[[str], bytes]:
    check_extra("a PNG file", "resvg_py")
    import resvg_py

    return lambda svg: resvg_py.svg_to_bytes(svg_string=svg, zoom=_ZOOM)


@cache
def _has_fonts() -> bool:
    """Tell whether this machine's fonts show: resvg leaves out text that it has no font for."""
    draw = _renderer()
    with_text, without = (
        draw(tag("svg", *inside, xmlns="http://www.w3.org/2000/svg", width=80, height=30,
                 font_family=_FAMILIES))
        for inside in ([words(4, 20, "Ag 19")], [])
    )  # fmt: skip
    return with_text != without
