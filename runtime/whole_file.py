"""Replace a file as a whole: whatever happens, there is the old one or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Name a file beside `path` to write to, which takes its name when the block ends.

    What was written is on the disk by then. Where the block raises, nothing of it is kept.

    Raises:
        OSError: the disk or the folder refused it; what had the name before is untouched.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """See a rename to the disk, where the system can: else a power cut may bring back the old."""
    if os.name == "nt":  # opens no folders
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
