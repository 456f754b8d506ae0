"""Writes answers as they come: plain, or so that one sees which model of a pair wrote what."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TextIO

import click

if TYPE_CHECKING:
    from edgeroute.skippers.steps import Who

COLOURS: Final = {"small": "cyan", "large": "yellow"}
"""Of the models' text on a terminal."""

_HARMLESS: Final = {i: "�" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def writer(*, err: bool = False) -> Callable[[str], None]:
    """Return a function that writes text at once, unbuffered.

    On a terminal, control characters other than newline and tab are shown as a
    replacement character: a model's text must not move the cursor or retitle the window.
    """
    stream = sys.stderr if err else sys.stdout
    on_terminal = stream.isatty()

    def write(text: str) -> None:
        stream.write(text.translate(_HARMLESS) if on_terminal else text)
        stream.flush()

    return write


class StepWriter:
    """Writes text like `writer`, so that one sees who wrote it.

    On a terminal by colour, below a legend; elsewhere, or where NO_COLOR is set, by a mark such
    as `[small]` where a model begins to write.

    Args:
        err: write to standard error instead of standard output.
    """

    def __init__(self, *, err: bool = False) -> None:
        self._stream: TextIO = sys.stderr if err else sys.stdout
        self._plain = writer(err=err)
        self._in_colour = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._model: Who | None = None
        self._told = False

    def __call__(self, text: str) -> None:
        """Write text of the model whose turn it is."""
        if self._model is None or not self._in_colour:
            self._plain(text)
            return
        styled = click.style(text.translate(_HARMLESS), fg=COLOURS[self._model])
        click.echo(styled, file=self._stream, nl=False, color=True)

    def turn(self, model: "Who | None") -> None:
        """Say who wrote what comes next; None is nobody in particular, as between answers."""
        if model is not None and model != self._model:
            if not self._in_colour:
                self._plain(f"[{model}] ")
            elif not self._told:
                self._told = True
                names = (click.style(f"the {who} model in {colour}", fg=colour)
                         for who, colour in COLOURS.items())  # fmt: skip
                click.echo(f"[{', '.join(names)}]", err=True)
        self._model = model
