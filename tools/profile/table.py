"""A profile as rows of (what, value), section by section, for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from edgeroute.offload.locality import srp_floor
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.profile.records import (
    Advice,
    HitRates,
    Interval,
    Live,
    Locality,
    PredictorRow,
    Profile,
    Reuse,
    Skew,
    Subject,
)

Row = tuple[str, str]
Section = tuple[str, list[Row]]

MOST_SIZES: Final = 7
"""Sizes of the hit table; a report draws all."""
WINDOWS: Final = (1, 4, 16, 64, 256)
"""Tokens of the working sets that are shown."""


def sections(profile: Profile) -> Iterator[Section]:
    """Yield the titles and rows of a profile, the advice last."""
    yield profile.subject.model, _subject(profile.subject)
    if profile.live is not None:
        yield "Recorded", _live(profile.live, profile.subject)
    yield "Hits by experts held", _hits(profile.hits, profile.subject)
    yield (
        "Locality",
        [*_locality(profile.locality, profile.subject), *_reuse(profile.reuse, profile.subject)],
    )
    yield "Skew", _skew(profile.skew)
    yield "Prefetch, replayed", _predictors(profile.predictors)
    yield "Advice", _advice(profile.advice, profile.subject)
    yield "Notes", [("", note) for note in profile.notes]


def _subject(subject: Subject) -> list[Row]:
    size = f", {format_bytes(subject.file_bytes)}" if subject.file_bytes else ""
    pages = subject.n_page * subject.page_bytes
    return [
        ("architecture", f"{subject.arch}, {subject.n_layer} layers{size}"),
        ("experts", f"{subject.n_expert} in each of {subject.n_moe_layer} layers, "
                    f"{subject.n_expert_used} used per token; {subject.n_page} in all, "
                    f"{format_bytes(subject.page_bytes)} each, {format_bytes(pages)}"),
        ("recorded", f"{subject.n_prompt_token} tokens of prompts and {subject.n_decode_token} "
                     f"decoded{_domains(subject.domains)}"),
        ("machine", subject.machine + (f", {subject.power_mode}" if subject.power_mode else "")),
    ]  # fmt: skip


def _domains(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f", {len(names)} domain{'' if len(names) == 1 else 's'}: {', '.join(names)}"


def _live(live: Live, subject: Subject) -> list[Row]:
    budget = f"budget {format_bytes(live.budget_bytes)}: " if live.budget_bytes else ""
    rows = [
        ("memory", f"{budget}{live.n_slots} of {subject.n_page} experts held "
                   f"({live.n_slots / subject.n_page:.0%}), {format_bytes(live.slots_bytes)}"),
        ("hits", f"{live.hit_ratio:.1%} of what decoding asked for, policy {live.policy}"),
        ("read per token", f"{format_bytes(round(live.demand_bytes_token))} on demand, "
                           f"{format_bytes(round(live.prefetch_bytes_token))} ahead; "
                           f"{1e3 * live.stall_s_token:.1f} ms waited"),
        ("speed", f"decode {live.decode_tok_s:.1f} tok/s, prompts {live.prefill_tok_s:.0f} tok/s"),
    ]  # fmt: skip
    if live.joules_token is not None:
        how = "estimated" if live.energy_estimated else "measured"
        rows.append(("energy", f"{live.joules_token:.2f} J per decoded token, prompts included, "
                               f"{how} ({live.energy_source})"))  # fmt: skip
    if live.replay_equal is not None:
        same = "the same counters, bit for bit" if live.replay_equal else "OTHER counters"
        rows.append(("replay", f"of this trace gives {same}"))
    return rows


def _hits(hits: HitRates, subject: Subject) -> list[Row]:
    names = [curve.policy for curve in hits.pooled]
    sizes = hits.pooled[0].n_slots
    rows = [("", "".join(f"{_policy(name, hits.active):>12}" for name in names))]
    shown = {*_spread(len(sizes), MOST_SIZES), *(
        i for i, n in enumerate(sizes) if n == hits.cliff_slots
    )}  # fmt: skip
    for i in sorted(shown):
        cells = "".join(f"{curve.hit_ratios[i]:>12.1%}" for curve in hits.pooled)
        label = f"{sizes[i]} ({sizes[i] / subject.n_page:.0%})"
        rows.append((f"{label}, {format_bytes(sizes[i] * subject.page_bytes)}", cells))
    cliff = f"{hits.cliff_slots} experts are one token's cycle; with fewer, LRU keeps next to none"
    return [*rows, ("LRU cliff", cliff), *_by_layer(hits)]


def _policy(name: str, active: str) -> str:
    return f"{name}*" if name == active else name


def _by_layer(hits: HitRates) -> list[Row]:
    ratios = hits.by_layer.get(hits.active)
    if not ratios:
        return []
    worst = min(range(len(ratios)), key=ratios.__getitem__)
    best = max(range(len(ratios)), key=ratios.__getitem__)
    return [("by layer", f"{hits.layer_slots} experts held in each, {hits.active}: "
                         f"{ratios[worst]:.0%} in layer {hits.layers[worst]} to "
                         f"{ratios[best]:.0%} in layer {hits.layers[best]}"
                         f"{'; * is the active policy' if hits.active else ''}")]  # fmt: skip


def _spread(n: int, most: int) -> list[int]:
    """Choose up to `most` of n places, evenly, first and last included."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def _locality(locality: Locality, subject: Subject) -> list[Row]:
    rows = []
    for m, found in locality.srp.items():
        floor = srp_floor(subject.n_expert, subject.n_expert_used, m).value
        rows.append((f"SRP, {m} tokens", f"{_interval(found)} with {locality.srp_rho[m]:.2f} "
                                         f"times the experts in use; by chance {floor:.1%}"
                    ))  # fmt: skip
    for m in sorted({m for m, _, _ in locality.sch}):
        parts = [f"{_interval(found)} at {rho:g} x" for n, rho, found in locality.sch if n == m]
        rows.append((f"SCH, {m} tokens", ", ".join(parts)))
    return rows


def _interval(found: Interval) -> str:
    return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _reuse(reuse: Reuse, subject: Subject) -> list[Row]:
    rows = [("first uses", f"{reuse.cold:.1%} of requests; no cache has those")]
    total, bound = 0.0, None
    for distance, share in zip(reuse.distances, reuse.shares, strict=True):
        total += share
        if total >= 0.5 * (1 - reuse.cold):
            bound = distance
            break
    if bound is not None:
        rows.append(("reuse", f"half of all reuse is within {bound} other experts"))
    if reuse.working_set:
        parts = [f"{n:.0f} ({n / subject.n_page:.0%}) in {tokens} tokens"
                 for tokens, n in reuse.working_set if tokens in WINDOWS]  # fmt: skip
        rows.append(("working set", ", ".join(parts)))
    return rows


def _skew(skew: Skew) -> list[Row]:
    rows = [
        (f"busiest {percent} %", f"take {sum(shares) / len(shares):.0%} of a layer's requests "
                                 f"({min(shares):.0%} to {max(shares):.0%})")
        for percent, shares in skew.top_shares.items() if shares
    ]  # fmt: skip
    n = len(skew.domains)
    pairs = [(skew.overlap[i][j], skew.domains[i], skew.domains[j])
             for i in range(n) for j in range(i)]  # fmt: skip
    if pairs:
        low, high = min(pairs), max(pairs)
        mean = sum(value for value, _, _ in pairs) / len(pairs)
        text = f"share {mean:.0%} of their experts"
        if len(pairs) > 1:
            text += (f" in the mean: least {low[2]} and {low[1]} ({low[0]:.0%}), most {high[2]} "
                     f"and {high[1]} ({high[0]:.0%})")  # fmt: skip
        rows.append(("domains", text))
    return rows


def _predictors(rows: Sequence[PredictorRow]) -> list[Row]:
    return [
        (f"{row.name}, {row.n_guess}", f"{row.recall:.0%} of what was needed, {row.precision:.0%} "
                                       f"of its guesses right, at most "
                                       f"{format_bytes(round(row.bytes_token))} per token")
        for row in rows
    ]  # fmt: skip


def _advice(rows: Sequence[Advice], subject: Subject) -> list[Row]:
    return [
        (_budget(each, subject), f"{each.policy}, {each.hit_ratio:.1%} hits: {each.why}")
        for each in rows
    ]  # fmt: skip


def _budget(advice: Advice, subject: Subject) -> str:
    held = f"{advice.n_slots} experts"
    return f"{format_bytes(advice.budget_bytes)}, {held}" if advice.budget_bytes else held


def forecast_section(name: str, facts: Mapping[str, Any]) -> Section:
    """Rows of one machine's forecast, and of each figure whether it was measured or computed.

    Args:
        name: the machine.
        facts: a Forecast as a mapping, with `origins` of the machine's speeds.
    """
    budget = f"{facts['verdict']} in {format_bytes(facts['budget_bytes'])}"
    if facts["verdict"] == "REFUSED":
        budget += f"; it needs {format_bytes(facts['smallest_bytes'])}"
    rows = [("verdict", budget)]
    if facts["hit_ratio"] is not None:
        rows.append(("hits", _range(facts["hit_ratio"], "%", 100)
                     + f", {facts.get('hits_origin') or 'stated'}"))  # fmt: skip
    for label, key, unit in (("decode", "decode_tok_s", "tok/s"), ("prompts", "prefill_tok_s",
                             "tok/s"), ("first token", "ttft_s", "s"),
                             ("energy", "joules_token", "J per token")):  # fmt: skip
        if facts[key] is not None:
            rows.append((label, f"{_range(facts[key], unit)}, computed"))
    if facts["read_bytes_token"]:
        rows.append(("read per token", format_bytes(round(facts["read_bytes_token"]))))
    origins: dict[str, list[str]] = {}
    for figure, origin in facts.get("origins", {}).items():
        origins.setdefault(origin, []).append(figure)
    rows += [(f"from {origin}", ", ".join(sorted(names))) for origin, names in origins.items()]
    rows += _emulation(facts.get("emulation"))
    return f"Forecast: {name}", [*rows, *(("note", note) for note in facts["notes"])]


def _emulation(facts: Mapping[str, Any] | None) -> list[Row]:
    """What a run under the device's limits measured, and which limits were those."""
    if facts is None:
        return []
    if "error" in facts:
        return [("emulated", f"it did not run: {facts['error']}")]
    hits = "" if facts["hit_ratio"] is None else f"{facts['hit_ratio']:.0%} hits, "
    rows = [("measured so", f"{facts['decode_tok_s']:.3g} tok/s, {hits}"
                            f"{format_bytes(round(facts['read_bytes_token']))} read and "
                            f"{1e3 * facts['stall_s_token']:.1f} ms waited per token")]  # fmt: skip
    if facts["computed_tok_s"] is not None:
        rows.append(("computed so", f"{facts['computed_tok_s']:.3g} tok/s with the device's own "
                                    "memory and cores in place of these"))  # fmt: skip
    for resource, each in facts["resources"].items():
        rows.append((f"{resource}: {each['how']}", each["note"]))
    return rows


def _range(found: Mapping[str, float], unit: str, factor: float = 1.0) -> str:
    low, likely, high = (factor * found[key] for key in ("low", "likely", "high"))
    return f"{likely:.3g} {unit} ({low:.3g} to {high:.3g})"
