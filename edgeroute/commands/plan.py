"""`edgeroute plan`: whether a model fits, and how fast it could be, before loading it."""

import json
from typing import TYPE_CHECKING, Any

import click

from edgeroute.cli import EXIT_CAPACITY
from edgeroute.commands.doctor_table import Row, show
from edgeroute.commands.generate_shared import SETTINGS, pick
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.commands.plan_model import ModelPlan

_EPILOG = """\b
Examples:
  edgeroute plan smollm2-135m-instruct
  edgeroute plan qwen2.5-coder-1.5b-instruct --memory 2GiB --n-ctx 8192
  edgeroute plan ./model.gguf --memory 1GiB --json || echo "does not fit"
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.option("--memory", metavar="BYTES", help="Budget, such as 2GiB; without it what is free, "
              "less a reserve.")  # fmt: skip
@click.option("--n-ctx", type=int, metavar="N", help="Context length.  [default: 4096]")
@click.option("--kv-type", metavar="TYPE", help="f16 or q8_0.  [default: f16]")
@click.option("--threads", "-t", type=int, metavar="N", help="Threads to predict for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def command(ctx: click.Context, /, model: str, as_json: bool, **given: Any) -> None:
    """Say what MODEL takes, by part, and whether that fits the budget.

    Only the file's header is read. The predicted speed is a ceiling: the bytes that one
    token reads over the memory bandwidth measured now. Ends with code 4 when it does not
    fit, naming the smallest budget that would do and the longest context that would fit.
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
    hparams, total = plan.hparams, plan.memory.total_bytes
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
        "parts": plan.memory.wants(),
        "total_bytes": total,
        "budget_bytes": plan.budget_bytes,
        "available_bytes": plan.available.available_bytes,
        "memory_limit": plan.available.limit,
        "verdict": "FITS" if plan.fits else "REFUSED",
        "smallest_budget_bytes": total,
        "largest_n_ctx": plan.largest_n_ctx,
        "weight_read_bytes": plan.weight_read_bytes,
        "kv_bytes_per_token": plan.kv_cell_bytes,
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
    total, budget = found["total_bytes"], found["budget_bytes"]
    show("Memory", [
        *((part, format_bytes(n)) for part, n in found["parts"].items()),
        ("total", f"{format_bytes(total)} at n_ctx={found['n_ctx']}, KV {found['kv_type']}"),
        ("budget", format_bytes(budget)),
        ("available now", f"{format_bytes(found['available_bytes'])} ({found['memory_limit']})"),
        ("verdict", _verdict(found)),
        *_advice(found),
    ])  # fmt: skip
    show("Decode", _decode(found))


def _verdict(found: dict[str, Any]) -> str:
    total, budget = found["total_bytes"], found["budget_bytes"]
    if found["verdict"] == "FITS":
        return f"FITS, {format_bytes(budget - total)} to spare"
    return f"REFUSED, {format_bytes(total - budget)} too much"


def _advice(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    longest = found["largest_n_ctx"]
    if found["verdict"] == "REFUSED":
        mib = -(-found["smallest_budget_bytes"] // (1 << 20))
        rows.append(("smallest budget", f"--memory {mib}MiB"))
        context = "none fits" if longest is None else f"--n-ctx {longest}"
        rows.append(("longest context", f"{context} within this budget"))
    else:
        trained = ", all it was trained on" if longest == found["n_ctx_train"] else ""
        rows.append(("longest context", f"--n-ctx {longest}{trained}"))
    if found["budget_bytes"] > found["available_bytes"]:
        rows.append(("warning", "the budget is more than what is available now"))
    return rows


def _decode(found: dict[str, Any]) -> list[Row]:
    decode = found["decode"]
    full = decode["ceiling_tok_s_full_context"]
    return [
        ("read per token", f"{format_bytes(found['weight_read_bytes'])} of weights and "
                           f"{format_bytes(found['kv_bytes_per_token'])} for each token before it"),
        ("memory reads", f"{format_bytes(decode['bandwidth_bytes_s'])}/s measured now, by "
                         f"{decode['threads']} threads"),
        ("predicted", f"at most {decode['ceiling_tok_s']:.1f} tok/s, {full:.1f} with a full "
                      "context (a ceiling: arithmetic comes on top)"),
    ]  # fmt: skip
