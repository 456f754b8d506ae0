"""Which devices compute where a user says `auto`, and what to say of those that a user names."""

from edgeroute.config import RunParams
from edgeroute.device_proofs import DeviceProof, load_proof, save_proof, subject
from edgeroute.runtime.device import RPC_PREFIX, Device, DeviceInfo, devices
from edgeroute.runtime.errors import CapacityError, ComputeError, LibraryError
from edgeroute.runtime.gguf import GGUFFile

CPU = "cpu"
MIN_GAIN = 1.05
"""A device that is not this much quicker than the processor is left alone."""


def choose(params: RunParams, file: GGUFFile) -> tuple[str, ...]:
    """Return the devices of `device="auto"`: those proved to answer like the processor, and faster.

    A device without a proof is tried now, which takes some seconds and is remembered. Devices
    of other machines are never taken unasked, nor is one that could not be tried.

    Returns:
        Names, the quickest first, no more than the model's file needs the memory of; what they
        have no room for is the processor's. That alone where no device is of use.
    """
    found: list[tuple[float, DeviceInfo]] = []
    for info in candidates():
        proof = _proved(info, file, params)
        if proof is not None and proof.holds and proof.gain >= MIN_GAIN:
            found.append((proof.gain, info))
    found.sort(key=lambda each: -each[0])
    chosen: list[str] = []
    room = 0
    for _, info in found:
        chosen.append(info.name)
        room += info.memory_free_bytes
        if room >= file.size_bytes:
            return tuple(chosen)
    return tuple(chosen) or (CPU,)


def candidates() -> list[DeviceInfo]:
    """List the GPUs that ggml found on this machine."""
    return [info for info in devices() if info.kind in ("gpu", "igpu") and not _is_remote(info)]


def _is_remote(info: DeviceInfo) -> bool:
    return info.name.upper().startswith(RPC_PREFIX.rstrip(":").upper())


def _proved(info: DeviceInfo, file: GGUFFile, params: RunParams) -> DeviceProof | None:
    """Return what is known of a device, or try it; None where it cannot be tried."""
    known = load_proof(subject(info, file, params.kv_type))
    if known is not None:
        return known
    try:
        return prove(info.name, file, params)
    except (CapacityError, ComputeError, LibraryError):
        return None  # it has no memory left, or fails: the processor computes, as without it


def prove(device: str, file: GGUFFile, params: RunParams) -> DeviceProof:
    """Compare a device with the processor on the first layers of a model, and keep what came out.

    Args:
        device: ggml's name for it, or rpc:host:port.
        file: the model.
        params: how it would be run: `kv_type`, `threads` and `repack_experts` count.

    Raises:
        UsageError: there is no such device.
        CapacityError: it, or the processor, has no memory for that.
        DeviceLostError: it went away.
    """
    # A model that runs on the processor should not wait for this import.
    from edgeroute.device_trial import try_device

    with Device.open(device) as opened:
        proof = try_device(opened, file, params)
        save_proof(subject(opened.info, file, params.kv_type), proof)
    return proof


def warning_of(device: Device, file: GGUFFile, kv_type: str = "f16") -> str | None:
    """Return what a user of a device should know before its answers are trusted.

    Looks at what was proved before and computes nothing; one small file is read.

    Returns:
        None for the processor, and for a device that is proved to answer like it.
    """
    if device.is_cpu:
        return None
    name = device.info.name
    proof = load_proof(subject(device.info, file, kv_type))
    if proof is None:
        return (f"nothing proves yet that {name} answers like the processor with this model; "
                f"compare them: {proving(name, file, kv_type)}")  # fmt: skip
    if proof.holds:
        return None
    return (f"DO NOT TRUST answers computed on {name}: {proof.note}; use --device cpu, and after "
            f"another driver or build compare again: {proving(name, file, kv_type)}")  # fmt: skip


def proving(name: str, file: GGUFFile, kv_type: str = "f16") -> str:
    """Return the command that compares a device with the processor."""
    path = str(file.path)
    model = f'"{path}"' if " " in path else path
    remote = f" --rpc {name.removeprefix(RPC_PREFIX)}" if name.startswith(RPC_PREFIX) else ""
    kept = "" if kv_type == "f16" else f" --kv-type {kv_type}"
    return f"edgeroute doctor --prove {model}{remote}{kept}"
