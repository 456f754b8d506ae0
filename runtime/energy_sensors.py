"""Counters of energy that machines keep themselves: RAPL of x86 processors, NVML of NVIDIA GPUs.

Both only go up, cost some microseconds to read, and cover every process of the machine.
"""

import importlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

MAX_DOMAIN_WATTS: Final = 2000.0
"""Of one package. A counter that seems to have gone faster was set back, not turned over."""
GRACE_J: Final = 50.0
"""Which a short interval may have beyond that: counters move in steps."""
MAX_TEXT: Final = 64
RAPL: Final = "sys/class/powercap"
_PACKAGE: Final = re.compile(r"intel-rapl:\d+")
_PART: Final = re.compile(r"(intel-rapl:\d+):\d+")
REMEDY: Final = (
    "this processor counts its energy (RAPL), but only root may read that; let others by "
    "`sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj`, which lasts until the next start"
)
NO_NVML: Final = "the GPU's energy is not counted: {}; install edgeroute[energy]"


def read_text(path: Path) -> str | None:
    """Return what a small file of the system says, without spaces around; None: nothing.

    Raises:
        PermissionError: it is there, and others may read it.
    """
    try:
        # What is no file, a pipe that somebody planted say, must not be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            text = os.read(descriptor, MAX_TEXT)
        finally:
            os.close(descriptor)
    except PermissionError:
        raise
    except OSError:
        return None
    return text.decode("ascii", "replace").strip()


def read_number(path: Path) -> int | None:
    """Return the whole number in a small file; None where there is none.

    Raises:
        PermissionError: as `read_text`.
    """
    text = read_text(path)
    if text is None or not re.fullmatch(r"-?[0-9]{1,20}", text):
        return None
    return int(text)


@dataclass(slots=True)
class _Domain:
    """One counter of RAPL: where, where it turns over (0: unknown), and how far it was when."""

    path: Path
    range_uj: int
    last_uj: int
    at: float
    joules: float = 0.0

    def read(self, now: float) -> bool:
        """Add what was counted since the last time; tell whether it could be read."""
        found = read_number(self.path)
        if found is None or found < 0:
            return False
        moved = found - self.last_uj
        if moved < 0:
            moved += self.range_uj if found < self.range_uj else 0
        most_j = MAX_DOMAIN_WATTS * (now - self.at) + GRACE_J
        if 0 <= moved <= most_j * 1e6:
            self.joules += moved / 1e6
        self.last_uj, self.at = found, now
        return True


class Rapl:
    """Joules of all packages, and of their memory where that is counted apart. A Counter.

    Source: Linux, Documentation/power/powercap: energy_uj turns over at max_energy_range_uj.
    """

    source: Final = "rapl"
    estimated: Final = False

    def __init__(self, domains: list[_Domain], clock: Callable[[], float], *, memory: bool) -> None:
        self._domains, self._clock = domains, clock
        self.scope = f"package{' and memory' if memory else ''}, all processes"

    @classmethod
    def open(
        cls, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic
    ) -> Self | str | None:
        """Find the counters; None where there are none, a sentence where they are kept from us."""
        folder = root / RAPL
        packages: dict[str, _Domain] = {}
        memory: list[_Domain] = []
        try:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            zones = [name for name in names if _PACKAGE.fullmatch(name)]
            for zone in zones:
                title = read_text(folder / zone / "name") or ""
                if title.startswith("package") and title not in packages:
                    domain = _domain(folder / zone, clock)
                    if domain is not None:
                        packages[title] = domain
            for name in names:
                part = _PART.fullmatch(name)
                if part and (read_text(folder / name / "name") or "") == "dram":
                    domain = _domain(folder / name, clock)
                    memory += [] if domain is None else [domain]
        except PermissionError:
            return REMEDY
        if not packages:
            return None
        return cls([*packages.values(), *memory], clock, memory=bool(memory))

    def joules(self) -> float | None:
        """Return joules since it was opened; None where a counter cannot be read any more."""
        now = self._clock()
        try:
            read = [domain.read(now) for domain in self._domains]
        except PermissionError:
            return None
        return sum(domain.joules for domain in self._domains) if all(read) else None

    def close(self) -> None:
        """Do nothing: it holds nothing open."""


def _domain(folder: Path, clock: Callable[[], float]) -> _Domain | None:
    found = read_number(folder / "energy_uj")
    if found is None or found < 0:
        return None
    most = read_number(folder / "max_energy_range_uj")
    return _Domain(folder / "energy_uj", max(0, most or 0), found, clock())


class Nvml:
    """Joules of one NVIDIA GPU. A Counter.

    Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver
    was loaded, from Volta on.
    """

    source: Final = "nvml"
    estimated: Final = False
    scope: Final = "GPU only, all processes"

    def __init__(self, library: Any, handle: object, first_mj: int) -> None:
        self._library, self._handle, self._first = library, handle, first_mj

    @classmethod
    def open(cls, index: int = 0, library: Any = None) -> Self | str:
        """Find a GPU's counter; a sentence where there is none.

        Args:
            index: of the GPU, as the driver counts.
            library: what stands in for pynvml.
        """
        if library is None:
            try:
                library = importlib.import_module("pynvml")
            except ImportError:
                return NO_NVML.format("nvidia-ml-py is not installed")
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            return NO_NVML.format(str(error) or "NVML does not start")
        try:
            handle = library.nvmlDeviceGetHandleByIndex(index)
            first = int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
        except library.NVMLError as error:
            library.nvmlShutdown()
            return f"the GPU's energy is not counted: {error}"
        return cls(library, handle, first)

    def joules(self) -> float | None:
        """Return joules since it was opened; None where the driver does not answer any more."""
        try:
            now = int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._library.NVMLError:
            return None
        return max(0, now - self._first) / 1e3

    def close(self) -> None:
        """Let go of the driver's library."""
        self._library.nvmlShutdown()
