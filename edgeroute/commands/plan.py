"""`edgeroute plan`: whether a model fits, and how fast it would be, before it is downloaded."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeroute.cli import EXIT_CAPACITY
from edgeroute.commands.generate_shared import SETTINGS, pick
from edgeroute.commands.plan_rows import print_plan
from edgeroute.runtime.errors import CatalogueError
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.commands.plan_forecast import Foreseen, Where
    from edgeroute.config import RunParams
    from edgeroute.runtime.gguf import GGUFFile
    from edgeroute.tools.forecast.plan import ExpertSlots, Paging
    from edgeroute.tools.forecast.plan_layers import Streaming

_EPILOG = """\b
Examples:
  edgeroute plan smollm2-135m-instruct
  edgeroute plan qwen2.5-coder-1.5b-instruct --memory 2GiB --n-ctx 8192
  edgeroute plan hf:owner/repository/mixture-Q4_K_M.gguf --memory 6GiB
  edgeroute plan hf:owner/repository/model.gguf --device orin-nano-8gb --power-mode 15W
  edgeroute plan ./mixture-of-experts.gguf --memory 2GiB --trace routes.trace
  edgeroute plan qwen2.5-coder-1.5b-instruct --on cuda0,rpc:192.168.1.20:50052
  edgeroute plan qwen2.5-coder-1.5b-instruct --small qwen2.5-coder-0.5b-instruct --memory 940MiB
  edgeroute plan ./model.gguf --memory 1GiB --json || echo "does not fit"
"""


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
@click.option("--small", metavar="NAME", help="Plan it with this smaller model beside it, under "
              "one budget.")  # fmt: skip
@click.option("--steps", metavar="WHO", help="With --small: off where it only drafts, which needs "
              "one vocabulary.  [default: auto]")  # fmt: skip
@click.option(
    "--device",
    "on",
    metavar="NAME",
    help="Forecast for this device, or the one in "
    "a .toml file, instead of this machine; `list` names them.",
)
@click.option("--on", "device", metavar="NAMES", help="Also say what would go where on these "
              "devices of this machine or others: see --device of `edgeroute serve`.")  # fmt: skip
@click.option("--device-memory", metavar="BYTES", help="Of --on: what may be used of each.")
@click.option("--power-mode", "mode", metavar="NAME", help="One of the device's power modes.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Routes of this model, see `edgeroute profile`: hit rates are then replayed, "
    "not taken from models like it.",
)
@click.option(
    "--prompt-tokens",
    "n_prompt",
    type=click.IntRange(1, 1 << 20),
    default=512,
    show_default=True,
    help="Length of the prompt whose first token is forecast.",
)
@click.option("--fresh", is_flag=True, help="Measure this machine again (some seconds).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def command(ctx: click.Context, /, model: str, as_json: bool, **given: Any) -> None:
    """Say whether MODEL fits, by part, and how fast it would be, before it is downloaded.

    MODEL may be a catalogue name, a .gguf file or hf:owner/repository/file.gguf. Only its
    header is read, and of a file that is not here only the header is fetched. The verdict is
    FITS, PAGES (experts or layers come from the disk as they are needed) or REFUSED, with the
    smallest budget that would do and the longest context that would fit.

    Speeds are forecast from what this machine was measured to reach: the first time that takes
    some seconds, then it is remembered for a month. For a --device they are computed from
    its stated figures. How often an expert is found in memory is taken from a trace of the
    model where one is given, else from published figures of models like it, with a wide range.

    With --small, both models' bytes are told by part: all of the small one is in memory, and the
    large one is whole, paged or refused within what is left. What steps of both would bring is
    forecast from what their passes take.

    Ends with code 4 when it does not fit.
    """
    if given["on"] == "list":
        return _list_devices(as_json)
    from edgeroute.commands.plan_forecast import Where, foresee
    from edgeroute.config import merge_settings

    params = merge_settings(pick(given, SETTINGS))
    where = Where(device=given["on"], mode=given["mode"], trace=given["trace"],
                  fresh=given["fresh"], n_prompt=given["n_prompt"])  # fmt: skip
    with _header(model) as header:
        here = replace(params, device="cpu")  # forecasts are of processors
        if params.small is not None:
            if given["device"] is not None:
                raise click.UsageError("--on places one model; leave it out, or --small")
            found = _pair(model, header, here, where)
        else:
            found = _facts(model, header, foresee(header.file, here, where, _measuring))
            found |= _on_devices(header, params, given["device"])
    if as_json:
        click.echo(json.dumps(found))
    else:
        print_plan(found)
    if not found["fits"]:
        ctx.exit(EXIT_CAPACITY)


def _measuring(line: str) -> None:
    click.echo(f"measuring {line}", err=True)


def _pair(model: str, header: "_Header", params: "RunParams", where: "Where") -> dict[str, Any]:
    """Plan a model with the small one that `params` names beside it."""
    from edgeroute.commands.plan_pair import foresee_pair, pair_facts

    name = str(params.small)
    with _header(name) as small:
        files = header.file, small.file
        seen = foresee_pair(*files, params, where, _measuring)
        facts = _facts(model, header, seen.large), _facts(name, small, seen.small)
        return pair_facts(*facts, seen, files)


def _on_devices(header: "_Header", params: "RunParams", names: str | None) -> dict[str, Any]:
    """Add what would go where, if that was asked."""
    if names is None:
        return {}
    from edgeroute.commands.plan_devices import plan_on

    return {"on": plan_on(header.file, params, whole=header.source["kind"] == "file")}


@dataclass(frozen=True, slots=True)
class _Header:
    """A model's header, and how it was come by."""

    file: "GGUFFile"
    source: dict[str, Any]


@contextlib.contextmanager
def _header(model: str) -> "Iterator[_Header]":
    """Open a file that is here, or fetch the header of one that is not."""
    from edgeroute.models.pull import resolve
    from edgeroute.models.remote_header import fetch_header, is_remote
    from edgeroute.runtime.gguf import GGUFFile

    try:
        path = resolve(model)
    except CatalogueError as error:
        if not is_remote(model):
            raise
        absent = error
    else:
        with GGUFFile.open(path) as file:
            yield _Header(file, {"kind": "file", "path": str(path), "size_bytes": file.size_bytes})
        return
    try:
        found = fetch_header(model)
    except CatalogueError as error:
        raise CatalogueError(f"{absent}; its header cannot be fetched either: {error}") from error
    click.echo(f"fetched {format_bytes(found.n_fetched)} of {found.spec}, its header", err=True)
    with found.file as file:
        yield _Header(file, {
            "kind": "header", "path": None, "size_bytes": file.size_bytes,
            "fetched_bytes": found.n_fetched, "n_ranges": found.n_ranges,
        })  # fmt: skip


def _list_devices(as_json: bool) -> None:
    """Name the devices that forecasts can be made for."""
    from edgeroute.tools.forecast.devices import load_devices

    devices = load_devices()
    if as_json:
        click.echo(json.dumps({name: asdict(each) for name, each in devices.items()}))
        return
    width = max(map(len, devices))
    for name, each in devices.items():
        modes = ", ".join(mode.name for mode in each.power_modes)
        click.echo(f"{name:<{width}}  {each.title}{f'; power modes {modes}' if modes else ''}")


def _facts(model: str, header: _Header, seen: "Foreseen") -> dict[str, Any]:
    plan = seen.plan
    hparams, parts = plan.hparams, plan.parts
    return {
        "model": model,
        "source": header.source,
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
        "verdict": seen.forecast.verdict,
        "pages": seen.forecast.pages,
        "smallest_budget_bytes": plan.smallest_budget_bytes,
        "largest_n_ctx": plan.largest_n_ctx,
        "weight_read_bytes": plan.weight_read_bytes,
        "kv_bytes_per_token": plan.kv_cell_bytes,
        "experts": None if plan.paging is None else _experts_facts(plan.paging),
        "slots": None if plan.slots is None else _slots_facts(plan.slots),
        "layers": None if plan.streaming is None else _layers_facts(plan.streaming),
        "machine": seen.speeds.name,
        "machine_notes": list(seen.speeds.notes),
        "forecast": asdict(seen.forecast),
    }


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
