"""Opens the devices that the setting `device` names."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from edgeroute.config import RunParams
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_group import DeviceGroup
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile

CPU, AUTO = "cpu", "auto"
MAX_DEVICES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices(Closing):
    """The devices of one model, open.

    Attributes:
        cpu: this machine's processor, which is always there.
        accelerators: the others, in the order in which they were named.
        cpu_shares: whether the processor was named beside them: it then computes as many layers
            as pays, and else only those that the others have no room for.
        chosen: whether they were chosen by `auto`: one without room is then left out, and else
            refused.
        face: what stands for all of them: threads, stops, signs of life.
    """

    cpu: Device
    accelerators: tuple[Device, ...] = ()
    cpu_shares: bool = False
    chosen: bool = False
    face: Device

    @property
    def all(self) -> tuple[Device, ...]:
        """Every device, the accelerators first."""
        return (*self.accelerators, self.cpu)

    def close(self) -> None:
        """Close all of them; safe to call twice."""
        for device in self.all:
            device.close()


def open_devices(params: RunParams, file: GGUFFile) -> Devices:
    """Open what `params.device` names; for `auto`, what is proved to pay for this model.

    Raises:
        UsageError: there is no such device, or one is named twice.
        DeviceLostError: nobody answers at an RPC address.
    """
    if not isinstance(params.device, str):
        raise UsageError(f"device must be text, got {params.device!r:.200}")
    chosen = params.device.strip().lower() == AUTO
    names = _chosen(params, file) if chosen else _parse(params.device)
    with contextlib.ExitStack() as own:
        cpu = own.enter_context(Device.open(CPU))
        others = [name for name in names if name.lower() != CPU]
        found = [own.enter_context(Device.open(name)) for name in others]
        accelerators = tuple(device for device in found if not device.is_cpu)
        _check_distinct(others, found)
        shares = len(accelerators) < len(names)
        face = DeviceGroup([*accelerators, cpu]) if accelerators else cpu
        opened = Devices(cpu=cpu, accelerators=accelerators, cpu_shares=shares, chosen=chosen,
                         face=face)  # fmt: skip
        own.pop_all()
    return opened


def _chosen(params: RunParams, file: GGUFFile) -> tuple[str, ...]:
    # A model on the processor should not wait for this import.
    from edgeroute.device_choice import choose

    return choose(params, file)


def _parse(text: str) -> list[str]:
    """Take a list of names with commas between apart.

    Raises:
        UsageError: it is none, or names a device twice.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(names) > MAX_DEVICES:
        raise UsageError(
            f"device must be cpu, auto, or 1 to {MAX_DEVICES} names of devices with commas "
            f"between, such as cuda0 or rpc:host:port; got {text!r:.200}"
        )
    if AUTO in (lowered := [name.lower() for name in names]):
        raise UsageError(f"auto chooses the devices by itself: give it alone, not {text!r:.200}")
    _refuse_repeated(names, lowered)
    return names


def _check_distinct(names: Sequence[str], devices: Sequence[Device]) -> None:
    """Refuse two names of one device, such as `gpu` and `cuda0`."""
    _refuse_repeated(names, [f"{each.info.name} {each.info.pointer}" for each in devices])


def _refuse_repeated(names: Sequence[str], keys: Sequence[str]) -> None:
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise UsageError(f"{names[keys.index(key)]} and {names[i]} are one device; name each "
                             "device once")  # fmt: skip
