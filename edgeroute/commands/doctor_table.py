"""Rows of (what, value) to a terminal as a table, to anything else as plain lines."""

import sys
from collections.abc import Sequence

import click

Row = tuple[str, str]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print one section on standard output."""
    if not rows:
        return
    if sys.stdout.isatty():
        _show_rich(title, rows)
        return
    click.echo(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}".rstrip())


def _show_rich(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console().print(table)
