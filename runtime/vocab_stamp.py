"""Remembers which files' vocabularies have passed their check, so that it is done once.

Reading 150,000 strings takes a tenth of a second, a fifth of the time to the first token of
a small model. A file counts as the same while device, inode, size and both times are equal;
the change time cannot be set by programs, so that an edited file is checked again.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Final

from edgeroute.runtime.cache_file import cache_path, replace_text
from edgeroute.runtime.gguf import GGUFFile

RULES: Final = 1
"""Raise it whenever the check becomes stricter or another llama.cpp reads the files."""
_MAX_STAMPS: Final = 256
_STAMP_CHARACTERS: Final = 32
_SETTLED_NS: Final = 2_000_000_000


def stamp(file: GGUFFile) -> str | None:
    """Return what stands for the file as it is now; None where the system cannot tell.

    Windows has no change time: there every file is checked every time. So is a file that
    has just changed, since clocks of file systems are too coarse to see the next change.
    """
    status = file.status
    if os.name != "posix" or time.time_ns() - status.st_ctime_ns < _SETTLED_NS:
        return None
    facts = (RULES, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
             status.st_ctime_ns)  # fmt: skip
    return hashlib.blake2b(repr(facts).encode(), digest_size=_STAMP_CHARACTERS // 2).hexdigest()


def is_known(mark: str | None) -> bool:
    """Whether a file with this stamp has passed before."""
    return mark is not None and mark in _read()


def remember(mark: str | None) -> None:
    """Note that a file has passed; without a writable cache folder it is checked again."""
    if mark is None:
        return
    replace_text(_path(), "\n".join([*_read(), mark][-_MAX_STAMPS:]))


def _path() -> Path:
    return cache_path("checked_vocabularies")


def _read() -> list[str]:
    """Read the stamps; whatever else stands in the file counts for nothing."""
    try:
        with _path().open(encoding="ascii") as file:
            text = file.read(_MAX_STAMPS * (_STAMP_CHARACTERS + 1))
    except (OSError, ValueError):
        return []
    return [line for line in text.split("\n") if len(line) == _STAMP_CHARACTERS]
