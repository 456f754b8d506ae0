"""Reading what the user says: lines from a terminal with history, or from a pipe."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from edgeroute.runtime.errors import UsageError

try:
    import readline as _readline
except ImportError:  # Windows: its console edits lines by itself
    readline: ModuleType | None = None
else:
    readline = _readline

_MAX_HISTORY = 1000


def history_path() -> Path:
    """Where the lines typed into `edgeroute chat` are kept."""
    import platformdirs

    return platformdirs.user_state_path("edgeroute", appauthor=False) / "chat_history"


class LineReader:
    """Messages one at a time. On a terminal they are edited and remembered.

    Args:
        note: told why history is not kept, when it is not.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.interactive = sys.stdin.isatty()
        self._note = note
        self._history = history_path() if self.interactive and readline is not None else None
        self._load_history()

    def read(self) -> str | None:
        """Return the next message, its continued lines joined; None at the end of input.

        Raises:
            UsageError: a piped line is not UTF-8.
            KeyboardInterrupt: Ctrl-C at the prompt; what was typed is forgotten.
        """
        lines: list[str] = []
        while True:
            line = self._read_line("... " if lines else ">>> ")
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def close(self) -> None:
        """Write the history."""
        if readline is None or self._history is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            # Nobody else on this machine may read what was typed.
            os.close(os.open(self._history, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.write_history_file(self._history)
        except OSError as error:
            self._note(f"the history is not kept: {error}")

    def _read_line(self, prompt: str) -> str | None:
        try:
            if self.interactive:
                return input(prompt)
            line = sys.stdin.readline()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text: {error.reason}") from error
        return line.rstrip("\r\n") if line else None

    def _load_history(self) -> None:
        if readline is None or self._history is None:
            return
        readline.set_history_length(_MAX_HISTORY)
        try:
            readline.read_history_file(self._history)
        except FileNotFoundError:
            return  # the first time
        except OSError as error:
            self._note(f"the history could not be read: {error}")
