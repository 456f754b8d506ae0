"""What `edgeroute plan` found, as rows for people."""

from typing import Any

from edgeroute.commands.doctor_table import Row, show
from edgeroute.runtime.units import MIB, format_bytes


def print_plan(found: dict[str, Any]) -> None:
    """Print all sections."""
    bits = 8 * sum(found["type_bytes"].values()) / found["n_params"]
    size = sum(found["type_bytes"].values())
    mix = ", ".join(f"{name} {format_bytes(n)} ({n / size:.0%})"
                    for name, n in found["type_bytes"].items())  # fmt: skip
    show(found["model"], [
        ("architecture", f"{found['arch']}, {found['n_layer']} layers, width {found['n_embd']}, "
                         f"vocabulary {found['n_vocab']}, trained on {found['n_ctx_train']}"),
        ("parameters", f"{found['n_params'] / 1e6:.1f} million, {bits:.2f} bits each"),
        ("quantisation", mix),
    ])  # fmt: skip
    if "pair" in found:
        from edgeroute.commands.plan_pair import pair_rows

        show("Pair", pair_rows(found))
    show("Memory", [
        *((part, format_bytes(n)) for part, n in found["parts"].items()),
        ("total", f"{format_bytes(found['total_bytes'])} at n_ctx={found['n_ctx']}, "
                  f"KV {found['kv_type']}"),
        ("budget", format_bytes(found["budget_bytes"])),
        ("available now", f"{format_bytes(found['available_bytes'])} ({found['memory_limit']})"),
        ("verdict", _verdict(found)),
        *_advice(found),
    ])  # fmt: skip
    if found["slots"] is not None:
        show("Experts", _experts(found["experts"], found["slots"]))
    if "on" in found:
        from edgeroute.commands.plan_devices import device_plan_rows

        show("Devices", device_plan_rows(found["on"]))
    show(f"Forecast for {found['machine']}", _forecast(found))


def _verdict(found: dict[str, Any]) -> str:
    budget, resident = found["budget_bytes"], found["resident_bytes"]
    if found["verdict"] == "FITS":
        return f"FITS, {format_bytes(budget - resident)} to spare"
    if found["pages"] == "experts":
        share = found["slots"]["n_slots"] / found["experts"]["n_pages"]
        return (f"PAGES: {share:.0%} of its experts are in memory at a time; all at once "
                f"would take {format_bytes(resident)}")  # fmt: skip
    if found["pages"] == "layers":
        layers = found["layers"]
        n_layers = layers["n_resident"] + layers["n_streamed"]
        return (f"PAGES: {layers['n_streamed']} of {n_layers} layers are streamed (the head "
                f"counts as one); all at once would take {format_bytes(resident)}")  # fmt: skip
    total = found["total_bytes"]
    if "pair" in found:
        from edgeroute.commands.plan_pair import over_by

        return over_by(found)
    if found["layers"] is not None:
        return f"REFUSED, {format_bytes(total - budget)} too much, even with all layers streamed"
    paged = ", even with the fewest experts in memory" if total < resident else ""
    return f"REFUSED, {format_bytes(total - budget)} too much{paged}"


def _advice(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    longest = found["largest_n_ctx"]
    if found["verdict"] == "REFUSED":
        rows.append(("smallest budget", _memory_option(found["smallest_budget_bytes"])))
        context = "none fits" if longest is None else f"--n-ctx {longest}"
        rows.append(("longest context", f"{context} within this budget"))
    else:
        trained = ", all it was trained on" if longest == found["n_ctx_train"] else ""
        rows.append(("longest context", f"--n-ctx {longest}{trained}{_at_what_cost(found)}"))
    if found["budget_bytes"] > found["available_bytes"]:
        rows.append(("warning", "the budget is more than what is available now"))
    return rows


def _at_what_cost(found: dict[str, Any]) -> str:
    """Say that a longer context leaves fewer slots or layers, where it does."""
    if found["pages"] is None or found["largest_n_ctx"] <= found["n_ctx"]:
        return ""
    return f", with fewer {found['pages']} in memory"


def _memory_option(n_bytes: int) -> str:
    """Write the option that gives at least so many bytes."""
    return f"--memory {-(-n_bytes // MIB)}MiB"


def _experts(experts: dict[str, Any], slots: dict[str, Any]) -> list[Row]:
    cliff = slots["cliff"]
    n_slots, n_pages = slots["n_slots"], experts["n_pages"]
    useful = cliff["useful_slots"]
    above = f"{cliff['n_slots']} slots hold the {useful} experts that one token uses"
    if cliff["is_below"]:
        keeps = "nothing" if cliff["n_slots"] < cliff["zero_below_slots"] else "next to nothing"
        above = (f"below it: {cliff['n_slots']} slots are fewer than the {useful} experts that "
                 f"one token uses; lru would keep {keeps}")  # fmt: skip
    return [
        ("slots", f"{n_slots} of {n_pages} experts ({n_slots / n_pages:.0%}), "
                  f"{format_bytes(slots['n_bytes'])} of {format_bytes(experts['all_bytes'])}"),
        ("one token", f"uses {experts['token_pages']} of them, "
                      f"{format_bytes(experts['token_bytes'])}"),
        ("LRU cliff", above),
        ("policy", slots["policy"]),
        ("prefetch", _prefetch(slots)),
        ("smallest budget", f"about {_memory_option(experts['smallest_budget_bytes'])}"),
        ("of use from", f"about {_memory_option(experts['useful_budget_bytes'])}, which holds "
                        "one token's experts"),
    ]  # fmt: skip


def _prefetch(slots: dict[str, Any]) -> str:
    how: str = slots["prefetch"]
    if how == "auto":
        return "while it pays"
    if how == "off":
        return f"off{', below the cliff' if slots['cliff']['is_below'] else ''}"
    return f"always, by {how}"


def _forecast(found: dict[str, Any]) -> list[Row]:
    forecast = found["forecast"]
    rows = [
        ("read per token", f"{format_bytes(found['weight_read_bytes'])} of weights and "
                           f"{format_bytes(found['kv_bytes_per_token'])} for each token before it"),
    ]  # fmt: skip
    if forecast["decode_tok_s"] is None:
        return [*rows, *_notes(found)]
    if forecast["hit_ratio"] is not None:
        each = forecast["hit_ratio"]
        rows.append(("experts found", f"{each['likely']:.0%} of those a token wants "
                                      f"({each['low']:.0%} to {each['high']:.0%})"))  # fmt: skip
    if forecast["read_bytes_token"]:
        rows.append(("from the disk", f"{format_bytes(round(forecast['read_bytes_token']))} "
                                      "per token"))  # fmt: skip
    rows += [
        ("decode", f"{_range(forecast['decode_tok_s'])} tok/s"),
        ("prompt", f"{_range(forecast['prefill_tok_s'])} tok/s"),
        ("first token", f"after {_range(forecast['ttft_s'])} s"),
    ]
    if forecast["joules_token"] is not None:
        rows.append(("energy", f"{_range(forecast['joules_token'])} J per token, computed"))
    total = sum(forecast["parts"].values())
    parts = sorted(forecast["parts"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {n / total:.0%}" for name, n in parts if n >= 0.01 * total)
    return [*rows, ("a token's time", shares), *_notes(found)]


def _notes(found: dict[str, Any]) -> list[Row]:
    """The forecast's own notes; they begin with those of the machine's speeds."""
    return [("note", note) for note in found["forecast"]["notes"]]


def _range(found: dict[str, float]) -> str:
    """Write a forecast number and its range, as finely as it is worth."""
    return (f"{_figure(found['likely'])} ({_figure(found['low'])} to "
            f"{_figure(found['high'])})")  # fmt: skip


def _figure(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{1 if value >= 1 else 2}f}"
