"""`edgeroute adapters`: the library of LoRA adapters, and training one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.models.adapter_file import AdapterFile, BaseShapes

_EPILOG = """\b
Examples:
  edgeroute adapters list
  edgeroute adapters add loras/robot --model smollm2-135m-instruct
  edgeroute adapters show robot
  edgeroute adapters train smollm2-135m-instruct pairs.jsonl --out robot
  edgeroute generate "go two metres ahead" --adapter robot
"""
Command = TypeVar("Command", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--library", metavar="DIR", help="Folder of adapters; without it "
                 "EDGEROUTE_LIBRARY, or a folder with the user's data."),
    click.option("--model", "-m", metavar="NAME", help="Base model that they must fit; without "
                 "it the default model."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object last."),
)  # fmt: skip


def _common(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class _Group(click.Group):
    """Imports the training command only when it is asked for: it is the one that is large."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands."""
        return [*super().list_commands(ctx), "train"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command."""
        if cmd_name == "train":
            from edgeroute.commands.adapters_train import train

            return train
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Group, epilog=_EPILOG)
def command() -> None:
    """List, check and keep LoRA adapters.

    An adapter changes a model's answers at a small part of its size. The library is a folder
    of PEFT folders and GGUF adapters; a Runtime keeps a few of them in memory and loads the
    others when they are asked for. Every command takes --json.
    """


@command.command("list")
@_common
def list_(library: str | None, model: str | None, as_json: bool) -> None:
    """List the library's adapters, and whether they fit the model."""
    from edgeroute.models import adapter_library
    from edgeroute.models.adapter_file import adapter_name, open_adapter
    from edgeroute.runtime.errors import AdapterFileError

    folder = _folder(library)
    paths = adapter_library.entries(folder)
    base = _base(model) if paths else None
    rows: list[dict[str, Any]] = []
    for path in paths:
        assert base is not None
        try:
            rows.append(_facts(open_adapter(path, base)) | {"fits": True, "reason": None})
        except AdapterFileError as error:
            rows.append({"name": adapter_name(path), "fits": False, "reason": str(error)})
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "adapters": rows}))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"{row['name']:<{width}}  {_line(row)}")
    click.echo(f"folder: {folder}" + ("" if rows else ", which has no adapters yet"))


@command.command()
@click.argument("source")
@click.option("--name", metavar="NAME", help="What to call it; without it its file's name.")
@click.option("--replace", is_flag=True, help="Take the place of one of the same name.")
@_common
def add(
    source: str, name: str | None, replace: bool, library: str | None, model: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Check the adapter SOURCE against the model, all its numbers too, and copy it in.

    SOURCE is a PEFT folder, its adapter_model.safetensors, or a GGUF adapter.
    """
    from edgeroute.models import adapter_library
    from edgeroute.models.adapter_file import adapter_name, open_adapter

    file = open_adapter(source, _base(model))
    path = adapter_library.add(file, _folder(library), name, replace=replace)
    if as_json:
        click.echo(json.dumps(_facts(file) | {"name": adapter_name(path), "path": str(path)}))
    else:
        click.echo(f"added {adapter_name(path)}: {_line(_facts(file) | {'fits': True})}")


@command.command()
@click.argument("name")
@click.option("--library", metavar="DIR", help="Folder of adapters, as for list.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def remove(name: str, library: str | None, as_json: bool) -> None:
    """Delete the adapter NAME from the library."""
    from edgeroute.models import adapter_library

    adapter_library.remove(_folder(library), name)
    click.echo(json.dumps({"removed": name}) if as_json else f"removed {name}")


@command.command()
@click.argument("name")
@_common
def show(name: str, library: str | None, model: str | None, as_json: bool) -> None:
    """Show what the adapter NAME changes in the model."""
    from edgeroute.models import adapter_library
    from edgeroute.models.adapter_file import open_adapter

    file = open_adapter(adapter_library.find(_folder(library), name), _base(model))
    weights: list[dict[str, Any]] = [
        {"name": pair.name, "n_in": pair.n_in, "n_out": pair.n_out, "rank": pair.rank,
         "scale": pair.scale}
        for pair in file.tensors
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(_facts(file) | {"path": str(file.path), "weights": weights}))
        return
    click.echo(f"{file.name}: {_line(_facts(file) | {'fits': True})}\n{file.path}")
    for weight in weights:
        click.echo("  {name}  {n_in} -> {n_out}, rank {rank}, scale {scale:g}".format(**weight))


def _folder(library: str | None) -> Path:
    from edgeroute.models.adapter_library import library_folder

    return library_folder() if library is None else Path(library)


def _base(model: str | None) -> "BaseShapes":
    from edgeroute.commands.generate_shared import find_model
    from edgeroute.models.adapter_file import base_shapes
    from edgeroute.models.registry import describe
    from edgeroute.runtime.gguf import GGUFFile

    with GGUFFile.open(find_model(model)) as file:
        return base_shapes(describe(file))


def _facts(file: "AdapterFile") -> dict[str, Any]:
    """Return what a list says of an adapter, as plain JSON types."""
    ranks = sorted({pair.rank for pair in file.tensors})
    parts = sorted({pair.name.split(".")[-1] for pair in file.tensors})
    return {
        "name": file.name, "format": file.format, "n_bytes": file.n_bytes, "ranks": ranks,
        "targets": parts, "n_weights": len(file.tensors), "description": file.description,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return f"does not fit: {row['reason']}"
    rank = "-".join(str(rank) for rank in sorted({row["ranks"][0], row["ranks"][-1]}))
    line = (f"{row['format']}, {format_bytes(row['n_bytes'])}, rank {rank} on "
            f"{', '.join(row['targets'])}")  # fmt: skip
    return f"{line}; {row['description']}" if row["description"] else line
