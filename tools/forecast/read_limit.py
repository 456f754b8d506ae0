"""The kernel's limit on a worker's reads from a disk, whoever does them: blkio's throttle.

A model of a drive delays the pager's reads one by one, see `edgeroute.offload.throttle`; this holds
all others to the drive's rate as well: weights that are loaded at the start, what is mapped.

Source: Linux Documentation/admin-guide, cgroup-v1/blkio-controller.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench import limit as limits

_V1: Final = "blkio.throttle.read_bps_device"
_BLOCKS: Final = Path("/sys/dev/block")


class ReadLimit(Closing):
    """A fresh control group of version 1 in which a file's disk is read no faster than so.

    Of version 2 there is one group for everything, and a worker under a memory limit is in it:
    the rate is not set there.

    Raises:
        UsageError: this system has no such groups, none that we may make, or the file is on
            nothing that they could limit.
    """

    def __init__(self, path: Path, bytes_s: float) -> None:
        device = _disk_of(path)
        reasons = []
        for v2, folder in limits.own_groups("blkio"):
            if v2:
                continue
            limits.sweep(folder)
            try:
                self.folder = limits.new_group(folder)
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror or error}")
                continue
            try:
                (self.folder / _V1).write_text(f"{device} {int(bytes_s)}")
            except OSError as error:
                self.folder.rmdir()
                reasons.append(f"{folder}: {error.strerror or error}")
                continue
            return
        why = "; ".join(reasons) or "this system has none of version 1 for disks"
        raise UsageError(f"no control group can limit reads ({why})")

    def factory(self, factory: Callable[..., Any], *args: object) -> tuple[Any, ...]:
        """Return what makes an engine inside the group: see `MemoryLimit.factory`."""
        return limits.join_and_make, str(self.folder), pickle.dumps((factory, args))

    def close(self) -> None:
        """End what still runs inside and remove the group; safe to call twice.

        Raises:
            OSError: it cannot be removed.
        """
        limits.remove_group(self.folder)


def _disk_of(path: Path) -> str:
    """Return the numbers of the disk that a file is on, of the whole one if that is a partition.

    Raises:
        UsageError: it is on none: a file system in memory, or of a network.
    """
    try:
        found = os.stat(path).st_dev
        block = (_BLOCKS / f"{os.major(found)}:{os.minor(found)}").resolve(strict=True)
        whole = block.parent if (block / "partition").exists() else block
        return (whole / "dev").read_text().strip()
    except OSError as error:
        raise UsageError(f"{path} is on no disk whose reads could be limited") from error
