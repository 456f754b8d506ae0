"""`edgeroute models`: what the catalogue knows, what is installed, and removing it."""

import json
from dataclasses import dataclass

import click

from edgeroute.runtime.units import format_bytes

_EPILOG = """\b
Examples:
  edgeroute models
  edgeroute models --json
  edgeroute models --remove qwen2.5-coder-1.5b-instruct
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One line of the list: a catalogue entry, an installed file, or both."""

    name: str
    architecture: str | None
    licence: str | None
    n_bytes: int
    installed: bool
    path: str | None
    sha256: str | None
    source: str | None
    note: str
    default: bool


@click.command(epilog=_EPILOG)
@click.option("--remove", "removed", metavar="NAME", help="Delete a pulled model's file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def command(removed: str | None, as_json: bool) -> None:
    """List the models that edgeroute knows by name and those that are installed.

    Any other GGUF file works too: name it by its path, or pull it as
    hf:owner/repo/file.gguf.
    """
    from edgeroute.models import store

    folder = str(store.models_folder())
    if removed is not None:
        _remove(removed, as_json)
        return
    rows = _rows()
    if as_json:
        models = [{name: getattr(row, name) for name in row.__slots__} for row in rows]
        click.echo(json.dumps({"folder": folder, "models": models}))
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        state = "installed" if row.installed else "-"
        size, licence = format_bytes(row.n_bytes), row.licence or "see its page"
        line = f"{row.name:<{width}}  {size:>8}  {state:<9}  {licence:<12}  {row.note}"
        click.echo(line.rstrip())
    click.echo(f"folder: {folder}")


def _remove(name: str, as_json: bool) -> None:
    from edgeroute.models.pull import remove

    n_bytes = remove(name)
    if as_json:
        click.echo(json.dumps({"removed": name, "n_bytes": n_bytes}))
    else:
        click.echo(f"removed {name}, {format_bytes(n_bytes)} freed")


def _rows() -> list[_Row]:
    """Catalogue entries first, in its order, then every other installed file."""
    from edgeroute.models import store
    from edgeroute.models.catalogue import CATALOGUE, DEFAULT_MODEL

    here = {model.name: model for model in store.installed()}
    rows = []
    for entry in CATALOGUE.values():
        model = here.pop(entry.name, None)
        rows.append(
            _Row(
                name=entry.name,
                architecture=entry.architecture,
                licence=entry.licence,
                n_bytes=entry.n_bytes,
                installed=model is not None and model.n_bytes == entry.n_bytes,
                path=str(model.path) if model else None,
                sha256=entry.sha256,
                source=model.source if model else None,
                note=entry.note,
                default=entry.name == DEFAULT_MODEL,
            )
        )
    for model in here.values():
        rows.append(
            _Row(
                name=model.name,
                architecture=None,
                licence=None,
                n_bytes=model.n_bytes,
                installed=True,
                path=str(model.path),
                sha256=model.sha256,
                source=model.source,
                note="",
                default=False,
            )
        )
    return rows
