"""What a calibration has found so far, kept on disk, so that it goes on where it was stopped.

A text file of one JSON object a line: the first says what is being calibrated, each other one
holds a result by its key. A line is written whole before the next thing is computed; a last
line that was cut short is computed again.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from edgeroute.runtime.errors import UsageError

FILE_SUFFIX: Final = ".fitted"
"""Of files that callers keep in the folder beside the results."""

_NAME: Final = "found.jsonl"
_SUB: Final = "part-"


class Work:
    """A folder of results by key; use it as a context manager.

    What was found for another subject (model, text or settings) is deleted.

    Args:
        folder: made if it is not there; this program's own.
        subject: what the results are of, plain JSON types.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, subject: dict[str, object]) -> None:
        self.folder = folder
        self._found: dict[str, object] = {}
        self._subject = json.loads(json.dumps(subject))
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        path = self.folder / _NAME
        try:
            lines = self._read(path)
            if not lines or lines[0] != self._subject:
                self._clear()
                self.folder.mkdir(parents=True, exist_ok=True)
                lines = [self._subject]
            # Written anew, so that a line that was cut short does not run into the next.
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"the work folder {self.folder} cannot be written: {error.strerror}; name another"
            ) from error
        for line in lines[1:]:
            self._found[str(line["key"])] = line["value"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def n_found(self) -> int:
        """Results that are there."""
        return len(self._found)

    def has(self, key: str) -> bool:
        """Whether a result is there."""
        return key in self._found

    def value(self, key: str, compute: Callable[[], object]) -> object:
        """Return a result: as it was found before, or computed now and kept.

        Args:
            key: of the result.
            compute: returns plain JSON types.
        """
        if key not in self._found:
            self._found[key] = compute()
            self._write({"key": key, "value": self._found[key]})
        return self._found[key]

    def subfolder(self, name: str) -> Path:
        """Return a folder for the files of one part of the work; it goes with ours."""
        return self.folder / f"{_SUB}{name}"

    def finish(self) -> None:
        """Delete what the folder holds, which is in a better place by now."""
        if self._file is not None:
            self._file.close()
            self._file = None
        with contextlib.suppress(OSError):  # a folder that stays costs a little room, no more
            self._clear()
            self.folder.rmdir()

    def _clear(self) -> None:
        """Delete our own files, and nothing that somebody else put there."""
        for path in (self.folder / _NAME, *self.folder.glob(f"*{FILE_SUFFIX}")):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f"{_SUB}*"):
            shutil.rmtree(path)

    def _write(self, line: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    @staticmethod
    def _read(path: Path) -> list[dict[str, object]]:
        """Read whole lines, up to the first that is none of ours."""
        found: list[dict[str, object]] = []
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return found
        for line in text.split("\n")[:-1]:
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not isinstance(value, dict) or (found and set(value) != {"key", "value"}):
                break
            found.append(value)
        return found


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it there: whole or not at all.

    Raises:
        OSError: no room, or no permission; nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
