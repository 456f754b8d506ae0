"""The report's plots as PNG: whole files, and no label missing where there is no font."""

import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile import png
from edgeroute.tools.profile.figures import Figure
from edgeroute.tools.profile.html import figures_of
from edgeroute.tools.profile.markup import tag
from edgeroute.tools.profile.plots import words
from edgeroute.tools.profile.png import image, write_png
from edgeroute.tools.profile.strokes import outline
from edgeroute.tools.profile.style import LIGHT
from edgeroute.tools.profile.view import view_of
from tests.tools import profile_lab as lab

resvg_py = pytest.importorskip("resvg_py", reason="the extra `report` is not installed")


def figures(profile: dict[str, Any]) -> dict[str, Figure]:
    return {one.key: one for _, found in figures_of(view_of(profile)) for one in found}


@pytest.fixture(scope="module")
def profile() -> dict[str, Any]:
    found: dict[str, Any] = lab.made_profile().to_dict()
    return found


def pixels(data: bytes, n_row: int = 100) -> tuple[int, list[bytes]]:
    """Return the width and the first rows of an 8-bit RGBA PNG."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, head = 8, b"", (0, 0, 0, 0)
    while at < len(data):
        (n,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + n]
        if kind == b"IHDR":
            head = struct.unpack(">IIBB", body[:10])
        elif kind == b"IDAT":
            packed += body
        at += 12 + n
    width, height, depth, colours = head
    assert (depth, colours) == (8, 6)
    raw, stride, rows = zlib.decompress(packed), 4 * width + 1, [bytes(4 * width)]
    for y in range(min(height, n_row)):
        rows.append(_unfilter(raw[y * stride], raw[y * stride + 1 : (y + 1) * stride], rows[-1]))
    return width, rows[1:]


def _unfilter(kind: int, line: bytes, above: bytes) -> bytes:
    if kind == 0:
        return line
    found = bytearray(line)
    for i, value in enumerate(line):
        left = found[i - 4] if i >= 4 else 0
        corner = above[i - 4] if i >= 4 else 0
        guess = left + above[i] - corner
        best = min((left, above[i], corner), key=lambda one: abs(guess - one))
        found[i] = (value + (0, left, above[i], (left + above[i]) // 2, best)[kind]) % 256
    return bytes(found)


def n_dark(rows: list[bytes], box: tuple[int, int, int, int]) -> int:
    """Count the dark pixels in (left, top, right, bottom)."""
    left, top, right, bottom = box
    return sum(
        row[4 * x + 3] > 128 and sum(row[4 * x : 4 * x + 3]) < 384
        for row in rows[top:bottom]
        for x in range(left, right)
    )


def test_every_plot_becomes_a_file(profile: dict[str, Any], tmp_path: Path) -> None:
    few = {key: profile[key] for key in ("format", "version", "subject", "skew", "forecasts")}
    written = write_png(few, tmp_path / "new" / "folder")
    assert [path.name for path in written] == [
        "skew.png", "overlap.png", "forecasts.png", "parts.png"
    ]  # fmt: skip
    for path in written:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width == 2 * (640 + 48) and height > 500 and len(data) < 300_000


@pytest.mark.parametrize("fonts", [True, False], ids=["fonts", "no fonts"])
def test_text_shows_with_and_without_fonts(fonts: bool) -> None:
    """Without the strokes, a machine that has no font would draw nothing here."""
    svg = tag("svg", words(4, 20, "Ag 19", px=16), xmlns="http://www.w3.org/2000/svg",
              width=80, height=30, font_family=png._FAMILIES)  # fmt: skip
    text = svg if fonts else outline(svg, LIGHT)
    drawn = resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=not fonts)
    if fonts and not png._has_fonts():
        pytest.skip("this machine has no font")
    _, rows = pixels(drawn)
    assert n_dark(rows, (0, 0, 60, 30)) > 40
    bare = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    assert n_dark(pixels(bare)[1], (0, 0, 80, 30)) == 0


def test_a_plot_has_its_sentence_where_no_font_is(profile: dict[str, Any]) -> None:
    one = figures(profile)["overlap"]
    svg = image(one, fonts=False)
    assert "<text" not in svg
    drawn = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    width, rows = pixels(drawn)
    assert n_dark(rows, (0, 24, width, 50)) > 200  # the sentence
    assert n_dark(rows, (width - 24, 0, width, 100)) == 0  # the border


def test_letters_are_as_wide_as_their_strokes_and_stand_where_they_should() -> None:
    def span(anchor: str | None) -> tuple[float, float]:
        path = outline(words(100, 50, "HHH", anchor=anchor), LIGHT)
        xs = [float(x) for x in re.findall(r"[ML]([0-9.]+) ", path)]
        return min(xs), max(xs)

    start, end = span(None)
    assert 100 <= start < 102 and 118 < end < 126
    assert span("end")[1] <= 100 and sum(span("middle")) / 2 == pytest.approx(100, abs=0.1)


def test_every_printable_letter_has_strokes_and_others_a_box() -> None:
    drawn = {chr(i): outline(words(0, 9, chr(i)), LIGHT) for i in range(33, 127)}
    box = outline(words(0, 9, "\u4e2d"), LIGHT)
    assert all(path != box for path in drawn.values())
    assert len(set(drawn.values())) == len(drawn)
    assert outline(words(0, 9, "\u00e4"), LIGHT) == drawn["a"]
    assert "M" not in outline(words(0, 9, "\u00a0"), LIGHT).partition('d="')[2].partition('"')[0]


def test_hostile_text_is_drawn_not_read() -> None:
    path = outline(words(0, 9, '"/><script>&amp;'), LIGHT)
    assert "script" not in path and path.startswith("<path ") and path.endswith("/>")


def test_without_the_extra_it_says_what_to_install(
    profile: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UsageError, match=r"edgeroute\[report\]"):
        write_png(profile, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(profile: dict[str, Any], tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(UsageError, match="cannot write the plots to"):
        write_png(profile, taken)
