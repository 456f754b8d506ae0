"""Saved sessions on disk: one folder, one file per session, a limit in bytes.

Callers name sessions; what a file is called is a hash of that name, so that no name is a path.
Any thread, and any number of processes, may use one folder: files appear and vanish whole.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from edgeroute.runtime.errors import SessionFileError, UsageError
from edgeroute.runtime.session_file import SessionFacts, SessionReader
from edgeroute.runtime.session_writer import is_being_written

SUFFIX: Final = ".session"
PART_SUFFIX: Final = ".part"
DEFAULT_BYTES: Final = 4 << 30
PART_AGE_S: Final = 60.0
"""A file in the making is left alone for so long, whether it is locked or not."""
OLD_PART_AGE_S: Final = 86400.0
"""And for so long where the system has no locks."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """A session on disk.

    Attributes:
        name: as its callers call it.
        model: fingerprint of the model's file.
        adapter: what it was computed under; "" without any adapter.
        plan: the depth plan's key; "" for the whole model.
        n_tokens: tokens whose keys and values are saved.
        n_bytes: of the file.
        saved: when, seconds since 1970.
    """

    name: str
    model: str
    adapter: str
    plan: str
    n_tokens: int
    n_bytes: int
    saved: int

    @property
    def adapter_names(self) -> str | None:
        """The adapters that it was computed under, by name, `+` between them; None without any."""
        return "+".join(part.partition(":")[0] for part in self.adapter.split("+")) or None


def check_session_name(name: object) -> str:
    """Return a session's name if it may be one.

    Raises:
        UsageError: it is too long, or has other characters than names have.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"session must be a name of 1 to 64 letters, digits, '.', '_' or '-' "
                         f"that begins with a letter or digit, got {name!r:.80}")  # fmt: skip
    return name


def default_folder() -> Path:
    """Return where sessions are kept if nothing else is said: with the user's state."""
    return platformdirs.user_state_path("edgeroute", appauthor=False) / "sessions"


class SessionFolder:
    """A folder of saved sessions.

    Args:
        path: of the folder; it is made when something is saved.
        limit_bytes: what the files may take together. The least recently used leave first.
    """

    def __init__(self, path: Path, limit_bytes: int = DEFAULT_BYTES) -> None:
        self.path = path
        self.limit_bytes = limit_bytes

    def file_of(self, facts: SessionFacts) -> Path:
        """Return where a session is, or would be: one per name, model, adapter and depth plan."""
        key = json.dumps([facts.name, facts.model, facts.adapter, facts.plan])
        return self.path / (hashlib.blake2b(key.encode(), digest_size=20).hexdigest() + SUFFIX)

    def new_part(self) -> Path:
        """Return a name for a file in the making, and see that the folder is there.

        Raises:
            OSError: the folder cannot be made.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.path / f"{os.getpid()}-{os.urandom(8).hex()}{PART_SUFFIX}"

    def sessions(self) -> list[SavedSession]:
        """List what is saved, newest first; files that are no whole sessions are left out."""
        found = []
        for path, _ in self._files():
            with contextlib.suppress(SessionFileError), SessionReader(path) as reader:
                head = reader.head
                found.append(SavedSession(
                    name=head.facts.name, model=head.facts.model, adapter=head.facts.adapter,
                    plan=head.facts.plan, n_tokens=head.n_cells, n_bytes=head.n_bytes,
                    saved=head.saved,
                ))  # fmt: skip
        return sorted(found, key=lambda each: (-each.saved, each.name))

    def remove(self, name: str, model: str | None = None) -> int:
        """Delete a session, under whatever adapter and plan it was saved.

        Args:
            name: of it.
            model: fingerprint of the model that it must be of; None for any.

        Returns:
            How many files were deleted.
        """
        n_removed = 0
        for path, _ in self._files():
            with contextlib.suppress(SessionFileError, OSError):
                with SessionReader(path) as reader:
                    facts = reader.head.facts
                if facts.name == name and model in (None, facts.model):
                    path.unlink()
                    n_removed += 1
        return n_removed

    def touch(self, path: Path) -> None:
        """Note that a session was used."""
        with contextlib.suppress(OSError):  # it was removed meanwhile
            os.utime(path)

    def make_room(self, spare: Path | None = None) -> int:
        """Delete the least recently used sessions beyond the limit, and what dead saves left.

        Args:
            spare: stays, whatever it takes.

        Returns:
            How many sessions were deleted.
        """
        self._clear_parts()
        files = sorted(self._files(), key=lambda each: each[1].st_mtime_ns)
        total, n_removed = sum(status.st_size for _, status in files), 0
        for path, status in files:
            if total <= self.limit_bytes:
                break
            if path == spare:
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                n_removed += 1
            total -= status.st_size
        return n_removed

    def _files(self, suffix: str = SUFFIX) -> Iterator[tuple[Path, os.stat_result]]:
        """Go through the regular files of the folder with this suffix."""
        try:
            entries = list(os.scandir(self.path))
        except OSError:  # nothing was saved yet
            return
        for entry in entries:
            with contextlib.suppress(OSError):  # another process removed it meanwhile
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(suffix) and stat.S_ISREG(status.st_mode):
                    yield Path(entry.path), status

    def _clear_parts(self) -> None:
        now = time.time()
        for path, status in self._files(PART_SUFFIX):
            age_s = now - status.st_mtime
            old = age_s > OLD_PART_AGE_S or (age_s > PART_AGE_S and not is_being_written(path))
            if old:
                with contextlib.suppress(OSError):
                    path.unlink()
