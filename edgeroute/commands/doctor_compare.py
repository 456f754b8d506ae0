"""The doctor's second half: this run against earlier ones and against the board's profile."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from edgeroute.commands.doctor_findings import Measured, figures_of, findings
from edgeroute.commands.doctor_history import Entry, add_entry, read_history, usual
from edgeroute.models import store
from edgeroute.runtime.board import Board
from edgeroute.runtime.board_throttle import counted
from edgeroute.tools.forecast.devices import device_of
from edgeroute.tools.forecast.records import DeviceProfile

Facts = dict[str, Any]


def compare(facts: Mapping[str, Any], boards: tuple[Board, Board], device: DeviceProfile | None) \
        -> Facts:  # fmt: skip
    """Compare what was measured, remember it, and say what is throttled.

    Args:
        facts: of the doctor.
        boards: as it was before and after measuring.
        device: to compare with; that of the board if not given.

    Returns:
        The sections `board`, `comparison` (each figure with what is usual, and the device) and
        `findings`.
    """
    before, after = boards
    during = counted(before.counters, after.counters)
    board = replace(after, throttles=(*after.throttles, *during))
    if device is None:
        device = device_of(board, facts.get("memory", {}).get("total_bytes", 0))
    history = read_history()
    measured = Measured(
        figures=figures_of(facts, _disk()), board=board,
        others_busy=facts.get("cpu", {}).get("others_busy", 0.0),
    )  # fmt: skip
    found = findings(measured, history, device)
    if measured.figures:
        add_entry(measured.figures, board.power_mode)
    return {
        "board": asdict(board),
        "comparison": {
            "device": None if device is None else device.name,
            "n_earlier": len(history),
            "figures": _table(measured, history),
        },
        "findings": [asdict(each) for each in found],
    }


def _disk() -> str:
    """Tell the disk that models lie on from others, without a serial number."""
    folder = store.models_folder()
    for each in (folder, *folder.parents):
        if each.is_dir():
            return str(each.stat().st_dev)
    return "unknown"


def _table(measured: Measured, history: list[Entry]) -> Facts:
    """List every figure, noise or not, beside what is usual."""
    table = {}
    for name, value in measured.figures.items():
        known = usual(history, name)
        table[name] = {
            "bytes_s": round(value),
            "usual_bytes_s": None if known is None else round(known.value),
            "ratio": None if known is None else round(value / known.value, 4),
        }
    return table
