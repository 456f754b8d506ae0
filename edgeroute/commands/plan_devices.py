"""What of a model would go where: `edgeroute plan MODEL --on DEVICES`."""

from collections.abc import Mapping
from typing import Any

from edgeroute.commands.doctor_table import Row
from edgeroute.config import RunParams
from edgeroute.devices_open import open_devices
from edgeroute.memory_plan import budget_bytes
from edgeroute.models.registry import describe
from edgeroute.placing import Room, Source, SplitPlan, layers_on, plan_split, sizes_on
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import format_bytes


def plan_on(file: GGUFFile, params: RunParams, *, whole: bool) -> dict[str, Any]:
    """Place a model on the devices that `params.device` names, as loading would.

    Args:
        file: the model.
        params: settings.
        whole: the file is here with its weights, with which devices are timed.

    Returns:
        `devices`: for each that gets anything `name`, `layers` (first and last, or None), `head`,
        `n_bytes` and `budget_bytes`; `experts`: whether they are paged beside it instead, in
        which case nothing is placed yet; `warnings`.

    Raises:
        UsageError: there is no such device, or only the model's header is here.
        CapacityError: it does not fit; the message has the numbers of each.
        DeviceLostError: nobody answers at an address.
    """
    if not whole:
        raise UsageError("devices are timed with the model's weights, of which only the header is "
                         "here; `edgeroute pull` it first, or leave --on out")  # fmt: skip
    with open_devices(params, file) as devices:
        source = Source(file=file, model=describe(file), params=params)
        host_bytes = budget_bytes(params)
        if not devices.accelerators:
            return {"devices": [], "experts": False, "warnings": []}
        split = plan_split(devices, source, host_bytes, {})
        if split is None:
            return {"devices": [], "experts": True, "warnings": []}
        cpu = Room(device=devices.cpu, sizes=sizes_on(devices.cpu, source), budget_bytes=host_bytes)
        placed = [_placed(split, room) for room in (*split.rooms, cpu)]
        return {"devices": [each for each in placed if each["layers"] or each["head"]],
                "experts": False, "warnings": list(split.warnings)}  # fmt: skip


def _placed(split: SplitPlan, room: Room) -> dict[str, Any]:
    layers, head = layers_on(split.placement, room.device)
    return {
        "name": room.device.info.name,
        "layers": [layers[0], layers[-1]] if layers else None,
        "head": head,
        "n_bytes": room.takes(layers, head=head),
        "budget_bytes": room.budget_bytes,
    }


def device_plan_rows(found: Mapping[str, Any]) -> list[Row]:
    """Show what goes where, a device per row."""
    if found["experts"]:
        return [("experts", "do not all fit the devices: they are paged between disk, memory and "
                            "devices, and the layers go where these are")]  # fmt: skip
    rows = [(each["name"], _row(each)) for each in found["devices"]]
    rows += [("WARNING", each) for each in found["warnings"]]
    return rows or [("cpu", "everything: no other device was named, or proved to be of use")]


def _row(device: Mapping[str, Any]) -> str:
    parts = []
    if device["layers"]:
        first, last = device["layers"]
        parts.append(f"layer {first}" if first == last else f"layers {first} to {last}")
    if device["head"]:
        parts.append("the head")
    return (f"{' and '.join(parts)}, {format_bytes(device['n_bytes'])} of "
            f"{format_bytes(device['budget_bytes'])}")  # fmt: skip
