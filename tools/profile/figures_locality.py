"""The plots of locality and reuse: SRP, SCH, reuse distances, the working set."""

import math
from collections.abc import Sequence
from itertools import groupby

from edgeroute.offload.locality import srp_floor
from edgeroute.tools.profile.figures import MAX_SERIES, Figure, Table, layer_axis, ratio_axis, thin
from edgeroute.tools.profile.plots import Axis, LineChart, Series, line_chart
from edgeroute.tools.profile.plots_rows import Bar, BarChart, bar_chart
from edgeroute.tools.profile.records import Interval, Locality, Reuse
from edgeroute.tools.profile.scales import figure, log_ticks, percent, score, size, ticks, top_of
from edgeroute.tools.profile.view import View

_SCORE_TICKS = tuple((i / 4, score(i / 4, 2)) for i in range(5))
_MAX_BARS = 24
_MAX_LENGTH = 16_384
"""Tokens up to which the random router's score is worth its computation."""


def locality_figures(view: View) -> list[Figure]:
    """Return the plots of SRP by length and SCH by size."""
    locality = view.locality
    if locality is None:
        return []
    lengths = [m for m, one in locality.srp.items() if m > 0 and math.isfinite(one.value)]
    found = [_srp(view, locality, sorted(lengths)[:32])] if lengths else []
    return found + ([_sch(locality)] if locality.sch else [])


def locality_layer_figures(view: View) -> list[Figure]:
    """Return the plot of SRP by layer."""
    found = view.locality.srp_by_layer.items() if view.locality else ()
    rows = {m: values for m, values in list(found)[:4] if values}
    return [_srp_layers(view, rows)] if rows else []


def _srp(view: View, locality: Locality, lengths: Sequence[int]) -> Figure:
    values = [locality.srp[m] for m in lengths]
    series = [
        Series(name="this model", tone=1, strong=True, dots=True,
               points=[(m, one.value) for m, one in zip(lengths, values, strict=True)],
               intervals=[_ends(one) for one in values]),
    ]  # fmt: skip
    subject = view.subject
    floor: dict[int, float] = {}
    if subject is not None and 0 < subject.n_expert_used <= subject.n_expert:
        floor = {
            m: srp_floor(subject.n_expert, subject.n_expert_used, m).value
            for m in lengths
            if m <= _MAX_LENGTH
        }
        series.append(Series(name="random router", points=list(floor.items()), tone=0, dots=True))
    chart = LineChart(
        x=Axis(label="tokens in a row (m)", low=min(lengths),
               high=max(lengths), ticks=[(m, figure(m)) for m in lengths], log=True),
        y=Axis(label="SRP", low=0, high=1, ticks=_SCORE_TICKS),
        series=series,
    )  # fmt: skip
    shown = min(lengths, key=lambda m: abs(math.log(m / 16)))
    text = f"Over {shown} tokens, one fixed set of experts fits the routing with a score of "
    text += score(locality.srp[shown].value, 2)
    if shown in floor:
        text += f"; a router that drew at random would reach {floor[shown]:.2f}"
    return Figure(
        key="srp",
        headline=text + ".",
        about="Segment routing best performance: the best F1 score of one set of experts kept for "
        "m tokens, all layers together; bars are 95 % bootstrap intervals. 1 would be the same "
        "experts for every token.",
        draw=lambda width: line_chart(chart, width),
        table=Table(
            head=("tokens (m)", "SRP", "from", "to", "random router", "cache multiple (rho)"),
            rows=tuple(
                (figure(m), score(one.value), score(one.low), score(one.high),
                 score(floor[m]) if m in floor else "–",
                 score(locality.srp_rho[m], 2) if m in locality.srp_rho else "–")
                for m, one in zip(lengths, values, strict=True)
            ),
        ),
    )  # fmt: skip


def _ends(one: Interval) -> tuple[float, float]:
    """Return an interval; where bootstrap found none, the value itself."""
    low = one.low if math.isfinite(one.low) else one.value
    return low, one.high if math.isfinite(one.high) else one.value


def _sch(locality: Locality) -> Figure:
    rows = sorted(row for row in locality.sch[:512] if math.isfinite(row[1] + row[2].value))
    groups = [(m, list(group)) for m, group in groupby(rows, key=lambda row: row[0])][:MAX_SERIES]
    series = [
        Series(name=f"{figure(m)} tokens ahead", tone=(len(groups) - i) if i > len(groups) - 7
               else 0, dots=True, points=[(rho, one.value) for _, rho, one in group],
               intervals=[_ends(one) for _, _, one in group], strong=i == len(groups) - 1)
        for i, (m, group) in enumerate(groups)
    ]  # fmt: skip
    high = max((row[1] for row in rows), default=1.0)
    low = min((row[1] for row in rows), default=0.0)
    chart = LineChart(
        x=Axis(label="slots, in multiples of a token's experts (rho)",
               low=min(low, 1.0), high=high, ticks=[(x, figure(x)) for x in ticks(0, high, 6)
                                                    if x >= min(low, 1.0)]),
        y=ratio_axis("hit ratio (SCH)"),
        series=series,
    )  # fmt: skip
    near = min(rows, key=lambda row: (abs(row[1] - 2), abs(row[0] - 16)), default=None)
    text = "A cache that knew the next tokens would set the bound."
    if near is not None:
        text = (f"A cache of {figure(near[1])} times a token's experts would hit "
                f"{percent(near[2].value)}, if it knew the next {figure(near[0])} "
                "tokens.")  # fmt: skip
    return Figure(
        key="sch",
        headline=text,
        about="Segment cache best hit rate: what a cache with foresight of m tokens reaches; "
        "a bound for the policies that have none. Bars are 95 % bootstrap intervals.",
        draw=lambda width: line_chart(chart, width),
        table=Table(
            head=("tokens ahead (m)", "rho", "SCH", "from", "to"),
            rows=tuple((figure(m), figure(rho), percent(one.value, 1), percent(one.low, 1),
                        percent(one.high, 1)) for m, rho, one in rows),
        ),
    )  # fmt: skip


def _srp_layers(view: View, rows: dict[int, tuple[float, ...]]) -> Figure:
    first = next(iter(rows.values()))
    layers = view.hits.layers if view.hits else view.skew.layers if view.skew else ()
    if len(layers) != len(first):
        layers = tuple(range(len(first)))
    series = [
        Series(name=f"m = {m}", tone=min(i + 1, 6), strong=i == 0,
               points=thin(list(zip(layers, values, strict=False))))
        for i, (m, values) in enumerate(rows.items())
    ]  # fmt: skip
    chart = LineChart(x=layer_axis(layers), y=Axis(label="SRP", low=0, high=1, ticks=_SCORE_TICKS),
                      series=series)  # fmt: skip
    pairs = [pair for pair in zip(first, layers, strict=True) if math.isfinite(pair[0])]
    (low, least), (high, most) = min(pairs, default=(0, 0)), max(pairs, default=(0, 0))
    return Figure(
        key="srp-layers",
        headline=f"Layer {most} keeps to its experts most (SRP {high:.2f}), layer {least} least "
        f"({low:.2f}).",
        about=f"SRP layer by layer, over {figure(next(iter(rows)))} tokens. Layers high here "
        "gain most from slots of their own.",
        draw=lambda width: line_chart(chart, width),
        table=Table(
            head=("layer", *(f"SRP, m = {m}" for m in rows)),
            rows=tuple(
                (str(layer), *(score(values[i]) if i < len(values) else "–"
                               for values in rows.values()))
                for i, layer in enumerate(layers[:512])
            ),
        ),
    )  # fmt: skip


def reuse_figures(view: View) -> list[Figure]:
    """Return the histogram of reuse distances and the working set."""
    reuse = view.reuse
    if reuse is None:
        return []
    found = [_distances(view, reuse)] if reuse.distances and reuse.shares else []
    steps = [(n, pages) for n, pages in reuse.working_set if n > 0 and math.isfinite(pages)]
    return found + ([_working_set(view, steps[:256])] if steps else [])


def _distances(view: View, reuse: Reuse) -> Figure:
    advice = view.main_advice
    n_slots = (view.live.n_slots if view.live else 0) or (advice.n_slots if advice else 0)
    bins = _merged(list(zip(reuse.distances, map(_share, reuse.shares), strict=False)))
    while len(bins) > 1 and not bins[0][1]:  # a layer's cycle leaves the shortest ones empty
        bins = bins[1:]
    kept = sum(1 for bound, _ in bins if n_slots and bound <= n_slots)
    bars = [
        Bar(name=_bound(bound), value=share, text=percent(share), tone=1 if i < kept else 2)
        for i, (bound, share) in enumerate(bins)
    ]
    bars.append(Bar(name="first", value=_share(reuse.cold), text=percent(reuse.cold), tone=0))
    inside = sum(share for _, share in bins[:kept])
    where = f"{figure(n_slots)} experts" + (
        f" ({size(n_slots * view.page_bytes)})" if view.page_bytes else ""
    )
    chart = BarChart(label="share of requests", bars=bars, divide=kept if kept else None,
                     x_label="distinct experts used since (at most)",
                     divide_text=f"fits {where}")  # fmt: skip
    text = (
        f"{percent(inside)} of requests ask again for one of the {where} that memory holds."
        if kept
        else f"{percent(_share(reuse.cold))} of requests are for an expert not used before."
    )
    return Figure(
        key="reuse",
        headline=text,
        about="How many other experts are used between two uses of one. What lies left of the "
        "line is found again under LRU; the grey bar is first uses, which no cache can hit.",
        draw=lambda width: bar_chart(chart, width),
        table=Table(head=("experts between, at most", "share of requests"),
                    rows=(*((figure(bound), percent(share, 1)) for bound, share in bins),
                          ("first use", percent(_share(reuse.cold), 1)))),
    )  # fmt: skip


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def _bound(bound: int) -> str:
    return figure(bound) if bound < 10_000 else f"{figure(bound / 1000)}k"


def _merged(bins: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Join neighbours until few enough bars are left to be read."""
    pitch = -(-len(bins) // _MAX_BARS)
    groups = [bins[i : i + pitch] for i in range(0, len(bins), max(pitch, 1))]
    return [(group[-1][0], sum(share for _, share in group)) for group in groups]


def _working_set(view: View, steps: Sequence[tuple[int, float]]) -> Figure:
    n_page = view.n_page
    high = top_of(max(n_page, max(pages for _, pages in steps)), 4)
    low_n, high_n = steps[0][0], max(steps[-1][0], steps[0][0] + 1)
    series = [Series(name="used", points=steps, tone=1, strong=True, dots=len(steps) <= 16)]
    if n_page:
        series.append(Series(name="all", points=[(low_n, n_page), (high_n, n_page)], tone=0))
    chart = LineChart(
        x=Axis(label="tokens in a row", low=low_n, high=high_n, log=True,
               ticks=[(n, figure(n)) for n in log_ticks(low_n, high_n) if n >= 1]),
        y=Axis(label="distinct experts", low=0, high=high,
               ticks=[(value, figure(value)) for value in ticks(0, high, 4)]),
        series=series,
    )  # fmt: skip
    shown = min(steps, key=lambda step: abs(math.log(step[0] / 64)))
    text = f"{figure(shown[0])} tokens in a row use {figure(round(shown[1]))} different experts"
    if n_page:
        text += f", {percent(shown[1] / n_page)} of all"
    if view.page_bytes:
        text += f" ({size(shown[1] * view.page_bytes)})"
    return Figure(
        key="working-set",
        headline=text + ".",
        about="The working set: how many distinct experts of all layers so many consecutive "
        "tokens use, in the mean.",
        draw=lambda width: line_chart(chart, width),
        table=Table(
            head=("tokens", "distinct experts", "memory"),
            rows=tuple((figure(n), figure(pages), size(pages * view.page_bytes)
                        if view.page_bytes else "–") for n, pages in steps),
        ),
    )  # fmt: skip
