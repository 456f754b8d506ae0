"""A kernel limit on what a worker reads from a disk per second, to play a slower one."""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.tools.bench.limit import (
    MemoryLimit,
    join_and_make,
    new_group,
    own_groups,
    remove_group,
    sweep,
)

_BLOCK: Final = Path("/sys/dev/block")


class DiskRate(Closing):
    """A fresh control group whose reads from a file's disk are slowed down; removed when closed.

    Args:
        path: a file on the disk.
        bytes_per_s: the limit. What a reader gets of it is less where requests are small.

    Raises:
        UsageError: this system cannot do that, or does not let us.
    """

    def __init__(self, path: Path, bytes_per_s: int) -> None:
        disk = _disk_of(path)
        reasons = []
        for v2, parent in own_groups("blkio"):
            sweep(parent)
            try:
                self.folder = _make(parent, disk, bytes_per_s, v2=v2)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror or error}")
                continue
            return
        why = "; ".join(reasons) or "this system has none for disks"
        raise UsageError(
            f"no control group can slow reads down to {format_bytes(bytes_per_s)}/s ({why}); run "
            "as root, or leave --disk-rate out"
        )

    def factory(self, factory: Callable[..., Any], *args: object) -> tuple[Any, ...]:
        """Return what a Worker takes to make an engine inside the group: see MemoryLimit."""
        return join_and_make, str(self.folder), pickle.dumps((factory, args))

    def close(self) -> None:
        """End what still runs inside and remove the group; safe to call twice.

        Raises:
            OSError: it cannot be removed.
        """
        remove_group(self.folder)


@contextlib.contextmanager
def limited(
    limit_bytes: int, disk_rate: str | int | None, path: Path, made: tuple[Any, ...]
) -> Iterator[tuple[Any, ...]]:
    """Give what a Worker takes to make an engine in fresh groups: of memory, and of a disk's rate.

    Args:
        limit_bytes: of memory.
        disk_rate: bytes a second, or None for the disk's own rate.
        path: a file on the disk.
        made: the engine's factory and its arguments.

    Raises:
        UsageError: no such group can be made here.
        EdgerouteError: the memory was too little.
    """
    with contextlib.ExitStack() as own:
        limit = own.enter_context(MemoryLimit(limit_bytes))
        made = limit.factory(*made)
        if disk_rate is not None:
            made = own.enter_context(DiskRate(path, parse_bytes(disk_rate))).factory(*made)
        own.enter_context(limit.explaining())
        yield made


def _make(parent: Path, disk: str, bytes_per_s: int, *, v2: bool) -> Path:
    """Make a group and set its rate; leave nothing behind on OSError.

    Source: Linux Documentation/admin-guide, cgroup-v1/blkio-controller and cgroup-v2.
    """
    folder = new_group(parent)
    try:
        if v2:
            (folder / "io.max").write_text(f"{disk} rbps={bytes_per_s}")
        else:
            (folder / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_per_s}")
    except OSError:
        folder.rmdir()
        raise
    return folder


def _disk_of(path: Path) -> str:
    """Return the whole disk that a file is on, as MAJOR:MINOR.

    Raises:
        UsageError: it is on none that this system names.
    """
    device = path.stat().st_dev
    where = _BLOCK / f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else None
    if where is None or not where.exists():
        raise UsageError(f"{path.name} is on no disk whose reads can be limited; leave --disk-rate "
                         "out")  # fmt: skip
    if (where / "partition").exists():  # limits hold for whole disks
        where = where.resolve().parent
    return (where / "dev").read_text().strip()
