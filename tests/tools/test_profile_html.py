"""The HTML report of a profile: what it says, what it leaves out, and what cannot harm it."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile.figures import Figure, hit_ratio_at, thin
from edgeroute.tools.profile.html import figures_of, render
from edgeroute.tools.profile.markup import escape, tag
from edgeroute.tools.profile.png import image
from edgeroute.tools.profile.records import Curve
from edgeroute.tools.profile.scales import (
    Scale,
    byte_ticks,
    figure,
    log_ticks,
    percent,
    shorten,
    spread,
    text_width,
    ticks,
    top_of,
)
from edgeroute.tools.profile.style import DARK, LIGHT, N_HEAT, N_TONE, contrast
from edgeroute.tools.profile.view import View, view_of
from tests.tools import profile_lab as lab

HOSTILE = '<script>alert(1)</script>"\' onload="x" &amp; \x00\ud800\u202e ]]> {{7*7}}'
SECTIONS = ("live", "hits", "reuse", "locality", "skew", "predictors", "advice", "forecasts",
            "subject", "notes")  # fmt: skip
VOID = {"meta", "link"}


class Page(HTMLParser):
    """The page's tags, attributes and texts, with its nesting checked."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, {key: value or "" for key, value in attributes}))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, {key: value or "" for key, value in attributes}))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, key: str) -> list[str]:
        return [attributes[key] for _, attributes in self.tags if key in attributes]


@pytest.fixture(scope="module")
def profile() -> dict[str, Any]:
    """A whole profile as it comes out of a JSON file."""
    found: dict[str, Any] = json.loads(json.dumps(lab.made_profile().to_dict()))
    return found


@pytest.fixture(scope="module")
def page(profile: dict[str, Any]) -> str:
    return render(profile)


def figures(profile: dict[str, Any]) -> dict[str, Figure]:
    return {one.key: one for _, found in figures_of(view_of(profile)) for one in found}


def only(profile: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: profile[key] for key in dict.fromkeys(("format", "version", *names))}


def texts_replaced(value: Any, text: str) -> Any:
    """Return a copy in which every text that may be anything is `text`."""
    if isinstance(value, dict):
        fixed = ("format", "verdict", "pages")
        return {
            key: item if key in fixed else texts_replaced(item, text) for key, item in value.items()
        }
    if isinstance(value, list):
        return [texts_replaced(item, text) for item in value]
    return text if isinstance(value, str) else value


def shortened(value: Any) -> Any:
    """Return a copy whose lists and objects of many alike have three items."""
    if isinstance(value, dict):
        alike = len({str(type(item)) for item in value.values()}) == 1
        items = list(value.items())[: 3 if alike else None]
        return {key: shortened(item) for key, item in items}
    return [shortened(item) for item in value[:3]] if isinstance(value, list) else value


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each kind of field is: the first item stands for a list."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths_of(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from paths_of(value[0], (*path, 0))


def put(value: Any, path: tuple[Any, ...], item: Any) -> Any:
    if not path:
        return item
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], item)
    return copy


# --- the page ---------------------------------------------------------------------------


def test_the_page_is_whole_small_and_alone(page: str) -> None:
    """Nothing in it could ask the network for anything, and its own policy forbids it."""
    assert len(page.encode()) < 300_000
    found = Page(page)
    names = {name for name, _ in found.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base", "use",
                        "image", "foreignobject", "a:href"}  # fmt: skip
    assert [name for name, _ in found.tags].count("style") == 1
    links = found.values("href")
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert not found.values("style") and not found.values("src")
    css = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "url(" not in css and "@import" not in css and "<" not in css
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = next(a["content"] for _, a in found.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none';") and f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "script-src" not in policy


def test_every_id_is_there_once_and_every_label_points_to_one(page: str) -> None:
    found = Page(page)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    for label in found.values("aria-labelledby"):
        assert set(label.split()) <= set(ids)
    for link in found.values("href"):
        assert link == "data:," or link[1:] in ids


def test_every_plot_has_a_title_a_description_and_its_figures(page: str) -> None:
    found = Page(page)
    n_plot = sum(name == "figure" for name, _ in found.tags)
    assert n_plot == 12
    images = [a for name, a in found.tags if name == "svg"]
    assert len(images) == 2 * n_plot + 2  # the two broad ones have a third
    assert all(image["role"] == "img" and image["aria-labelledby"] for image in images)
    assert sum(name == "table" for name, _ in found.tags) == n_plot
    assert sum(a.get("tabindex") == "0" for _, a in found.tags) == n_plot


def test_the_page_says_what_to_do_first(page: str, profile: dict[str, Any]) -> None:
    said = re.search(r'<p class="say">(.*?)</p>', page)
    assert said is not None
    assert "9.4\u00a0GiB" in said[1] and "LFRU" in said[1] and "3,072" in said[1]
    assert page.index('class="say"') < page.index("<figure")
    without = profile["advice"][1] | {"budget_bytes": 0}
    text = render(only(profile, "subject") | {"advice": [without]})
    assert "1.98\u00a0GiB for experts" in text


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("how", ["missing", "null", "alone"])
def test_any_section_may_be_missing(profile: dict[str, Any], name: str, how: str) -> None:
    if how == "alone":
        given = only(profile, name)
    else:
        given = {key: value for key, value in profile.items() if key != name}
        given |= {name: None} if how == "null" else {}
    Page(render(given))


def test_a_profile_of_nothing_is_a_page(profile: dict[str, Any]) -> None:
    found = Page(render(only(profile)))
    assert "figure" not in {name for name, _ in found.tags}


# --- what may come in a profile ------------------------------------------------------------


def test_no_text_of_a_profile_is_more_than_text(profile: dict[str, Any]) -> None:
    """Model, domain, predictor, note and machine names may hold anything at all."""
    hostile = texts_replaced(profile, HOSTILE)
    hostile["forecasts"] = {HOSTILE + name: one for name, one in hostile["forecasts"].items()}
    hostile["skew"]["domains"] = [HOSTILE] * len(hostile["skew"]["domains"])
    text = render(hostile)
    found = Page(text)
    assert "script" not in {name for name, _ in found.tags}
    assert not [key for _, a in found.tags for key in a if key.startswith("on")]
    assert not set("\x00\ud800\u202e") & set(text)
    text.encode()
    assert any("<script>alert(1)</script>\"' onload" in one for one in found.texts)
    assert len({tuple(sorted(a)) for name, a in found.tags if name == "svg"}) == 1
    for one in figures(hostile).values():
        ElementTree.fromstring(image(one))


def test_any_wrong_value_anywhere_is_refused_by_name_or_drawn(profile: dict[str, Any]) -> None:
    """Every kind of field, each with every kind of value; only its own section is drawn."""
    values = (None, True, -1, 0, 10**400, math.inf, "9" * 5000, [[]])
    small = shortened(profile)
    for path in paths_of(small):
        for value in values if path else ():
            given = put(only(small, path[0]) | {"subject": small["subject"]}, path, value)
            try:
                text = render(given)
            except UsageError as error:
                assert str(path[0]) in str(error) or "no profile" in str(error), path
                assert len(str(error)) < 400
            else:
                assert not re.search(r"\bnan\b|\binf\b", text, re.IGNORECASE), (path, value)
                assert len(text) < 100_000, path


def test_what_is_no_profile_is_refused(profile: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no profile"):
        render({"format": "something"})
    with pytest.raises(UsageError, match="version 2; this edgeroute reads up to 1"):
        render(profile | {"version": 2})
    hits = {key: value for key, value in profile["hits"].items() if key != "layers"}
    with pytest.raises(UsageError, match=r"lacks hits\.layers"):
        render(profile | {"hits": hits})
    with pytest.raises(UsageError, match=r"live\.policy of the profile must be text, got int"):
        render(profile | {"live": profile["live"] | {"policy": 3}})
    with pytest.raises(UsageError, match="100001 items"):
        render(profile | {"notes": [""] * 100_001})


def test_a_huge_profile_stays_a_small_page(profile: dict[str, Any]) -> None:
    n = 8_000
    curve = {"policy": "lru", "n_slots": list(range(1, n + 1)),
             "hit_ratios": [i / n for i in range(n)]}  # fmt: skip
    domains = [f"domain {i}" for i in range(60)]
    huge = profile | {
        "hits": profile["hits"] | {"pooled": [curve] * 8},
        "skew": profile["skew"] | {"domains": domains, "overlap": [[0.5] * 60] * 60},
        "notes": ["a note " * 280] * 1000,
        "reuse": profile["reuse"] | {"distances": list(range(1, 5001)), "shares": [0.0002] * 5000},
        "forecasts": {f"m{i}": profile["forecasts"]["Raspberry Pi 5"] for i in range(900)},
        "predictors": profile["predictors"] * 500,
    }
    text = render(huge)
    assert len(text.encode()) < 2_000_000
    assert "36 more domains are not shown" in text


def test_a_dense_model_has_a_page_too(profile: dict[str, Any]) -> None:
    subject = profile["subject"] | {"n_expert": 0, "n_expert_used": 0, "n_moe_layer": 0,
                                    "page_bytes": 0, "n_page": 0}  # fmt: skip
    text = render(profile | {"subject": subject})
    assert "0 experts in each" not in text
    assert "Machine" in render(only(profile) | {"subject": subject})


# --- what the plots say ----------------------------------------------------------------------


def test_the_sentences_are_computed_from_the_figures(profile: dict[str, Any]) -> None:
    found = figures(profile)
    half = lab.N_PAGE // 2
    at = {one["policy"]: one["hit_ratios"][one["n_slots"].index(half)]
          for one in profile["hits"]["pooled"]}  # fmt: skip
    headline = found["hits"].headline
    assert f"{percent(at['lfru'])} hits under LFRU" in headline
    assert f"foresight it would be {percent(at['belady'])}" in headline
    by_layer = profile["hits"]["by_layer"]["lfru"]
    assert found["layers"].headline.startswith(f"Layer {by_layer.index(min(by_layer))} finds")
    assert "news and chat (77\u00a0%), least code and Chinese" in found["overlap"].headline
    assert "score of 0.54" in found["srp"].headline
    assert "would reach 0.24" in found["srp"].headline  # the uniform router's, 8 of 128
    assert found["sch"].headline.startswith("A cache of 2 times a token's experts")
    assert found["reuse"].headline.startswith("83\u00a0% of requests")
    assert "With 4 guesses, the predictor gate reuse names" in found["predictors"].headline
    assert found["forecasts"].headline.startswith("7 of 8 machines would run it, from 1.9 (Rasp")


def test_other_figures_give_other_sentences(profile: dict[str, Any]) -> None:
    other = put(profile, ("hits", "active"), "lru")
    assert "under LRU" in figures(other)["hits"].headline
    refused = {"Phone": profile["forecasts"]["Phone"]}
    told = figures(profile | {"forecasts": refused})["forecasts"].headline
    assert told == "None of 1 machines would run it."
    assert "parts" not in figures(profile | {"forecasts": refused})


def test_the_table_has_the_figures_of_the_plot(profile: dict[str, Any]) -> None:
    table = figures(profile)["hits"].table
    assert table.head[:3] == ("share", "experts", "memory")
    row = next(row for row in table.rows if row[0] == "50\u00a0%")
    lru = next(one for one in profile["hits"]["pooled"] if one["policy"] == "lru")
    assert row[1] == "3,072"
    assert row[table.head.index("LRU")] == percent(lru["hit_ratios"][47], 1)
    for one in figures(profile).values():
        assert one.table.rows and {len(row) for row in one.table.rows} == {len(one.table.head)}


def test_a_curve_is_where_its_figures_are(profile: dict[str, Any]) -> None:
    """The active policy's line passes through the point that the table gives for 50 %."""
    drawing = figures(profile)["hits"].draw(1110)
    root = ElementTree.fromstring(f"<g>{drawing.body}</g>")
    strong = next(e for e in root.iter("path") if "strong" in e.attrib.get("class", "")
                  and e.attrib["d"].count("L") > 10)  # fmt: skip
    points = [tuple(map(float, pair.split())) for pair in strong.attrib["d"][1:].split("L")]
    grid = {e.text: float(e.attrib["y"]) for e in root.iter("text") if "end" in e.attrib.values()}
    ends = [float(e.attrib["x"]) for e in root.iter("text") if e.text == "0"]
    left, zero, full = ends[0], grid["0\u00a0%"] - 4, grid["100\u00a0%"] - 4
    middle = left + (points[-1][0] - left) / 2
    near = min(points, key=lambda point: abs(point[0] - middle))
    assert math.isclose(zero - (zero - full) * 0.5**0.42, near[1], abs_tol=1.5)
    assert math.isclose(points[-1][1], full, abs_tol=0.2)


@pytest.mark.parametrize("width", [1110, 530, 330])
def test_no_text_leaves_its_image(profile: dict[str, Any], width: int) -> None:
    """By the estimate of a broad font; a label that does not fit is shortened or left out."""
    for one in figures(profile).values():
        drawing = one.draw(width)
        for element in ElementTree.fromstring(f"<g>{drawing.body}</g>").iter("text"):
            text, x = element.text or "", float(element.attrib["x"])
            wide = text_width(text, float(element.attrib["font-size"]))
            start = x - wide * {"middle": 0.5, "end": 1.0}.get(
                element.attrib.get("text-anchor", ""), 0.0
            )
            assert start >= -4 and start + wide <= drawing.width + 8, (one.key, text)
            assert 0 < float(element.attrib["y"]) <= drawing.height, (one.key, text)


# --- the parts ---------------------------------------------------------------------------------


def test_markup_is_escaped_once() -> None:
    assert escape("a<b>\"'&") == "a&lt;b&gt;&quot;&#x27;&amp;"
    assert tag("p", tag("b", "<"), "&", class_="x", hidden=None) == (
        '<p class="x"><b>&lt;</b>&amp;</p>'
    )
    assert tag("path", d="M0 0", x=1.25) == '<path d="M0 0" x="1.2"/>'


def test_ticks_are_round() -> None:
    assert ticks(0, 47, 8) == (0, 10, 20, 30, 40)
    assert ticks(3, 3, 4) == (3,)
    assert log_ticks(1, 300) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert log_ticks(1, 1e6) == tuple(10.0**i for i in range(7))
    assert log_ticks(0, 5) == (0,)
    assert [text for _, text in byte_ticks(3 << 30, 3)] == [
        "0", "1\u00a0GiB", "2\u00a0GiB", "3\u00a0GiB"
    ]  # fmt: skip
    assert top_of(6144, 4) == 8000 and top_of(0, 4) == 1.0


def test_numbers_are_printed_as_people_read_them() -> None:
    assert [figure(value) for value in (0.01234, 6144, 2.0, 0.5, 31.04, 1e300, math.nan)] == [
        "0.0123", "6,144", "2", "0.5", "31", "1e+300", "–"
    ]  # fmt: skip
    assert percent(0.004) == "0.4\u00a0%" and percent(0.5) == "50\u00a0%"
    assert len(percent(1e300)) < 12


def test_labels_are_spread_in_order_and_inside() -> None:
    placed = spread([10.0, 11.0, 90.0, 12.0], 16, 0, 100)
    order = sorted(placed)
    assert all(b - a >= 16 - 1e-9 for a, b in pairwise(order))
    assert placed[0] < placed[1] < placed[3] < placed[2] and order[0] >= 0 and order[-1] <= 100
    crowded = spread([5.0] * 20, 16, 0, 100)
    assert min(crowded) >= -1e-9 and max(crowded) <= 100 + 1e-9


def test_scales_hold_what_is_beyond_them() -> None:
    scale = Scale(low=1, high=100, start=0, end=200, log=True)
    assert (scale.at(1), scale.at(10), scale.at(1e9), scale.at(0)) == (0, 100, 200, 0)
    assert Scale(low=3, high=3, start=0, end=10).at(3) == 5


def test_shortened_text_fits() -> None:
    assert shorten("abc", 500, 12) == "abc"
    assert text_width(shorten("a long name of a machine", 60, 12), 12) <= 60


def test_thinning_keeps_a_cliff() -> None:
    points = [(float(i), 0.0 if i < 5003 else 0.7) for i in range(20_000)]
    kept = thin(points)
    assert len(kept) <= 160 and kept[0] == points[0] and kept[-1] == points[-1]
    assert (5002.0, 0.0) in kept and (5003.0, 0.7) in kept


def test_hits_between_two_sizes_lie_on_the_line() -> None:
    curve = Curve(policy="lru", n_slots=(10, 20), hit_ratios=(0.2, 0.6))
    assert [hit_ratio_at(curve, n) for n in (5, 10, 15, 20, 99)] == [
        pytest.approx(value) for value in (0.1, 0.2, 0.4, 0.6, 0.6)
    ]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_lines_can_be_told_from_what_is_behind_them(theme: dict[str, str]) -> None:
    """4.5 for text, 3 for what only has to be seen, by WCAG."""
    for name in ("ink", "soft", *(f"t{tone}" for tone in range(N_TONE + 1))):
        assert contrast(theme[name], theme["face"]) >= 4.5, name
    assert contrast(theme["soft"], theme["back"]) >= 4.5
    assert contrast(theme["ink"], theme["wash"]) >= 4.5
    assert contrast(theme["axis"], theme["face"]) >= 3
    for step in range(N_HEAT):
        assert contrast(theme[f"h{step}"], theme[f"k{step}"]) >= 4.5, step
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_a_view_knows_the_advice_between_the_least_and_the_most(profile: dict[str, Any]) -> None:
    view = view_of(profile)
    assert view.main_advice is not None and view.main_advice.n_slots == 3072
    assert View().main_advice is None
