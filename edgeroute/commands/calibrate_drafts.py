"""`edgeroute calibrate --drafts`: bridges over the layers that stream."""

import json
from typing import TYPE_CHECKING, Any, Final

import click

from edgeroute.commands.progress import steps_on_stderr
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.tools.calibrate_drafts import DraftsReport

SHARED: Final = frozenset({"model", "drafts", "files", "budget_minutes", "threads", "out",
                           "as_json"})  # fmt: skip
"""Options, by parameter, that mean something with --drafts."""


def check(ctx: click.Context) -> None:
    """Refuse options that do not go with --drafts.

    Raises:
        UsageError: it names the option.
    """
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in SHARED:
            raise click.UsageError(f"{param.opts[0]} does not go with --drafts; leave it out", ctx)


def calibrate_model(model: str, options: dict[str, Any], *, as_json: bool) -> None:
    """Calibrate the drafts of a model and say what was found.

    Args:
        model: its name or path.
        options: the command's options by parameter.
        as_json: print one JSON object last.
    """
    from edgeroute.models.pull import resolve
    from edgeroute.runtime import machine
    from edgeroute.tools.calibrate_drafts import DraftsParams, calibrate_drafts

    params = DraftsParams(
        files=options["files"], budget_minutes=options["budget_minutes"], out=options["out"],
        threads=options["threads"] or machine.usable_cores(),
    )  # fmt: skip
    with steps_on_stderr() as progress:
        report = calibrate_drafts(resolve(model), params, progress)
    _show(report)
    if as_json:
        click.echo(json.dumps(report.to_dict()))


def _show(report: "DraftsReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.model}: bridges, {report.n_guesses} first guesses each",
                  show_edge=False)  # fmt: skip
    for name in ("layers crossed", "unexplained", "right", "right without"):
        table.add_column(name, justify="right")
    for each in report.bridges:
        shares = ("" if share is None else f"{share:.1%}"
                  for share in (each.right, each.right_without))  # fmt: skip
        table.add_row(f"{each.first} to {each.end - 1}", f"{each.error:.3f}", *shares)
    Console().print(table)
    click.echo(f"{report.path}: {format_bytes(report.n_bytes)}, fitted to {report.n_fitted} "
               f"tokens in {report.seconds / 60:.1f} min; {report.n_trained} trained")  # fmt: skip
    if report.untrained_because:
        click.echo(f"bridges were fitted, not trained: {report.untrained_because}")
