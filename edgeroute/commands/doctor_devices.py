"""What the doctor says of ggml's devices: those of this machine, and those at RPC addresses."""

from collections.abc import Sequence
from typing import Any

from edgeroute.commands.doctor_ops import lacking_operations
from edgeroute.commands.doctor_probe import probe
from edgeroute.runtime import machine
from edgeroute.runtime.device import RPC_PREFIX, Device, DeviceInfo, devices
from edgeroute.runtime.errors import CapacityError, ComputeError, EdgerouteError, LibraryError
from edgeroute.runtime.rpc_link import is_private, parse_address

Facts = dict[str, Any]

_MEASURED = ("cpu", "gpu", "igpu")
_RPC_OPERATIONS = "its server says yes to every operation: run `edgeroute doctor` on that machine"


def local_devices(threads: int | None) -> list[Facts]:
    """Describe every device that ggml lists here; one that cannot be opened says why.

    Args:
        threads: of the processor when it is measured, like all others, a second at most; None
            measures nothing.
    """
    return [_local(info, threads) for info in devices()]


def _local(info: DeviceInfo, threads: int | None) -> Facts:
    facts = _info(info)
    try:
        with Device(info) as device:
            facts["buffer_types"] = _buffer_types(device)
            facts["lacks"] = lacking_operations(device)
            if threads is not None and info.kind in _MEASURED:
                facts["measured"] = _measured(device, threads)
    except (LibraryError, ComputeError) as error:
        facts["error"] = str(error)
    return facts


def _info(info: DeviceInfo) -> Facts:
    return {
        "name": info.name,
        "description": info.description,
        "kind": info.kind,
        "memory_free_bytes": info.memory_free_bytes,
        "memory_total_bytes": info.memory_total_bytes,
        "unified": info.unified,
        "asynchronous": info.asynchronous,
        "events": info.events,
        "pinned": info.pinned,
        "host_pointers": info.host_pointers,
    }


def _buffer_types(device: Device) -> list[str]:
    """Name its own buffer type, then those that hold weights in another layout."""
    types = (device.buffer_type, *device.extra_buffer_types)
    return [device.buffer_type_name(each) for each in types]


def _measured(device: Device, threads: int = 1) -> Facts:
    try:
        return probe(device, _room_bytes(device), threads)
    except CapacityError as error:
        return {"error": str(error)}


def _room_bytes(device: Device) -> int:
    """What a probe may allocate: half of what is free on the device, and here where it is one."""
    free = device.memory()[0]
    here = machine.memory().available_bytes
    if device.info.unified or not free:
        free = min(free or here, here)
    return free // 2


def rpc_devices(addresses: Sequence[str], *, measured: bool) -> list[Facts]:
    """Describe the device behind each address, or say why there is none.

    Raises:
        UsageError: what was given is no address.
    """
    hosts = [parse_address(each) for each in addresses]
    return [_remote(host, port, measured=measured) for host, port in hosts]


def _remote(host: str, port: int, *, measured: bool) -> Facts:
    facts: Facts = {"name": f"{RPC_PREFIX}{host}:{port}", "private": is_private(host)}
    if not facts["private"]:
        facts["warning"] = (
            f"{host} is neither loopback nor of a private network, and the connection carries "
            "neither authentication nor encryption: whoever is in between reads prompts and "
            "weights, and can run code there; go through a tunnel"
        )
        facts["tunnel"] = tunnel(host, port)
    try:
        with Device.open(facts["name"]) as device:
            free, total = device.memory()
            facts |= _info(device.info)
            facts |= {"description": "a server of ggml's RPC", "operations": _RPC_OPERATIONS,
                      "memory_free_bytes": free, "memory_total_bytes": total}  # fmt: skip
            if measured:
                facts["measured"] = _measured(device)
            device.check()
    except EdgerouteError as error:
        facts["error"] = str(error)
    return facts


def tunnel(host: str, port: int) -> str:
    """Return the command that carries the connection through ssh."""
    return (f"ssh -N -L 127.0.0.1:{port}:127.0.0.1:{port} {host}  "
            f"# then --device rpc:127.0.0.1:{port}")  # fmt: skip
