"""What this machine is: each section measured on its own, a failure told with its reason."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from edgeroute import __version__
from edgeroute.commands.doctor_devices import local_devices, rpc_devices
from edgeroute.commands.doctor_hardware import Hardware, look
from edgeroute.commands.doctor_install import install, missing_gpu, package_version
from edgeroute.models import store
from edgeroute.runtime import machine
from edgeroute.runtime.device import Device, devices
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.ggml.lib import libraries
from edgeroute.runtime.rpc_link import parse_address
from edgeroute.tools import measure

Facts = dict[str, Any]

_PROBE_BYTES = 128 << 20
_FEATURES = (
    "import llama_cpp, json; print(json.dumps({"
    "'features': llama_cpp.llama_print_system_info().decode(errors='replace'), "
    "'rpc': bool(llama_cpp.llama_supports_rpc())}))"
)
_GPU_KINDS = ("gpu", "igpu")


def gather(*, measured: bool, rpc: Sequence[str] = ()) -> Facts:
    """Gather every section; one that fails is `{"error": reason}`.

    Args:
        measured: also measure disk, memory and devices, which takes some seconds.
        rpc: addresses of devices on other machines.

    Raises:
        UsageError: what was given in `rpc` is no address.
    """
    for each in rpc:
        parse_address(each)
    facts: Facts = {
        "edgeroute": {"version": __version__, "python": platform.python_version()},
        "system": _try(_system),
        "cpu": _try(_cpu),
        "memory": _try(_memory),
        "models": _try(_models),
        "ggml": _try(_ggml),
        "build": _try(_build),
    }
    busy = facts["cpu"].get("others_busy", 0.0)
    facts["devices"] = _try(lambda: _devices(rpc, measured=measured, busy=busy))
    if measured:
        facts["memory_bandwidth"] = _try(_memory_bandwidth)
        facts["disk_bandwidth"] = _try(_disk_bandwidth)
    facts["hardware"] = _try(_hardware)
    facts["missing"] = missing(facts)
    return facts


def _try(section: Callable[[], Facts]) -> Facts:
    try:
        return section()
    except (EdgerouteError, OSError, MemoryError, psutil.Error) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _system() -> Facts:
    return {"os": platform.platform(), "machine": platform.machine(), "board": _board()}


def _board() -> str | None:
    """Name a board such as a Jetson or Raspberry Pi, where Linux says."""
    path = Path("/proc/device-tree/model")
    return path.read_text(errors="replace").strip("\0\n ") if path.is_file() else None


def _cpu() -> Facts:
    usable = machine.usable_cores()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    limits = {
        "physical cores": psutil.cpu_count(logical=False),
        "affinity of this process": affinity,
        "CPU quota of the control group": machine.cpu_quota(),
        "logical cores": psutil.cpu_count(),
    }
    reasons = [name for name, n in limits.items() if n is not None and max(1, int(n)) == usable]
    return {
        "logical": limits["logical cores"],
        "physical": limits["physical cores"],
        "affinity": affinity,
        "quota": limits["CPU quota of the control group"],
        "usable": usable,
        "usable_because": reasons[0] if reasons else "the fastest cluster of cores",
        "others_busy": _others_busy(),
    }


def _others_busy() -> float:
    """Cores that other processes use right now, over a fifth of a second."""
    meter = machine.LoadMeter()
    psutil.cpu_percent(interval=0.2)
    return round(meter.read()[0], 2)


def _memory() -> Facts:
    found, swap = machine.memory(), psutil.swap_memory()
    return {
        "total_bytes": found.total_bytes,
        "available_bytes": found.available_bytes,
        "limit": found.limit,
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
    }


def _models() -> Facts:
    folder = store.models_folder()
    disk = shutil.disk_usage(_existing(folder))
    return {
        "folder": str(folder),
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
        "installed": [
            {"name": model.name, "n_bytes": model.n_bytes, "path": str(model.path)}
            for model in (store.installed() if folder.is_dir() else [])
        ],
    }


def _existing(folder: Path) -> Path:
    """The folder or its nearest parent that exists: on the disk that it will be on."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _ggml() -> Facts:
    libs = libraries()
    return {
        "version": libs.version,
        "llama_cpp_python": package_version(),
        "folder": str(libs.folder),
        "devices": [
            {
                "name": info.name,
                "description": info.description,
                "kind": info.kind,
                "memory_free_bytes": info.memory_free_bytes,
                "memory_total_bytes": info.memory_total_bytes,
            }
            for info in devices()
        ],
        "buffer_types": _buffer_types(),
    }


def _devices(rpc: Sequence[str], *, measured: bool, busy: float) -> Facts:
    threads = max(1, machine.usable_cores() - round(busy))  # one that waits stops all others
    return {
        "local": local_devices(threads if measured else None),
        "rpc": rpc_devices(rpc, measured=measured),
    }


def _buffer_types() -> list[str]:
    """Buffer types of the CPU: its own, then those that hold weights in another layout."""
    with Device.open("cpu") as device:
        types = (device.buffer_type, *device.extra_buffer_types)
        return [device.buffer_type_name(each) for each in types]


def _build() -> Facts:
    """Ask llama-cpp-python what its build uses, in a process of its own.

    Raises:
        OSError: it could not be asked; the reason is its last line of error.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _FEATURES], capture_output=True, text=True, timeout=60,
            errors="replace", check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(f"llama-cpp-python did not load within {error.timeout:.0f} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise OSError(f"llama-cpp-python cannot be loaded: {reason}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    pairs = [part.split("=") for part in found["features"].replace(":", "|").split("|")]
    names = [pair[0].strip() for pair in pairs if len(pair) == 2 and pair[1].strip() != "0"]
    return {"rpc": found["rpc"], "features": names}


def _memory_bandwidth() -> Facts:
    found = measure.memory_bandwidth(machine.usable_cores())
    return {
        "read_bytes_s": round(found.read_bytes_s),
        "copy_bytes_s": round(found.copy_bytes_s),
        "n_threads": found.n_threads,
        "array_bytes": found.array_bytes,
    }


def _disk_bandwidth() -> Facts:
    """Read the largest installed model, or a file written for this, at depths 1 and 2."""
    folder = store.models_folder()
    files = [(model.n_bytes, model.path) for model in store.installed()] if folder.is_dir() else []
    n_bytes, path = max(files, default=(0, folder))
    if n_bytes >= _PROBE_BYTES // 2:
        return _read_twice(path, "an installed model")
    with tempfile.TemporaryDirectory(prefix="edgeroute-", dir=_existing(folder)) as here:
        probe = Path(here) / "probe"
        store.check_room(Path(here), _PROBE_BYTES, "measuring the disk")
        measure.write_probe_file(probe, _PROBE_BYTES)
        return _read_twice(probe, "a file written for this")


def _read_twice(path: Path, what: str) -> Facts:
    half = min(_PROBE_BYTES, path.stat().st_size // 2)
    runs = [
        measure.disk_read_bandwidth(path, queue_depth=depth, max_bytes=half, start=start)
        for depth, start in ((1, 0.0), (2, 0.5))
    ]
    return {
        "file": what,
        "cache": runs[0].cache,
        "block_bytes": runs[0].block_bytes,
        "by_queue_depth": {
            str(run.queue_depth): {"bytes_s": round(run.bytes_s), "n_bytes": run.n_bytes}
            for run in runs
        },
    }


def _hardware() -> Facts:
    """Accelerators that the system shows, whatever ggml was built for."""
    return asdict(look())


def missing(facts: Facts) -> list[dict[str, str]]:
    """List what this machine could have and has not, each with the command that brings it."""
    ggml, hardware = facts["ggml"], facts["hardware"]
    if "error" in ggml:
        # The message of a missing or wrong library carries its own remedy.
        seen = Hardware() if "error" in hardware else Hardware(**hardware)
        command = install(seen, "RPC")
        return [{"what": "a usable ggml", "why": ggml["error"], "command": command}]
    if "error" in hardware:
        return []
    seen = Hardware(**hardware)
    found = []
    has_gpu = any(device["kind"] in _GPU_KINDS for device in ggml["devices"])
    if not has_gpu:
        found += [asdict(each) for each in missing_gpu(seen)]
    if facts["build"].get("rpc") is False:
        why = "layers on other machines (ggml's RPC backend) are not built in"
        found.append({"what": "RPC", "why": why, "command": install(seen, "RPC")})
    if not facts["models"].get("installed"):
        why = "no model is installed yet"
        found.append({"what": "a model", "why": why, "command": "edgeroute pull"})
    return found
