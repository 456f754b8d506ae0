"""The plots of hit ratios, and what a plot of the report consists of."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeroute.tools.profile.plots import Axis, Drawing, LineChart, Marker, Series, line_chart
from edgeroute.tools.profile.records import Curve, HitRates
from edgeroute.tools.profile.scales import NBSP, byte_ticks, figure, percent, size, ticks
from edgeroute.tools.profile.style import N_TONE
from edgeroute.tools.profile.view import View

RATIO_TICKS = tuple((i / 4, f"{i * 25}{NBSP}%") for i in range(5))
MAX_SERIES = 12
_MAX_POINTS = 160
_BOUND = "belady"
"""The policy that knows the future: drawn in grey, as the bound of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The figures of a plot, as text: the first cell of a row is its name."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot: what it says in a sentence, what it shows, how it is drawn, and its figures."""

    key: str
    headline: str
    about: str
    draw: Callable[[float], Drawing]
    table: Table
    broad: bool = False


def thin(points: Sequence[tuple[float, float]], n: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most about `n` of the points that can be drawn: spread evenly, and all cliffs."""
    real = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if len(real) <= n:
        return real
    kept = {round(i * (len(real) - 1) / (n * 3 // 4 - 1)) for i in range(n * 3 // 4)}
    jumps = sorted(range(1, len(real)), key=lambda i: -abs(real[i][1] - real[i - 1][1]))
    for i in jumps[: n // 8]:
        kept |= {i - 1, i}
    return [real[i] for i in sorted(kept)]


def ratio_axis(label: str) -> Axis:
    """Return an axis from 0 to 100 %."""
    return Axis(label=label, low=0.0, high=1.0, ticks=RATIO_TICKS)


def layer_axis(layers: Sequence[int]) -> Axis:
    """Return the axis of layer numbers."""
    low, high = min(layers), max(layers)
    marks = [(i, str(round(i))) for i in ticks(low, high, 8) if i == round(i)]
    return Axis(label="layer", low=low, high=high, ticks=marks)


def policy_name(name: str) -> str:
    """Print a policy's name as people write it: LRU, LFRU, Belady."""
    if name.lower() in ("lru", "lfu", "lfru", "mru", "sch"):
        return name.upper()
    return name[:1].upper() + name[1:40]


def hit_ratio_at(curve: Curve, n_slots: float) -> float:
    """Return the hit ratio of a cache of `n_slots`, on the straight line between the sizes."""
    xs, ys = curve.n_slots, curve.hit_ratios
    if not xs:
        return math.nan
    i = bisect_left(xs, n_slots)
    if i == 0:
        return ys[0] * n_slots / xs[0] if xs[0] > 0 else ys[0]
    if i == len(xs):
        return ys[-1]
    share = (n_slots - xs[i - 1]) / max(xs[i] - xs[i - 1], 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * share


def hit_figures(view: View) -> list[Figure]:
    """Return the plot of hits against cache size."""
    hits = view.hits
    if hits is None:
        return []
    curves = [one for one in hits.pooled if one.n_slots and len(one.n_slots) == len(one.hit_ratios)]
    return [_by_size(view, hits, curves[:MAX_SERIES])] if curves else []


def hit_layer_figures(view: View) -> list[Figure]:
    """Return the plot of hits by layer."""
    hits = view.hits
    if hits is None:
        return []
    rows = {
        name: ratios
        for name, ratios in list(hits.by_layer.items())[:MAX_SERIES]
        if ratios and len(ratios) == len(hits.layers)
    }
    return [_by_layer(hits, rows)] if rows else []


def _tones(names: Sequence[str], active: str) -> dict[str, int]:
    """Give the active policy the first colour, the bound grey, the others what is left."""
    tones, free = {}, 2
    for name in names:
        if name.lower() == _BOUND:
            tones[name] = 0
        elif name == active:
            tones[name] = 1
        else:
            tones[name] = free if free <= N_TONE else 0
            free += 1
    return tones


def _by_size(view: View, hits: HitRates, curves: Sequence[Curve]) -> Figure:
    """Plot hits against what is resident, in bytes where an expert's bytes are known."""
    n_page = view.n_page or max(one.n_slots[-1] for one in curves)
    each = view.page_bytes or 1
    here = _reference(view, n_page)
    tones = _tones([one.policy for one in curves], hits.active)
    order = sorted(curves, key=lambda one: -_real(hit_ratio_at(one, here)))
    series = [
        Series(
            name=policy_name(one.policy),
            points=thin([(x * each, y) for x, y in zip(one.n_slots, one.hit_ratios, strict=True)]),
            tone=tones[one.policy],
            note=percent(hit_ratio_at(one, here)),
            strong=one.policy == hits.active,
        )
        for one in order
    ]

    def draw(width: float) -> Drawing:
        n_tick = 8 if width > 700 else 4
        low = Axis(label=_resident(view), low=0, high=n_page * each, ticks=_sizes(view, n_tick))
        top = Axis(label="share of all experts", low=0, high=n_page * each,
                   ticks=[(part * n_page * each, text) for part, text in RATIO_TICKS])  # fmt: skip
        return line_chart(
            LineChart(
                x=low, y=ratio_axis("hit ratio"), series=series, markers=_markers(view, hits),
                top=top, ranked=f"Hits with {_size_of(view, here)}",
                height=320 if width > 700 else 240,
            ),
            width,
        )  # fmt: skip

    return Figure(
        key="hits",
        headline=_size_headline(view, hits, curves, n_page),
        about="Share of expert requests that find their expert in memory, by how much memory "
        "experts get, all layers sharing one pool. " + _cliff_words(view, hits),
        draw=draw,
        table=_size_table(view, curves, n_page),
        broad=True,
    )


def _real(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def _reference(view: View, n_page: int) -> int:
    """Return the size that policies are compared at: this run's, the advised, or half."""
    if view.live is not None and view.live.n_slots > 0:
        return view.live.n_slots
    advice = view.main_advice
    return advice.n_slots if advice else max(n_page // 2, 1)


def _resident(view: View) -> str:
    return "experts in memory" + ("" if view.page_bytes else " (count)")


def _size_of(view: View, n_slots: float) -> str:
    if view.page_bytes:
        return size(n_slots * view.page_bytes)
    return f"{figure(n_slots)} experts"


def _sizes(view: View, n_tick: int) -> Sequence[tuple[float, str]]:
    if view.page_bytes:
        return byte_ticks(view.n_page * view.page_bytes, n_tick)
    return [(value, figure(value)) for value in ticks(0, view.n_page, n_tick)]


def _markers(view: View, hits: HitRates) -> list[Marker]:
    each = view.page_bytes or 1
    found = []
    if hits.cliff_slots > 0:
        found.append(Marker(x=hits.cliff_slots * each, label="LRU cliff"))
    live = view.live
    for one in (view.advice or ())[:4]:
        if live is None or live.n_slots != one.n_slots:
            name = "advised" if one is view.main_advice else _size_of(view, one.n_slots)
            name += f": {percent(one.hit_ratio)}"
            found.append(Marker(x=one.n_slots * each, y=one.hit_ratio, label=name, tone=3))
    if live is not None:
        name = f"this run: {percent(live.hit_ratio)}"
        found.append(Marker(x=live.n_slots * each, y=live.hit_ratio, label=name, tone=1))
    return sorted(found, key=lambda marker: marker.x)


def _size_headline(view: View, hits: HitRates, curves: Sequence[Curve], n_page: int) -> str:
    best = next((one for one in curves if one.policy == hits.active), curves[0])
    half = hit_ratio_at(best, n_page / 2)
    text = (
        f"Half of all experts in memory ({_size_of(view, n_page / 2)}) "
        f"gives {percent(half)} hits under {policy_name(best.policy)}"
    )
    bound = next((one for one in curves if one.policy.lower() == _BOUND), None)
    if bound is None or bound is best:
        return text + "."
    return (
        text + f"; with perfect foresight it would be {percent(hit_ratio_at(bound, n_page / 2))}."
    )


def _cliff_words(view: View, hits: HitRates) -> str:
    if hits.cliff_slots <= 0:
        return ""
    return (
        f"Below the cliff at {_size_of(view, hits.cliff_slots)}, the experts of one token, LRU "
        "throws each out before its next use."
    )


def _size_table(view: View, curves: Sequence[Curve], n_page: int) -> Table:
    rows = []
    for share in (0.05, *(i / 10 for i in range(1, 11))):
        n_slots = n_page * share
        rows.append(
            (
                percent(share),
                figure(round(n_slots)),
                *([size(n_slots * view.page_bytes)] if view.page_bytes else []),
                *(percent(hit_ratio_at(one, n_slots), 1) for one in curves),
            )
        )
    bytes_head = ["memory"] if view.page_bytes else []
    names = (policy_name(one.policy) for one in curves)
    return Table(head=("share", "experts", *bytes_head, *names), rows=tuple(rows))


def _by_layer(hits: HitRates, rows: dict[str, tuple[float, ...]]) -> Figure:
    tones = _tones(list(rows), hits.active)
    series = [
        Series(
            name=policy_name(name),
            points=thin(list(zip(hits.layers, ratios, strict=True))),
            tone=tones[name],
            strong=name == hits.active,
        )
        for name, ratios in rows.items()
    ]
    name = hits.active if hits.active in rows else next(iter(rows))
    pairs = [pair for pair in zip(rows[name], hits.layers, strict=True) if math.isfinite(pair[0])]
    (low, least), (high, most) = min(pairs, default=(0, 0)), max(pairs, default=(0, 0))
    chart = LineChart(x=layer_axis(hits.layers), y=ratio_axis("hit ratio"), series=series)
    return Figure(
        key="layers",
        headline=f"Layer {least} finds the fewest of its experts in memory ({percent(low)}), "
        f"layer {most} the most ({percent(high)}).",
        about=f"Hit ratio layer by layer, each with {figure(hits.layer_slots)} slots of its own. "
        f"The sentence above is of {policy_name(name)}.",
        draw=lambda width: line_chart(chart, width),
        table=Table(
            head=("layer", *map(policy_name, rows)),
            rows=tuple(
                (str(layer), *(percent(ratios[i], 1) for ratios in rows.values()))
                for i, layer in enumerate(hits.layers[:512])
            ),
        ),
    )
