"""`edgeroute profile`: what a model's routes and pages say of the memory that it needs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeroute.cli import EXIT_INTERRUPTED
from edgeroute.commands.doctor_table import show
from edgeroute.runtime.extras import check_extra

if TYPE_CHECKING:
    from edgeroute.commands.profile_work import Outcome
    from edgeroute.tools.profile.prompts import Prompt

_EPILOG = """\b
Examples:
  edgeroute profile ./qwen3-30b-a3b.gguf --memory 8GiB --html profile.html
  edgeroute profile ./moe.gguf --prompts ./my-prompts --tokens 64 --trace-out moe.trace
  edgeroute profile ./moe.gguf --from-trace moe.trace --export routes.parquet
  edgeroute profile ./moe.gguf --from-trace moe.trace --device orin-nano-8gb
  edgeroute profile --compare before.trace after.trace
"""
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("model", required=False)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Your own prompts: text with lines of --- between them, JSON, JSON lines, or "
    "a folder of such files, each a domain. Default: 21 bundled ones of 9 domains.",
)
@click.option(
    "--tokens",
    "-n",
    default=32,
    show_default=True,
    type=click.IntRange(2, 4096),
    help="Tokens to decode after each prompt.",
)
@click.option(
    "--chat/--raw",
    "chat",
    default=None,
    help="Send prompts as chat messages, or "
    "continue them as text.  [default: chat if the model has a template]",
)
@click.option(
    "--memory",
    metavar="BYTES",
    help="Budget over everything, such as 2GiB; without "
    "it what is free, or less, so that experts are paged and seen.",
)
@click.option("--n-ctx", type=int, metavar="N", help="Context length.  [default: 4096]")
@click.option(
    "--threads",
    "-t",
    type=int,
    metavar="N",
    help="Compute threads; without it measured while decoding.",
)
@click.option(
    "--policy",
    metavar="NAME",
    help="Which expert leaves when another needs its room.  [default: auto]",
)
@click.option(
    "--prefetch",
    metavar="WHEN",
    help="Read experts ahead: auto, off, or a predictor.  [default: auto]",
)
@click.option(
    "--trace-out",
    type=_FILE,
    metavar="FILE",
    help="Keep the trace: every token's experts, and what each step cost.",
)
@click.option(
    "--from-trace",
    type=_FILE,
    metavar="FILE",
    help="Analyse a trace that is there; "
    "nothing is run. Without MODEL beside it, budgets are unknown.",
)
@click.option("--export", type=_FILE, metavar="FILE", help="Write the routes as .csv or .parquet.")
@click.option(
    "--html", type=_FILE, metavar="FILE", help="Write the report, one page that needs no network."
)
@click.option("--png", type=_FOLDER, metavar="DIR", help="Write its plots as pictures.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="Also forecast speed and energy on this kind of machine; may repeat. `here` is this "
    "one, `edgeroute plan MODEL --device list` names the others.",
)
@click.option(
    "--emulate", is_flag=True,
    help="Also run MODEL here with a --device's memory (a control group of the kernel) and "
    "drive (reads are delayed), and compute the rest.",
)  # fmt: skip
@click.option("--power-mode", metavar="NAME", help="Of the devices, such as 15W.")
@click.option(
    "--compare",
    nargs=2,
    type=_FILE,
    metavar="A B",
    help="Compare two traces, or two profiles written by --json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last: the profile.")
@click.pass_context
def command(ctx: click.Context, /, model: str | None, as_json: bool, **given: Any) -> None:
    """Say how much memory MODEL's experts need, and which policy suits them.

    Prompts of several domains are answered (greedily), and every token's choice of experts is
    recorded. From that trace come: the hit rate at every size of memory, by policy and beside
    the optimum (Belady); how local routing is (SRP, SCH, reuse, working set); how unequally
    experts are used, and whether domains share them; what prefetch could name; and a budget.

    A model that would fit is given less memory, so that its experts are paged and can be seen.
    For a model without experts: its speed, its reads per token, and a forecast.

    Ctrl-C ends the recording; what came until then is analysed.
    """  # fmt: skip
    _check(model, given)
    if given["compare"] is not None:
        _compare(given["compare"], as_json=as_json)
        return
    _check_outputs(given)
    outcome = _work(model, given)
    for title, rows in outcome.sections():
        show(title, rows)
    if as_json:
        click.echo(json.dumps(outcome.to_dict()))
    if outcome.interrupted:
        ctx.exit(EXIT_INTERRUPTED)


def _check(model: str | None, given: dict[str, Any]) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        UsageError: the message names the options.
    """
    if given["compare"] is not None:
        others = [
            _flag(name)
            for name in ("from_trace", "trace_out", "html", "png", "export", "prompts")
            if given[name] is not None
        ]
        if model is not None or others or given["devices"] or given["emulate"]:
            raise click.UsageError("--compare A B takes two files and, but --json, nothing else")
        return
    if given["from_trace"] is None and model is None:
        raise click.UsageError("name a MODEL to run, or a recorded trace by --from-trace")
    if given["from_trace"] is not None:
        wrong = [_flag(name) for name in ("trace_out", "prompts") if given[name] is not None]
        if wrong:
            raise click.UsageError(f"--from-trace runs nothing: leave {' and '.join(wrong)} out")
        if given["devices"] and model is None:
            raise click.UsageError("--device forecasts a model: name MODEL beside --from-trace")
    for option in ("power_mode", "emulate"):
        if given[option] and not given["devices"]:
            raise click.UsageError(f"{_flag(option)} is of a --device; name one")
    export = given["export"]
    if export is not None and export.suffix not in (".csv", ".parquet"):
        raise click.UsageError(f"--export {export}: the name must end in .csv or .parquet")
    _check_settings(given)
    _check_devices(given["devices"], given["power_mode"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_settings(given: dict[str, Any]) -> None:
    from edgeroute.commands.profile_work import SETTINGS
    from edgeroute.config import merge_settings

    merge_settings({name: given[name] for name in SETTINGS if given[name] is not None})


def _check_devices(names: tuple[str, ...], mode: str | None) -> None:
    from edgeroute.commands.profile_work import HERE
    from edgeroute.tools.forecast.devices import find_device, find_mode

    for name in names:
        if name != HERE:
            device = find_device(name)
            if mode is not None:
                find_mode(device, mode)


def _check_outputs(given: dict[str, Any]) -> None:
    """Look at every file that is to be written now, not after minutes."""
    for name in ("html", "export", "trace_out"):
        path: Path | None = given[name]
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            why = "it is a folder" if path.is_dir() else "there is no such folder"
            raise click.UsageError(f"{_flag(name)} {path}: {why}")
    _check_extras(given)


def _check_extras(given: dict[str, Any]) -> None:
    """Ask for what pictures and Parquet need before a model is loaded for them."""
    if given["png"] is not None:
        check_extra("--png", "resvg_py")
    if str(given["export"]).endswith(".parquet"):
        check_extra("--export to Parquet", "pyarrow", otherwise="export CSV")


def _work(model: str | None, given: dict[str, Any]) -> "Outcome":
    """Record and analyse, or only analyse."""
    from edgeroute.commands.profile_work import profile_model, profile_trace

    if given["from_trace"] is not None:
        return profile_trace(given["from_trace"], model, given)
    assert model is not None
    return profile_model(model, _prompts(given["prompts"]), given)


def _prompts(path: Path | None) -> "list[Prompt]":
    from edgeroute.tools.profile.prompts import bundled_prompts, read_prompts

    return bundled_prompts() if path is None else read_prompts(path)


def _compare(paths: tuple[Path, Path], *, as_json: bool) -> None:
    from edgeroute.commands.progress import steps_on_stderr
    from edgeroute.tools.profile.compare import compare, read_side

    with steps_on_stderr() as progress:
        found = compare(*(read_side(path, progress) for path in paths))
    for title, rows in found.sections():
        show(title, rows)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
