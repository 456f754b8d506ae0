"""`edgeroute convert`: model files made from model files."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeroute.commands import convert_moe
from edgeroute.commands.progress import byte_bars
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.tools.convert.page_order import Ordered

_PACK_EXAMPLES = """\b
Examples:
  edgeroute convert pack olmoe-1b-7b.gguf
  edgeroute generate -m olmoe-1b-7b.gguf --memory 2GiB --prefetch off --trace routes.trace "..."
  edgeroute convert pack olmoe-1b-7b.gguf --order routes.trace --force --json
"""
_COPIES_EXAMPLES = """\b
Examples:
  edgeroute convert copies olmoe-1b-7b.gguf --type Q3_K
  edgeroute bench misses --model olmoe-1b-7b.gguf --memory 2GiB
  edgeroute generate -m olmoe-1b-7b.gguf --memory 2GiB --degrade-misses 0.4 "..."
"""

_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")


@click.group(epilog=_PACK_EXAMPLES + _COPIES_EXAMPLES.partition("Examples:\n")[2])
def command() -> None:
    """Rewrite models for this engine."""


command.add_command(convert_moe.command, "moe")


@command.command(epilog=_PACK_EXAMPLES)
@click.argument("model")
@click.option("--order", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="A trace of this model: experts that are missing together lie together. Or a "
              "JSON list of pages, layer × experts + expert, that come first.")  # fmt: skip
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

    path = resolve(model)
    traced = None if order is None or not _is_trace(order) else _order_by(order, path)
    pages = [] if order is None else _read_order(order) if traced is None else traced.pages
    with _progress_on_stderr("pack") as progress:
        report = write(path, order=pages, replace=replace, progress=progress)
    if as_json:
        found = {name: getattr(report, name) for name in report.__slots__}
        found |= {"path": str(report.path), "reads": None if traced is None else traced.to_dict()}
        click.echo(json.dumps(found))
        return
    sizes = " or ".join(format_bytes(n) for n in report.page_bytes)
    click.echo(
        f"{report.path}: {format_bytes(report.n_bytes)}, {report.n_layer} layers of "
        f"{report.n_expert} experts, {sizes} each, in {report.seconds:.0f} s"
    )


@command.command(epilog=_COPIES_EXAMPLES)
@click.argument("model")
@click.option("--type", "kind", metavar="NAME", type=click.Choice(_TYPES),
              help=f"Type of the copies: {', '.join(_TYPES)}.  [default: the best of at most 60 % "
              "of an expert's bytes]")  # fmt: skip
@click.option("--force", "replace", is_flag=True, help="Replace copies that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def copies(model: str, kind: str | None, replace: bool, as_json: bool) -> None:
    """Write copies of the experts of MODEL in fewer bits into MODEL.copies, beside it.

    With `--degrade-misses`, a token reads these instead of experts that are not in memory and
    weigh little in its layer. That changes answers: `edgeroute bench misses` says by how much.
    """
    import os

    from edgeroute.models.pull import resolve
    from edgeroute.runtime.gguf_types import GGMLType
    from edgeroute.tools.convert.copies import write_copies

    wanted = None if kind is None else GGMLType[kind]
    with _progress_on_stderr("copies") as progress:
        report = write_copies(resolve(model), kind=wanted, replace=replace, progress=progress,
                              n_threads=os.cpu_count() or 1)  # fmt: skip
    written = report.pack
    if as_json:
        click.echo(json.dumps({
            "path": str(written.path), "n_layer": written.n_layer, "n_expert": written.n_expert,
            "n_bytes": written.n_bytes, "types": report.types, "ratio": report.ratio,
            "seconds": written.seconds,
        }))  # fmt: skip
        return
    click.echo(
        f"{written.path}: {format_bytes(written.n_bytes)}, {report.ratio:.0%} of the experts' own, "
        f"in {', '.join(report.types)}, in {written.seconds:.0f} s"
    )


def _is_trace(path: Path) -> bool:
    from edgeroute.offload.trace import MAGIC

    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise UsageError(f"cannot read the order of pages from {path}: {error}") from error


def _order_by(trace: Path, model: Path) -> "Ordered":
    """Order pages by a trace, and say what reads that spares."""
    from edgeroute.tools.convert.page_order import order_by

    found = order_by(trace, model)
    click.echo(found.to_text(), err=True)
    return found


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
def _progress_on_stderr(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback: a bar on a terminal, a line every tenth elsewhere."""
    if not sys.stderr.isatty():
        yield _Tenths(what)
        return
    with byte_bars() as bar:
        task = bar.add_task(what, total=None)
        yield lambda n_done, n_total: bar.update(task, completed=n_done, total=n_total)


class _Tenths:
    """Progress for a log."""

    def __init__(self, what: str) -> None:
        self._what, self._tenth = what, 0

    def __call__(self, n_done: int, n_total: int) -> None:
        if 10 * n_done // n_total > self._tenth:
            self._tenth = 10 * n_done // n_total
            click.echo(f"{self._what}: {format_bytes(n_done)} of {format_bytes(n_total)}", err=True)
