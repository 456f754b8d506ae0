"""`edgeroute pull`: bring a model's file, verified, with progress on standard error."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgeroute.commands.progress import byte_bars
from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.models.sources import PullProgress

_EPILOG = """\b
Examples:
  edgeroute pull
  edgeroute pull qwen2.5-coder-0.5b-instruct
  edgeroute pull hf:ggml-org/gemma-3-1b-it-GGUF/gemma-3-1b-it-Q4_K_M.gguf
"""


@click.command(epilog=_EPILOG)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--force", is_flag=True, help="Download again even if the file is here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def command(model: str, force: bool, as_json: bool) -> None:
    """Download MODEL and check its hash; a broken download resumes.

    MODEL is a catalogue name (see `edgeroute models`), hf:owner/repo/file.gguf[@revision], or
    the path of a file to hash. Without MODEL the default one is pulled. EDGEROUTE_MODELS names
    the folder that keeps the files.
    """
    from edgeroute.models.pull import pull

    with progress_on_stderr() as report:
        try:
            result = pull(model, progress=report, force=force)
        except KeyboardInterrupt:
            click.echo(f"stopped; `edgeroute pull {model}` resumes where it was", err=True)
            raise
    if as_json:
        answer = asdict(result) | {"name": model, "path": str(result.path)}
        click.echo(json.dumps(answer))
        return
    verb = "already here" if result.cached else f"pulled from {result.source}"
    click.echo(f"{model}: {verb}, {format_bytes(result.n_bytes)}, sha256 {result.sha256}")
    click.echo(str(result.path))


@contextmanager
def progress_on_stderr() -> "Iterator[Callable[[PullProgress], None]]":
    """A progress callback for `pull`: a bar on a terminal, a line every tenth elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    with byte_bars() as bar:
        tasks = {}

        def report(step: "PullProgress") -> None:
            if step.message:
                bar.console.print(step.message, markup=False, highlight=False)
                return
            if step.phase not in tasks:
                tasks[step.phase] = bar.add_task(f"{step.phase:<8}", total=step.n_total)
            bar.update(tasks[step.phase], completed=step.n_done, total=step.n_total)

        yield report


class _Lines:
    """Progress for a log: messages as they come, and a line at each tenth of a phase."""

    def __init__(self) -> None:
        self._tenth: tuple[str, int] = ("", -1)

    def __call__(self, step: "PullProgress") -> None:
        if step.message:
            click.echo(step.message, err=True)
            return
        tenth = (step.phase, 10 * step.n_done // max(1, step.n_total))
        if tenth == self._tenth or (step.phase == "verify" and step.n_done < step.n_total):
            return
        self._tenth = tenth
        percent = 100 * step.n_done // max(1, step.n_total)
        done, total = format_bytes(step.n_done), format_bytes(step.n_total)
        click.echo(f"{step.phase} {step.name}: {percent} % ({done} of {total})", err=True)
