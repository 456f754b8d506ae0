"""Writes session files, see runtime/session_file: whole ones, or none."""

import contextlib
import io
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.sequence import Classes
from edgeroute.runtime.session_file import (
    FIXED,
    MAGIC,
    O_BINARY,
    VERSION,
    Bytes,
    SessionFacts,
    Tokens,
    digest,
    head_bytes,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class SessionWriter(Closing):
    """A session file in the making, under another name; `commit` makes it appear as a whole.

    Use it as a context manager: what was not committed is removed on leaving.
    """

    def __init__(
        self, path: Path, facts: SessionFacts, tokens: Tokens, classes: Classes, cell_bytes: int
    ) -> None:
        """Create the file.

        Args:
            path: where it is made; in the folder that it will be in.
            facts: whose it is.
            tokens: int32 (n_cells,).
            classes: uint8 (n_cells,).
            cell_bytes: of one cell.

        Raises:
            OSError: it cannot be created.
        """
        self._path = path
        self._facts = json.dumps(asdict(facts)).encode()
        self._tokens, self._classes, self._cell_bytes = tokens, classes, cell_bytes
        self._digests = bytearray()
        self.n_bytes = head_bytes(len(self._facts), len(tokens), cell_bytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | O_BINARY
        self._file = io.FileIO(os.open(path, flags, 0o600), "r+b")
        self._committed = False
        try:
            if fcntl is not None:  # so that others can tell it from what a dead process left
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(self.n_bytes)
        except BaseException:
            self.close()
            raise

    def add(self, data: Bytes) -> None:
        """Write the next block of cells.

        Raises:
            OSError: it cannot be written.
        """
        self._digests += digest(data.data)
        self._write(data.data)
        self.n_bytes += data.nbytes

    def commit(self, path: Path) -> None:
        """Write what stands before the cells, see it to the disk, and give the file its name.

        Raises:
            OSError: one of these failed; what had that name before is untouched.
        """
        n_facts, n_cells = len(self._facts), len(self._tokens)
        sizes = (n_facts, n_cells, self._cell_bytes)
        head = b"".join((
            FIXED.pack(MAGIC, VERSION, *sizes, int(time.time())), self._facts,
            self._tokens.astype("<i4").tobytes(), self._classes.tobytes(), self._digests,
        ))  # fmt: skip
        self._file.seek(0)
        self._write(memoryview(head + digest(head)))
        os.fsync(self._file.fileno())
        if fcntl is None:  # Windows renames no open files
            self._file.close()
        os.replace(self._path, path)
        self._committed = True
        _sync_folder(path.parent)

    def close(self) -> None:
        """Close the file, and remove it if it was not committed; safe to call twice."""
        self._file.close()
        if not self._committed:
            with contextlib.suppress(OSError):  # someone else has cleared it away
                self._path.unlink()

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0


def is_being_written(path: Path) -> bool:
    """Tell whether a process that lives is making a session file here.

    Where the system has no locks, every file counts as being written.
    """
    if fcntl is None:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sync_folder(folder: Path) -> None:
    """See a rename to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
