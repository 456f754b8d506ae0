"""Small reads of system files below a root, and small commands: bounded, never trusted."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

MAX_BYTES: Final = 64 << 10
MAX_ENTRIES: Final = 256
COMMAND_S: Final = 2.0
_MAX_CHARS: Final = 200


class Run(Protocol):
    """Runs a program; tests put recorded answers in its place."""

    def __call__(self, command: Sequence[str]) -> str:
        """Return what it printed; empty where it is not there, failed or took too long."""


def run_command(command: Sequence[str]) -> str:
    """Run a program for at most COMMAND_S; only the first MAX_BYTES of its output count."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, timeout=COMMAND_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""  # not installed here, or hangs: every caller has an answer for that
    return "" if done.returncode else done.stdout[:MAX_BYTES].decode(errors="replace")


class Tree:
    """The files of a system below a root: `/`, or a recorded copy."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def text(self, path: str) -> str:
        """Return a file's beginning; empty where there is none or it cannot be read."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(MAX_BYTES).decode(errors="replace")
        except (OSError, ValueError):
            return ""  # another kernel, another board, no permission

    def line(self, path: str) -> str:
        """Return a file's first line without what would disturb a terminal or a table."""
        return clean(self.text(path))

    def number(self, path: str) -> int | None:
        """Return a file's whole number, decimal or 0x..., or None."""
        text = self.line(path)
        if re.fullmatch(r"-?[0-9]{1,18}", text):
            return int(text)
        return int(text, 16) if re.fullmatch(r"0[xX][0-9a-fA-F]{1,15}", text) else None

    def glob(self, pattern: str) -> list[str]:
        """Return paths below the root that match, sorted, at most MAX_ENTRIES."""
        try:
            found = sorted(self.root.glob(pattern))[:MAX_ENTRIES]
        except OSError:
            return []
        return [each.relative_to(self.root).as_posix() for each in found]

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False


def clean(text: str) -> str:
    """Take the first line, printable, at most 200 characters."""
    first = text.replace("\0", "\n").strip().partition("\n")[0]
    return "".join(c for c in first if c.isprintable())[:_MAX_CHARS].strip()
