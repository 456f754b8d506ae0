"""The watchdog: finds engines and openings without a sign of life, and gives them up.

An engine that is stuck is first asked to stop what it computes: a batch of a prompt is then
computed again. If that does not help, or not for long, its requests fail with 503 and the model is
opened anew at the next use. What the thread holds is counted as lost until it returns.

A model's opening that reads nothing and computes nothing for that time is given up as well, when
the next look finds the same: nothing can be asked of a thread that waits for a disk.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from edgeroute.pulse import Pulse
from edgeroute.runtime.errors import ClosedError
from edgeroute.runtime.units import format_bytes
from edgeroute.server.openings import HungOpening

LOOKS: Final = 6
"""How often one looks in the time that an engine may be silent."""
GRACE_RATIO: Final = 0.25
"""Of that time, what an engine has to come back once it was asked to stop."""
FORGIVE: Final = 4.0
"""Multiples of that time after which a stop that helped is forgotten."""

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is watched: a Runtime."""

    def pulse(self) -> Pulse:
        """Tell since when nothing has come of its work."""

    def interrupt(self) -> None:
        """Stop what it computes now."""

    def abandon(self, error: BaseException) -> int:
        """End all of its requests with an error; return how many."""

    @property
    def stuck_bytes(self) -> int:
        """Bytes that it holds after that, until it returns."""


class Opening(Protocol):
    """A model's opening that is watched."""

    @property
    def pulse(self) -> "Pulsing":
        """Its signs of life."""


class Pulsing(Protocol):
    """Signs of life that are read."""

    def read(self) -> Pulse:
        """Look; tell since when nothing has come of it."""


class Watched(Protocol):
    """Whose engines are watched: a Fleet."""

    @property
    def names(self) -> Sequence[str]:
        """Of the models."""

    @property
    def cannot_open(self) -> Sequence[str]:
        """Names of models that lost memory keeps from being opened."""

    def peek(self, name: str) -> Engine | None:
        """Return a model's engine, if it is open."""

    def abandon(self, name: str, engine: Engine) -> None:
        """Wait no more for an engine."""

    @property
    def openings(self) -> Mapping[str, Opening]:
        """Openings under way, by their models' names."""

    def forsake(self, name: str, error: HungOpening) -> None:
        """Wait no more for an opening."""


@dataclass(slots=True)
class _Suspect:
    """An engine that was asked to stop, when, and whether it came back since."""

    engine: Engine
    asked: float
    came_back: bool = False


class Watchdog:
    """Looks at all open engines again and again. The event loop owns it.

    Args:
        fleet: whose engines.
        limit_s: longest time that an engine may be busy without a sign of life.
    """

    def __init__(self, fleet: Watched, limit_s: float) -> None:
        self._fleet, self._limit_s = fleet, limit_s
        self._suspects: dict[str, _Suspect] = {}
        self._silent: dict[str, Opening] = {}
        self.n_stopped = 0
        """Computations that were asked to stop."""
        self.n_abandoned = 0
        """Engines that were given up."""
        self.n_forsaken = 0
        """Openings that were given up."""

    @property
    def healthy(self) -> bool:
        """Whether no engine is stuck, and none that was keeps a model from being opened."""
        stuck = any(not each.came_back for each in self._suspects.values())
        return not stuck and not self._fleet.cannot_open

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await asyncio.sleep(self._limit_s / LOOKS)
            self.look()

    def look(self) -> None:
        """Look once at every open engine, and at every opening."""
        now = time.monotonic()
        for name in self._fleet.names:
            engine = self._fleet.peek(name)
            suspect = self._suspects.get(name)
            if suspect is not None and suspect.engine is not engine:
                del self._suspects[name]
                suspect = None
            if engine is not None:
                self._judge(name, engine, suspect, now)
        before, self._silent = self._silent, {}
        for name, opening in list(self._fleet.openings.items()):
            idle_s = opening.pulse.read().idle_s
            if idle_s <= self._limit_s:
                continue
            # After a pause of the whole process the first look knows nothing of what follows.
            if before.get(name) is opening:
                self._forsake(name, idle_s)
            else:
                self._silent[name] = opening

    def _forsake(self, name: str, idle_s: float) -> None:
        self.n_forsaken += 1
        _log.error("opening the model %s has read and computed nothing for %.1f s; it is given up",
                   name, idle_s)  # fmt: skip
        self._fleet.forsake(name, HungOpening(
            f"opening the model {name!r} has read and computed nothing for {idle_s:.1f} s and was "
            "given up"
        ))  # fmt: skip

    def _judge(self, name: str, engine: Engine, suspect: _Suspect | None, now: float) -> None:
        pulse = engine.pulse()
        silent_s = pulse.idle_s if pulse.busy else 0.0
        if suspect is None:
            if silent_s > self._limit_s:
                self._stop(name, engine, pulse, now)
            return
        asked_s = now - suspect.asked
        if not suspect.came_back:
            if silent_s < asked_s:  # it has done something since
                suspect.came_back = True
            elif asked_s > GRACE_RATIO * self._limit_s:
                self._give_up(name, engine, pulse)
        elif silent_s > self._limit_s:  # the same again, and stopping it helps nobody
            self._give_up(name, engine, pulse)
        elif asked_s > FORGIVE * self._limit_s:
            del self._suspects[name]

    def _stop(self, name: str, engine: Engine, pulse: Pulse, now: float) -> None:
        _log.error("the engine of %s gave no sign of life for %.1f s while it was busy with %s; it "
                   "is asked to stop that", name, pulse.idle_s, pulse.doing)  # fmt: skip
        self._suspects[name] = _Suspect(engine, now)
        self.n_stopped += 1
        engine.interrupt()

    def _give_up(self, name: str, engine: Engine, pulse: Pulse) -> None:
        self._suspects.pop(name, None)
        self.n_abandoned += 1
        n_ended = engine.abandon(ClosedError(
            f"the engine of {name} gave no sign of life for {pulse.idle_s:.1f} s while it was busy "
            f"with {pulse.doing} and was given up; try again, the model is opened anew"
        ))  # fmt: skip
        self._fleet.abandon(name, engine)
        _log.error("the engine of %s is given up: %d requests ended, %s are held until its thread "
                   "returns", name, n_ended, format_bytes(engine.stuck_bytes))  # fmt: skip
