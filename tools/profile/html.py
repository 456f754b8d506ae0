"""The report of a profile: one HTML page with everything in it, for screen and paper.

It has no scripts, asks the network for nothing (its own policy forbids it), and follows the
reader's light or dark theme. Every text in it is escaped: profiles come from anywhere.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgeroute.tools.profile.figures import (
    Figure,
    Table,
    hit_figures,
    hit_layer_figures,
    policy_name,
)
from edgeroute.tools.profile.figures_devices import forecast_figures
from edgeroute.tools.profile.figures_locality import (
    locality_figures,
    locality_layer_figures,
    reuse_figures,
)
from edgeroute.tools.profile.figures_use import predictor_figures, skew_figures
from edgeroute.tools.profile.markup import Markup, escape, join, tag
from edgeroute.tools.profile.records import Advice, Live, Subject
from edgeroute.tools.profile.scales import figure, percent, seconds, size
from edgeroute.tools.profile.style import page_css
from edgeroute.tools.profile.view import View, view_of

_WIDTHS = {"wide": 1110, "middle": 530, "narrow": 330}
_SECTIONS = (
    ("Cache size", (hit_figures,)),
    ("Reuse and locality", (reuse_figures, locality_figures)),
    ("Layers and domains", (hit_layer_figures, locality_layer_figures, skew_figures)),
    ("Prefetch", (predictor_figures,)),
    ("Forecasts", (forecast_figures,)),
)


def render(profile: Mapping[str, Any]) -> str:
    """Return the page of `Profile.to_dict()`, or of what JSON made of it.

    Sections that are missing or null are left out.

    Raises:
        UsageError: it is no profile, of a later version, or a field of it is malformed.
    """
    view = view_of(profile)
    css = page_css()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    title = f"Profile of {view.subject.model[:200]}" if view.subject else "Profile"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy + "; form-action 'none'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(css)),
    )
    return "<!doctype html>\n" + tag("html", head, _body(view, title), lang="en") + "\n"


def figures_of(view: View) -> list[tuple[str, list[Figure]]]:
    """Return the plots that the profile has figures for, by section."""
    found = [(title, [one for make in makers for one in make(view)]) for title, makers in _SECTIONS]
    return [(title, figures) for title, figures in found if figures]


def _body(view: View, title: str) -> Markup:
    sections = figures_of(view)
    facts = _facts(view.subject) if view.subject else ""
    links = tag("ul", *(tag("li", tag("a", name, href=f"#s{i}"))
                        for i, (name, _) in enumerate(sections)))  # fmt: skip
    return tag(
        "body",
        tag("a", "Skip to the plots", href="#plots", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            tag("p", facts, class_="facts"),
            _advice(view),
            _tiles(view.live) if view.live else "",
            tag("nav", links, aria_label="Sections") if sections else "",
        ),
        tag("main", *(_section(i, *one) for i, one in enumerate(sections)), id="plots",
            tabindex="-1"),
        _footer(view),
    )  # fmt: skip


def _facts(subject: Subject) -> str:
    parts = [size(subject.file_bytes)] if subject.file_bytes else []
    parts.append(f"{subject.n_layer} layers")
    if subject.n_expert:
        parts.append(f"{figure(subject.n_expert)} experts in each of {subject.n_moe_layer} layers, "
                     f"{subject.n_expert_used} used per token")  # fmt: skip
        parts.append(f"{size(subject.page_bytes)} each")
    n_token = subject.n_prompt_token + subject.n_decode_token
    domains = f" in {len(subject.domains)} domains" if len(subject.domains) > 1 else ""
    parts.append(f"{figure(n_token)} tokens recorded{domains}")
    return " · ".join(parts)


def _advice(view: View) -> Markup:
    """Return what to do, in two sentences; further advice as a list."""
    first = view.main_advice
    if first is None:
        return Markup()
    saved = f"{percent(first.hit_ratio)} of requests then find their expert among the "
    said = f"Give it {_budget(view, first)}, with the policy {policy_name(first.policy)}: {saved}"
    others = [
        tag("li", _sentence(f"{_budget(view, one)}, {policy_name(one.policy)}: "
            f"{percent(one.hit_ratio)} hits. {_sentence(one.why)}"))
        for one in (view.advice or ())[:9] if one is not first
    ]  # fmt: skip
    return tag(
        "section",
        tag("h2", "What to do", id="todo"),
        tag("p", f"{said}{figure(first.n_slots)} kept. {_sentence(first.why)}", class_="say"),
        tag("ul", *others) if others else "",
        class_="advice",
        aria_labelledby="todo",
    )


def _budget(view: View, one: Advice) -> str:
    """Return the bytes of all; where they are not known those of experts, or their number."""
    if one.budget_bytes > 0:
        return f"a budget of {size(one.budget_bytes)}"
    if view.page_bytes:
        return f"{size(one.n_slots * view.page_bytes)} for experts"
    return f"room for {figure(one.n_slots)} experts"


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) or not text else text + "."


def _tiles(live: Live) -> Markup:
    """Return what the recorded run did, as a row of numbers."""
    rows = [
        ("Hits", percent(live.hit_ratio), f"{policy_name(live.policy)}, "
         f"{figure(live.n_slots)} slots"),
        ("Decode", f"{figure(live.decode_tok_s)} tok/s", f"prompt {figure(live.prefill_tok_s)} "
         "tok/s"),
        ("Waiting for experts", seconds(live.stall_s_token), "per token"),
        ("Read on demand", size(live.demand_bytes_token), "per token, "
         f"{size(live.prefetch_bytes_token)} more ahead"),
        ("Memory", size(live.slots_bytes), f"for experts, of a budget of "
         f"{size(live.budget_bytes)}"),
    ]  # fmt: skip
    if live.joules_token is not None:
        source = live.energy_source or ""
        told = "estimated" if live.energy_estimated else "measured"
        rows.append(("Energy", f"{figure(live.joules_token)} J", f"per token, {told}"
                     + (f" ({source[:60]})" if source else "")))  # fmt: skip
    if live.replay_equal is not None:
        told = "the same counters" if live.replay_equal else "other counters"
        rows.append(("Replay", "equal" if live.replay_equal else "differs", f"{told} as the run"))
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value, tag("small", note)))
          for name, value, note in rows),
        class_="tiles",
    )  # fmt: skip


def _section(index: int, title: str, figures: Sequence[Figure]) -> Markup:
    return tag(
        "section",
        tag("h2", title, id=f"s{index}"),
        tag("div", *map(_figure, figures), class_="plots"),
        aria_labelledby=f"s{index}",
    )


def _figure(one: Figure) -> Markup:
    names = ("wide", "middle", "narrow") if one.broad else ("middle", "narrow")
    return tag(
        "figure",
        tag("h3", one.headline, id=f"{one.key}-h"),
        tag("p", one.about, class_="about"),
        *(_image(one, name) for name in names),
        tag(
            "details",
            tag("summary", "Figures as a table"),
            tag("div", _table(one.table), class_="scroll", tabindex="0", role="region",
                aria_label=f"Table: {one.headline}"),
        ),
        class_="broad" if one.broad else None,
        aria_labelledby=f"{one.key}-h",
    )  # fmt: skip


def _image(one: Figure, name: str) -> Markup:
    drawing = one.draw(_WIDTHS[name])
    key = f"{one.key}-{name}"
    return tag(
        "svg",
        tag("title", one.headline, id=f"{key}-t"),
        tag("desc", one.about, id=f"{key}-d"),
        drawing.body,
        viewBox=f"0 0 {math.ceil(drawing.width)} {math.ceil(drawing.height)}",
        class_=name,
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


def _table(table: Table) -> Markup:
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in table.head)))
    rows = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in table.rows
    )
    return tag("table", head, tag("tbody", *rows))


def _footer(view: View) -> Markup:
    parts: list[object] = []
    if view.notes:
        parts += [tag("h2", "Notes"), tag("ul", *(tag("li", note) for note in view.notes[:50]))]
    subject = view.subject
    if subject is not None:
        rows = {
            "Machine": subject.machine,
            "Power mode": subject.power_mode,
            "Architecture": subject.arch,
            "Recorded": subject.when,
            "Tokens": f"{figure(subject.n_prompt_token)} of prompts, "
            f"{figure(subject.n_decode_token)} generated",
            "Domains": ", ".join(subject.domains[:50]),
            "Trace": subject.trace,
        }
        found = [(name, text) for name, text in rows.items() if text]
        parts += [tag("h2", "What was recorded"),
                  tag("dl", *(join((tag("dt", n), tag("dd", t))) for n, t in found))]  # fmt: skip
    return tag("footer", *parts, tag("p", escape("Written by edgeroute profile.")))
