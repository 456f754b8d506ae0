"""How one visit to a server went, and reading answers with an eye for what must not come."""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edgeroute.tools.bench.serve_http import Address, Exchange, Head, request_bytes
from edgeroute.tools.bench.serve_throughput import WORDS

BUSY: Final = (429, 503)
"""Statuses by which a server may refuse anything, if it says when to come again."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How a visit went.

    Attributes:
        status: of the answer; None where we left before there was one.
        ended: `whole`, `done` (a stream to its end), `error` (a stream that said why it stopped),
            `left` (we did).
        ttft_s: from the request to the first text of a stream.
        n_events: texts of a stream.
        fault: what must not happen; None if nothing did.
    """

    kind: str
    status: int | None = None
    ended: str = "left"
    ttft_s: float | None = None
    n_events: int = 0
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Whom a visitor visits, with which dice.

    Attributes:
        model: name by which the server knows its model.
        n_ctx: its context; the longest prompts fill about half of it.
        stall_s: how long the server lets a reader take nothing.
    """

    address: Address
    rng: random.Random
    model: str
    n_ctx: int
    max_body_bytes: int
    stall_s: float

    def words(self, n: int) -> str:
        """Return words that hardly two visits have in common."""
        return f"{self.rng.randrange(10**6)} " + " ".join(self.rng.choices(WORDS, k=n))

    def chat(self, n_words: int = 12, **more: Any) -> dict[str, Any]:
        """Return a chat's request."""
        rng = self.rng
        return {"model": self.model, "max_tokens": rng.randint(4, 32), "seed": rng.randrange(99),
                "temperature": rng.choice((0.0, 0.8)),
                "messages": [{"role": "user", "content": self.words(n_words)}], **more}  # fmt: skip


async def check_refusal(
    exchange: Exchange, head: Head, outcome: Outcome, allowed: tuple[int, ...]
) -> None:
    """Read an error to its end and check its form."""
    outcome.ended, body = "whole", await exchange.body()
    if head.status in BUSY and head.status not in allowed:
        if not head.headers.get("retry-after", "").isdigit():
            outcome.fault = f"{head.status} without Retry-After: {body!r:.200}"
    elif head.status not in allowed:
        outcome.fault = f"status {head.status}, not {allowed}: {body!r:.300}"
    if (
        head.status >= 400
        and outcome.fault is None
        and head.headers.get("content-type", "").startswith("application/json")
    ):
        told = json.loads(body).get("error")
        if not isinstance(told, dict) or not told.get("message"):
            outcome.fault = f"{head.status} without a message: {body!r:.200}"


async def whole(place: Place, kind: str, path: str, body: bytes | Mapping[str, Any] | None,
                 allowed: tuple[int, ...] = (200,), **headers: str) -> Outcome:  # fmt: skip
    """Ask and read all of it."""
    outcome = Outcome(kind=kind)
    async with await Exchange.open(place.address) as exchange:
        await exchange.send(request_bytes(place.address, path, body, headers=headers))
        head = await exchange.head()
        outcome.status = head.status
        await check_refusal(exchange, head, outcome, allowed)
    return outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a stream is read: left after so many events, waiting before each."""

    leave_after: int | None = None
    pause_s: float = 0.0
    slow: bool = False


async def stream(place: Place, kind: str, path: str, body: Mapping[str, Any],
                  reading: Reading | None = None) -> Outcome:  # fmt: skip
    """Read a stream as told; it must end by [DONE] or by an error's event."""
    how, outcome, began = reading or Reading(), Outcome(kind=kind), time.monotonic()
    async with await Exchange.open(place.address, slow=how.slow) as exchange:
        await exchange.send(request_bytes(place.address, path, {**body, "stream": True}))
        head = await exchange.head()
        outcome.status = head.status
        if head.status != 200:
            await check_refusal(exchange, head, outcome, (200,))
            return outcome
        if how.leave_after == 0:
            exchange.abort()
            return outcome
        last, finished = None, False
        async for data in exchange.events():
            if last == "[DONE]":
                outcome.fault = f"something came after [DONE]: {data!r:.100}"
            last = data
            finished |= _read_event(data, outcome, began)
            if how.leave_after is not None and outcome.n_events >= how.leave_after:
                exchange.abort()
                return outcome
            if how.pause_s:
                await asyncio.sleep(how.pause_s)
    if outcome.ended != "error":
        outcome.ended = "done"
        if last != "[DONE]" or not finished:
            outcome.fault = outcome.fault or (
                f"a stream ended by {last!r:.100}, finish_reason told: {finished}"
            )
    return outcome


def _read_event(data: str, outcome: Outcome, began: float) -> bool:
    """Take an event in; True if it tells how an answer ended."""
    if data == "[DONE]":
        return False
    told = json.loads(data)
    if "error" in told:
        outcome.ended = "error"
        if told["error"].get("type") == "server_error" and told["error"].get("code") is None:
            outcome.fault = f"a stream failed: {data:.300}"
        return False
    finished = False
    for choice in told.get("choices", ()):
        delta = choice.get("delta", choice)
        if delta.get("content") or delta.get("text") or delta.get("tool_calls"):
            if outcome.ttft_s is None:
                outcome.ttft_s = time.monotonic() - began
            outcome.n_events += 1
        finished |= choice.get("finish_reason") is not None
    return finished


@dataclass(slots=True, kw_only=True)
class Tally:
    """All visits so far, added up."""

    n_visits: int = 0
    n_events: int = 0
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    n_faults: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one more; the first faults are kept in words."""
        self.n_visits += 1
        self.n_events += outcome.n_events
        kind = self.statuses.setdefault(outcome.kind, {})
        status = "left" if outcome.status is None else str(outcome.status)
        kind[status] = kind.get(status, 0) + 1
        self.ends[outcome.ended] = self.ends.get(outcome.ended, 0) + 1
        if outcome.ttft_s is not None:
            self.ttft_s.append(outcome.ttft_s)
        if outcome.fault is not None:
            self.n_faults += 1
            if len(self.faults) < 20:
                self.faults.append(f"{outcome.kind}: {outcome.fault}")
