"""Signs of life of an engine thread, as others see them."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Whether an engine works, and since when nothing has come of it.

    Attributes:
        busy: whether anybody waits for it. An engine that nobody waits for cannot stall.
        idle_s: while busy, seconds since the last progress (a graph was computed, a command ran,
            a round ended) or since it was given something to do, whichever is later. Else
            seconds since the last progress.
        doing: what it does, for people.
    """

    busy: bool
    idle_s: float
    doing: str


@dataclass(slots=True)
class Heart:
    """Times of `time.monotonic`. The engine thread writes `beat`, `command` and `opening`.

    `woke` is when an idle engine was given something to do, by whoever gave it.
    """

    beat: float = field(default_factory=time.monotonic)
    woke: float = field(default_factory=time.monotonic)
    command: bool = False
    opening: bool = False
    """Whether the model is being opened again: that is no stall, however long it takes."""
    _asked: int = 0
    _moved: float = 0.0
    """When somebody last saw that a long computation had got on."""

    def read(self, loaded: "LoadedModel", scheduler: "Scheduler", n_queued: int) -> Pulse:
        """Look, from any thread; nothing is locked and nothing waits."""
        busy = self.command or n_queued > 0 or scheduler.busy
        if self.opening:
            return Pulse(busy=True, idle_s=0.0, doing="opening the model again")
        devices = [loaded.device] if loaded.small is None else [loaded.device, loaded.small.device]
        asked = sum(device.stop_flag.n_asked for device in devices)
        if asked != self._asked:
            self._asked, self._moved = asked, time.monotonic()
        beats = [self.beat, self._moved, *(device.beat for device in devices)]
        if busy:
            beats.append(self.woke)
        doing = "a command" if self.command else scheduler.doing
        idle_s = max(0.0, time.monotonic() - max(beats))
        return Pulse(busy=busy, idle_s=idle_s, doing=doing if busy else "nothing")
