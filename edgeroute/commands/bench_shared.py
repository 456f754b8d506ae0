"""What the benchmarks' commands share: options, finding the model, and the end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeroute.models.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from edgeroute.tools.bench.report import BenchParams, Report

F = TypeVar("F", bound=Callable[..., None])


def examples(name: str, *options: str) -> str:
    """Write a command's examples as the end of its help."""
    lines = [f"  edgeroute bench {name} {option}".rstrip() for option in options]
    return "\b\nExamples:\n" + "\n".join(lines)


def shared(command: F) -> F:
    """Add the options that every benchmark has."""
    for option in reversed((
        click.option("--model", default=DEFAULT_MODEL, show_default=True,
                     help="Catalogue name, or path of a .gguf file."),
        click.option("--threads", type=click.IntRange(1, 512),
                     help="Compute threads of all that is measured; default: the usable cores."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object last."),
    )):  # fmt: skip
        command = option(command)
    return command


def timed(command: F) -> F:
    """Add the options of benchmarks that measure time."""
    for option in reversed((
        shared,
        click.option("--reps", default=5, show_default=True, type=click.IntRange(1, 1000),
                     help="Counted runs of each side, alternating, after one uncounted."),
        click.option("--check", is_flag=True, help="Exit with status 1 if a target is missed."),
    )):  # fmt: skip
        command = option(command)
    return command


tokens = click.option("--tokens", default=128, show_default=True, type=click.IntRange(8, 4096),
                       help="Tokens to decode in one run.")  # fmt: skip


def slowed(command: F) -> F:
    """Add the option that plays a slower disk."""
    option = click.option("--disk-rate", metavar="BYTES", help="Read at most so many bytes a "
                          "second, as from a slower disk: 300MB.")  # fmt: skip
    return option(command)


def phases(*, tokens: int, n_prompt: int, max_s: float, target: float) -> Callable[[F], F]:
    """Add the options of a bench under a memory limit, with their defaults."""
    options = (
        click.option("--tokens", default=tokens, show_default=True, type=click.IntRange(8, 4096),
                     help="Tokens to decode in one run."),
        click.option("--prompt", "n_prompt", default=n_prompt, show_default=True,
                     type=click.IntRange(2, 8192), help="Tokens of a prompt."),
        click.option("--seconds", "max_s", default=max_s, show_default=True,
                     type=click.FloatRange(0.5, 600), help="Longest phase of decoding."),
        click.option("--peer/--no-peer", default=True, show_default=True,
                     help="Measure llama.cpp's mmap as well."),
        click.option("--target", default=target, show_default=True, type=click.FloatRange(0),
                     help="Demanded ratio of decoding speeds."),
    )  # fmt: skip

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def bench_params(options: dict[str, Any]) -> "BenchParams":
    """Find the model, pulled if it is the default one, and say what every benchmark is told."""
    from edgeroute.models.pull import pull, resolve
    from edgeroute.runtime import machine
    from edgeroute.runtime.errors import CatalogueError
    from edgeroute.tools.bench.report import BenchParams

    model = options["model"]
    try:
        path = resolve(model)
    except CatalogueError:
        if model != DEFAULT_MODEL:
            raise
        progress(f"pulling {model}")
        path = pull(model).path
    given = {name: options[name] for name in ("reps", "tokens", "window_s") if name in options}
    return BenchParams(path=path, name=model,
                       threads=options["threads"] or machine.usable_cores(), **given)  # fmt: skip


def progress(line: str) -> None:
    """Show a line of progress."""
    click.echo(line, err=True)


def finish(report: "Report", options: dict[str, Any]) -> None:
    """Print table and JSON; leave with status 1 if a target was missed and that was asked."""
    from edgeroute.tools.bench import report as reports

    reports.show(report)
    if options["as_json"]:
        reports.show_json(report)
    if options["check"] and not report.met:
        raise click.exceptions.Exit(1)
