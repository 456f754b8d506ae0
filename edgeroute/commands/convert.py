"""`edgeroute convert`: model files made from model files."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from edgeroute.commands import convert_moe
from edgeroute.commands.progress import byte_bars
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes

_EPILOG = """\b
Examples:
  edgeroute convert pack olmoe-1b-7b.gguf
  edgeroute convert pack olmoe-1b-7b.gguf --order pages.json --force --json
"""


@click.group(epilog=_EPILOG)
def command() -> None:
    """Rewrite models for this engine."""


command.add_command(convert_moe.command, "moe")


@command.command(epilog=_EPILOG)
@click.argument("model")
@click.option("--order", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="JSON list of pages, layer × experts + expert, that come first.")  # fmt: skip
@click.option("--force", "replace", is_flag=True, help="Replace the sidecar if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def pack(model: str, order: Path | None, replace: bool, as_json: bool) -> None:
    """Write the experts of MODEL side by side into MODEL.pages, beside it.

    A GGUF keeps the three matrices of an expert far apart, and a paged model reads them in
    three places. With the sidecar beside it, it reads one, where that is fewer reads of the
    length that the disk likes (setting `sidecar`): small experts gain, and disks on which each
    read costs time. The model itself stays as it is, and is still needed; the sidecar takes
    about as much room as its experts do.
    """
    from edgeroute.models.pull import resolve
    from edgeroute.tools.convert.pack import pack as write

    pages = [] if order is None else _read_order(order)
    with _progress_on_stderr() as progress:
        report = write(resolve(model), order=pages, replace=replace, progress=progress)
    if as_json:
        found = {name: getattr(report, name) for name in report.__slots__}
        click.echo(json.dumps(found | {"path": str(report.path)}))
        return
    sizes = " or ".join(format_bytes(n) for n in report.page_bytes)
    click.echo(
        f"{report.path}: {format_bytes(report.n_bytes)}, {report.n_layer} layers of "
        f"{report.n_expert} experts, {sizes} each, in {report.seconds:.0f} s"
    )


def _read_order(path: Path) -> list[int]:
    """Read a list of pages.

    Raises:
        UsageError: the file cannot be read, or is no list of whole numbers.
    """
    try:
        pages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the order of pages from {path}: {error}") from error
    if not isinstance(pages, list) or any(type(page) is not int for page in pages):
        raise UsageError(f"{path} is not a JSON list of whole numbers, which an order of pages is")
    return pages


@contextmanager
def _progress_on_stderr() -> Iterator[Callable[[int, int], None]]:
    """A callback: a bar on a terminal, a line every tenth elsewhere."""
    if not sys.stderr.isatty():
        yield _Tenths()
        return
    with byte_bars() as bar:
        task = bar.add_task("pack", total=None)
        yield lambda n_done, n_total: bar.update(task, completed=n_done, total=n_total)


class _Tenths:
    """Progress for a log."""

    def __init__(self) -> None:
        self._tenth = 0

    def __call__(self, n_done: int, n_total: int) -> None:
        if 10 * n_done // n_total > self._tenth:
            self._tenth = 10 * n_done // n_total
            click.echo(f"pack: {format_bytes(n_done)} of {format_bytes(n_total)}", err=True)
