"""Places on a shelf, the leases that hold their models open, and turns of those who wait."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeroute.engine import Runtime
from edgeroute.runtime.closing import Closing
from edgeroute.shelf_plan import ShelfModel, plan_model

if TYPE_CHECKING:
    from edgeroute.pool_shelf import Shelf

State = Literal["closed", "opening", "open", "closing"]


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """One model and what is known of it.

    Attributes:
        n_bytes: its part of the budget while it is not closed.
        adapters: names of those that it begins with.
        broken: its engine has stopped.
        opener: the lease that opens it, while it is being opened.
        abandoned: its engine computes without end, and is not waited for.
        used: rank of its last use among all of the shelf.
        used_at: time of its last use, or of its opening.
        failed: why it could not be opened the last time.
    """

    model: ShelfModel
    n_bytes: int
    whole_bytes: int
    adapters: tuple[str, ...] = ()
    state: State = "closed"
    runtime: "Future[Runtime]" = field(default_factory=Future)
    opener: "Lease | None" = None
    broken: bool = False
    abandoned: bool = False
    n_leases: int = 0
    used: int = 0
    used_at: float = field(default_factory=time.monotonic)
    n_opened: int = 0
    load_s: float | None = None
    failed: str | None = None

    @property
    def name(self) -> str:
        """Its model's."""
        return self.model.name

    @property
    def ready(self) -> bool:
        """Whether it can be lent at once."""
        return self.state == "open" and not self.broken

    @property
    def paged(self) -> bool:
        """Whether it has less memory than all of it would take."""
        return self.n_bytes < self.whole_bytes


class Lease(Closing):
    """The use of an open model, until `close`."""

    def __init__(self, shelf: "Shelf", place: Place) -> None:
        self._shelf, self._place, self.opened = shelf, place, place.runtime
        self._held = True
        self.counts = True
        """Whether the model is in use by this; a glance at it does not keep it from leaving."""

    @property
    def runtime(self) -> Runtime:
        """The model; waits until it is open.

        Raises:
            EdgerouteError: it could not be opened.
        """
        return self.opened.result()

    def broke(self) -> None:
        """Say that the model's engine has stopped: the next lease opens it anew."""
        self._shelf.give_up(self._place, self.opened)

    def close(self) -> None:
        """Let the model be closed if need be; safe to call twice."""
        held, self._held = self._held, False
        if held:
            self._shelf.take_back(self._place, counts=self.counts)

    def again(self) -> "Lease":
        """Take another lease of the same model, which is open while this one is held."""
        return self._shelf.lend_again(self._place)


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """Somebody's turn: for which model, until when, and which others were lent meanwhile."""

    place: Place
    deadline: float | None
    left: threading.Event | None
    opens: bool = False
    overtaken_by: set[str] = field(default_factory=set)


def make_place(model: ShelfModel, budget: int, owner: str) -> Place:
    """Make the place of a model that is closed; errors as `plan_model`."""
    plan = plan_model(model, budget, owner)
    return Place(
        model=model, n_bytes=plan.n_bytes, whole_bytes=plan.whole_bytes, adapters=plan.adapters
    )


def choose_victims(place: Place, places: Sequence[Place], free_bytes: int) -> list[Place] | None:
    """Choose idle models to close for one that is closed, or broken; None: not yet.

    Args:
        place: of the model that is wanted.
        places: of all models.
        free_bytes: of the budget, now.
    """
    if place.state == "open":
        return None if place.n_leases else [place]
    others = [each for each in places if each is not place]
    if place.state == "closing" or any(each.paged and each.state == "opening" for each in others):
        return None
    if place.paged:
        # What is left for its pages is found by what the process has taken: that must not
        # be other models, which are in the budget already. They may open again beside it.
        kept = [each for each in others if each.state != "closed"]
        busy = any(each.state != "open" or each.n_leases for each in kept)
        return None if busy else kept
    missing = place.n_bytes - free_bytes
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
