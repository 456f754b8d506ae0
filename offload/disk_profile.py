"""How a disk is best read: measured once, remembered per device.

A second of reads tells the length and the number of reads at once that the disk likes; that
does not change from start to start.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_speed import measure
from edgeroute.runtime.cache_file import cache_path, replace_text
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB

MEASURE_S: Final = 1.0
VALID_S: Final = 30 * 24 * 3600
MOST_THREADS: Final = 8
MOST_READ_BYTES: Final = 4 * MIB
_MOST_DISKS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskProfile:
    """The longest read, reads at once, and the bandwidth they gave in bytes per second.

    `bytes_s` is 0 where nothing could be measured.
    """

    read_bytes: int = MIB
    n_threads: int = 2
    bytes_s: float = 0.0


def profile(disk: DiskFile) -> DiskProfile:
    """Return the profile of the disk that a file lies on, measuring it if it is not known.

    Files too short to measure by get the default, which is not remembered.

    Raises:
        ModelFileError: a read failed.
    """
    key = f"{disk.identity.device}/{disk.mode}"
    known = _read()
    found = _checked(known.get(key))
    if found is not None:
        return found
    try:
        best = measure(disk, seconds=MEASURE_S).best
    except UsageError:
        return DiskProfile()
    found = DiskProfile(read_bytes=best.read_bytes, n_threads=best.n_threads, bytes_s=best.bytes_s)
    entry = {"read_bytes": found.read_bytes, "n_threads": found.n_threads,
             "bytes_s": round(found.bytes_s), "measured": int(time.time())}  # fmt: skip
    entries = dict([*known.items(), (key, entry)][-_MOST_DISKS:])
    replace_text(_path(), json.dumps(entries))
    return found


def _checked(entry: object) -> DiskProfile | None:
    """Take an entry of the file as far as it can be believed."""
    if not isinstance(entry, dict):
        return None
    values = [entry.get(name) for name in ("read_bytes", "n_threads", "bytes_s", "measured")]
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) < len(values):
        return None
    read_bytes, n_threads, bytes_s, measured = numbers
    young = 0 <= time.time() - measured < VALID_S
    if not (young and 1 <= n_threads <= MOST_THREADS and 4096 <= read_bytes <= MOST_READ_BYTES):
        return None
    return DiskProfile(read_bytes=read_bytes, n_threads=n_threads, bytes_s=float(bytes_s))


def _path() -> Path:
    return cache_path("disks.json")


def _read() -> dict[str, object]:
    try:
        with _path().open(encoding="ascii") as file:
            found = json.loads(file.read(1 << 16))
    except (OSError, ValueError, RecursionError):
        return {}  # not there, or not ours: measured again
    return found if isinstance(found, dict) else {}
