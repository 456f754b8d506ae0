"""Colours and rules of the report: one set of classes, in two themes, on screen and as PNG.

The tones keep apart for colour-blind eyes (blue, orange, green, purple, ochre, cyan after Okabe
and Ito 2008), darkened or lightened until text in them has a contrast of 4.5 on its background;
every tone comes with a dash pattern of its own besides.
"""

from collections.abc import Mapping

Theme = Mapping[str, str]
N_TONE = 6
N_HEAT = 9

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 4")


def _mix(start: str, end: str, share: float) -> str:
    both = [(int(start[i : i + 2], 16), int(end[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in both)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours `#rrggbb`, 1 to 21.

    Source: WCAG 2.2, contrast ratio and relative luminance.
    """

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _theme(plain: Theme, heat: tuple[str, str], inks: tuple[str, str]) -> dict[str, str]:
    """Add the steps of the heat scale, and on each the ink that reads best."""
    theme = dict(plain)
    for step in range(N_HEAT):
        fill = _mix(heat[0], heat[1], step / (N_HEAT - 1))
        theme[f"h{step}"] = fill
        theme[f"k{step}"] = max(inks, key=lambda ink: contrast(ink, fill))
    return theme


LIGHT: Theme = _theme(
    {
        "back": "#f6f7f8",
        "face": "#ffffff",
        "ink": "#1a2126",
        "soft": "#55616a",
        "line": "#dde2e6",
        "axis": "#8b969e",
        "wash": "#eef2f4",
        "t0": "#5c6870",
        "t1": "#0b5fa5",
        "t2": "#b04a08",
        "t3": "#00714f",
        "t4": "#93397a",
        "t5": "#7d5c00",
        "t6": "#00707f",
    },
    heat=("#e9f1f8", "#0b4a82"),
    inks=("#000000", "#ffffff"),
)
DARK: Theme = _theme(
    {
        "back": "#0f1316",
        "face": "#171c20",
        "ink": "#e4e9ec",
        "soft": "#9ca8b1",
        "line": "#2a3238",
        "axis": "#68757e",
        "wash": "#20272c",
        "t0": "#98a4ad",
        "t1": "#69b3f2",
        "t2": "#f09a5f",
        "t3": "#4fc79c",
        "t4": "#e096c8",
        "t5": "#d8b44c",
        "t6": "#5cc7d4",
    },
    heat=("#1d2a35", "#86c6fa"),
    inks=("#000000", "#ffffff"),
)


def drawing_css(colour: Theme) -> str:
    """Return the rules of the classes that plots use, with `colour` by name."""
    rules = [
        f".word{{fill:{colour['ink']}}}",
        f".word.soft{{fill:{colour['soft']}}}",
        ".word.strong{font-weight:600}",
        f".halo{{paint-order:stroke;stroke:{colour['face']};stroke-width:4px;"
        "stroke-linejoin:round}",
        f".grid{{stroke:{colour['line']};stroke-width:1px}}",
        f".axis{{stroke:{colour['axis']};stroke-width:1px}}",
        f".rule{{stroke:{colour['soft']};stroke-width:1px;stroke-dasharray:3 3}}",
        ".curve{fill:none;stroke-width:1.75px;stroke-linejoin:round;stroke-linecap:round}",
        ".curve.strong{stroke-width:3px}",
        ".lead{fill:none;stroke-width:1px;opacity:.5}",
        ".area{stroke:none;opacity:.15}",
        ".dot{stroke-width:1.5px}",
        f".ring{{stroke:{colour['face']};stroke-width:2px}}",
    ]
    for tone in range(N_TONE + 1):
        shade = colour[f"t{tone}"]
        rules += [
            f".s{tone}{{stroke:{shade}}}",
            f".f{tone}{{fill:{shade}}}",
            f".curve.d{tone}{{stroke-dasharray:{_DASHES[max(tone - 1, 0)] or 'none'}}}",
        ]
    rules.append(".curve.d0{stroke-dasharray:5 4}")
    for step in range(N_HEAT):
        rules.append(f".h{step}{{fill:{colour[f'h{step}']}}}.k{step}{{fill:{colour[f'k{step}']}}}")
    return "\n".join(rules)


def _variables(theme: Theme) -> str:
    return "".join(f"--{name}:{value};" for name, value in theme.items())


def page_css() -> str:
    """Return all rules of the page: both themes, the layout, print."""
    names = {name: f"var(--{name})" for name in LIGHT}
    return "\n".join(
        (
            f":root{{color-scheme:light dark;{_variables(LIGHT)}}}",
            f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}",
            _PAGE,
            drawing_css(names),
        )
    )


_PAGE = """\
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);-webkit-text-size-adjust:100%;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums}
h1,h2,h3,p,dl,dd,ul,figure{margin:0;padding:0}
header,main,footer{max-width:1200px;margin:0 auto;padding:0 24px}
header{padding-top:32px}
h1{font-size:24px;line-height:1.25;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;line-height:1.3;margin:36px 0 4px;letter-spacing:-.005em}
h3{font-size:16px;line-height:1.35;max-width:60ch;overflow-wrap:anywhere}
.facts,.about,.aside,footer{color:var(--soft)}
.facts{margin-top:6px;overflow-wrap:anywhere}
.aside{max-width:80ch}
.about{font-size:13px;margin:2px 0 10px;max-width:80ch}
.advice{background:var(--face);border:1px solid var(--line);border-left:4px solid var(--t1);
border-radius:6px;padding:16px 20px;margin-top:20px}
.advice h2{margin:0 0 4px;font-size:13px;font-weight:600;color:var(--soft);letter-spacing:0}
.advice .say{font-size:18px;line-height:1.45;max-width:75ch;overflow-wrap:anywhere}
.advice ul{margin:10px 0 0;padding-left:18px;color:var(--soft);max-width:90ch;
overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:1px;
background:var(--line);border:1px solid var(--line);border-radius:6px;overflow:hidden;
margin-top:12px}
.tiles div{background:var(--face);padding:10px 16px;flex:1 1 150px}
.tiles dt{font-size:13px;color:var(--soft)}
.tiles dd{font-size:22px;line-height:1.3;font-weight:600}
.tiles small{display:block;font-size:12px;line-height:1.35;font-weight:400;color:var(--soft)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:16px;font-size:14px}
a{color:var(--t1);text-underline-offset:2px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));
gap:16px;margin-top:12px}
figure{background:var(--face);border:1px solid var(--line);border-radius:6px;
padding:16px 20px 12px;min-width:0;container-type:inline-size;
display:flex;flex-direction:column}
figure.broad{grid-column:1/-1}
svg{display:block;width:100%;height:auto;font-family:inherit}
.wide,.middle{display:none}
.narrow{max-width:480px}
@container (min-width:470px){.middle{display:block;max-width:640px}.narrow{display:none}}
@container (min-width:760px){.wide{display:block}.wide~.middle{display:none}}
details{margin-top:auto;padding-top:8px;font-size:13px}
summary{cursor:pointer;color:var(--soft);padding:4px 0}
summary:hover{color:var(--ink)}
:focus-visible{outline:2px solid var(--t1);outline-offset:2px;border-radius:2px}
.scroll{overflow:auto;max-height:420px;margin-top:4px;border:1px solid var(--line);
border-radius:4px}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{padding:4px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600}
tbody th{font-weight:400}
th:first-child,td.text{text-align:left}
td.text{white-space:normal;min-width:16ch;overflow-wrap:anywhere}
thead th{position:sticky;top:0;background:var(--wash)}
tbody tr:last-child>*{border-bottom:0}
footer{margin-top:40px;padding-bottom:40px;font-size:13px}
footer ul{padding-left:18px;margin:4px 0 12px;max-width:90ch;overflow-wrap:anywhere}
footer h2{font-size:15px;color:var(--ink);margin:0 0 4px}
footer dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px}
footer dd{overflow-wrap:anywhere}
.skip{position:absolute;left:8px;top:-80px;background:var(--face);padding:8px 12px;
border:1px solid var(--t1);border-radius:4px}
.skip:focus{top:8px}
@media (max-width:560px){
header,main,footer{padding-left:12px;padding-right:12px}
header{padding-top:20px}
figure{padding:12px 12px 8px}
.advice{padding:12px 14px}
.advice .say{font-size:16px}
footer dl{grid-template-columns:1fr;gap:0}
footer dd{margin-bottom:6px}
}
@media print{
body{background:#fff;font-size:11pt}
header,main,footer{max-width:none;padding:0}
nav,.skip,details{display:none}
figure,.advice,.tiles{break-inside:avoid}
h2{break-after:avoid}
.plots{grid-template-columns:1fr 1fr}
}
"""
