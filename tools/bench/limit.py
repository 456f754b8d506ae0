"""A kernel limit on a worker's memory, page cache included, and a page cache without the model.

Imports next to nothing: what a worker loads before it joins is charged to somebody else.
"""

import contextlib
import itertools
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.units import format_bytes

PREFIX: Final = "edgeroute-bench"
_MOUNT: Final = Path("/sys/fs/cgroup")
_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
_CACHED_RATIO: Final = 0.02
"""More of the file than this in the page cache counts as not dropped."""
_N_SAMPLES: Final = 64
_REMOVE_S: Final = 10.0
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """File names of one version of control groups."""

    limit: str
    swap: str
    peak: str
    kills: str


_V1: Final = _Version(limit="memory.limit_in_bytes", swap="memory.memsw.limit_in_bytes",
                      peak="memory.max_usage_in_bytes", kills="memory.oom_control")  # fmt: skip
_V2: Final = _Version(limit="memory.max", swap="memory.swap.max", peak="memory.peak",
                      kills="memory.events")  # fmt: skip


class MemoryLimit(Closing):
    """A fresh control group with a limit of bytes, no swap; removed when closed.

    It is made inside this process's own group where that may be, else inside the nearest
    ancestor that allows it, so that no limit which holds for us is evaded.

    Raises:
        UsageError: this system has no control groups, or none that we may make.
    """

    def __init__(self, n_bytes: int) -> None:
        if n_bytes < 1 << 20:
            raise UsageError(f"a memory limit must be at least 1 MiB, got {n_bytes} bytes")
        self.n_bytes = n_bytes
        reasons = []
        for v2, folder in own_groups("memory"):
            version = _V2 if v2 else _V1
            sweep(folder)
            try:
                self.folder = _make(version, folder, n_bytes)
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror or error}")
                continue
            self._version = version
            return
        why = "; ".join(reasons) or "this system has none for memory"
        raise UsageError(
            f"no control group can limit memory to {format_bytes(n_bytes)} ({why}); run as root, "
            "or in a delegated group (systemd-run --user --scope)"
        )

    def factory(self, factory: Callable[..., Any], *args: object) -> tuple[Any, ...]:
        """Return what a Worker takes to make an engine inside the group, from its first import.

        Example: `Worker(*limit.factory(Theirs, path, params))`.
        """
        # Pickled once more, so that the engine's modules are imported after joining.
        return join_and_make, str(self.folder), pickle.dumps((factory, args))

    @property
    def peak_bytes(self) -> int | None:
        """Most that was ever charged at once; None where the kernel does not say."""
        text = _read(self.folder / self._version.peak)
        return int(text) if text.strip().isdigit() else None

    @property
    def n_killed(self) -> int:
        """Processes that the kernel killed for this limit."""
        for line in _read(self.folder / self._version.kills).splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0

    @contextlib.contextmanager
    def explaining(self, what: str = "a run") -> Iterator[None]:
        """Say of a failure within that the kernel's limit was its cause, where it was.

        Raises:
            EdgerouteError: what failed within, or in its place that the kernel killed it.
        """
        try:
            yield
        except EdgerouteError as error:
            if not self.n_killed:
                raise
            raise EdgerouteError(
                f"the kernel killed {what}: it needs more than the limit of "
                f"{format_bytes(self.n_bytes)}; raise --limit, or lower --memory"
            ) from error

    def close(self) -> None:
        """End what still runs inside and remove the group; safe to call twice.

        Raises:
            OSError: it cannot be removed.
        """
        remove_group(self.folder)


def remove_group(folder: Path) -> None:
    """End what still runs inside a group and remove it, if it is still there.

    Raises:
        OSError: it cannot be removed.
    """
    deadline = time.monotonic() + _REMOVE_S
    while folder.exists():
        for pid in _read(folder / "cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError:  # a killed process leaves a moment later
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def join_and_make(folder: str, pickled: bytes) -> Any:
    """Enter the group, then import and make the engine; runs in the worker."""
    (Path(folder) / "cgroup.procs").write_text(str(os.getpid()))
    factory, args = pickle.loads(pickled)
    return factory(*args)


def own_groups(controller: str) -> Iterator[tuple[bool, Path]]:
    """Yield folders in which a group may be made: our own first, then its ancestors.

    Args:
        controller: of version 1, such as `memory`.

    Yields:
        Whether a folder is of version 2, and the folder.

    Source: Linux Documentation/admin-guide, cgroup-v1/memory and cgroup-v2.
    """
    if sys.platform != "linux":
        return
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            v2, mount = False, _MOUNT / controller
        elif number == "0" and (_MOUNT / "cgroup.controllers").exists():
            v2, mount = True, _MOUNT
        else:
            continue
        folder = mount / path.lstrip("/")
        while folder.is_dir():
            yield v2, folder
            if folder == mount:
                break
            folder = folder.parent


def _make(version: _Version, parent: Path, n_bytes: int) -> Path:
    """Make a group and set its limit; leave nothing behind on OSError."""
    if version is _V2 and "memory" not in _read(parent / "cgroup.subtree_control").split():
        (parent / "cgroup.subtree_control").write_text("+memory")
    folder = new_group(parent)
    try:
        (folder / version.limit).write_text(str(n_bytes))
        if (folder / version.swap).exists():
            (folder / version.swap).write_text("0" if version is _V2 else str(n_bytes))
    except OSError:
        folder.rmdir()
        raise
    return folder


def new_group(parent: Path) -> Path:
    """Make an empty group whose name says whose it is."""
    folder = parent / f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
    folder.mkdir()
    return folder


def sweep(parent: Path) -> None:
    """Remove groups of benchmarks that were killed before they could do it."""
    for folder in parent.glob(f"{PREFIX}-*"):
        pid = folder.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):  # not ours, or in use: it does us no harm
                folder.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # every caller has an answer for a file that this kernel does not have


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """How a file was dropped from the page cache, and what share of it (0 to 1) is left.

    `how` is `fadvise`, `drop_caches` or `kept`; `cached_ratio` is None where the system cannot
    say.
    """

    how: str
    cached_ratio: float | None

    @property
    def note(self) -> str:
        """One sentence for the report."""
        left = "unknown" if self.cached_ratio is None else f"{self.cached_ratio:.0%}"
        if self.how == "kept":
            return f"page cache NOT dropped (not permitted here); share of the file in it: {left}"
        return f"page cache dropped before each run ({self.how}); share of the file left: {left}"


def drop_page_cache(path: Path) -> CacheState:
    """Make the system forget a file's bytes, as far as it lets us.

    First by advice for this file alone; where something keeps it, the whole page cache, which
    takes root.

    Raises:
        OSError: the file cannot be read.
    """
    if not hasattr(os, "posix_fadvise"):
        return CacheState(how="kept", cached_ratio=None)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages not yet written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    left = cached_ratio(path)
    if left is None or left <= _CACHED_RATIO:
        return CacheState(how="fadvise", cached_ratio=left)
    try:
        _DROP_CACHES.write_text("1")
    except OSError:
        return CacheState(how="kept", cached_ratio=left)
    left = cached_ratio(path)
    dropped = left is None or left <= _CACHED_RATIO
    return CacheState(how="drop_caches" if dropped else "kept", cached_ratio=left)


def cached_ratio(path: Path) -> float | None:
    """Sample which share of a file, 0 to 1, is in the page cache; None where that is unknown.

    Source: preadv2(2), RWF_NOWAIT: a read that would have to wait for the disk fails.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Else the kernel would read ahead behind every sample.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        size, hits = os.fstat(descriptor).st_size, 0
        for i in range(_N_SAMPLES):
            try:
                os.preadv(descriptor, [bytearray(1)], size * i // _N_SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # a file system that does not know the flag
                return None
            hits += 1
        return hits / _N_SAMPLES
    finally:
        os.close(descriptor)


def disk_read_bytes() -> int | None:
    """Read how many bytes this process has caused to be read from a disk so far.

    Faults of mapped files and what the kernel read ahead for them are among it. None where
    the system does not count that.
    """
    for line in _read(Path("/proc/self/io")).splitlines():
        name, _, value = line.partition(": ")
        if name == "read_bytes":
            return int(value)
    return None
