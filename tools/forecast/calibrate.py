"""What this machine reaches, measured once in a few seconds and remembered for a month.

Products by weight type as the engine computes them, attention, what a layer costs of itself, and
the disk as the pager reads it. What is remembered is only a cache: whatever is wrong with it, it
is measured again.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from edgeroute.offload.disk import DiskFile
from edgeroute.runtime import machine
from edgeroute.runtime.cache_file import cache_path, replace_text
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGMLType
from edgeroute.tools.bench.pairs import NOISY_CORES, OthersProbe
from edgeroute.tools.forecast.fixed_costs import measure_fixed
from edgeroute.tools.forecast.kernels import (
    FORMS,
    N_IN,
    SHORT_IN,
    Form,
    Kernel,
    decode_bytes_s,
    is_repacked,
    measure_attention,
    prefill_flops_s,
    rate_key,
)
from edgeroute.tools.forecast.records import Origin, Speeds, StoragePoint
from edgeroute.tools.forecast.storage import LEAST_FILE_BYTES, measure_storage
from edgeroute.tools.measure import write_probe_file

COMMON_TYPES: Final = ("Q4_K", "Q6_K", "Q8_0", "F16", "F32")
"""Types that most files are made of; further ones are measured when a model has them."""
VALID_S, VALID_BUSY_S = 30 * 24 * 3600, 3600
"""How long figures are remembered, and those taken while others used the processor."""
KERNEL_S, ATTENTION_S, STORAGE_S = 0.15, 0.1, 4.0
ROUNDS: Final = 3
ROWS: Final = (N_IN, SHORT_IN)
NAME: Final = "this machine"
_FILE: Final = "speeds.json"
_VERSION: Final = 2
_MOST_FILE_BYTES: Final = 1 << 20
_MOST_ENTRIES, _MOST_RATES, _MOST_POINTS = 32, 400, 200
_FIXED: Final = ("graph_s", "layer_s", "expert_layer_s", "paged_layer_s")

Progress = Callable[[str], None]
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateParams:
    """What is measured beside what always is.

    Attributes:
        types: names of weight types; None is COMMON_TYPES.
        path: a file on the disk that models are read from, of at least 64 MiB; None writes one
            beside the cache.
        fresh: measure all of it, whatever is remembered.
        fresh_disk: measure the disk: one that others use too varies by the minute.
    """

    types: Collection[str] | None = None
    path: Path | None = None
    fresh: bool = False
    fresh_disk: bool = False


def calibrate(
    threads: int | None = None, params: CalibrateParams | None = None,
    progress: Progress = lambda line: None,
) -> Speeds:  # fmt: skip
    """Return this machine's speeds, measuring what is not remembered.

    Args:
        threads: that compute; None is the usable cores.
        params: what to measure.
        progress: told of each part that takes a second or more.

    Raises:
        UsageError: a type is unknown, or the file is too short to read from.
        CapacityError: some 100 MB of memory are not to be had.
        OSError: the file cannot be opened, or no probe file written.
    """
    params, threads = params or CalibrateParams(), threads or machine.usable_cores()
    types = COMMON_TYPES if params.types is None else params.types
    for name in types:
        if name not in GGMLType.__members__:
            raise UsageError(f"there is no weight type {name!r} to measure")
    known = {} if params.fresh else _load(threads)
    probe = OthersProbe()
    probe.start()
    with Device.open("cpu") as device:
        device.set_threads(threads)
        _measure_products(device, types, known, progress)
        if "attention" not in known:
            known["attention"] = measure_attention(device, ATTENTION_S)
        if "fixed" not in known:
            progress("what a token and a layer cost of themselves")
            found = measure_fixed(threads)
            known["fixed"] = dict(zip(_FIXED, (
                found.token_s, found.layer_s, found.expert_layer_s - found.layer_s,
                found.paged_layer_s - found.layer_s,
            ), strict=True))  # fmt: skip
        key = _measure_disk(device, params, known, progress)
    known.setdefault("measured", int(time.time()))
    known["others"] = max(known.get("others", 0.0), probe.stop())
    _keep(threads, known)
    return _speeds(known, threads, key)


def kept(threads: int | None = None, path: Path | None = None) -> Speeds | None:
    """Return what is remembered of this machine, measuring nothing; None without.

    Args:
        threads: that compute; None is the usable cores.
        path: a file on the disk that is meant; None is any disk.
    """
    threads = threads or machine.usable_cores()
    known = _load(threads)
    if not {"rates", "attention", "fixed", "disks"} <= known.keys() or not known["disks"]:
        return None
    key: str | None = None
    if path is not None:
        try:
            number = path.stat().st_dev
        except OSError:
            return None
        key = next((each for each in known["disks"] if each.split("/")[0] == str(number)), None)
        if key is None:
            return None
    return _speeds(known, threads, key)


def _measure_products(
    device: Device, types: Collection[str], known: Entry, progress: Progress
) -> None:
    rates = known.setdefault("rates", {})
    wanted = [
        kernel for kernel in itertools.starmap(Kernel, itertools.product(types, FORMS, ROWS))
        if rate_key(*kernel) not in rates
    ]  # fmt: skip
    if wanted:
        names = ", ".join(dict.fromkeys(kernel.weight_type for kernel in wanted))
        progress(f"products with weights of {names}")
    plain: dict[Form, Form] = {"dense": "plain", "experts": "slots"}
    alike: dict[str, str] = {}
    found: dict[str, list[float]] = {}
    for number in range(ROUNDS):  # where weights lie in memory moves a speed by a fifth
        for kernel in wanted:
            key = rate_key(*kernel)
            if kernel.form in plain and not is_repacked(device, kernel):
                alike[key] = rate_key(*kernel._replace(form=plain[kernel.form]))
                continue
            bytes_s = decode_bytes_s(device, kernel, KERNEL_S / ROUNDS)
            found.setdefault(key, []).append(bytes_s)
            if not number:
                rates[key] = [bytes_s, prefill_flops_s(device, kernel)]
    for key, speeds in found.items():
        rates[key][0] = statistics.median(speeds)
    for key, other in alike.items():
        rates[key] = list(rates[other])


def _measure_disk(device: Device, params: CalibrateParams, known: Entry, progress: Progress) -> str:
    """Measure the disk of a file if it is not known; return its key."""
    path, fresh = params.path, params.fresh_disk
    disks = known.setdefault("disks", {})
    with tempfile.TemporaryDirectory(dir=_probe_folder() if path is None else None) as folder:
        place = path
        if place is None:
            place = Path(folder) / "probe"
            write_probe_file(place, LEAST_FILE_BYTES)
        disk = DiskFile.open(place)
        key = f"{disk.identity.device}/{disk.mode}"
        if key in disks and not fresh:
            disk.close()
            return key
        progress("reads of many lengths")
        found = measure_storage(disk, device, STORAGE_S, seed=int(time.time()))
    disks[key] = {
        "points": [[point.read_bytes, point.depth, point.bytes_s] for point in found.points],
        "overlap_ratio": found.overlap_ratio,
    }  # fmt: skip
    return key


def _probe_folder() -> Path:
    folder = cache_path(_FILE).parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _speeds(known: Entry, threads: int, key: str | None) -> Speeds:
    memory = machine.memory()
    disk = known["disks"][key or next(iter(known["disks"]))]
    measured: Origin = "measured"
    others, notes = known["others"], tuple[str, ...]()
    if others > NOISY_CORES:
        notes = (f"measured while other programs used {others:.1f} cores: too slow, if anything",)
    names = ("weight_bytes_s", "prefill_flops_s", "kv_bytes_s", "storage", "layer_s")
    return Speeds(
        name=NAME, memory_bytes=memory.total_bytes, available_bytes=memory.available_bytes,
        weight_bytes_s={name: pair[0] for name, pair in known["rates"].items()},
        prefill_flops_s={name: pair[1] for name, pair in known["rates"].items()},
        kv_bytes_s=known["attention"],
        storage=tuple(StoragePoint(read_bytes=size, depth=depth, bytes_s=bytes_s)
                      for size, depth, bytes_s in disk["points"]),
        threads=threads, overlap_ratio=disk["overlap_ratio"],
        origins=dict.fromkeys(names, measured), notes=notes, **known["fixed"],
    )  # fmt: skip


# the cache


def fingerprint(threads: int) -> str:
    """Name what the figures hold for: the processor, the threads, and what computes."""
    parts = (
        platform.system(), platform.machine(), _processor(), machine.usable_cores(), threads,
        metadata.version("llama-cpp-python"), os.environ.get("OMP_WAIT_POLICY", ""),
    )  # fmt: skip
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _processor() -> str:
    if sys.platform == "linux":
        try:
            with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
                lines = file.read(1 << 16).splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor()


def _read_all() -> dict[str, Any]:
    try:
        with cache_path(_FILE).open(encoding="ascii") as file:
            found = json.loads(file.read(_MOST_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}  # not there, or not ours: measured again
    good = isinstance(found, dict) and found.get("version") == _VERSION
    entries = found.get("entries") if good else None
    return entries if isinstance(entries, dict) else {}


def _load(threads: int) -> Entry:
    """What is remembered for this machine and so many threads, as far as it can be believed."""
    entry = _read_all().get(fingerprint(threads))
    if not isinstance(entry, dict) or not _number(entry.get("measured")):
        return {}
    others = entry.get("others")
    if not isinstance(others, int | float) or not _number(others, zero=True):
        return {}
    valid_s = VALID_S if others <= NOISY_CORES else VALID_BUSY_S
    if not 0 <= time.time() - entry["measured"] < valid_s:
        return {}
    found: Entry = {"measured": entry["measured"], "others": others}
    rates = entry.get("rates")
    if isinstance(rates, dict) and len(rates) <= _MOST_RATES and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_number, pair))
        for pair in rates.values()
    ):  # fmt: skip
        found["rates"] = rates
    if _number(entry.get("attention")):
        found["attention"] = entry["attention"]
    fixed = entry.get("fixed")
    if isinstance(fixed, dict) and fixed.keys() == set(_FIXED) and all(
        _number(value, zero=True) for value in fixed.values()
    ):  # fmt: skip
        found["fixed"] = fixed
    disks = entry.get("disks")
    if isinstance(disks, dict):
        found["disks"] = {key: disk for key, disk in disks.items() if _is_disk(disk)}
    return found


def _is_disk(disk: object) -> bool:
    if not isinstance(disk, Mapping):
        return False
    points, overlap = disk.get("points"), disk.get("overlap_ratio")
    if not isinstance(points, list) or not 0 < len(points) <= _MOST_POINTS:
        return False
    if not isinstance(overlap, int | float) or not _number(overlap, zero=True) or overlap > 1:
        return False
    return all(
        isinstance(point, list) and len(point) == 3 and all(map(_number, point))
        and isinstance(point[0], int) and isinstance(point[1], int)
        for point in points
    )  # fmt: skip


def _number(value: object, zero: bool = False) -> bool:
    """Whether it is a finite number, positive or, if that may be, zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 or (zero and value == 0)) and value < 1e18


def _keep(threads: int, entry: Entry) -> None:
    entries = _read_all() | {fingerprint(threads): entry}
    latest = dict(list(entries.items())[-_MOST_ENTRIES:])
    replace_text(cache_path(_FILE), json.dumps({"version": _VERSION, "entries": latest}))
