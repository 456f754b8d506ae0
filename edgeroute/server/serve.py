"""The server as a whole: its parts put together, listening, and ended with care."""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette

from edgeroute.runtime.errors import UsageError
from edgeroute.server import admin, api, dashboard, health, live, metrics, openapi, sessions
from edgeroute.server.app import make_app
from edgeroute.server.connection import Connection
from edgeroute.server.fleet import Fleet
from edgeroute.server.guard import guards
from edgeroute.server.logs import JobLog
from edgeroute.server.notify import Notifier
from edgeroute.server.records import ServerParams, Services
from edgeroute.server.watchdog import Watchdog
from edgeroute.session_folder import default_folder
from edgeroute.shelf_plan import ShelfModel

BACKLOG: Final = 512
SPARE_CONNECTIONS: Final = 256
"""Connections beyond those that may compute; from there on uvicorn itself says 503."""
KEEP_ALIVE_S: Final = 75
CANCEL_S: Final = 2.0
"""How long requests that were cancelled may take to end."""
CLOSE_S: Final = 30.0
"""How long models may take to close; what sessions save is written meanwhile."""
LEAVE_S: Final = 5.0
"""How long threads may take to end after that."""
ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What the system says of an address that this machine does not have."""
EXIT_FORCED: Final = 130

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A server that does not listen yet."""

    app: Starlette
    fleet: Fleet
    live: live.Live
    params: ServerParams


def build(params: ServerParams, models: Sequence[ShelfModel]) -> Built:
    """Put a server together; no model is opened yet.

    Raises:
        CapacityError: a model may take more than the budget.
        EdgerouteError: a model's file, or what goes with it, cannot be used.
    """
    fleet = Fleet(params, [_with_sessions(each, params) for each in models])
    streams, counts = live.Live(fleet), metrics.Metrics(fleet)
    services = Services(params=params, models=fleet, observers=(counts, streams, JobLog()))
    routes = [
        *api.routes(services), *health.routes(services), *admin.routes(services),
        *sessions.routes(services), *metrics.routes(services, counts), *live.routes(services),
        *dashboard.routes(services), *openapi.routes(services),
    ]  # fmt: skip
    app = make_app(services, routes, guards(params, counts.answered))
    return Built(app=app, fleet=fleet, live=streams, params=params)


def _with_sessions(model: ShelfModel, params: ServerParams) -> ShelfModel:
    """Give a model the folder that sessions are saved in."""
    folder = params.sessions or model.params.sessions or default_folder()
    settings = dataclasses.replace(
        model.params, sessions=str(folder), sessions_bytes=params.sessions_bytes
    )
    return dataclasses.replace(model, params=settings)


def listen(host: str, port: int) -> list[socket.socket]:
    """Take an address; who calls it before `run` waits for that.

    Args:
        host: an address or a name, all of whose addresses are taken.
        port: 0 is any free one.

    Raises:
        UsageError: it cannot be had; the message says why and what to do.
    """
    taken: list[socket.socket] = []
    absent: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            if taken:  # a name has several: all get the port that the first one got
                address = (address[0], taken[0].getsockname()[1], *address[2:])
            try:
                taken.append(_bind(family, address))
            except OSError as error:
                if error.errno not in ABSENT:  # such as ::1, where IPv6 is switched off
                    raise
                absent = error
        if absent is not None and not taken:
            raise absent
    except OSError as error:
        for each in taken:
            each.close()
        raise UsageError(_why_not_bound(host, port, error)) from error
    return taken


def _bind(family: int, address: tuple[object, ...]) -> socket.socket:
    # With the protocol named, asyncio sends small pieces at once instead of gathering them.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # where it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # now: only that finds out whether another listens there
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (f"port {port} of {host} is in use by another program; choose another by --port, or "
                "0 for any free one")  # fmt: skip
    if error.errno == errno.EACCES:
        return f"port {port} of {host} needs rights that you do not have; choose one from 1024 on"
    if isinstance(error, socket.gaierror) or error.errno in ABSENT:
        return f"this machine has no address {host!r}; listen on 127.0.0.1, or 0.0.0.0 for all"
    return f"cannot listen on {host}, port {port}: {error.strerror or error}"


def urls(sockets: Sequence[socket.socket]) -> list[str]:
    """Return where a server is reached."""
    found = []
    for each in sockets:
        host, port = each.getsockname()[:2]
        found.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    return found


def run(
    built: Built, sockets: Sequence[socket.socket], started: Callable[[], None] = lambda: None
) -> None:
    """Serve until a signal says otherwise; then end all with care.

    SIGTERM or Ctrl-C lets running answers end for `grace_s` seconds, and cancels the others; a
    second one ends the process at once.

    Args:
        built: what to serve.
        sockets: of `listen`.
        started: called when requests are taken.
    """
    server = Server(built, started)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(server.serve_with_care(list(sockets)))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        closed = built.fleet.close(CLOSE_S)
        loop.close()
    _leave(closed)


def _leave(closed: bool) -> None:
    """Return if nothing is in the way of a normal end of the process; else end it."""
    deadline = time.monotonic() + LEAVE_S
    others = [
        each for each in threading.enumerate()
        if each is not threading.current_thread() and not each.daemon
    ]  # fmt: skip
    for each in others:
        each.join(max(0.0, deadline - time.monotonic()))
    stuck = [each.name for each in others if each.is_alive()]
    if closed and not stuck:
        return
    _log.error("some work does not end (%s); the process ends without it",
               ", ".join(stuck) or "an engine")  # fmt: skip
    logging.shutdown()
    os._exit(0)


class Server(uvicorn.Server):
    """uvicorn's server, with this one's beginning and end."""

    def __init__(self, built: Built, started: Callable[[], None] = lambda: None) -> None:
        params = built.params
        n_connections = params.max_waiting + SPARE_CONNECTIONS
        super().__init__(uvicorn.Config(
            built.app, http=Connection, ws="none", loop="asyncio", lifespan="on",
            log_config=None, log_level="warning", access_log=False, server_header=False,
            proxy_headers=False, backlog=BACKLOG, limit_concurrency=n_connections,
            timeout_keep_alive=KEEP_ALIVE_S, h11_max_incomplete_event_size=params.max_header_bytes,
            timeout_graceful_shutdown=math.ceil(params.grace_s),
        ))  # fmt: skip
        self._built, self._notifier = built, Notifier()
        self._watchdog = Watchdog(built.fleet, params.watchdog_s)
        self._urls: list[str] = []
        self._tell_started = started
        self._failed = False

    async def serve_with_care(self, sockets: list[socket.socket]) -> None:
        """Serve, with what goes on beside."""
        self._urls = urls(sockets)
        fleet, notifier = self._built.fleet, self._notifier
        beside = [
            asyncio.create_task(self._looked_after(work)) for work in (
                self._watchdog.run(), fleet.close_unused(), notifier.keep_alive(self._is_healthy)
            )
        ]  # fmt: skip
        try:
            await self.serve(sockets)
        finally:
            left = [*beside, *self.server_state.tasks]
            for each in left:
                each.cancel()
            await asyncio.wait(left, timeout=CANCEL_S)

    async def _looked_after(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what goes on beside; should it fail, the service manager hears of no more life."""
        try:
            await work
        except Exception:
            self._failed = True
            _log.exception("what watches over the server has failed; restart it")
            raise

    def _is_healthy(self) -> bool:
        return self._watchdog.healthy and not self._failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests, and say so."""
        await super().startup(sockets)
        self._notifier.ready(f"serving {', '.join(self._built.fleet.names)} at {self._urls[0]}")
        self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and let those that run end."""
        n = len(self.server_state.tasks)
        _log.info("ending: %d requests run, and have %g s", n, self._built.params.grace_s)
        self._notifier.stopping()
        self._built.live.end()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Listen to signals; unlike uvicorn's, the end that they ask for is a success."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = [signal.SIGINT, signal.SIGTERM]
        if sys.platform == "win32":
            kinds.append(signal.SIGBREAK)
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end; the second time, end."""
        if self.should_exit:
            os._exit(EXIT_FORCED)
        self.should_exit = True
