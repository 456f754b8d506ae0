"""What energy a computation takes where no counter of the machine can be read: a stated model.

    joules = core_watts x core-seconds + read_j_byte x bytes read + idle_watts x seconds

Core-seconds are the process's own, waiting threads that spin included. The memory's energy is part
of a core's watts; a GPU's is not counted. The figures below are good for comparing two ways to run
on one machine, and may be off by a factor of two for the machine itself.
"""

import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edgeroute.runtime.errors import UsageError

MODES: Final = ("auto", "all", "off", "estimate")
"""How energy is asked for; see `check_energy`."""
MAX_WATTS: Final = 10_000.0

SERVER_CORE_WATTS: Final = 5.5
"""Of a busy x86-64 core beyond an idle one: two threads of (3.5 - 0.74) W.

Source: Cloud Carbon Footprint, Methodology, section Compute: average of SPECpower results over the
processors of one cloud, 0.74 W idle and 3.5 W busy for each thread."""
BOARD_CORE_WATTS: Final = 0.75
"""Of a busy ARM core of a small board beyond an idle one: (5.4 - 2.4) W over four cores.

Source: chipwired.com, "How much power a Raspberry Pi uses", 36 measurements of a Raspberry Pi 4
at its supply: 2.4 W idle, 5.4 W at high load."""
READ_J_BYTE: Final = 2e-9
"""Of a byte read from an NVMe disk: some 6 W while reading 3 GB/s, as data sheets of consumer
disks of the PCIe 3 generation state."""
SCOPE: Final = "this process, estimated"
WHOLE_SCOPE: Final = "the machine, estimated"
_MAX_IO_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyModel:
    """Watts and joules that an estimate multiplies with.

    Attributes:
        core_watts: of one busy core.
        read_j_byte: joules for a byte read from disk.
        idle_watts: of the whole machine, for every second in which answers are computed; 0 counts
            only what the process adds.
        origin: where the figures are from, for people.
    """

    core_watts: float
    read_j_byte: float = READ_J_BYTE
    idle_watts: float = 0.0
    origin: str

    def __post_init__(self) -> None:
        for name in ("core_watts", "read_j_byte", "idle_watts"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= MAX_WATTS):
                raise UsageError(f"{name} must be a number from 0 to {MAX_WATTS:g}, got {value!r}")

    @property
    def scope(self) -> str:
        """What its joules cover."""
        return WHOLE_SCOPE if self.idle_watts > 0 else SCOPE

    @property
    def told(self) -> str:
        """The model in a sentence."""
        parts = [f"{self.core_watts:g} W for a busy core",
                 f"{self.read_j_byte * 1e9:g} nJ for a byte read from disk"]  # fmt: skip
        if self.idle_watts > 0:
            parts.append(f"{self.idle_watts:g} W for the idle machine")
        return f"estimated: {', '.join(parts)} ({self.origin}); a GPU is not counted"


def model_here() -> EnergyModel:
    """Return the model for the kind of machine that this is."""
    board = sys.platform == "linux" and platform.machine().lower() in ("aarch64", "arm64")
    if board:
        return EnergyModel(core_watts=BOARD_CORE_WATTS, origin="as measured on small ARM boards")
    return EnergyModel(core_watts=SERVER_CORE_WATTS, origin="as SPECpower has it for servers")


def model_of_device(
    name: str, *, active_watts: float, idle_watts: float, cores: int
) -> EnergyModel:
    """Return the model of a machine whose watts are known, idle and with all cores busy.

    Raises:
        UsageError: it has no core, or takes more while idle than while active.
    """
    if not (0 <= idle_watts <= active_watts) or cores < 1:
        raise UsageError(
            f"{name}: {idle_watts:g} W idle, {active_watts:g} W active, {cores} cores; active "
            "watts must be at least the idle ones, and a core is needed"
        )
    each = (active_watts - idle_watts) / cores
    return EnergyModel(core_watts=each, idle_watts=idle_watts, origin=f"the profile of {name}")


def check_energy(how: object) -> tuple[str, EnergyModel | None]:
    """Read how energy is asked for.

    Args:
        how: `auto`, counters that cost nothing to read, else the model; `all`, also sensors that
            have to be sampled ten times a second (a Jetson's rails, a battery); `estimate`, the
            model alone; `estimate:WATTS` with so many for a busy core; `off`.

    Returns:
        One of MODES, and the model where its watts were given.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(how, str):
        mode, colon, text = how.partition(":")
        if mode in MODES and not colon:
            return mode, None
        if mode == "estimate":
            try:
                watts = float(text)
            except ValueError:
                watts = math.nan
            if 0 < watts <= MAX_WATTS:
                return mode, EnergyModel(core_watts=watts, origin="as given")
    raise UsageError(f"energy must be auto, all, off, estimate or estimate:WATTS (of a busy core, "
                     f"up to {MAX_WATTS:g}), got {how!r:.80}")  # fmt: skip


def disk_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process had read from disks so far; 0 where nobody says.

    Source: proc(5), /proc/pid/io, read_bytes.
    """
    if sys.platform != "linux":
        return 0
    try:
        with open(root / "proc/self/io", "rb") as file:
            text = file.read(_MAX_IO_BYTES)
    except OSError:
        return 0  # some containers hide it: then reads are not part of the estimate
    for line in text.splitlines():
        name, _, value = line.partition(b":")
        if name == b"read_bytes" and value.strip().isdigit():
            return int(value)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Where an estimate reads what was used so far: seconds of cores, seconds, bytes."""

    core_s: Callable[[], float] = time.process_time
    wall_s: Callable[[], float] = time.monotonic
    read_bytes: Callable[[], int] = disk_bytes


@dataclass(slots=True, eq=False)
class Estimate:
    """Joules by a model. A Counter, see `edgeroute.runtime.energy`."""

    model: EnergyModel
    used: Used = field(default_factory=Used)
    source: str = "estimate"
    estimated: bool = True
    _before: tuple[float, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._before = self._now()

    @property
    def scope(self) -> str:
        """What its joules cover."""
        return self.model.scope

    def _now(self) -> tuple[float, float, float]:
        return self.used.core_s(), self.used.wall_s(), float(self.used.read_bytes())

    def joules(self) -> float:
        """Return joules since it was made."""
        core_s, wall_s, n_bytes = (b - a for a, b in zip(self._before, self._now(), strict=True))
        model = self.model
        return (model.core_watts * max(0.0, core_s) + model.idle_watts * max(0.0, wall_s)
                + model.read_j_byte * max(0.0, n_bytes))  # fmt: skip

    def close(self) -> None:
        """Do nothing: it holds nothing."""
