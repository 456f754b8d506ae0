"""The configured models: opened on demand, evicted by bytes, never while loading or busy.

The event loop owns it. What waits for room or opens a model runs in threads of its own, one for
each model at most: all who wait for the same model share its opening.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from edgeroute.config import RunParams
from edgeroute.engine import Runtime
from edgeroute.loaded import budget_bytes
from edgeroute.pool_shelf import NobodyWaits, Shelf
from edgeroute.runtime.errors import CapacityError, ClosedError, DeviceLostError, EdgerouteError
from edgeroute.runtime.units import format_bytes
from edgeroute.server.errors import ApiError, as_api_error
from edgeroute.server.logs import log
from edgeroute.server.openings import MAX_HUNG, HungOpening, Opening
from edgeroute.server.records import ALIAS, ModelFacts, ServerParams
from edgeroute.server.watchdog import Engine
from edgeroute.shelf_place import Lease, Place
from edgeroute.shelf_plan import ShelfModel, with_room

RETRY_S: Final = 2.0
"""When another try may succeed, where nothing better is known."""
LOAD_S: Final = 5.0
"""What opening a model is taken to last, until it was measured."""
DISK: Final = "see whether its disk or network file system answers"
"""What to do about an opening that hangs."""
CLOSE_S: Final = 30.0
"""How long a model may take to close, at least: saved sessions are written meanwhile."""
UNUSED_POLLS: Final = 4
"""How often in `idle_s` it is looked for models that are unused."""

_log = logging.getLogger(__name__)


class FleetUse:
    """A model that is open and stays so; the `Use` protocol."""

    def __init__(self, name: str, lease: Lease) -> None:
        self._name, self._lease = name, lease
        self._runtime = lease.runtime

    @property
    def name(self) -> str:
        """As configured."""
        return self._name

    @property
    def runtime(self) -> Runtime:
        """What answers."""
        return self._runtime

    def broke(self) -> None:
        """Say that its engine has stopped: the next use opens the model anew."""
        self._lease.broke()


class Fleet:
    """The `Models` protocol over a Shelf.

    Args:
        params: of the server. `memory` is the budget of all open models together.
        models: the default one first.

    Raises:
        CapacityError: a model may take more than the budget.
        EdgerouteError: a model's file, or what goes with it, cannot be used.
    """

    def __init__(self, params: ServerParams, models: Iterable[ShelfModel]) -> None:
        budget = budget_bytes(RunParams(memory=params.memory))
        models = [with_room(each, budget, "server") for each in models]
        self._shelf = Shelf(models, budget, "server", close_s=max(CLOSE_S, params.watchdog_s))
        self._params = params
        self._names = list(self._shelf.places)
        self._created = {each.name: _created(each) for each in self.places}
        self._threads = ThreadPoolExecutor(2 * len(self._names) + 2, "edgeroute-fleet")
        self._openings: dict[str, Opening] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._n_uses = 0
        self._closing = False

    # names and facts

    @property
    def names(self) -> Sequence[str]:
        """Of all models, the default one first."""
        return self._names

    def facts(self, name: str) -> ModelFacts:
        """Tell what is known of a model; 404 where there is none."""
        place = self._place(name)
        runtime = self.peek(name)
        adapters = place.adapters if runtime is None else tuple(runtime.adapters)
        return ModelFacts(
            name=place.name, state=place.state, created=self._created[place.name],
            n_ctx=place.model.params.n_ctx, n_bytes=place.n_bytes, adapters=adapters,
            adapter_folders=tuple(map(Path, place.model.params.adapters or ())),
            n_busy=place.n_leases, failed=place.failed,
        )  # fmt: skip

    def peek(self, name: str) -> Runtime | None:
        """Return an open model's Runtime for reading its statistics, without keeping it open."""
        place = self._place(name)
        return place.runtime.result() if place.ready and place.runtime.done() else None

    def snapshot(self) -> Mapping[str, Any]:
        """Tell budget, bytes and states of all, as plain JSON types."""
        shelf = self._shelf
        return {
            "budget_bytes": shelf.budget_bytes,
            "used_bytes": shelf.used_bytes,
            "lost_bytes": shelf.lost_bytes,
            "n_hung": sum(map(shelf.n_lost, self._names)),
            "n_requests": self._n_uses,
            "max_requests": self._params.max_waiting,
            "n_waiting": sum(each.n_waiting for each in self._openings.values()),
            "n_evicted": shelf.n_evicted,
            "models": [_told(each) for each in shelf.places.values()],
        }

    @property
    def places(self) -> Sequence[Place]:
        """Of all models."""
        return list(self._shelf.places.values())

    @property
    def lost_bytes(self) -> int:
        """Bytes of abandoned engines and openings that have not returned."""
        return self._shelf.lost_bytes

    @property
    def cannot_open(self) -> Sequence[str]:
        """Names of models that would not fit beside what is lost."""
        free = self._shelf.budget_bytes - self._shelf.lost_bytes
        return [each.name for each in self.places if each.state == "closed" and each.n_bytes > free]

    @property
    def budget_bytes(self) -> int:
        """Of all open models together."""
        return self._shelf.budget_bytes

    def _place(self, name: str) -> Place:
        found = self._shelf.places.get(name)
        if found is None and name == ALIAS:
            found = self._shelf.places[self._names[0]]
        if found is None:
            known = ", ".join(self._names)
            raise ApiError(404, f"there is no model {name!r:.80}; there are: {known:.400}",
                           param="model", code="model_not_found")  # fmt: skip
        return found

    # uses

    @contextlib.asynccontextmanager
    async def use(
        self, name: str, *, deadline: float, counts: bool = True
    ) -> AsyncIterator[FleetUse]:
        """Open a model if need be, and keep it open inside the block.

        Args:
            name: of the model.
            deadline: of the wait for room and for opening, in `time.monotonic`.
            counts: False is for a glance: it has its place beyond `max_waiting`, and does not
                keep an unused model from being closed.

        Raises:
            ApiError: 404 unknown; 429 too many wait; 503 no room in time, with `retry_after_s`;
                400 it never fits; 500 it cannot be opened.
        """
        place = self._place(name)
        if counts and self._n_uses >= self._params.max_waiting:
            raise ApiError(
                429, f"{self._n_uses} requests are under way or waiting, as many as there may be; "
                "try again later, or raise server.max_waiting", code="too_many_requests",
                retry_after_s=RETRY_S,
            )  # fmt: skip
        self._n_uses += counts
        try:
            lease = self._shelf.try_lease(place.name) or await self._wait(place, deadline)
            lease.counts = counts
            with lease:
                found = FleetUse(place.name, lease)
                try:
                    yield found
                except ClosedError:
                    found.broke()
                    raise
        finally:
            self._n_uses -= counts

    async def load(self, name: str) -> None:
        """Open a model now; errors as `use`."""
        async with self.use(name, deadline=time.monotonic() + self._params.timeout_s):
            return

    def load_now(self, name: str) -> None:
        """Open a model, before there is an event loop.

        Raises:
            EdgerouteError: it cannot be opened.
        """
        with self._shelf.lease(self._place(name).name) as lease:
            _ = lease.runtime

    async def unload(self, name: str) -> None:
        """Close a model; 409 while it is busy or loading."""
        place = self._place(name)
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._threads, self._shelf.unload, place.name):
            busy = f"{place.n_leases} requests use it"
            state = busy if place.state == "open" else f"it is {place.state}"
            raise ApiError(409, f"the model {place.name!r} cannot be closed now: {state}; try "
                           "again when it is idle", code="model_busy")  # fmt: skip

    async def _wait(self, place: Place, deadline: float) -> Lease:
        """Wait for room and for opening, together with all others that want this model."""
        if self._closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down",
                           retry_after_s=RETRY_S)  # fmt: skip
        while True:
            opening = self._openings.get(place.name) or self._begin(place)
            opening.n_waiting += 1
            try:
                left_s = max(0.0, deadline - time.monotonic())
                await asyncio.wait([opening.done], timeout=left_s)
                if not opening.done.done():
                    raise self._too_late(place, opening)
                if opening.lease is not None:
                    return opening.lease.again()
                assert opening.error is not None
                # Those who came before had left, and its turn was given up at that moment.
                if not isinstance(opening.error, NobodyWaits):
                    raise self._refused(place, opening.error) from opening.error
            finally:
                if opening.leave():
                    self._shelf.wake()

    def _begin(self, place: Place) -> Opening:
        """Begin to open a model; there is one at a time of each, and so one thread."""
        if self._shelf.n_lost(place.name) >= MAX_HUNG:
            raise ApiError(503, f"the model {place.name!r} hung {MAX_HUNG} times and none of that "
                           f"has ended; {DISK}, or restart the server", code="model_hangs",
                           retry_after_s=self._params.watchdog_s)  # fmt: skip
        opening = self._openings[place.name] = Opening(asyncio.get_running_loop())
        task = asyncio.create_task(self._run(place, opening))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return opening

    async def _run(self, place: Place, opening: Opening) -> None:
        """Open a model, and note what came of it."""
        n_before = place.n_opened
        await opening.run(lambda: self._shelf.lease(place.name, left=opening.left))
        if opening.lease is not None and place.n_opened > n_before:
            log(logging.INFO, "model opened", model=place.name, seconds=place.load_s,
                n_bytes=place.n_bytes, evicted=self._shelf.n_evicted)  # fmt: skip
        if self._openings.get(place.name) is opening:
            del self._openings[place.name]

    def _too_late(self, place: Place, opening: Opening) -> ApiError:
        """Say why a model was not there in time."""
        load_s = place.load_s or LOAD_S
        if place.state == "opening":
            waited_s = time.monotonic() - opening.began
            return ApiError(
                503, f"the model {place.name!r} is still being opened, for {waited_s:.1f} s now; "
                "try again later, or raise the timeout", code="model_opening",
                retry_after_s=load_s,
            )  # fmt: skip
        return ApiError(503, f"{self._shelf.no_room(place.name)}; try again later", code="no_room",
                        retry_after_s=load_s)  # fmt: skip

    def _refused(self, place: Place, error: Exception) -> ApiError:
        """Say why a model could not be opened."""
        if isinstance(error, ClosedError):
            return ApiError(503, "the server is shutting down", code="shutting_down",
                            retry_after_s=RETRY_S)  # fmt: skip
        if isinstance(error, HungOpening):
            return ApiError(503, f"{error}; {DISK}, and try again", code="model_hangs",
                            retry_after_s=self._params.watchdog_s)  # fmt: skip
        if isinstance(error, CapacityError):
            lost = self._shelf.lost_bytes
            if error.smallest_bytes is None or lost:
                why = f"{error}; an engine that does not return holds {format_bytes(lost)}"
                return ApiError(
                    503, f"the model {place.name!r} does not fit now: {why if lost else error}",
                    code="does_not_fit", retry_after_s=LOAD_S,
                )  # fmt: skip
            return ApiError(
                400, f"the model {place.name!r} does not fit its {format_bytes(place.n_bytes)} of "
                f"the server's {format_bytes(self._shelf.budget_bytes)}, not even paged: {error}",
                param="model", code="does_not_fit",
            )  # fmt: skip
        if isinstance(error, DeviceLostError):
            return as_api_error(error)
        known = isinstance(error, EdgerouteError | OSError)
        _log.error("the model %s cannot be opened: %s", place.name, error,
                   exc_info=None if known else error)  # fmt: skip
        why = str(error) if known else "an internal error; the server's log has it"
        return ApiError(500, f"the model {place.name!r} cannot be opened: {why}",
                        code="model_not_opened")  # fmt: skip

    # engines that stop, and the end

    @property
    def openings(self) -> Mapping[str, Opening]:
        """Models that are being opened now: their room is there."""
        return {
            name: each for name, each in self._openings.items()
            if self._place(name).state == "opening"
        }  # fmt: skip

    def forsake(self, name: str, error: HungOpening) -> None:
        """Wait no more for a model's opening, which hangs; the next use opens it anew."""
        if self._shelf.forsake(self._place(name), error):
            self._openings.pop(name).give_up(error)

    def abandon(self, name: str, engine: Engine) -> None:
        """Wait no more for a model's engine, which does not return; the next use opens it anew."""
        place = self._place(name)
        opened = place.runtime
        if opened.done() and opened.exception() is None and opened.result() is engine:
            self._shelf.abandon(place, opened)

    async def close_unused(self) -> None:
        """Close models that nobody uses, for ever; returns at once where they may stay."""
        idle_s = self._params.idle_s
        loop = asyncio.get_running_loop()
        while idle_s is not None:
            await asyncio.sleep(idle_s / UNUSED_POLLS)
            await loop.run_in_executor(self._threads, self._shelf.close_unused, idle_s)

    def close(self, wait_s: float | None = None) -> bool:
        """End running answers, close all models; safe to call twice.

        Args:
            wait_s: longest wait for engines to end; None is for ever.

        Returns:
            Whether all have ended.
        """
        self._closing = True
        try:
            return self._shelf.end(wait_s)
        finally:
            self._threads.shutdown(wait=wait_s is None, cancel_futures=True)


def _created(place: Place) -> int:
    """Return when a model's file was written, in seconds since 1970; 0 where it is gone."""
    try:
        return int(place.model.path.stat().st_mtime)
    except OSError:
        return 0


def _told(place: Place) -> dict[str, object]:
    """Tell of one model what the dashboard shows."""
    return {
        "name": place.name,
        "file": place.model.path.name,
        "state": place.state,
        "broken": place.broken,
        "n_bytes": place.n_bytes,
        "whole_bytes": place.whole_bytes,
        "n_busy": place.n_leases,
        "n_opened": place.n_opened,
        "load_s": None if place.load_s is None else round(place.load_s, 3),
        "failed": place.failed,
    }
