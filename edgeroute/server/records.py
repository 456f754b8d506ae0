"""What the parts of the server tell each other: settings, one request's record, the models."""

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from edgeroute.engine import Runtime
from edgeroute.stats import Generation

Endpoint = Literal["chat", "completions", "embeddings"]
ALIAS: Final = "base"
"""What the default model is called beside its own name."""


def new_request_id() -> str:
    """Make an id for a request that came without one."""
    return f"req-{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerParams:
    """How a server listens and what it takes; `edgeroute.server.config` reads and checks them.

    Attributes:
        host: address to listen on.
        port: 0 is any free one.
        memory: what all open models may take together, in bytes; None: measured.
        api_keys: one of them must come with every request; needed off loopback. Admin calls
            are refused where there is none.
        allowed_hosts: names that the Host header may have beside loopback's and `host`.
        cors_origins: origins of other pages that may call; none by default.
        max_waiting: requests under way or waiting at once; one more gets 429.
        timeout_s: longest time from a request to the end of its answer.
        stall_s: longest time that a reader of a stream may take nothing of it.
        watchdog_s: longest time that an engine may compute without a sign of life, and that
            opening a model may neither read nor compute.
        idle_s: a model unused for so long is closed; None: only when others need its room.
        max_body_bytes: of a request.
        max_json_depth: nesting of a request's JSON.
        max_header_bytes: of all headers of a request.
        max_tokens: most tokens of one answer, whatever it asks for; None: as the context allows.
        sessions: folder of saved sessions; None: the user's state folder.
        sessions_bytes: what they may take on disk together.
        dashboard: whether `/` is served.
        grace_s: how long running answers may go on when the server is to end.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    memory: int | None = None
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 64
    timeout_s: float = 600.0
    stall_s: float = 30.0
    watchdog_s: float = 60.0
    idle_s: float | None = None
    max_body_bytes: int = 8 << 20
    max_json_depth: int = 64
    max_header_bytes: int = 32 << 10
    max_tokens: int | None = None
    sessions: Path | None = None
    sessions_bytes: int = 4 << 30
    dashboard: bool = True
    grace_s: float = 20.0


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request that computes, as metrics, logs and the dashboard see it.

    Times are of `time.monotonic`. Owned by the event loop.
    """

    id: str
    endpoint: Endpoint
    model: str
    adapter: str | None = None
    streaming: bool = False
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    """When its model was there."""
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    n_prompt: int = 0
    n_generated: int = 0
    status: int | None = None
    """HTTP status; 499 where the client went away."""
    error: str | None = None
    generations: list[Generation] = field(default_factory=list)
    """Finished answers, with their statistics; several for `n` over 1."""


class Observer(Protocol):
    """Is told of every request; must be quick and raise nothing. Called on the event loop."""

    def began(self, job: Job) -> None:
        """A request was accepted; its model may have to be opened yet."""

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Tokens of an answer came, `seconds` after the ones before (or after `job.created`)."""

    def ended(self, job: Job) -> None:
        """It is over: `status` and the rest are final."""


class Use(Protocol):
    """A model that is open and stays so while it is used."""

    @property
    def name(self) -> str:
        """As configured."""

    @property
    def runtime(self) -> Runtime:
        """What answers."""

    def broke(self) -> None:
        """Say that its engine has stopped: the next use opens the model anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a configured model without opening it.

    Attributes:
        state: `closed`, `opening`, `open` or `closing`.
        n_bytes: what it takes of the budget while it is not closed.
        adapters: names of its adapters, as far as known.
        adapter_folders: where more of them may lie; empty where it can have none.
        n_busy: requests that keep it open.
        failed: why it could not be opened the last time; None where it could.
    """

    name: str
    state: str
    created: int
    n_ctx: int
    n_bytes: int
    adapters: tuple[str, ...] = ()
    adapter_folders: tuple[Path, ...] = ()
    n_busy: int = 0
    failed: str | None = None


class Models(Protocol):
    """The configured models. Methods are called on the event loop."""

    @property
    def names(self) -> Sequence[str]:
        """Of all models, the default one first."""

    def facts(self, name: str) -> ModelFacts:
        """Tell what is known of one.

        Raises:
            ApiError: 404, there is none of that name.
        """

    def use(
        self, name: str, *, deadline: float, counts: bool = True
    ) -> AbstractAsyncContextManager[Use]:
        """Open a model if need be, and keep it open inside the block.

        Args:
            name: of the model.
            deadline: of the wait for room and for opening, in `time.monotonic`.
            counts: False for a glance, such as a health check's: it has its place beyond
                `max_waiting`, and does not keep an unused model from being closed.

        Raises:
            ApiError: 404 unknown; 429 too many wait; 503 no room in time, with `retry_after_s`;
                400 it never fits; 500 it cannot be opened.
        """

    async def load(self, name: str) -> None:
        """Open a model now; errors as `use`."""

    async def unload(self, name: str) -> None:
        """Close a model; 409 while it is busy or loading."""

    def peek(self, name: str) -> Runtime | None:
        """Return an open model's Runtime for reading its statistics, without keeping it open."""

    def snapshot(self) -> Mapping[str, Any]:
        """Tell budget, bytes and states of all, as plain JSON types, for the dashboard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes stand on."""

    params: ServerParams
    models: Models
    observers: tuple[Observer, ...] = ()

    def began(self, job: Job) -> None:
        """Tell all observers of a new request."""
        for each in self.observers:
            each.began(job)

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Tell all observers of new tokens."""
        for each in self.observers:
            each.token(job, n_tokens, seconds)

    def ended(self, job: Job) -> None:
        """Tell all observers of a request's end."""
        for each in self.observers:
            each.ended(job)
