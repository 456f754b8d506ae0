"""Small files in the user's cache folder: notes that save time and may vanish at any moment."""

import contextlib
import os
from pathlib import Path

import platformdirs


def cache_path(name: str) -> Path:
    """Where a note of this name is kept; the folder need not exist."""
    return platformdirs.user_cache_path("edgeroute", appauthor=False) / name


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
