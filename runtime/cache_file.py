"""Small files in the user's cache folder: notes that save time and may vanish at any moment."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import platformdirs


def cache_path(name: str) -> Path:
    """Where a note of this name is kept; the folder need not exist."""
    return platformdirs.user_cache_path("edgeroute", appauthor=False) / name


def read_entries(path: Path, version: int, most_bytes: int) -> list[Any]:
    """Read the list `entries` of a JSON note of this version; what is in it is not checked.

    Empty where the note is not there, is longer, or is not of that form.
    """
    try:
        with path.open(encoding="ascii") as file:
            text = file.read(most_bytes + 1)
        found = json.loads(text) if len(text) <= most_bytes else None
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(found, dict) or found.get("version") != version:
        return []
    listed = found.get("entries")
    return listed if isinstance(listed, list) else []


def write_entries(path: Path, version: int, entries: Sequence[object]) -> None:
    """Write a note that `read_entries` reads; without a writable cache folder nothing is kept."""
    replace_text(path, json.dumps({"version": version, "entries": entries}))


def replace_text(path: Path, text: str) -> None:
    """Replace a note as a whole, ASCII; without a writable cache folder nothing is kept."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="ascii")
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
