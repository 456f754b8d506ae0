"""`edgeroute calibrate`: what a model may leave out, measured on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeroute.commands import calibrate_drafts, calibrate_steps
from edgeroute.commands.progress import steps_on_stderr
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.tools.calibrate_report import CalibrateReport

_EPILOG = """\b
Examples:
  edgeroute calibrate qwen2.5-coder-0.5b-instruct
  edgeroute calibrate model.gguf --data notes.txt --data manual.md --max-kl 0.1
  edgeroute calibrate model.gguf --target-speed 1.15 --budget-minutes 20 --json
  edgeroute calibrate --drafts qwen2.5-coder-1.5b-instruct
  edgeroute calibrate --steps qwen2.5-coder-0.5b-instruct qwen2.5-coder-1.5b-instruct \\
      --target-accuracy 0.95 --html steps.html

\b
Stopped with Ctrl-C, it goes on where it was when it is called again in the same way.
"""

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("model", required=False)
@click.option(
    "--data",
    "files",
    multiple=True,
    type=_FILE,
    help="A file of text like what the model will write; repeat for more. Default: the "
    "documentation and the standard library of this Python.",
)
@click.option(
    "--target-speed",
    type=click.FloatRange(1, 4, min_open=True),
    metavar="R",
    help="Look for the best plan that decodes R times as fast as the full model.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0, 10, min_open=True),
    metavar="X",
    help="Look for the fastest plan whose divergence is at most X nats per token. [default: 0.05]",
)
@click.option(
    "--budget-minutes",
    default=50.0,
    show_default=True,
    type=click.FloatRange(0, 1 << 16, min_open=True),
    help="About how long it may take; more time means more text and more plans.",
)
@click.option(
    "--fits/--no-fits",
    default=True,
    show_default=True,
    help="Fit small maps that stand in for what is left out.",
)
@click.option(
    "--drafts",
    is_flag=True,
    help="Fit instead what the layers that stay in memory draft with where the others stream.",
)
@click.option("--threads", type=click.IntRange(1, 512), help="Compute threads; default: all cores.")
@click.option(
    "--out", type=_FILE, help="The depth or steps file; default: beside the (large) model."
)
@calibrate_steps.step_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
@click.pass_context
def command(
    ctx: click.Context, /, model: str | None, pair: tuple[str, str] | None, drafts: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure what MODEL may leave out of its layers, and what that costs in quality.

    MODEL is a path or a catalogue name. Each sub-block is left out alone, plans are searched,
    small stand-ins are fitted, and every plan is measured against the full model: divergence
    (KL) and perplexity on text that was kept apart, and decoding speed. The plans and this
    table go into a depth file beside the model, where `depth="auto"` finds them.

    With --drafts, fit bridges over the layers that stream where memory is short: what the
    others draft with then. They go into a drafts file beside the model and are used unasked.

    With --steps SMALL LARGE, measure instead which policy should have the small model write
    steps of the large one's answers; it goes into a steps file, where `steps="auto"` finds it.
    """
    calibrate_steps.check(ctx, model, pair)
    if pair is not None:
        calibrate_steps.calibrate_pair(pair, options, as_json=as_json)
        return
    assert model is not None
    if drafts:
        calibrate_drafts.check(ctx)
        calibrate_drafts.calibrate_model(model, options, as_json=as_json)
        return
    _calibrate_layers(model, options, as_json=as_json)


def _calibrate_layers(model: str, options: dict[str, Any], *, as_json: bool) -> None:
    from edgeroute.models.pull import resolve
    from edgeroute.runtime import machine
    from edgeroute.tools.calibrate import CalibrateParams, calibrate

    options = {name: value for name, value in options.items() if name not in calibrate_steps.NAMES}
    if options["target_speed"] is not None and options["max_kl"] is not None:
        raise UsageError("--target-speed and --max-kl exclude each other: name the one that matters"
                         " more, and read the other off the table")  # fmt: skip
    params = CalibrateParams(**options | {"threads": options["threads"] or machine.usable_cores()})
    with steps_on_stderr() as progress:
        report = calibrate(resolve(model), params, progress)
    _show(report, options["max_kl"], options["target_speed"])
    if as_json:
        click.echo(json.dumps(report.to_dict()))


def _show(report: "CalibrateReport", max_kl: float | None, target_speed: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{report.model}: plans on {report.n_checked} tokens kept apart", show_edge=False
    )
    for name in ("plan", "compute", "speed", "quartiles", "KL, nats", "perplexity", "same top"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for each in report.plans:
        plan, (low, high) = each.plan, each.speed.quartiles
        table.add_row(
            plan.name if each.kept else f"[dim]{plan.name} (not kept)[/dim]",
            f"{plan.compute:.1%}", f"x{plan.speed:.3f}", f"{low:.3f} to {high:.3f}",
            f"{plan.kl:.4f} ± {plan.kl_error:.4f}", f"x{plan.ppl_ratio:.3f}", f"{each.top1:.1%}",
        )  # fmt: skip
    Console().print(table)
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"{report.path}: {format_bytes(report.n_bytes)}, in {report.seconds / 60:.1f} min")
    click.echo(_verdict(report, max_kl, target_speed))


def _verdict(report: "CalibrateReport", max_kl: float | None, target_speed: float | None) -> str:
    """Say which plan is what was asked for; where none is, that the full model is the answer."""
    from edgeroute.skippers.auto import MAX_KL

    best = report.best
    if target_speed is not None:
        if best is None:
            return f"no plan decodes {target_speed:g} times as fast as the full model"
        return f"best at x{target_speed:g} or more: depth={best.name!r}, x{best.speed:.3f}"
    limit = max_kl or MAX_KL
    if best is None:
        return f"no plan is faster and surely within {limit:g} nats: the full model runs"
    return f"fastest within {limit:g} nats: depth={best.name!r}, x{best.speed:.3f}"
