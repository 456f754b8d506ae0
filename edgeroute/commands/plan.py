"""`edgeroute plan`: whether a model fits, and how fast it could be, before loading it."""

import json
from typing import TYPE_CHECKING, Any

import click

from edgeroute.cli import EXIT_CAPACITY
from edgeroute.commands.doctor_table import Row, show
from edgeroute.commands.generate_shared import SETTINGS, pick
from edgeroute.runtime.units import MIB, format_bytes

if TYPE_CHECKING:
    from edgeroute.commands.plan_layers import Streaming
    from edgeroute.commands.plan_model import ExpertSlots, ModelPlan, Paging

_EPILOG = """\b
Examples:
  edgeroute plan smollm2-135m-instruct
  edgeroute plan qwen2.5-coder-1.5b-instruct --memory 2GiB --n-ctx 8192
  edgeroute plan ./mixture-of-experts.gguf --memory 2GiB --policy lru
  edgeroute plan ./model.gguf --memory 1GiB --json || echo "does not fit"
"""
_CACHE_NOTES = {
    "bypassed": "",
    "dropped": ", page cache dropped first",
    "possible": ", perhaps from the page cache",
}


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.option("--memory", metavar="BYTES", help="Budget, such as 2GiB; without it what is free, "
              "less a reserve.")  # fmt: skip
@click.option("--n-ctx", type=int, metavar="N", help="Context length.  [default: 4096]")
@click.option("--kv-type", metavar="TYPE", help="f16 or q8_0.  [default: f16]")
@click.option("--threads", "-t", type=int, metavar="N", help="Threads to predict for.")
@click.option("--policy", metavar="NAME", help="Which expert leaves when they are paged.  "
              "[default: auto]")  # fmt: skip
@click.option("--prefetch", metavar="WHEN", help="Read experts ahead: auto, off, or a "
              "predictor.  [default: auto]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def command(ctx: click.Context, /, model: str, as_json: bool, **given: Any) -> None:
    """Say what MODEL takes, by part, and whether that fits the budget.

    Only the file's header is read. A mixture of experts that does not fit is planned with
    its experts paged: how many are held at a time, and from which budget on that is of use.
    Any other model that does not fit is planned with some of its layers streamed.

    The predicted speed is a ceiling: the bytes that one token reads over the memory
    bandwidth measured now and, for experts or layers that are not in memory, over that of the disk,
    measured on the file itself (at most 128 MiB are read).

    Ends with code 4 when it does not fit even so, naming the smallest budget that would do
    and the longest context that would fit.
    """
    from edgeroute.commands.plan_model import plan_model, predict
    from edgeroute.config import merge_settings
    from edgeroute.models.pull import resolve

    params = merge_settings(pick(given, SETTINGS))
    plan = plan_model(resolve(model), params)
    found = _facts(model, plan) | {"decode": predict(plan)}
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print(found)
    if not plan.fits:
        ctx.exit(EXIT_CAPACITY)


def _facts(model: str, plan: "ModelPlan") -> dict[str, Any]:
    hparams, parts = plan.hparams, plan.parts
    return {
        "model": model,
        "path": str(plan.path),
        "arch": hparams.arch,
        "n_layer": hparams.n_layer,
        "n_embd": hparams.n_embd,
        "n_vocab": hparams.n_vocab,
        "n_ctx_train": hparams.n_ctx_train,
        "n_params": plan.n_params,
        "type_bytes": plan.type_bytes,
        "n_ctx": plan.params.n_ctx,
        "kv_type": plan.params.kv_type,
        "parts": parts,
        "total_bytes": sum(parts.values()),
        "resident_bytes": plan.memory.total_bytes,
        "budget_bytes": plan.budget_bytes,
        "available_bytes": plan.available.available_bytes,
        "memory_limit": plan.available.limit,
        "fits": plan.fits,
        "verdict": _word(plan),
        "smallest_budget_bytes": plan.smallest_budget_bytes,
        "largest_n_ctx": plan.largest_n_ctx,
        "weight_read_bytes": plan.weight_read_bytes,
        "kv_bytes_per_token": plan.kv_cell_bytes,
        "experts": None if plan.paging is None else _experts_facts(plan.paging),
        "slots": None if plan.slots is None else _slots_facts(plan.slots),
        "layers": None if plan.streaming is None else _layers_facts(plan.streaming),
    }


def _word(plan: "ModelPlan") -> str:
    if not plan.fits:
        return "REFUSED"
    if plan.is_resident:
        return "FITS"
    return "PAGED" if plan.streaming is None else "STREAMED"


def _layers_facts(streaming: "Streaming") -> dict[str, Any]:
    return {
        "n_resident": streaming.n_resident,
        "n_streamed": streaming.n_streamed,
        "token_bytes": streaming.token_bytes,
        "smallest_budget_bytes": streaming.smallest_bytes,
    }


def _experts_facts(paging: "Paging") -> dict[str, Any]:
    return {
        "n_pages": paging.n_pages,
        "all_bytes": paging.all_bytes,
        "token_pages": paging.token_pages,
        "token_bytes": paging.token_bytes,
        "fixed_bytes": paging.fixed_bytes,
        "smallest_budget_bytes": paging.smallest_bytes,
        "useful_budget_bytes": paging.useful_bytes,
    }


def _slots_facts(slots: "ExpertSlots") -> dict[str, Any]:
    cliff = slots.cliff
    return {
        "n_slots": slots.n_slots,
        "n_bytes": slots.n_bytes,
        "policy": slots.policy,
        "prefetch": slots.prefetch,
        "cliff": {
            "is_below": cliff.is_below,
            "n_slots": cliff.n_slots,
            "zero_below_slots": cliff.zero_below,
            "useful_slots": cliff.smallest_useful,
            "fallback": cliff.fallback,
            "repeating_hit_ratios": dict(cliff.repeating),
            "drifting_hit_ratios": dict(cliff.drifting),
        },
    }


def _print(found: dict[str, Any]) -> None:
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
    show("Decode", _decode(found))


def _verdict(found: dict[str, Any]) -> str:
    budget, resident = found["budget_bytes"], found["resident_bytes"]
    if found["verdict"] == "FITS":
        return f"FITS, {format_bytes(budget - resident)} to spare"
    if found["verdict"] == "PAGED":
        share = found["slots"]["n_slots"] / found["experts"]["n_pages"]
        return (f"FITS with experts paged, {share:.0%} of them in memory at a time; all at once "
                f"would take {format_bytes(resident)}")  # fmt: skip
    if found["verdict"] == "STREAMED":
        layers = found["layers"]
        return (f"FITS with {layers['n_streamed']} of "
                f"{layers['n_resident'] + layers['n_streamed']} layers streamed (the head counts "
                f"as one); all at once would take {format_bytes(resident)}")  # fmt: skip
    total = found["total_bytes"]
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
    if found["verdict"] not in ("PAGED", "STREAMED") or found["largest_n_ctx"] <= found["n_ctx"]:
        return ""
    what = "experts" if found["verdict"] == "PAGED" else "layers"
    return f", with fewer {what} in memory"


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


def _decode(found: dict[str, Any]) -> list[Row]:
    decode = found["decode"]
    full = decode["ceiling_tok_s_full_context"]
    paged, streams = found["slots"] is not None, found["verdict"] == "STREAMED"
    rows = [
        ("read per token", f"{format_bytes(found['weight_read_bytes'])} of weights and "
                           f"{format_bytes(found['kv_bytes_per_token'])} for each token before it"),
        ("memory reads", f"{format_bytes(decode['bandwidth_bytes_s'])}/s measured now, by "
                         f"{decode['threads']} threads"),
        ("all in memory" if paged or streams else "predicted",
         f"at most {decode['ceiling_tok_s']:.1f} tok/s, {full:.1f} with a full context "
         "(a ceiling: arithmetic comes on top)"),
    ]  # fmt: skip
    if streams:
        return rows + _streamed_decode(decode)
    return rows + _paged_decode(decode) if paged else rows


def _paged_decode(decode: dict[str, Any]) -> list[Row]:
    """Ceilings by hit ratio: misses read before the arithmetic, or behind it."""
    rows = [_disk_row(decode["disk"])]
    for each in decode["paged"]:
        routing = " (routing without locality)" if each["routing"] == "uniform" else ""
        rows.append((
            f"{each['hit_ratio']:.0%} hits",
            f"at most {_speed(each['serial_ceiling_tok_s'])} tok/s, "
            f"{_speed(each['overlapped_ceiling_tok_s'])} if reads hide behind arithmetic; "
            f"{format_bytes(each['miss_bytes'])} read per token{routing}",
        ))  # fmt: skip
    return rows


def _streamed_decode(decode: dict[str, Any]) -> list[Row]:
    """Ceilings of streaming: layers are read before the arithmetic, or behind it."""
    rows, found = [_disk_row(decode["disk"])], decode["streamed"]
    if found is not None:
        rows.append((
            "predicted",
            f"at most {_speed(found['overlapped_ceiling_tok_s'])} tok/s "
            f"({_speed(found['serial_ceiling_tok_s'])} if reads did not hide behind arithmetic); "
            f"{format_bytes(found['read_bytes'])} of layers read per token",
        ))  # fmt: skip
    return rows


def _disk_row(disk: dict[str, Any]) -> Row:
    if "error" in disk:
        return "disk reads", f"not measured, so nothing is predicted: {disk['error']}"
    return (
        "disk reads",
        f"{format_bytes(disk['bytes_s'])}/s measured now on this file, "
        f"{disk['queue_depth']} at a time{_CACHE_NOTES[disk['cache']]}",
    )


def _speed(tok_s: float) -> str:
    """Print tokens per second with a digit behind the point, two below one."""
    return f"{tok_s:.{1 if tok_s >= 1 else 2}f}"
