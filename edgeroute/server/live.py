"""`/edgeroute/live`: what the server is doing, once a second, to all who listen.

One task samples while anybody listens, and everybody gets the same bytes. Who reads slowly
misses snapshots and gets the newest one next: nothing waits in a queue.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from edgeroute.engine import Runtime
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.server.errors import ApiError
from edgeroute.server.live_figures import Figures, figures, residency
from edgeroute.server.live_jobs import Jobs
from edgeroute.server.records import Job, Models, Services

log = logging.getLogger("edgeroute.server.live")

PATH: Final = "/edgeroute/live"
PERIOD_S: Final = 1.0
HEARTBEAT_S: Final = 5.0
"""A reader hears something at least so often, also where a snapshot takes long."""
RETRY_S: Final = 30.0
MAX_LISTENERS: Final = 32
HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something large that is told again only when it changed."""

    version: int
    event: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state at one moment, as events that all listeners share.

    Attributes:
        number: counts up.
        event: the figures.
        parts: by name: the requests, and residency of each model.
    """

    number: int
    event: bytes
    parts: Mapping[str, Part]


class Live:
    """Samples the models for listeners; also an Observer. The event loop owns it.

    Args:
        models: whose figures are told.
        period_s: seconds from one snapshot to the next.
    """

    def __init__(self, models: Models, *, period_s: float = PERIOD_S) -> None:
        self.period_s = period_s
        self.n_listeners = 0
        self.n_sampled = 0
        self.ending = False
        self._models = models
        self._jobs = Jobs(models)
        self._latest: Snapshot | None = None
        self._news = asyncio.Event()  # of the snapshot after the latest
        self._sampler: asyncio.Task[None] | None = None
        self._before: dict[str, Figures] = {}
        self._unreadable: set[str] = set()

    # an Observer

    def began(self, job: Job) -> None:
        """A request was accepted."""
        self._jobs.began(job)

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Tokens of an answer came."""
        self._jobs.token(job, n_tokens, seconds)

    def ended(self, job: Job) -> None:
        """It is over."""
        self._jobs.ended(job)

    # listeners

    @property
    def sampling(self) -> bool:
        """Whether the sampler runs."""
        return self._sampler is not None

    def end(self) -> None:
        """End all streams, and refuse new ones: the server is about to stop."""
        self.ending = True
        self._wake()

    @contextlib.contextmanager
    def listening(self) -> Iterator["Listener"]:
        """Count a listener in, and sample while there are any.

        Raises:
            ApiError: there are too many, or the server is stopping.
        """
        if self.ending:
            raise ApiError(503, "the server is stopping", retry_after_s=5)
        if self.n_listeners >= MAX_LISTENERS:
            raise ApiError(
                429, f"{MAX_LISTENERS} dashboards are listening already; close one of them",
                code="too_many_listeners", retry_after_s=10,
            )  # fmt: skip
        self.n_listeners += 1
        if self._sampler is None:
            self._latest, self._before = None, {}
            self._sampler = asyncio.create_task(self._sample(), name="edgeroute-live")
        try:
            yield Listener(live=self)
        finally:
            self.n_listeners -= 1
            if self.n_listeners == 0 and self._sampler is not None:
                self._sampler.cancel()
                self._sampler = None

    async def after(self, number: int) -> Snapshot | None:
        """Wait for a snapshot newer than `number`; None where none came in HEARTBEAT_S."""
        until = time.monotonic() + HEARTBEAT_S
        while not self.ending:
            latest = self._latest
            if latest is not None and latest.number > number:
                return latest
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._news.wait()
            except TimeoutError:
                break
        return None

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # the sampler

    async def _sample(self) -> None:
        while True:
            began = time.monotonic()
            pause_s = self.period_s
            try:
                self._latest = await self._take()
            except Exception:  # listeners hear heartbeats meanwhile
                log.exception("no snapshot could be taken; the next try is in %g s", RETRY_S)
                pause_s = RETRY_S
            self._wake()
            await asyncio.sleep(max(0.01, began + pause_s - time.monotonic()))

    async def _take(self) -> Snapshot:
        """Read everything: what may be large, in a thread."""
        models = self._models
        overview = dict(models.snapshot())
        open_ones = {name: models.peek(name) for name in models.names}
        runtimes = {name: each for name, each in open_ones.items() if each is not None}
        read = await asyncio.to_thread(self._read, runtimes)
        for name, (found, _) in read.items():
            found |= self._jobs.totals(name)
        self._before = {name: found for name, (found, _) in read.items()}
        self.n_sampled += 1
        told = {
            "at": round(time.time(), 3),
            "clock_s": round(time.monotonic(), 3),
            "period_s": self.period_s,
            "requests": self._jobs.n_running,
            "server": overview,
            "models": self._before,
        }
        parts = {"jobs": self._part("jobs", {"rows": self._jobs.rows()})}
        for name, (_, resident) in read.items():
            key = f"residency {name}"
            parts[key] = self._part(key, {"model": name, "residency": resident}, "residency")
        return Snapshot(number=self.n_sampled, event=as_event("snapshot", told), parts=parts)

    def _part(self, key: str, value: object, event: str | None = None) -> Part:
        """Make a part, or find the last one where nothing changed."""
        told = as_event(event or key, value)
        old = None if self._latest is None else self._latest.parts.get(key)
        if old is not None and old.event == told:
            return old
        return Part(version=self.n_sampled, event=told)

    def _read(self, runtimes: Mapping[str, Runtime]) -> dict[str, tuple[Figures, Figures | None]]:
        """Read models; one that is closing meanwhile, or cannot be read, is left out."""
        found: dict[str, tuple[Figures, Figures | None]] = {}
        for name, runtime in runtimes.items():
            try:
                now = figures(runtime.stats(), self._before.get(name))
                found[name] = now, residency(runtime)
            except EdgerouteError:
                continue  # closed since; the overview tells its state
            except Exception:  # of one model: the others are told even so
                if name not in self._unreadable:
                    self._unreadable.add(name)
                    log.exception("the figures of model %s cannot be read", name)
            else:
                self._unreadable.discard(name)
        return found


@dataclass(slots=True, kw_only=True)
class Listener:
    """One reader: knows what it was told already."""

    live: Live
    _number: int = 0
    _told: dict[str, int] = field(default_factory=dict)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield what is new, until the server stops."""
        while not self.live.ending:
            snapshot = await self.live.after(self._number)
            yield b": still here\n\n" if snapshot is None else self._news(snapshot)

    def _news(self, snapshot: Snapshot) -> bytes:
        self._number = snapshot.number
        found = [snapshot.event]
        for key, part in snapshot.parts.items():
            if self._told.get(key) != part.version:
                found.append(part.event)
        self._told = {key: part.version for key, part in snapshot.parts.items()}
        return b"".join(found)


class LiveResponse(Response):
    """A stream of events that ends with its reader, with the server, or when nobody reads."""

    media_type = "text/event-stream"

    def __init__(self, live: Live, stall_s: float) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._live, self._stall_s = live, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end.

        Raises:
            ApiError: before anything was sent, see `Live.listening`.
        """
        with self._live.listening() as listener:
            tasks = [asyncio.create_task(self._write(listener, send)),
                     asyncio.create_task(_gone(receive))]  # fmt: skip
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, TimeoutError):
                log.info("a dashboard took nothing for %g s and was dropped", self._stall_s)
            elif isinstance(end, Exception):
                raise end

    async def _write(self, listener: Listener, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with contextlib.aclosing(listener.events()) as events:
            async for event in events:
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def as_event(name: str, value: object) -> bytes:
    """Write one server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (name.encode("ascii"), msgspec.json.encode(value))


def routes(services: Services) -> list[BaseRoute]:
    """Return the route of the stream.

    The `Live` among the services' observers is used, which then also tells of requests.
    """
    found = [each for each in services.observers if isinstance(each, Live)]
    live = found[0] if found else Live(services.models)

    async def listen(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type=LiveResponse.media_type, headers=HEADERS)
        return LiveResponse(live, services.params.stall_s)

    return [Route(PATH, listen, methods=["GET"])]
