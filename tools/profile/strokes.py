"""An alphabet of plain strokes, for images on machines that have no font at all.

Each letter is its width and its lines; a line is points of two digits, x and y, on a grid where
the baseline is 2, small letters reach 6 and capitals 8. A single point is a dot.
"""

import html
import re
import unicodedata

from edgeroute.tools.profile.markup import Markup, number, tag
from edgeroute.tools.profile.style import Theme

_UNIT = 0.12
"""Of the font's size: capitals are six units high."""
_GAP = 1.6
_TEXT = re.compile(r"<text ([^>]*)>([^<]*)</text>")
_ATTRIBUTE = re.compile(r'([a-z-]+)="([^"]*)"')

_LETTERS = """
A 4 022842,1535|B 4 02083847463505,3544433202|C 4 4738180703123243|D 4 02082846442202
E 4 48080242,0535|F 4 480802,0535|G 4 47381807031232434525|H 4 0208,4248,0545|I 0 0208
J 3 3833221203|K 4 0208,480542|L 3 080232|M 4 0208244842|N 4 02084248|O 4 180703123243473818
P 4 02083847463505|Q 4 180703123243473818,2442|R 4 02083847463505,2542
S 4 473818070615354443321203|T 4 0848,2822|U 4 080312324348|V 4 082248|W 4 0812253248
X 4 0248,0842|Y 4 082548,2522|Z 4 08480242
a 3 16263532,341403122233|b 3 0802,0312223335261605|c 3 3526160503122233
d 3 3832,3322120305162635|e 3 04343526160503122233|f 2 281712,0626
g 3 3631201001,3322120305162635|h 3 0802,0516263532|i 0 0206,08|j 1 161100,18
k 3 0802,360432|l 1 080312|m 4 0602,05162522,25364542|n 3 0602,0516263532
o 3 160503122233352616|p 3 0600,0516263533221203|q 3 3630,3526160503122233
r 2 0602,041626|s 3 35261605142433221203|t 2 181322,0626|u 3 0603122233,3632|v 2 061226
w 4 0612253246|x 3 0236,0632|y 2 0613,2600|z 3 06360232
0 3 180703122233372818|1 3 071812,0222|2 3 07182837360232|3 3 0718283736253433221203
4 3 22280434|5 3 380805253433221203|6 3 372818070312223334251504|7 3 083812
8 3 15060718283736251504031222333425|9 3 031222333728180706152536
. 0 02|, 1 1201|: 0 02,05|; 1 15,1201|- 2 0424|– 3 0434|— 4 0444|+ 4 0444,2622|= 3 0333,0535
/ 3 0238|\\ 3 0832|( 1 18060412|) 1 08161402|[ 1 18080212|] 1 08181202|{ 2 28171605141322
} 2 08171625141302|% 5 0258,0718271607,3344534233|& 4 420607182726040312 2244
# 4 1218,3238,0444,0646|@ 4 35251413223335,3343472818070312 32|* 4 0446,0644,2327|! 0 0804,02
? 3 071828373624,22|' 0 0806|" 1 0806,1816|` 1 0817|< 3 360432|> 3 063402|≤ 3 370533,0232
≥ 3 073503,0232|^ 2 061826|_ 3 0131|~ 3 04152435|· 0 04|… 4 02,22,42|× 3 0236,0632
µ 3 0600,03122233,3632|$ 4 473818070615354443321203,2921
"""


def _read() -> dict[str, tuple[int, list[list[tuple[int, int]]]]]:
    found: dict[str, tuple[int, list[list[tuple[int, int]]]]] = {
        " ": (2, []),
        "|": (0, [[(0, 1), (0, 9)]]),  # which parts the entries above
    }
    for entry in _LETTERS.strip().replace("\n", "|").split("|"):
        letter, width, lines = entry.split(" ", 2)
        found[letter] = (
            int(width),
            [
                [(int(line[i]), int(line[i + 1])) for i in range(0, len(line), 2)]
                for line in lines.replace(" ", "").split(",")
            ],
        )
    return found


_ALPHABET = _read()
_UNKNOWN = (3, [[(0, 2), (0, 8), (3, 8), (3, 2), (0, 2)]])


def outline(svg: str, colour: Theme) -> str:
    """Return the image with every text that `markup.tag` wrote as strokes instead."""
    return _TEXT.sub(lambda found: _strokes(found[1], html.unescape(found[2]), colour), svg)


def _strokes(attributes: str, text: str, colour: Theme) -> Markup:
    given = dict(_ATTRIBUTE.findall(attributes))
    names = given.get("class", "").split()
    px = float(given.get("font-size", 12))
    letters = [_letter(letter) for letter in text]
    unit = px * _UNIT
    wide = sum(width + _GAP for width, _ in letters) * unit
    anchor = {"middle": 0.5, "end": 1.0}.get(given.get("text-anchor", ""), 0.0)
    x = float(given["x"]) + _GAP / 2 * unit - wide * anchor
    base, path = float(given["y"]), []
    for width, lines in letters:
        path += [_line(line, x, base, unit) for line in lines]
        x += (width + _GAP) * unit
    width_px = px * (0.13 if "strong" in names else 0.09)
    pen = {"d": "".join(path), "fill": "none", "stroke_linecap": "round",
           "stroke_linejoin": "round"}  # fmt: skip
    ink = tag("path", **pen, stroke=_ink(names, colour), stroke_width=number(width_px))
    if "halo" not in names:
        return ink
    return Markup(
        tag("path", **pen, stroke=colour["face"], stroke_width=number(width_px + 4)) + ink
    )


def _letter(letter: str) -> tuple[int, list[list[tuple[int, int]]]]:
    """Return a letter's strokes; of one with an accent those without it; else an empty box."""
    plain = unicodedata.normalize("NFKD", letter)[:1]
    return _ALPHABET.get(letter) or _ALPHABET.get(plain) or _UNKNOWN


def _line(line: list[tuple[int, int]], x: float, base: float, unit: float) -> str:
    points = [f"{x + i * unit:.2f} {base - (j - 2) * unit:.2f}" for i, j in line]
    return "M" + "L".join(points) + ("h0.01" if len(points) == 1 else "")


def _ink(names: list[str], colour: Theme) -> str:
    for name in names:
        if len(name) == 2 and name[0] in "fk" and name[1].isdecimal():
            return colour[("t" if name[0] == "f" else "k") + name[1]]
    return colour["soft" if "soft" in names else "ink"]
