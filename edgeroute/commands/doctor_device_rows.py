"""Devices as rows of the doctor's table."""

from collections.abc import Mapping
from typing import Any, Final

from edgeroute.commands.doctor_table import Row
from edgeroute.runtime.units import format_bytes

_KINDS: Final = {
    "cpu": "the processor", "gpu": "a GPU", "igpu": "an integrated GPU",
    "accel": "an accelerator of the processor", "other": "of another kind",
}  # fmt: skip
_MOST_NAMED: Final = 8
"""Lacking operations that are named; the JSON has all."""


def device_rows(devices: Mapping[str, Any]) -> list[Row]:
    """Describe devices, those of other machines last."""
    rows: list[Row] = []
    for each in devices["local"]:
        rows += _rows(each)
    for each in devices["rpc"]:
        rows += _rows(each)
        if "warning" in each:
            rows += [("", f"WARNING: {each['warning']}:"), ("", each["tunnel"])]
    return rows


def _rows(device: Mapping[str, Any]) -> list[Row]:
    name = device["name"]
    if "kind" not in device:
        return [(name, device.get("error", "not looked at"))]
    rows = [(name, f"{device['description']}, {_kind(device)}")]
    rows.append(("", f"{_memory(device)}; {_abilities(device)}"))
    if "buffer_types" in device:
        rows.append(("", f"buffer types {', '.join(device['buffer_types'])}"))
    rows += [("", line) for line in _speeds(device.get("measured"))]
    if "operations" in device:
        rows.append(("", device["operations"]))
    elif "lacks" in device:
        rows.append(("", _lacks(device["lacks"])))
    if "error" in device:
        rows.append(("", f"failed: {device['error']}"))
    return rows


def _kind(device: Mapping[str, Any]) -> str:
    if "operations" in device:
        return "on another machine, or in another process"
    return _KINDS.get(device["kind"], str(device["kind"]))


def _memory(device: Mapping[str, Any]) -> str:
    if not device["memory_total_bytes"]:
        return "memory not known"
    free, total = device["memory_free_bytes"], device["memory_total_bytes"]
    whose = ", the system's own" if device["unified"] else ""
    return f"memory {format_bytes(free)} free of {format_bytes(total)}{whose}"


def _abilities(device: Mapping[str, Any]) -> str:
    names = {
        "asynchronous": "queues work", "events": "events", "pinned": "pinned host memory",
        "host_pointers": "computes in mapped files",
    }  # fmt: skip
    found = [text for key, text in names.items() if device[key]]
    return ", ".join(found) or "no queues, no events, no pinned memory"


def _speeds(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return []
    if "error" in measured:
        return [f"not measured: {measured['error']}"]
    up, down = (format_bytes(measured[f"{way}_bytes_s"]) for way in ("upload", "download"))
    lines = [
        f"upload {up}/s, download {down}/s, round trip {1e6 * measured['round_trip_s']:.0f} µs"
    ]
    parts = []
    for name, found in measured["products"].items():
        if found["decode_bytes_s"] is None:
            continue
        part = f"{name} {format_bytes(found['decode_bytes_s'])}/s"
        if found["prefill_flops_s"]:
            part += f" and {found['prefill_flops_s'] / 1e12:.2g} TFLOP/s"
        parts.append(part)
    return [*lines, f"products (one token, a prompt): {'; '.join(parts)}"] if parts else lines


def _lacks(names: list[str]) -> str:
    if not names:
        return "has every operation that graphs may hold"
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return (f"lacks {', '.join(names[:_MOST_NAMED])}{more}: layers that need them are computed by "
            "the processor")  # fmt: skip
