"""What every source of model bytes shares: requests, progress, errors.

A source appends to one `.part` file in the pull's own folder, which a later pull takes up
where this one stopped. Nobody trusts those bytes: `pull` hashes the whole before naming it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeroute.runtime.errors import CatalogueError

REPORT_BYTES = 1 << 20


class SourceError(CatalogueError):
    """One source could not deliver; the next one is tried."""


class OfflineError(SourceError):
    """A source could not be reached at all."""


class BrokenTransferError(SourceError):
    """A transfer broke off or was put off by the server; trying again may help."""


class HashMismatchError(SourceError):
    """A file is not the one that was asked for; what had arrived of it was deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """One step of a pull. `note` and `wait` carry a message, the others byte counts."""

    name: str
    phase: Literal["note", "wait", "download", "verify"]
    source: str = ""
    n_done: int = 0
    n_total: int = 0
    message: str = ""


Report = Callable[[PullProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """What a source is asked for. `folder` keeps unfinished files; None means not known yet."""

    name: str
    folder: Path
    n_bytes: int | None
    sha256: str | None
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A whole but unverified file, and the digest that its source announced for it."""

    path: Path
    n_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


def file_size(path: Path) -> int:
    """Bytes of a file, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0
