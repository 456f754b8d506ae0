"""How quick devices are at a model's layers and at copies, and which layers go where."""

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from edgeroute.device_proofs import subject
from edgeroute.device_support import Probe, unsupported
from edgeroute.models.base import MoeModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime import machine
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cache_file import cache_path, read_entries, write_entries
from edgeroute.runtime.depth import Step
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, ComputeError, UnsupportedModelError
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.tensor import Descriptors, get_range, new_tensor, place_all
from edgeroute.runtime.upload import Uploader
from edgeroute.runtime.weights import ResidentWeights

N_CELLS: Final = 512
MOST_PROMPT: Final = 256
"""Tokens of the part of a prompt that is timed, at most; a shorter one is no slower by token."""
PASSES: Final = 3
"""Passes over the layer in the longer of two graphs: their difference is free of what a graph costs
apart from layers, such as the way to another machine."""
MOST_RUNS, MOST_S = 7, 0.3
COPY_BYTES, LEAST_COPY_BYTES = 8 << 20, 1 << 16
_SHORT: Final = 32
"""Part of them that is copied first; over a slow link that is enough."""
NAME: Final = "device-speeds.json"
VALID_S, VALID_RPC_S = 90 * 24 * 3600, 7 * 24 * 3600
"""What stands behind an address may change without a trace here."""
_MAX_BYTES, _MAX_ENTRIES, _VERSION = 1 << 17, 64, 1
_MOST: Final = 1e15
_I8: Final = 24  # Source: ggml.h, enum ggml_type
_LEAST_S: Final = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeed:
    """What was measured of one device with one model.

    Attributes:
        decode_s: seconds of a layer for one token.
        prompt_s: seconds of a layer per token of a prompt's part.
        entering_s: seconds that a pass of one token takes more for going to the device and back.
        upload_bytes_s: bytes per second into its memory.
        download_bytes_s: bytes per second out of it.
    """

    decode_s: float
    prompt_s: float
    entering_s: float
    upload_bytes_s: float
    download_bytes_s: float

    @property
    def layer_s(self) -> float:
        """Seconds of a layer per token of an answer, with as many tokens of a prompt."""
        return self.decode_s + self.prompt_s


def layer_seconds(
    probe: Probe, devices: Sequence[Device], threads: int | None = None
) -> dict[str, float]:
    """Return the seconds of a layer on each device, by its name; see `device_speeds`."""
    return {name: speed.layer_s for name, speed in device_speeds(probe, devices, threads).items()}


def device_speeds(
    probe: Probe, devices: Sequence[Device], threads: int | None = None
) -> dict[str, DeviceSpeed]:
    """Return the speed of each device by its name, measured now or before with the same model.

    Args:
        probe: the model.
        devices: those to measure, if there is no note.
        threads: of a device that has threads; None is one for each core that may be used.

    Raises:
        CapacityError, UnsupportedModelError, DeviceLostError: as `measure`.
    """
    notes, found, fresh = _read(cache_path(NAME)), dict[str, DeviceSpeed](), False
    n_threads = threads or machine.usable_cores()
    for device in devices:
        key = _key(probe, device, n_threads)
        valid_s = VALID_S if device.link is None else VALID_RPC_S
        note = notes.get(key)
        if note is None or not 0 <= time.time() - note.when < valid_s:
            device.set_threads(n_threads)
            notes.pop(key, None)
            note = notes[key] = _Note(int(time.time()), measure(probe, device))
            fresh = True
        found[device.info.name] = note.speed
    if fresh:
        kept = list(notes.items())[-_MAX_ENTRIES:]
        write_entries(cache_path(NAME), _VERSION, [
            {"key": key, "when": note.when, "speed": asdict(note.speed)} for key, note in kept
        ])  # fmt: skip
    return found


class _Note(NamedTuple):
    """A speed, and when it was measured, in seconds since 1970."""

    when: int
    speed: DeviceSpeed


def _key(probe: Probe, device: Device, n_threads: int) -> str:
    """Name everything that a speed holds for; any difference makes it void."""
    about = asdict(subject(device.info, probe.file, probe.kv.kv_type))
    n = n_threads if device.is_cpu else 0
    text = json.dumps([about, n, min(probe.n_ubatch, MOST_PROMPT)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, _Note]:
    """Read notes as far as they can be believed."""
    notes: dict[str, _Note] = {}
    for each in read_entries(path, _VERSION, _MAX_BYTES)[-_MAX_ENTRIES:]:
        if not isinstance(each, dict) or each.keys() != {"key", "when", "speed"}:
            continue
        key, when, speed = each["key"], each["when"], each["speed"]
        good = isinstance(key, str) and _is_number(when) and isinstance(speed, dict)
        names = DeviceSpeed.__dataclass_fields__.keys()
        if good and speed.keys() == names and all(map(_is_number, speed.values())):
            notes[key] = _Note(int(when), DeviceSpeed(**speed))
    return notes


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < _MOST  # type: ignore[operator]


def measure(probe: Probe, device: Device) -> DeviceSpeed:
    """Time one of the model's own layers on a device, with as many threads as it is set to.

    Takes up to two seconds, and that layer's weights on the device meanwhile.

    Raises:
        CapacityError: the device has no room for one layer.
        UnsupportedModelError: it can compute none.
        DeviceLostError: it is gone.
    """
    il = _typical_layer(probe, device)
    with _loaded(probe, device, il) as forward:
        n = min(probe.n_ubatch, MOST_PROMPT)
        whole_s, many_s = _timed(forward, il, 1, 1), _timed(forward, il, 1, PASSES)
        decode_s = min(whole_s, max(_LEAST_S, (many_s - whole_s) / (PASSES - 1)))
        prompt_s = _timed(forward, il, n, 1)  # long enough for the rest to count little
    up, down = _copies(device)
    return DeviceSpeed(
        decode_s=decode_s, prompt_s=prompt_s / n, entering_s=max(0.0, whole_s - decode_s),
        upload_bytes_s=up, download_bytes_s=down,
    )  # fmt: skip


def _typical_layer(probe: Probe, device: Device) -> int:
    """Choose a layer of the kind that most are of, and that the device can compute."""
    lacks, model = unsupported(device, probe), probe.model
    layers = [il for il in range(model.hparams.n_layer) if il not in lacks]
    if not layers:
        names = ", ".join(sorted(set[str]().union(*lacks.values())))
        raise UnsupportedModelError(
            f"device {device.info.name} can compute no layer of {probe.file.path.name}: it lacks "
            f"{names}; leave it out of `device`"
        )
    with_experts = [
        il for il in layers if isinstance(model, MoeModel) and model.hparams.moe is not None
        and model.is_moe(il)
    ]  # fmt: skip
    alike = with_experts or layers
    return alike[len(alike) // 2]


@contextlib.contextmanager
def _loaded(probe: Probe, device: Device, il: int) -> Iterator[Forward]:
    """Place one layer's weights and a small KV pool on a device for as long as it is timed."""
    with contextlib.ExitStack() as own:
        wanted = (f"blk.{il}.", "rope_")
        specs = [spec for spec in probe.model.specs() if spec.name.startswith(wanted)]
        weights = ResidentWeights(probe.file, device, specs)
        own.callback(weights.close)
        weights.load()
        kv = KvCache(device, probe.kv, N_CELLS)
        own.callback(kv.close)
        forward = Forward(probe.model, device, weights, kv)
        own.callback(forward.close)
        forward.reserve_stream(min(probe.n_ubatch, MOST_PROMPT))
        device.check()
        yield forward


def _timed(forward: Forward, il: int, n: int, n_passes: int) -> float:
    """Time a graph of n tokens that pass the layer so many times; median seconds."""
    region = forward.kv.allocate(N_CELLS)
    assert region is not None, "the pool is free"
    piece = Piece([0] * n, N_CELLS // 2 if n == 1 else 0, region, 0)
    states = np.full((n, forward.model.hparams.n_embd), 0.01, np.float32)
    span = (Span((Step(il),) * n_passes, embed=False, output=False),)

    def run() -> None:
        forward.set_residual(states)
        if forward.run([piece], span) is None:
            raise ComputeError(f"a pass on {forward.device.info.name} was stopped")
        forward.residual(1)  # some devices are only then known to have done it
        forward.device.check()

    found = median_s(run)
    forward.kv.release(region)
    return found


def median_s(work: Callable[[], None]) -> float:
    """Time some work a few times, after a first time that does not count."""
    work()
    found: list[float] = []
    while not found or (len(found) < MOST_RUNS and sum(found) < MOST_S):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _copies(device: Device) -> tuple[float, float]:
    """Measure bytes per second to a device and back.

    Raises:
        CapacityError: it has no room for the bytes.
    """
    free, _ = device.memory()
    n_bytes = min(COPY_BYTES, max(LEAST_COPY_BYTES, free // 4)) if free else COPY_BYTES
    data = np.random.default_rng(1).integers(0, 256, n_bytes, np.uint8)
    with contextlib.ExitStack() as own:
        descriptors = Descriptors(1)
        own.callback(descriptors.free)
        tensor = new_tensor(descriptors, _I8, (n_bytes,), "copied")
        own.callback(place_all([tensor], device).free)
        uploader = own.enter_context(Uploader(device))

        def up(n: int) -> None:
            uploader.send(tensor, 0, data[:n].data)
            uploader.finish()

        def down(n: int) -> None:
            get_range(tensor, data[:n], 0)
            device.check()

        return _rate(up, n_bytes), _rate(down, n_bytes)


def _rate(copy: Callable[[int], None], most_bytes: int) -> float:
    """Return bytes per second of a copy, of as many bytes as are quick enough to try."""
    n_bytes = most_bytes // _SHORT
    copy(n_bytes)
    began = time.perf_counter()
    copy(n_bytes)
    seconds = time.perf_counter() - began
    if seconds * _SHORT * 3 < MOST_S:
        n_bytes = most_bytes
        seconds = median_s(lambda: copy(n_bytes))
    return n_bytes / max(seconds, _LEAST_S)


def place_layers(
    seconds: Sequence[float], rooms: Sequence[int], n_layer: int, entering: Sequence[float] = ()
) -> tuple[int, ...]:
    """Split layers that are passed in turn between devices, so that a pass takes least time.

    Exact: the best way to give the first n layers to the first d devices is the best, over how
    many of them device d takes, of the best way for the others. Each device gets one stretch,
    in the order given; of equal times, that with more layers on earlier devices.

    Args:
        seconds: of one layer, per device.
        rooms: layers that each device has memory for.
        n_layer: layers of the model.
        entering: seconds that a pass takes more where a device has any layer; none if not given.

    Returns:
        For every layer the index of its device.

    Raises:
        CapacityError: all devices together have no room for so many layers.
    """
    if sum(rooms) < n_layer:
        raise CapacityError(
            f"the devices have room for {sum(rooms)} of {n_layer} layers; name another one in "
            "`device`, raise `device_memory`, or take a smaller model or context"
        )
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * n_layer]
    for d, (each, room) in enumerate(zip(seconds, rooms, strict=True)):
        enter = entering[d] if entering else 0.0
        following = list(best)
        for n in range(1, n_layer + 1):
            for k in range(1, min(room, n) + 1):
                before = best[n - k]
                if before is None:
                    continue
                total = before[0] + k * each + enter
                if (seen := following[n]) is None or total < seen[0]:
                    following[n] = (total, (*before[1], *[d] * k))
        best = following
    chosen = best[n_layer]
    assert chosen is not None, "there is room for all"
    return chosen[1]
