"""`edgeroute calibrate --steps`: what routing the steps of answers is worth for a pair."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from edgeroute.commands.progress import steps_on_stderr
from edgeroute.runtime.errors import UsageError

if TYPE_CHECKING:
    from edgeroute.tools.step_report import StepsReport
    from edgeroute.tools.step_tasks import Task

Command = TypeVar("Command", bound=Callable[..., Any])

_FILE = click.Path(dir_okay=False, path_type=Path)
_OPTIONS: Final = (
    click.option("--steps", "pair", nargs=2, metavar="SMALL LARGE", help="Measure instead what "
                 "policies of step routing are worth for a pair of models: accuracy, seconds and "
                 "the large model's share, on tasks with exact answers."),
    click.option("--tasks", type=_FILE, help="With --steps: JSON lines of tasks, each with "
                 "`prompt` or `messages`, `answer`, and optionally `form` (exact, last_line or "
                 "contains) and `max_tokens`. Default: our own questions, reasoned in steps."),
    click.option("--target-accuracy", type=click.FloatRange(0, 1, min_open=True), metavar="R",
                 help="With --steps: accuracy that a policy should keep, as a share of the large "
                 "model's. [default: 0.95]"),
    click.option("--n", "n_tasks", type=click.IntRange(8, 1000), metavar="N",
                 help="With --steps: how many tasks. [default: 60]"),
    click.option("--memory", metavar="BYTES", help="With --steps: budget over both models, such "
                 "as 2GiB; without it what is free, less a reserve."),
    click.option("--html", type=_FILE, help="With --steps: also draw the table as a page."),
)  # fmt: skip
NAMES: Final = frozenset({"tasks", "target_accuracy", "n_tasks", "memory", "html"})
"""Options, by parameter, that mean something only with --steps."""
SHARED: Final = frozenset({"model", "pair", "budget_minutes", "threads", "out", "as_json"})
TARGET, N_TASKS = 0.95, 60


def step_options(command: Command) -> Command:
    """Add the options of step routing to `calibrate`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check(ctx: click.Context, model: str | None, pair: tuple[str, str] | None) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: it names the option and what to do.
    """
    source = click.core.ParameterSource
    given = {
        param.name: param.opts[0] for param in ctx.command.params
        if param.name and ctx.get_parameter_source(param.name) is source.COMMANDLINE
    }  # fmt: skip
    if pair is None:
        if model is None:
            raise click.UsageError("give a MODEL, or two by --steps SMALL LARGE", ctx)
        for name in sorted(given.keys() & NAMES):
            raise click.UsageError(f"{given[name]} needs --steps SMALL LARGE", ctx)
        return
    if model is not None:
        raise click.UsageError(f"--steps takes its two models itself; leave {model!r} out", ctx)
    for name in sorted(given.keys() - NAMES - SHARED):
        raise click.UsageError(f"{given[name]} calibrates the layers of one model; leave it out "
                               "with --steps", ctx)  # fmt: skip


def calibrate_pair(pair: tuple[str, str], given: dict[str, Any], *, as_json: bool) -> None:
    """Calibrate a pair and say what was found.

    Args:
        pair: names or paths of the small and the large model.
        given: the command's options by parameter.
        as_json: print one JSON object last.
    """
    from edgeroute.models.pull import resolve
    from edgeroute.steps_file import place_steps_file
    from edgeroute.tools.step_calibrate import CalibrateStepsParams, calibrate_steps
    from edgeroute.tools.step_pair import ModelFiles

    small, large = (resolve(name) for name in pair)
    params = CalibrateStepsParams(
        out=given["out"] or place_steps_file(large, small),
        target=given["target_accuracy"] or TARGET, budget_minutes=given["budget_minutes"],
    )  # fmt: skip
    if given["html"] is not None:
        _check_place(given["html"])
    tasks = _tasks(given)
    models = ModelFiles(small=small, large=large, memory=given["memory"], threads=given["threads"])
    with steps_on_stderr() as progress:
        report = calibrate_steps(models, tasks, params, progress)
    _show(report)
    if given["html"] is not None:
        _write_page(given["html"], report)
    if as_json:
        click.echo(json.dumps(report.to_dict()))


def _tasks(given: dict[str, Any]) -> "list[Task]":
    from edgeroute.tools.step_tasks import own_tasks, read_tasks

    n = given["n_tasks"] or N_TASKS
    return own_tasks(n) if given["tasks"] is None else read_tasks(given["tasks"], n)


def _show(report: "StepsReport") -> None:
    from rich.console import Console

    from edgeroute.tools.step_report import to_table

    Console().print(to_table(report))
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"{report.path}: in {report.seconds / 60:.1f} min")
    click.echo(report.verdict)


def _check_place(path: Path) -> None:
    """Refuse a page that could not be written now, not after an hour's work.

    Raises:
        UsageError: its folder is not there.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--html {path}: there is no folder {path.parent}; make it, or name "
                         "another file")  # fmt: skip


def _write_page(path: Path, report: "StepsReport") -> None:
    from edgeroute.tools.step_report import to_html

    try:
        path.write_text(to_html(report), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path}: {error.strerror or error}") from error
    click.echo(f"{path}: the same as a page")
