"""What is slower than it was, or than such a device is, why that may be, and what to do."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edgeroute.commands.doctor_history import Entry, Usual, best_mode, usual
from edgeroute.offload.throttle import Point, Throttle
from edgeroute.runtime.board import Board
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.forecast.devices import find_mode
from edgeroute.tools.forecast.records import DeviceProfile, PowerMode

NOISE_RATIO: Final = 0.85
"""What is no more than so much below the usual is noise; so is what a fifth of the earlier runs
lay below."""
DRIVE_RATIO: Final = {"stated": 0.6, "estimate": 0.25}
"""Drives differ; below this share of a profile's, something is wrong. Much less where the
profile's own figure is an estimate."""
MEMORY_RATIO: Final = {"cpu": 0.35, "gpu": 0.15}
"""Plain reads by the CPU reach 0.5 to 0.9 of a stated peak, and less where a GPU is what the
memory was made for."""
_BUSY_CORES: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something slow: a figure against what it should be, or what the system itself says.

    `value` and `expected` are in bytes per second, None where the system says it.
    """

    what: str
    why: str
    remedy: str
    value: float | None = None
    expected: float | None = None
    against: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of the doctor: figures by name, the board, cores that others kept busy."""

    figures: Mapping[str, float]
    board: Board
    others_busy: float = 0.0


def figures_of(facts: Mapping[str, Any], disk: str) -> dict[str, float]:
    """Return what was measured, by a name that says all it depends on.

    Args:
        facts: of the doctor; sections that failed or were not measured are left out.
        disk: an identity of the disk, such as its device number.
    """
    found: dict[str, float] = {}
    memory = facts.get("memory_bandwidth", {})
    if "read_bytes_s" in memory:
        threads = memory["n_threads"]
        found[f"memory read, {threads} threads"] = float(memory["read_bytes_s"])
        found[f"memory copy, {threads} threads"] = float(memory["copy_bytes_s"])
    drive = facts.get("disk_bandwidth", {})
    for depth, run in drive.get("by_queue_depth", {}).items():
        name = f"disk {disk}, depth {depth}, {drive['file']}, {drive['cache']}"
        found[name] = float(run["bytes_s"])
    return found


def findings(
    measured: Measured, history: Sequence[Entry], device: DeviceProfile | None
) -> list[Finding]:
    """List what is throttled: by its own history, by the device's profile, by the system's word.

    Args:
        measured: now.
        history: earlier runs, without this one.
        device: that this board is; None where it is not known.
    """
    found = [*_against_history(measured, history)]
    if device is not None:
        found += _against_device(measured, device)
        found += _mode(measured.board, device)
    found += [
        Finding(what=each.what, why=each.why, remedy=each.remedy)
        for each in measured.board.throttles
    ]
    return found


def _against_history(measured: Measured, history: Sequence[Entry]) -> Iterator[Finding]:
    for name, value in measured.figures.items():
        known = usual(history, name)
        if known is None:
            continue
        mode = measured.board.power_mode
        best = best_mode(history, name)
        if best is not None and best.power_mode != mode and _below(value, best):
            yield _slower_mode(measured, name, value, best)
        elif _below(value, known):
            yield Finding(
                what=_short(name), value=value, expected=known.value,
                against="this machine's usual",
                why=f"{_short(name)} {_rate(value)}, {value / known.value:.2f} of this machine's "
                f"usual {_rate(known.value)} (median of {known.n}){_cause(measured, name)}",
                remedy=_remedy(measured, name),
            )  # fmt: skip


def _below(value: float, known: Usual) -> bool:
    return value < min(NOISE_RATIO * known.value, known.low)


def _slower_mode(measured: Measured, name: str, value: float, best: Usual) -> Finding:
    mode = measured.board.power_mode or "the mode it is in"
    return Finding(
        what=_short(name), value=value, expected=best.value,
        against=f"this machine in power mode {best.power_mode}",
        why=f"power mode {mode}: {_short(name)} {_rate(value)}, {value / best.value:.2f} of the "
        f"{_rate(best.value)} in {best.power_mode} (median of {best.n})",
        remedy=_set_mode(measured.board, best.power_mode or ""),
    )  # fmt: skip


def _cause(measured: Measured, name: str) -> str:
    """Name what was seen that may be why."""
    causes = [each.what for each in measured.board.throttles]
    if measured.others_busy >= _BUSY_CORES and name.startswith("memory"):
        causes.append(f"others kept {measured.others_busy:.1f} cores busy")
    return f"; seen: {', '.join(causes)}" if causes else ""


def _remedy(measured: Measured, name: str) -> str:
    if measured.board.throttles:
        return measured.board.throttles[0].remedy
    if name.startswith("disk"):
        return "see what else reads from it (iotop), its temperature and health (smartctl -a)"
    if measured.others_busy >= _BUSY_CORES:
        return "end what keeps the cores busy, and measure again"
    return "measure again; if it stays, look at heat and at the firmware's power settings"


def _against_device(measured: Measured, device: DeviceProfile) -> Iterator[Finding]:
    power = _power(measured.board, device)
    peak = device.memory_bytes_s * (power.memory_ratio if power else 1.0)
    drive = Throttle([Point(p.read_bytes, p.depth, p.bytes_s) for p in device.storage])
    for name, value in measured.figures.items():
        if name.startswith("memory read"):
            expected, least = peak, MEMORY_RATIO[device.processor]
        elif name.startswith("disk"):
            expected = drive.bytes_s(1 << 20, int(name.split("depth ")[1].split(",")[0]))
            guessed = device.sources.get("storage", "").startswith("estimate:")
            least = DRIVE_RATIO["estimate" if guessed else "stated"]
        else:
            continue
        if value < least * expected:
            stated = device.sources.get("storage" if name.startswith("disk") else "memory_bytes_s")
            yield Finding(
                what=_short(name), value=value, expected=expected, against=device.title,
                why=f"{_short(name)} {_rate(value)}, {value / expected:.2f} of what {device.title} "
                f"has ({_rate(expected)}; {stated or 'its profile'}){_cause(measured, name)}",
                remedy=_remedy(measured, name),
            )  # fmt: skip


def _mode(board: Board, device: DeviceProfile) -> Iterator[Finding]:
    """Tell what a smaller power mode costs."""
    power = _power(board, device)
    if power is None or not device.power_modes:
        return
    best = max(device.power_modes, key=lambda mode: mode.memory_ratio)
    ratio = power.memory_ratio / best.memory_ratio
    if ratio < NOISE_RATIO:
        yield Finding(
            what="power mode", against=device.title,
            why=f"power mode {power.name} leaves about {ratio:.2f} of decoding's speed in "
            f"{best.name}",
            remedy=_set_mode(board, best.name),
        )  # fmt: skip


def _power(board: Board, device: DeviceProfile) -> PowerMode | None:
    """Find the mode that the board is in among its profile's."""
    if board.power_mode is None:
        return None
    with contextlib.suppress(UsageError):  # a mode that the profile does not know
        return find_mode(device, board.power_mode)
    return None


def _set_mode(board: Board, name: str) -> str:
    """Say how to change to a power mode."""
    for number, known in board.power_modes.items():
        if known.lower() == name.lower():
            return f"sudo nvpmodel -m {number}"
    if board.kind == "jetson":
        return f"sudo nvpmodel -m with the number of {name} in /etc/nvpmodel.conf"
    if board.on_battery:
        return "plug in the power supply"
    return f"set the platform's profile that gave {name} (powerprofilesctl)"


def _short(name: str) -> str:
    """Name a figure for people."""
    if name.startswith("disk"):
        return f"disk reads at depth {name.split('depth ')[1].split(',')[0]}"
    return name.split(",")[0] + "s"


def _rate(bytes_s: float) -> str:
    return f"{format_bytes(bytes_s)}/s"
