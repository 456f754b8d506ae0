"""Models of a pool or a server, opened on demand under one byte budget.

Who needs a model takes a lease of it. A closed one is opened for the lease; to make room, idle
models are closed, the least recently used first. One with a lease is never closed, so that a
model opened for a query answers it. Leases are given in the order they were asked for; one of
an open model may overtake whoever waits for room, as long as that room is not made of it.

An engine that was abandoned, because it computes without end, is replaced at the next lease. Its
memory counts as lost until it returns.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Final

from edgeroute.engine import Runtime
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CapacityError, ClosedError, EdgerouteError
from edgeroute.runtime.units import format_bytes
from edgeroute.shelf_place import Lease, Place, State, Ticket, choose_victims, make_place
from edgeroute.shelf_plan import ShelfModel

SETTINGS: Final = ("threads", "n_ctx", "n_kv", "n_ubatch", "max_batch", "kv_type", "device")
"""Of a Runtime, those that a pool's models share."""
STUCK_POLL_S: Final = 0.2
"""How often it is looked whether a lost engine has returned."""


class NobodyWaits(ClosedError):
    """Who waited for a lease has left before it could be given."""


class Shelf(Closing):
    """Opens, lends and closes models. Thread-safe.

    Args:
        models: names differ.
        budget_bytes: of all open models together.
        owner: whose models they are, for messages.
        close_s: how long a model that is closed is waited for before it is given up as lost; None
            is for ever.

    Raises:
        CapacityError: a model may take more than all of them together.
        ModelFileError, UnsupportedModelError: a file cannot be used.
        AdapterFileError, DepthFileError: what goes with a model cannot be used.
    """

    def __init__(
        self, models: Iterable[ShelfModel], budget_bytes: int, owner: str = "pool", *,
        close_s: float | None = None,
    ) -> None:  # fmt: skip
        self.budget_bytes, self._owner, self._close_s = budget_bytes, owner, close_s
        self._changed = threading.Condition()
        self.places: Mapping[str, Place] = {
            each.name: make_place(each, budget_bytes, owner) for each in models
        }
        self._lost: dict[int, tuple[str, int]] = {}  # engines and openings that do not return
        self._queue: deque[Ticket] = deque()
        self._closed = False
        self._tick = 0
        self.n_evicted = 0
        """Models closed to make room."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the models that are not closed, and what is lost."""
        with self._changed:
            kept = sum(each.n_bytes for each in self.places.values() if each.state != "closed")
            return kept + self.lost_bytes

    @property
    def lost_bytes(self) -> int:
        """Bytes of abandoned engines, and openings, that have not returned."""
        with self._changed:
            return sum(n_bytes for _, n_bytes in self._lost.values())

    def n_lost(self, name: str) -> int:
        """Tell how many engines and openings of a model were abandoned and have not returned."""
        with self._changed:
            return sum(each == name for each, _ in self._lost.values())

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
                        f"the {self._owner}, not even paged: {error}", error.smallest_bytes,
                    ) from error  # fmt: skip

    def lease(
        self, name: str, wait_s: float | None = None, left: threading.Event | None = None
    ) -> Lease:
        """Take the use of a model, opening it if need be.

        Args:
            name: of the model.
            wait_s: longest wait for room, in seconds; None is for ever. Loading is not counted.
            left: ends the wait for room when it is set; see `wake`.

        Raises:
            CapacityError: there was no room in that time.
            NobodyWaits: `left` was set.
            ClosedError: the shelf was closed.
            EdgerouteError: the model could not be opened.
        """
        place = self.places[name]
        deadline = None if wait_s is None else time.monotonic() + wait_s
        ticket = Ticket(place=place, deadline=deadline, left=left)
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

    def try_lease(self, name: str) -> Lease | None:
        """Take the use of a model that is open and free to be lent; None otherwise."""
        place = self.places[name]
        with self._changed:
            if self._closed or not place.ready:
                return None
            if self._queue and not self._may_overtake(place):
                return None
            return self._lend(place)

    def lend_again(self, place: Place) -> Lease:
        """Lend a model that is held by another lease."""
        with self._changed:
            return self._lend(place)

    def wake(self) -> None:
        """Have all who wait look whether they still have to."""
        with self._changed:
            self._changed.notify_all()

    def _turn(self, ticket: Ticket) -> Lease | list[Place]:
        """Wait until a lease can be given, or idle models are found to be closed before."""
        place = ticket.place
        with self._changed:
            while True:
                if self._closed:
                    raise ClosedError(f"this {self._owner.title()} was closed; make a new one")
                if ticket.left is not None and ticket.left.is_set():
                    raise NobodyWaits(f"nobody waits for the model {place.name!r} any more")
                first = self._first() is ticket
                if place.state in ("opening", "open") and not place.broken:
                    if first or self._may_overtake(place):
                        return self._lend(place)
                elif first and (victims := self._victims(place)) is not None:
                    if victims:
                        for each in victims:
                            each.state = "closing"
                        return victims
                    place.state, place.runtime, ticket.opens = "opening", Future(), True
                    place.opener = self._lend(place)
                    return place.opener
                self._wait(ticket)

    def _lend(self, place: Place) -> Lease:
        place.n_leases += 1
        return Lease(self, place)

    def _first(self) -> Ticket:
        """Whose turn it is: who waits for what is lost holds nobody else up."""
        most = self.budget_bytes - self.lost_bytes
        return next((each for each in self._queue if each.place.n_bytes <= most), self._queue[0])

    def _may_overtake(self, place: Place) -> bool:
        """Whether the first in the queue could have its room with this model left open."""
        first = self._first()
        if first.place.paged:
            return False
        names = first.overtaken_by | {place.name}
        open_bytes = sum(self.places[name].n_bytes for name in names)
        if open_bytes + first.place.n_bytes > self.budget_bytes:
            return False
        first.overtaken_by.add(place.name)
        return True

    def _victims(self, place: Place) -> list[Place] | None:
        free_bytes = self.budget_bytes - self.used_bytes
        return choose_victims(place, list(self.places.values()), free_bytes)

    def _wait(self, ticket: Ticket) -> None:
        """Wait for a change.

        Raises:
            CapacityError: that must not be, or has lasted too long.
        """
        left_s = None if ticket.deadline is None else ticket.deadline - time.monotonic()
        if left_s is None or left_s > 0:
            self._changed.wait(left_s)
            return
        raise CapacityError(self.no_room(ticket.place.name) + "; raise timeout_s, or the "
                            f"{self._owner}'s memory")  # fmt: skip

    def no_room(self, name: str) -> str:
        """Say with numbers why a model has to wait for room."""
        place = self.places[name]
        busy = ", ".join(
            f"{each.name} {format_bytes(each.n_bytes)}"
            for each in self.places.values() if each.n_leases
        )  # fmt: skip
        lost = self.lost_bytes
        held = f"; an engine that does not return holds {format_bytes(lost)}" if lost else ""
        return (
            f"there is no room for the model {place.name!r}, {format_bytes(place.n_bytes)} of the "
            f"{self._owner}'s {format_bytes(self.budget_bytes)}, while others answer "
            f"({busy or 'waiting ones come first'}){held}"
        )

    def _evict(self, victims: list[Place]) -> None:
        for each in victims:
            broken = each.broken
            self._shut(each, self._close_s)
            with self._changed:
                self.n_evicted += not broken

    def _shut(self, place: Place, wait_s: float | None) -> None:
        """Close a model whose state is `closing`; one that is abandoned is not waited for."""
        runtime = place.runtime.result()
        ended = threading.Event()

        def shut() -> None:
            try:
                runtime.close()
                while runtime.stuck_bytes:  # an abandoned engine is not waited for in `close`
                    time.sleep(STUCK_POLL_S)
            finally:
                with self._changed:
                    ended.set()
                    self._lost.pop(id(runtime), None)
                    self._changed.notify_all()

        threading.Thread(target=shut, name="edgeroute-close", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: ended.is_set() or place.abandoned, wait_s)
            if not ended.is_set():
                self._lost[id(runtime)] = place.name, place.n_bytes
            place.state, place.broken, place.abandoned = "closed", False, False
            self._changed.notify_all()

    def _open(self, place: Place, lease: Lease) -> None:
        """Open a model whose room is reserved, and tell all who have a lease of it."""
        opened, began = lease.opened, time.monotonic()
        try:
            runtime = Runtime(place.model.path, memory=place.n_bytes, **place.model.arguments())
        except BaseException as error:
            ours = not isinstance(error, Exception)
            others = ClosedError("opening it was broken off") if ours else error
            with self._changed:
                if not self._come_back(opened):
                    place.failed = str(error) or type(error).__name__
                    lease.close()
                    self._set_state(place, "closed")
                    opened.set_exception(others)
            raise
        with self._changed:
            if id(opened) not in self._lost:
                place.load_s = time.monotonic() - began
                place.n_opened += 1
                place.failed, place.used_at = None, time.monotonic()
                self._set_state(place, "open")
                opened.set_result(runtime)
                return
        runtime.close()
        self._come_back(opened)
        raise NobodyWaits(f"opening the model {place.name!r} was given up before it ended")

    def forsake(self, place: Place, error: EdgerouteError) -> bool:
        """Wait no more for the opening of a model, which hangs; tell whether there was one.

        Whoever has a lease of it gets `error`; the next one opens it anew. Its part of the budget
        counts as lost until the opening returns: what it holds by then, only it knows.
        """
        with self._changed:
            if place.state != "opening" or place.opener is None:
                return False
            self._lost[id(place.runtime)] = place.name, place.n_bytes
            place.runtime.set_exception(error)
            place.failed = str(error)
            place.opener.close()
            self._set_state(place, "closed")
            return True

    def _come_back(self, opened: "Future[Runtime]") -> bool:
        """Count an opening as lost no longer; tell whether it was."""
        with self._changed:
            self._changed.notify_all()
            return self._lost.pop(id(opened), None) is not None

    def _set_state(self, place: Place, state: State) -> None:
        with self._changed:
            place.state = state
            self._changed.notify_all()

    def take_back(self, place: Place, *, counts: bool = True) -> None:
        """End a lease; `counts` says whether it was a use."""
        with self._changed:
            place.n_leases -= 1
            if counts:
                self._tick += 1
                place.used, place.used_at = self._tick, time.monotonic()
            self._changed.notify_all()

    def give_up(self, place: Place, opened: "Future[Runtime]") -> None:
        """Lend a model no longer: its engine, that of `opened`, has stopped."""
        with self._changed:
            if place.runtime is opened and place.state == "open":
                place.broken = True

    def abandon(self, place: Place, opened: "Future[Runtime]") -> None:
        """Wait no more for a model's engine, that of `opened`, which does not return."""
        with self._changed:
            if place.runtime is opened and place.state in ("open", "closing"):
                place.broken = place.abandoned = True
                self._changed.notify_all()

    def unload(self, name: str) -> bool:
        """Close a model unless it is busy, opening or closing; tell whether it is closed now."""
        return self._close_where(lambda each: each.name == name, [self.places[name]])

    def close_unused(self, idle_s: float) -> bool:
        """Close models that nobody has used for so long; tell whether there was any."""
        since = time.monotonic() - idle_s
        return self._close_where(lambda each: each.used_at <= since, [])

    def _close_where(self, chosen: Callable[[Place], bool], closed: list[Place]) -> bool:
        """Close idle models; tell whether any was, or those of `closed` are so already."""
        with self._changed:
            found = [
                each for each in self.places.values()
                if each.state == "open" and not each.n_leases and chosen(each)
            ]  # fmt: skip
            for each in found:
                each.state = "closing"
        for each in found:
            self._shut(each, self._close_s)
        return bool(found) or any(each.state == "closed" for each in closed)

    def close(self) -> None:
        """End running answers with ClosedError and close all models; safe to call twice."""
        self.end(None)

    def end(self, wait_s: float | None) -> bool:
        """Do the same as `close`, but wait only so long; safe to call twice.

        Args:
            wait_s: longest wait for engines to end; None is for ever.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            deadline = None if wait_s is None else time.monotonic() + wait_s
            while any(each.state in ("opening", "closing") for each in self.places.values()):
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                self._changed.wait(left_s)
            found = [each for each in self.places.values() if each.state == "open"]
            for each in found:
                each.state = "closing"
        for each in found:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._shut(each, left_s)
        return not self._lost
