"""A pool's models, opened on demand under one byte budget.

Who needs a model takes a lease of it. A closed one is opened for the lease; to make room, idle
models are closed, the least recently used first. One with a lease is never closed, so that a
model opened for a query answers it. Leases are given in the order they were asked for; one of
an open model may overtake whoever waits for room, as long as that room is not made of it.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from edgeroute.config import RunParams
from edgeroute.engine import Runtime
from edgeroute.loaded import budget_bytes, plan_memory
from edgeroute.models.registry import describe
from edgeroute.pool_config import Profile
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, ClosedError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import format_bytes
from edgeroute.runtime.weights import ResidentWeights

State = Literal["closed", "opening", "open", "closing"]
SETTINGS: Final = ("threads", "n_ctx", "n_kv", "n_ubatch", "max_batch", "kv_type", "device")
"""Of a Runtime, those that a pool's models share."""


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """One model and what is known of it. `n_bytes` is its part of the budget while not closed."""

    profile: Profile
    n_bytes: int
    whole_bytes: int
    state: State = "closed"
    runtime: "Future[Runtime]" = field(default_factory=Future)
    broken: bool = False
    n_leases: int = 0
    used: int = 0
    n_opened: int = 0
    load_s: float | None = None

    @property
    def paged(self) -> bool:
        """Whether it has less memory than all of it would take."""
        return self.n_bytes < self.whole_bytes


class Lease(Closing):
    """The use of an open model, until `close`."""

    def __init__(self, shelf: "Shelf", place: Place) -> None:
        self._shelf, self._place, self._opened = shelf, place, place.runtime
        self._held = True

    @property
    def runtime(self) -> Runtime:
        """The model; waits until it is open.

        Raises:
            EdgerouteError: it could not be opened.
        """
        return self._opened.result()

    def broke(self) -> None:
        """Say that the model's engine has stopped: the next lease opens it anew."""
        self._shelf.give_up(self._place, self._opened)

    def close(self) -> None:
        """Let the model be closed if need be; safe to call twice."""
        held, self._held = self._held, False
        if held:
            self._shelf.take_back(self._place)


@dataclass(slots=True, kw_only=True, eq=False)
class _Ticket:
    """Somebody's turn: for which model, until when, and which others were lent meanwhile."""

    place: Place
    deadline: float | None
    opens: bool = False
    overtaken_by: set[str] = field(default_factory=set)


class Shelf(Closing):
    """Opens, lends and closes models. Thread-safe.

    Args:
        profiles: of the models, by name.
        params: settings of every Runtime. `memory` is the budget of all open models together,
            in bytes.

    Raises:
        CapacityError: a model may take more than all of them together.
        ModelFileError, UnsupportedModelError: a file cannot be used.
    """

    def __init__(self, profiles: Mapping[str, Profile], params: RunParams) -> None:
        self.budget_bytes = budget_bytes(params)
        self._settings: dict[str, Any] = {name: getattr(params, name) for name in SETTINGS}
        self._changed = threading.Condition()
        self.places: Mapping[str, Place] = {
            name: _plan(each, self.budget_bytes, params) for name, each in profiles.items()
        }
        self._queue: deque[_Ticket] = deque()
        self._closed = False
        self._tick = 0
        self.n_evicted = 0
        """Models closed to make room."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the models that are not closed."""
        return sum(each.n_bytes for each in self.places.values() if each.state != "closed")

    @property
    def n_waiting(self) -> int:
        """Leases that are waited for."""
        return len(self._queue)

    def must_evict(self, name: str) -> bool:
        """Tell whether opening a model now would need others to be closed."""
        place = self.places[name]
        free = self.budget_bytes - self.used_bytes
        return place.state == "closed" and (
            place.n_bytes > free or (place.paged and self.used_bytes > 0)
        )

    def check_paged(self) -> None:
        """Open once every model that has to be paged: only that tells whether it can be.

        Raises:
            CapacityError: it does not fit even so; the message names the smallest budget.
        """
        for name, place in self.places.items():
            if place.paged:
                try:
                    self.lease(name).close()
                except CapacityError as error:
                    raise CapacityError(
                        f"the model {name!r} does not fit its {format_bytes(place.n_bytes)} of "
                        f"the pool, not even paged: {error}", error.smallest_bytes,
                    ) from error  # fmt: skip

    def lease(self, name: str, wait_s: float | None = None) -> Lease:
        """Take the use of a model, opening it if need be.

        Args:
            name: of the model.
            wait_s: longest wait for room, in seconds; None is for ever. Loading is not counted.

        Raises:
            CapacityError: there was no room in that time.
            ClosedError: the pool was closed.
            EdgerouteError: the model could not be opened.
        """
        place = self.places[name]
        deadline = None if wait_s is None else time.monotonic() + wait_s
        ticket = _Ticket(place=place, deadline=deadline)
        with self._changed:
            self._queue.append(ticket)
        try:
            while isinstance(found := self._turn(ticket), list):
                self._evict(found)
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()
        if ticket.opens:
            self._open(place, found)
        return found

    def _turn(self, ticket: _Ticket) -> Lease | list[Place]:
        """Wait until a lease can be given, or idle models are found to be closed before."""
        place = ticket.place
        with self._changed:
            while True:
                if self._closed:
                    raise ClosedError("this Pool was closed; make a new one")
                first = self._queue[0] is ticket
                if place.state in ("opening", "open") and not place.broken:
                    if first or self._may_overtake(place):
                        return self._lend(place)
                elif first and (victims := self._victims(place)) is not None:
                    if victims:
                        for each in victims:
                            each.state = "closing"
                        return victims
                    place.state, place.runtime, ticket.opens = "opening", Future(), True
                    return self._lend(place)
                self._wait(ticket)

    def _lend(self, place: Place) -> Lease:
        place.n_leases += 1
        return Lease(self, place)

    def _may_overtake(self, place: Place) -> bool:
        """Whether the first in the queue could have its room with this model left open."""
        first = self._queue[0]
        if first.place.paged:
            return False
        names = first.overtaken_by | {place.profile.name}
        open_bytes = sum(self.places[name].n_bytes for name in names)
        if open_bytes + first.place.n_bytes > self.budget_bytes:
            return False
        first.overtaken_by.add(place.profile.name)
        return True

    def _victims(self, place: Place) -> list[Place] | None:
        """Choose idle models to close for one that is closed, or broken; None: not yet."""
        if place.state == "open":
            return None if place.n_leases else [place]
        others = [each for each in self.places.values() if each is not place]
        if place.state == "closing" or any(
            each.paged and each.state == "opening" for each in others
        ):
            return None
        if place.paged:
            # What is left for its pages is found by what the process has taken: that must not
            # be other models, which are in the budget already. They may open again beside it.
            kept = [each for each in others if each.state != "closed"]
            busy = any(each.state != "open" or each.n_leases for each in kept)
            return None if busy else kept
        missing = place.n_bytes - (self.budget_bytes - self.used_bytes)
        idle = [each for each in others if each.state == "open" and not each.n_leases]
        found: list[Place] = []
        for each in sorted(idle, key=lambda each: each.used):
            if missing > 0:
                found.append(each)
                missing -= each.n_bytes
        if missing > 0:
            return None
        for each in list(found):  # small ones that a larger one behind them made needless
            if each.n_bytes <= -missing:
                found.remove(each)
                missing += each.n_bytes
        return found

    def _wait(self, ticket: _Ticket) -> None:
        """Wait for a change.

        Raises:
            CapacityError: that must not be, or has lasted too long.
        """
        left_s = None if ticket.deadline is None else ticket.deadline - time.monotonic()
        if left_s is None or left_s > 0:
            self._changed.wait(left_s)
            return
        place = ticket.place
        busy = ", ".join(
            f"{each.profile.name} {format_bytes(each.n_bytes)}"
            for each in self.places.values() if each.n_leases
        )  # fmt: skip
        raise CapacityError(
            f"there is no room for the model {place.profile.name!r}, "
            f"{format_bytes(place.n_bytes)} of the pool's {format_bytes(self.budget_bytes)}, while "
            f"others answer ({busy or 'waiting ones come first'}); raise timeout_s, or the pool's "
            "memory"
        )

    def _evict(self, victims: list[Place]) -> None:
        for each in victims:
            try:
                each.runtime.result().close()
            finally:
                with self._changed:
                    self.n_evicted += not each.broken
                    each.state, each.broken = "closed", False
                    self._changed.notify_all()

    def _open(self, place: Place, lease: Lease) -> None:
        """Open a model whose room is reserved, and tell all who have a lease of it."""
        opened, began = place.runtime, time.monotonic()
        try:
            runtime = Runtime(place.profile.path, memory=place.n_bytes, **self._settings)
        except BaseException as error:
            lease.close()
            self._set_state(place, "closed")
            others = error if isinstance(error, Exception) else ClosedError("opening it was broken "
                                                                           "off")  # fmt: skip
            opened.set_exception(others)
            raise
        with self._changed:
            place.load_s = time.monotonic() - began
            place.n_opened += 1
            self._set_state(place, "open")
            opened.set_result(runtime)

    def _set_state(self, place: Place, state: State) -> None:
        with self._changed:
            place.state = state
            self._changed.notify_all()

    def take_back(self, place: Place) -> None:
        """End a lease."""
        with self._changed:
            place.n_leases -= 1
            self._tick += 1
            place.used = self._tick
            self._changed.notify_all()

    def give_up(self, place: Place, opened: "Future[Runtime]") -> None:
        """Lend a model no longer: its engine, that of `opened`, has stopped."""
        with self._changed:
            if place.runtime is opened and place.state == "open":
                place.broken = True

    def close(self) -> None:
        """End running answers with ClosedError and close all models; safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while any(each.state in ("opening", "closing") for each in self.places.values()):
                self._changed.wait()
            found = [each for each in self.places.values() if each.state == "open"]
            for each in found:
                each.state = "closing"
        for each in found:
            try:
                each.runtime.result().close()
            finally:
                self._set_state(each, "closed")


def _plan(profile: Profile, budget: int, params: RunParams) -> Place:
    """Find from a model's header what it takes, whole, and give it that or what it may have.

    Raises:
        CapacityError: its profile wants more than the budget.
    """
    with contextlib.ExitStack() as own:
        file = own.enter_context(GGUFFile.open(profile.path))
        model = describe(file)
        device = own.enter_context(Device.open(params.device))
        weights = ResidentWeights(file, device, model.specs(), repack_experts=params.repack_experts)
        own.callback(weights.close)
        whole = plan_memory(model.hparams, weights, params).total_bytes
    if profile.memory is not None and profile.memory > budget:
        raise CapacityError(
            f"the model {profile.name!r} wants {format_bytes(profile.memory)}, over the pool's "
            f"{format_bytes(budget)}; lower models.{profile.name}.memory, or raise the pool's",
            profile.memory,
        )
    n_bytes = min(whole, budget if profile.memory is None else profile.memory)
    return Place(profile=profile, n_bytes=n_bytes, whole_bytes=whole)
