"""What this machine can give: cores, memory really available, how busy others are.

Limits of a container count, not only those of the hardware.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of memory: what the machine or container has, and what could be used now.

    `limit` names what sets the total: `machine`, or a control group.
    """

    total_bytes: int
    available_bytes: int
    limit: str


def memory() -> Memory:
    """Read the memory that is really available.

    Page cache counts as available (MemFree would not). Under a control group, its limit
    less what it cannot drop counts when that is smaller.
    """
    whole = psutil.virtual_memory()
    found = Memory(total_bytes=whole.total, available_bytes=whole.available, limit="machine")
    for group in _memory_groups():
        if group.total_bytes < found.total_bytes or group.available_bytes < found.available_bytes:
            found = Memory(
                total_bytes=min(group.total_bytes, found.total_bytes),
                available_bytes=min(group.available_bytes, found.available_bytes),
                limit=group.limit,
            )
    return found


def _memory_groups() -> list[Memory]:
    """Read the limits of this process's control group and its ancestors, version 2 and 1."""
    found = []
    for version, folder in _group_folders("memory"):
        if version == 2:
            names = ("memory.max", "memory.current", "inactive_file")
        else:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = _read_int(folder / names[0]), _read_int(folder / names[1])
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        used -= _read_stat(folder / "memory.stat", names[2])
        found.append(Memory(total_bytes=limit, available_bytes=max(0, limit - used),
                            limit=f"control group {folder}"))  # fmt: skip
    return found


def usable_cores() -> int:
    """Count the cores that this process may compute on, at least 1.

    Affinity, a control group's CPU quota, one thread per physical core, and only the
    fastest cluster of a big.LITTLE chip.
    """
    cores = _affinity()
    counts = [len(cores)]
    physical = psutil.cpu_count(logical=False)
    if physical:
        counts.append(physical)
    fast = _fast_cores(cores)
    if fast:
        counts.append(fast)
    quota = cpu_quota()
    if quota is not None:
        counts.append(max(1, math.floor(quota)))
    return max(1, min(counts))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _fast_cores(cores: set[int]) -> int | None:
    """Count cores of at least 70 % of the greatest capacity; None where Linux does not say."""
    capacity = {}
    for core in cores:
        value = _read_int(Path(f"/sys/devices/system/cpu/cpu{core}/cpu_capacity"))
        if value is not None:
            capacity[core] = value
    if not capacity:
        return None
    return sum(value >= 0.7 * max(capacity.values()) for value in capacity.values())


def cpu_quota() -> float | None:
    """Read the control group's CPU quota in cores; None where there is none."""
    quotas = []
    for version, folder in _group_folders("cpu"):
        if version == 2:
            words = _read_text(folder / "cpu.max").split()
            if len(words) == 2 and words[0].isdigit():
                quotas.append(int(words[0]) / int(words[1]))
        else:
            quota = _read_int(folder / "cpu.cfs_quota_us")
            period = _read_int(folder / "cpu.cfs_period_us")
            if quota is not None and period and quota > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _group_folders(controller: str) -> list[tuple[int, Path]]:
    """List this process's group and its ancestors for one controller, innermost first."""
    if sys.platform != "linux":
        return []
    found: list[tuple[int, Path]] = []
    for line in _read_text(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            version, root = 2, _CGROUP
        elif controller in controllers.split(","):
            version, root = 1, _CGROUP / controller
        else:
            continue
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each == root.parent:
                break
            if each.is_dir():
                found.append((version, each))
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # this machine has no such file; every caller treats that as "no limit"


def _read_int(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read_stat(path: Path, key: str) -> int:
    for line in _read_text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0


class LoadMeter:
    """Measures how many cores other processes used since the last reading."""

    def __init__(self) -> None:
        self._last = self._now()

    def read(self) -> tuple[float, float]:
        """Return (cores that others kept busy, seconds covered) and start a new interval."""
        now = self._now()
        wall, busy, own = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        if wall <= 0:
            return 0.0, 0.0
        return max(0.0, busy - own) / wall, wall

    @property
    def age_s(self) -> float:
        """Seconds since the last reading."""
        return time.monotonic() - self._last[0]

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # guest time is inside user time already, and stolen time is nobody's here
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        busy = total - idle - getattr(times, "steal", 0.0)
        return time.monotonic(), busy, time.process_time()
