"""Several devices that compute one model, seen as one: threads, stops and signs of life."""

from collections.abc import Sequence
from dataclasses import replace

from edgeroute.runtime.device import Device


class DeviceGroup(Device):
    """Devices behind the first of them, which allocates and computes where the group is asked to.

    All of them share one stop flag. The group owns none: whoever opened them closes them.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        """Join devices; the first is what the group computes on."""
        first, *others = devices
        vars(self).update(vars(first))  # whatever a device is asked for, the first answers
        self.first, self.devices = first, (first, *others)
        for device in others:
            device.stop_flag = first.stop_flag
        self._watches = False
        named = [each.info for each in self.devices if not each.is_cpu] or [first.info]
        self.info = replace(first.info, name=",".join(info.name for info in named),
                            description="; ".join(info.description for info in named))  # fmt: skip

    def note(self, what: str) -> None:
        """Add to its description what each device does: where that differs, so may last bits."""
        self.info = replace(self.info, description=f"{self.info.description}; {what}")

    @property
    def stopped(self) -> bool:
        """Whether what is computed now should end; asked between two graphs.

        Devices without a way to be stopped within a graph are stopped there.
        """
        return self._watches and self.stop_flag.is_set()

    @property
    def beat(self) -> float:
        """When any of them last ended a computation."""
        return max(device.beat for device in self.devices)

    @beat.setter
    def beat(self, now: float) -> None:
        self.first.beat = now

    def set_threads(self, n_threads: int) -> None:
        """Set how many threads the next computation uses, wherever that means something."""
        for device in self.devices:
            device.set_threads(n_threads)
        self.n_threads = n_threads

    def watch_stop_flag(self, on: bool) -> None:
        """Let `stop_flag` stop the computations that follow, on all of them."""
        self._watches = on
        for device in self.devices:
            device.watch_stop_flag(on)

    def check(self) -> None:
        """Raise DeviceLostError where any of them is gone."""
        for device in self.devices:
            device.check()

    def compute(self, graph: int) -> bool:
        """Compute a graph on the first of them, unless a stop was asked for: see Device."""
        return False if self.stopped else self.first.compute(graph)

    def close(self) -> None:
        """Nothing: the group owns no device."""
