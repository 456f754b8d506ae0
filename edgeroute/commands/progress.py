"""Progress of long work, on standard error: counted steps, and bytes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from rich.progress import Progress


class Report(Protocol):
    """Takes how much of a phase is done; `note` is shown behind the phase or the count."""

    def __call__(self, phase: str, n_done: int, n_total: int, note: str = "") -> None: ...


@contextmanager
def steps_on_stderr() -> Iterator[Report]:
    """A callback for counted work: a bar per phase on a terminal, a line every tenth elsewhere."""
    if not sys.stderr.isatty():
        yield _print_tenths
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(phase: str, n_done: int, n_total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=n_total)
            bar.update(tasks[phase], completed=n_done, description=f"{phase}{note}")

        yield report


def _print_tenths(phase: str, n_done: int, n_total: int, note: str = "") -> None:
    if 10 * n_done // n_total != 10 * (n_done - 1) // n_total:
        click.echo(f"{phase}: {n_done} of {n_total}{note}", err=True)


def byte_bars() -> "Progress":
    """Bars for bytes: how many, how fast, how long yet. A context manager; for a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
