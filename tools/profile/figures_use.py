"""The plots of how experts are used: skew, overlap of domains, prediction."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from edgeroute.tools.profile.figures import MAX_SERIES, Figure, Table, layer_axis, ratio_axis, thin
from edgeroute.tools.profile.plots import Axis, LineChart, Series, line_chart
from edgeroute.tools.profile.plots_rows import triangle
from edgeroute.tools.profile.records import PredictorRow, Skew
from edgeroute.tools.profile.scales import byte_ticks, figure, percent, size
from edgeroute.tools.profile.view import View

_MAX_DOMAINS = 24


def skew_figures(view: View) -> list[Figure]:
    """Return the plots of how unequally experts are used, and of overlap between domains."""
    skew = view.skew
    if skew is None:
        return []
    rows = {
        share: values
        for share, values in sorted(skew.top_shares.items())[:6]
        if values and len(values) == len(skew.layers)
    }
    found = [_top_shares(skew, rows)] if rows else []
    n_domain = len(skew.domains)
    if n_domain > 1 and len(skew.overlap) == n_domain == min(map(len, skew.overlap)):
        found.append(_overlap(skew))
    return found


def _top_shares(skew: Skew, rows: dict[int, tuple[float, ...]]) -> Figure:
    series = [
        Series(name=f"busiest {share}\u00a0%", tone=i + 1,
               points=thin(list(zip(skew.layers, values, strict=True))))
        for i, (share, values) in enumerate(rows.items())
    ]  # fmt: skip
    chart = LineChart(x=layer_axis(skew.layers), y=ratio_axis("share of requests"), series=series)
    shown = 25 if 25 in rows else next(iter(rows))
    values = [value for value in rows[shown] if math.isfinite(value)]
    mean = fmean(values) if values else math.nan
    loads = [value for value in skew.load_sd if math.isfinite(value)]
    about = (
        f"Share of a layer's requests that its busiest experts take. Equal use would give {shown}"
    )
    about += "\u00a0% to the busiest " + f"{shown}\u00a0%."
    if loads:
        about += f" The standard deviation of loads is {figure(fmean(loads))} times their mean."
    return Figure(
        key="skew",
        headline=f"The busiest {shown}\u00a0% of a layer's experts take {percent(mean)} of its "
        "requests.",
        about=about,
        draw=lambda width: line_chart(chart, width),
        table=Table(
            head=("layer", *(f"busiest {share}\u00a0%" for share in rows), "load deviation"),
            rows=tuple(
                (str(layer), *(percent(values[i], 1) for values in rows.values()),
                 figure(skew.load_sd[i]) if i < len(skew.load_sd) else "–")
                for i, layer in enumerate(skew.layers[:512])
            ),
        ),
    )  # fmt: skip


def _overlap(skew: Skew) -> Figure:
    names = [name[:40] for name in skew.domains[:_MAX_DOMAINS]]
    values = [row[:_MAX_DOMAINS] for row in skew.overlap[:_MAX_DOMAINS]]
    pairs = [
        (values[i][j], names[j], names[i])
        for i in range(len(names))
        for j in range(i)
        if math.isfinite(values[i][j])
    ]
    low, high = min(pairs, default=(0.0, "", "")), max(pairs, default=(0.0, "", ""))
    text = f"Most alike in their experts are {high[1]} and {high[2]} ({percent(high[0])})"
    if len(pairs) > 1:
        text += f", least {low[1]} and {low[2]} ({percent(low[0])})"
    left_out = len(skew.domains) - len(names)
    return Figure(
        key="overlap",
        headline=text + ".",
        about="Overlap of expert loads between domains, in per cent: 100 is the same experts "
        "equally often, 0 none in common. Each row's name is its column's too."
        + (f" {left_out} more domains are not shown." if left_out else ""),
        draw=lambda width: triangle("overlap, %", names, values, width),
        table=Table(
            head=("domain", *names),
            rows=tuple((name, *(percent(value) for value in row))
                       for name, row in zip(names, values, strict=True)),
        ),
    )  # fmt: skip


def predictor_figures(view: View) -> list[Figure]:
    """Return the plot of recall against bytes by predictor."""
    rows = [
        replace(row, name=row.name[:40])
        for row in (view.predictors or ())[:256]
        if math.isfinite(row.recall + row.bytes_token + row.wasted_bytes_token)
    ]
    return [_predictors(rows)] if rows else []


def _predictors(rows: Sequence[PredictorRow]) -> Figure:
    names = list(dict.fromkeys(row.name for row in rows))[:MAX_SERIES]
    by_name = {name: sorted((row for row in rows if row.name == name),
                            key=lambda row: row.bytes_token) for name in names}  # fmt: skip
    n_guess = min(row.n_guess for row in rows)
    best = max((row for row in rows if row.n_guess == n_guess), key=lambda row: row.recall)
    vain = best.wasted_bytes_token / best.bytes_token if best.bytes_token > 0 else 0.0
    high = max(row.bytes_token for row in rows) * 1.05 or 1.0
    series = [
        Series(name=name, tone=i + 1 if i < 6 else 0, dots=True,
               points=[(row.bytes_token, row.recall) for row in by_name[name]])
        for i, name in enumerate(names)
    ]  # fmt: skip
    chart = LineChart(
        x=Axis(label="bytes named per token", low=0, high=high, ticks=byte_ticks(high, 5)),
        y=ratio_axis("recall"),
        series=series,
    )  # fmt: skip
    return Figure(
        key="predictors",
        headline=f"With {figure(n_guess)} guesses, the predictor {best.name} names "
        f"{percent(best.recall)} of the next layer's experts; {percent(vain)} of its bytes would "
        "be in vain.",
        about="Recall of the predictors that prefetch could use, against the bytes of all that "
        "they name, as if nothing were in memory; one point per number of guesses. Up and to "
        "the left is better.",
        draw=lambda width: line_chart(chart, width),
        broad=True,
        table=Table(
            head=("predictor", "guesses", "recall", "precision", "per token", "in vain"),
            rows=tuple((row.name, figure(row.n_guess), percent(row.recall, 1),
                        percent(row.precision, 1), size(row.bytes_token),
                        size(row.wasted_bytes_token)) for row in rows),
        ),
    )  # fmt: skip
