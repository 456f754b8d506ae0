"""What a device would reach, from what this machine reaches and the device's stated figures.

Decoding goes through a token's weights once, so its speed is a share of the memory's bandwidth.
That share is taken from a run published for the device; where there is none, from this machine.
Types of weights cost a CPU different arithmetic per byte: their order is this machine's. A GPU
waits for memory whatever the type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.units import format_bytes
from edgeroute.tools.forecast.devices import find_mode
from edgeroute.tools.forecast.records import DeviceProfile, Origin, PowerMode, Speeds
from edgeroute.tools.measure import memory_bandwidth

MOST_RATIO: Final = 0.92
"""No decoding gets more of a memory's peak than this. Source: 0.91 of the stated bandwidth of
an RTX 3090 in plain reads, github.com/ashalliants/ninfer-3090/pull/50."""
MIX: Final = {"Q4_K": 0.7, "Q6_K": 0.3}
"""What published speeds are mostly of: files named Q4_K_M, by bytes. Source: Qwen2.5-Coder-1.5B
has 68 % Q4_K, Llama-3.2-3B 72 %."""
REFERENCE_TYPES: Final = ("Q4_K", "Q4_0", "Q8_0", "Q6_K", "F16")
"""What stands for that mix where its types were not measured, the likeliest first."""
GPU_LAYER_S: Final = 0.0001
"""Launching a layer's kernels, where a profile does not say. Source: that of the Orin Nano."""
GPU_TYPES: Final = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "MXFP4")


def speeds_of(
    device: DeviceProfile, here: Speeds, mode: str | None = None,
    *, memory_bytes_s: float | None = None,
) -> Speeds:  # fmt: skip
    """Compute what a device would reach.

    Args:
        device: its stated figures.
        here: what this machine was measured to reach.
        mode: one of the device's power modes; the one its figures hold in if not given.
        memory_bytes_s: this machine's memory bandwidth, as `measure.memory_bandwidth` reads;
            measured now if it is needed and not given.

    Raises:
        UsageError: the device has no such power mode.
    """
    power = PowerMode(name="", watts=device.active_watts) if mode is None else None
    power = power or find_mode(device, mode or "")
    ratio, how = _ratio(device, here, memory_bytes_s)
    scaled = _Scaled(device=device, here=here, power=power, ratio=ratio)
    name = device.name if mode is None else f"{device.name} in {power.name}"
    origins: dict[str, Origin] = dict.fromkeys(
        ("weight_bytes_s", "prefill_flops_s", "kv_bytes_s", "graph_s", "layer_s", "paged_layer_s",
         "active_watts", "available_bytes"), "computed",
    )  # fmt: skip
    origins |= {"memory_bytes": "stated", "threads": "stated", "storage": _storage_origin(device)}
    return Speeds(
        name=name,
        memory_bytes=device.memory_bytes,
        available_bytes=device.memory_bytes - device.system_bytes,
        weight_bytes_s=scaled.weights(),
        prefill_flops_s=scaled.prefill(),
        kv_bytes_s=scaled.kv(),
        graph_s=here.graph_s,
        layer_s=scaled.layer_s(),
        paged_layer_s=here.paged_layer_s + (scaled.layer_s() if device.processor == "gpu" else 0),
        storage=device.storage,
        threads=device.cores,
        expert_layer_s=here.expert_layer_s,
        overlap_ratio=here.overlap_ratio,
        active_watts=_watts(device, power),
        origins=origins,
        notes=(how, *_notes(device, power, mode)),
    )


def _ratio(device: DeviceProfile, here: Speeds, memory_bytes_s: float | None) -> tuple[float, str]:
    """Return the share of the peak that decoding reaches on the device, and where it is from."""
    if device.decode_ratio is not None:
        source = device.sources.get("decode_ratio", "its profile").partition("; ")[0]
        return device.decode_ratio, (
            f"decoding at {device.decode_ratio:.2f} of {format_bytes(device.memory_bytes_s)}/s "
            f"({source})"
        )
    peak = memory_bytes_s or memory_bandwidth(here.threads).read_bytes_s
    reached = reference(here.weight_bytes_s)
    ratio = min(MOST_RATIO, reached / peak)
    return ratio, (
        f"decoding at {ratio:.2f} of {format_bytes(device.memory_bytes_s)}/s, as "
        f"{format_bytes(reached)}/s of {format_bytes(peak)}/s here"
    )


def reference(speeds: Mapping[str, float]) -> float:
    """Return the speed of what published speeds are of, or of the nearest that was measured."""
    if MIX.keys() <= speeds.keys():
        return 1 / sum(share / speeds[name] for name, share in MIX.items())
    for name in REFERENCE_TYPES:
        if name in speeds:
            return speeds[name]
    ranked = sorted(speeds.values())
    return ranked[len(ranked) // 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaled:
    """Figures of one device in one power mode."""

    device: DeviceProfile
    here: Speeds
    power: PowerMode
    ratio: float

    @property
    def decode_bytes_s(self) -> float:
        """Bytes per second of a file's weights, as published speeds are of."""
        return self.ratio * self.device.memory_bytes_s * self.power.memory_ratio

    @property
    def most_bytes_s(self) -> float:
        return MOST_RATIO * self.device.memory_bytes_s * self.power.memory_ratio

    def weights(self) -> dict[str, float]:
        """Return bytes per second by type."""
        measured = self.here.weight_bytes_s
        if self.device.processor == "gpu":
            return dict.fromkeys([*GPU_TYPES, *measured], self.decode_bytes_s)
        base = reference(measured)
        return {
            name: min(self.most_bytes_s, self.decode_bytes_s * speed / base)
            for name, speed in measured.items()
        }

    def prefill(self) -> dict[str, float]:
        """Return operations per second on prompts, by type."""
        measured = self.here.prefill_flops_s
        flops_s = self.device.flops_s * self.power.compute_ratio
        if self.device.processor == "gpu":
            return dict.fromkeys([*GPU_TYPES, *measured], flops_s)
        base = reference(measured)
        return {name: flops_s * speed / base for name, speed in measured.items()}

    def kv(self) -> float:
        """Return bytes per second of the KV cache: beside weights, it is read as well as here.

        It may be more than memory gives: heads that share a cell read it once.
        """
        beside = self.here.kv_bytes_s / reference(self.here.weight_bytes_s)
        return self.decode_bytes_s * (beside if beside > 0 else 1.0)

    def layer_s(self) -> float:
        """Return seconds that a layer costs beyond its weights."""
        if self.device.layer_s is not None:
            return self.device.layer_s / self.power.compute_ratio
        return GPU_LAYER_S if self.device.processor == "gpu" else self.here.layer_s


def _watts(device: DeviceProfile, power: PowerMode) -> float:
    """Return the watts while decoding: above idling as much as the mode computes, at the most
    what it allows."""
    above = (device.active_watts - device.idle_watts) * power.compute_ratio
    return min(power.watts, device.idle_watts + above)


def _storage_origin(device: DeviceProfile) -> Origin:
    return "computed" if device.sources.get("storage", "").startswith("estimate:") else "stated"


def _notes(device: DeviceProfile, power: PowerMode, mode: str | None) -> list[str]:
    guessed = sorted(
        key for key, text in device.sources.items()
        if text.startswith("estimate:") and key != "power_modes"
    )  # fmt: skip
    notes = [f"estimates of the profile: {', '.join(guessed)}"] if guessed else []
    if mode is not None:
        notes.append(
            f"power mode {power.name}: {power.memory_ratio:g} of its memory speed, "
            f"{power.compute_ratio:g} of its compute"
        )
    elif device.power_modes:
        notes.append(f"power mode {device.power_modes[0].name}")
    return notes
