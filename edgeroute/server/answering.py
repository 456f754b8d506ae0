"""One request's answers, from an open model to the last byte: for chat and completions alike."""

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, cast

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeroute.engine import Runtime
from edgeroute.runtime.errors import ClosedError, EdgerouteError
from edgeroute.server.asked import Asked, Begun, Fields, facts, finish_reason, usage
from edgeroute.server.errors import ApiError
from edgeroute.server.logs import log_failure
from edgeroute.server.naming import check_adapter
from edgeroute.server.options import blame
from edgeroute.server.origins import Origins
from edgeroute.server.records import Job, Services
from edgeroute.server.reporting import reported
from edgeroute.server.short_way import DIRECT, Lane
from edgeroute.server.sse import DONE, EventWriter, event
from edgeroute.server.waiting import merged, unless_left
from edgeroute.skippers.steps import Who
from edgeroute.stats import Chunk, Generation

BEAT_S: Final = 10.0
"""Silence of an answer after which its stream shows that it is still there."""
GRACE_S: Final = 5.0
"""How much longer than an answer may take the server waits for an engine to end it."""

Piece = tuple[int, Chunk]
"""Number of a choice, and what came of it."""
Frame = tuple[bytes, bytes]
_TEXT: Final = "\0text\0"
_encode = msgspec.json.Encoder().encode


class Answering:
    """Answers one request.

    Args:
        services: what the server stands on.
        asked: the request.
        job: its record.
        origins: remembers which model each answer came from.
    """

    def __init__(self, services: Services, asked: Asked, job: Job, origins: Origins) -> None:
        self._services, self._asked, self._job, self._origins = services, asked, job, origins
        self._deadline = job.created + asked.timeout_s
        self._begun: Sequence[Begun] = ()
        self._found: dict[int, Generation] = {}
        self._last: dict[int, float] = {}
        self._head: Fields = {}
        self._begins = b""
        self._frames: dict[tuple[int, Who | None], Frame | None] = {}
        self._opened = False
        self._writer: EventWriter | None = None
        self._past: deque[tuple[int, Chunk, float]] = deque()  # written past us, not counted yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and end all of it at once when the client leaves.

        Raises:
            ApiError: the request failed before its answer began.
        """
        try:
            with reported(self._services, self._job):
                if self._asked.stream:
                    await self._send_events(scope, receive, send)
                else:
                    body = await unless_left(receive, self._whole())
                    answer = Response(msgspec.json.encode(body), media_type="application/json")
                    await answer(scope, receive, send)
        except ApiError:
            if self._writer is None or not self._writer.started:
                raise
            # The client has left or does not read: nobody can be told, and the record has it.

    # the two ways to tell an answer

    async def _whole(self) -> Fields:
        """Wait for all choices, and return the response's body."""
        try:
            async with aclosing(self._pieces()) as pieces, self._limit():
                async for piece in pieces:
                    self._take(*piece)
        except Exception as error:
            raise self._refusal(error) from error
        answers = [self._found[i] for i in range(len(self._begun))]
        told = [facts(each, with_stats=self._asked.with_stats) for each in answers]
        choices = [
            {"index": i, **each.choice.whole(),
             "finish_reason": finish_reason(answer, each.choice.n_calls)}
            for i, (each, answer) in enumerate(zip(self._begun, answers, strict=True))
        ]  # fmt: skip
        more = {"choices": [{"index": i} | each for i, each in enumerate(told)]}
        return {
            **self._head,
            "choices": choices,
            "usage": usage(self._begun, answers),
            "edgeroute": told[0] | (more if len(told) > 1 else {}),
        }

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to a client who may leave, or stop to read."""
        stall_s, direct = self._services.params.stall_s, scope.get("state", {}).get(DIRECT)
        self._writer = EventWriter(send, stall_s=stall_s, beat_s=BEAT_S, direct=direct)
        try:
            await unless_left(receive, self._stream(self._writer), self._writer.mind(self._tally))
        finally:
            self._writer.close()
            self._tally()

    async def _stream(self, writer: EventWriter) -> None:
        """Send pieces as they come; an error once they have begun is sent as the last one."""
        try:
            async with aclosing(self._pieces()) as pieces, self._limit():
                async for piece in pieces:
                    self._tally()
                    shown = self._opening() + self._show(*piece)
                    if shown and not writer.write_now(shown):
                        await writer.write(shown)
                    if writer.lane is not None:
                        writer.lane.came()
                        writer.lane.lend()
            if self._asked.with_usage:
                answers = [self._found[i] for i in range(len(self._begun))]
                told = usage(self._begun, answers)
                await writer.write(event({**self._head, "choices": [], "usage": told}))
        except Exception as error:
            refusal = self._refusal(error)
            if not writer.started:
                raise refusal from error
            if not isinstance(error, EdgerouteError | ApiError | TimeoutError):
                log_failure("failed in mid-stream", error, request_id=self._job.id)
            self._job.status, self._job.error = refusal.status, refusal.message
            await writer.write(event(refusal.body()))
        await writer.write(DONE)
        await writer.end()

    def _opening(self) -> bytes:
        """Return what a stream begins with, for all choices; the second time nothing."""
        if self._opened:
            return b""
        self._opened = True
        return b"".join(
            self._event(i, fields)
            for i, each in enumerate(self._begun)
            for fields in each.choice.begin()
        )

    def _show(self, i: int, chunk: Chunk) -> bytes:
        """Take a piece in, and return the events that show it."""
        choice = self._begun[i].choice
        self._count(i, chunk, time.monotonic())
        more = _written_by(chunk.model)
        events = [self._event(i, fields, None, more) for fields in choice.take(chunk)]
        answer = chunk.generation
        if answer is not None:
            self._finish(i, answer)
            *held, last = choice.end()
            events += [self._event(i, fields) for fields in held]
            reason = finish_reason(answer, choice.n_calls)
            told = {"edgeroute": facts(answer, with_stats=self._asked.with_stats)}
            events.append(self._event(i, last, reason, told))
        return b"".join(events)

    def _show_past(self, lane: Lane, i: int, chunk: Chunk) -> bool:
        """Write a piece past the event loop, if it may be; in the engine's thread."""
        frame = self._frame(i, chunk.model) if lane.lent else None
        if frame is None or chunk.generation is not None:
            lane.leave()
            return False
        if not lane.write(b"".join((frame[0], _encode(chunk.text), frame[1]))):
            return False
        self._past.append((i, chunk, lane.last))
        return True

    def _frame(self, i: int, model: Who | None = None) -> Frame | None:
        """Return what stands before and after a text in an event that shows nothing else.

        An event made anew would keep the engine from its next token ten times as long. None where
        pieces have to be taken in.
        """
        if (i, model) not in self._frames:
            fields, more = self._begun[i].choice.plain(_TEXT), _written_by(model)
            made = b"" if fields is None else self._event(i, fields, None, more)
            before, _, after = made[len(self._begins) :].partition(_encode(_TEXT))
            self._frames[i, model] = None if fields is None else (self._begins + before, after)
        return self._frames[i, model]

    def _tally(self) -> None:
        """Count what was written past the event loop."""
        while self._past:
            self._count(*self._past.popleft())

    def _event(
        self, i: int, fields: Fields, reason: str | None = None, more: Fields | None = None
    ) -> bytes:
        choice = msgspec.json.encode({"index": i, **fields, "finish_reason": reason})
        usage = b'],"usage":null' if self._asked.with_usage else b"]"
        rest = b"" if not more else b"," + msgspec.json.encode(more)[1:-1]
        return b"".join((self._begins, choice, usage, rest, b"}\n\n"))

    def _take(self, i: int, chunk: Chunk) -> None:
        """Take a piece of an answer that is not streamed."""
        choice = self._begun[i].choice
        self._count(i, chunk, time.monotonic())
        for _ in choice.take(chunk):
            pass  # it keeps what it shows
        if chunk.generation is not None:
            self._finish(i, chunk.generation)
            for _ in choice.end():
                pass

    # generating

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """Open the model, ask it for all choices, and give what comes."""
        asked, models = self._asked, self._services.models
        async with models.use(asked.named.name, deadline=self._deadline) as use:
            self._job.started = time.monotonic()
            try:
                check_adapter(use.runtime, asked.named, asked.adapter)
                self._head = asked.head(use.runtime)
                # What all events of choices have in common is encoded once.
                self._begins = event(self._head)[:-3] + b',"choices":['
                self._begun = await asyncio.to_thread(asked.question.begin, use.runtime)
                streams = [self._ask(use.runtime, i) for i in range(len(self._begun))]
                if self._writer is not None:
                    self._writer.may_beat = True
                async with aclosing(merged(streams)) as pieces:
                    async for piece in pieces:
                        yield piece
            except ClosedError:
                use.broke()
                raise

    def _ask(self, runtime: Runtime, i: int) -> AsyncGenerator[Chunk, None]:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time for this answer was over before it began")
        begun, asked = self._begun[i].options, self._asked
        options = {**begun, "adapter": asked.adapter, "timeout_s": left_s}
        lane = None if self._writer is None else self._writer.lane
        tap = None if lane is None else functools.partial(self._show_past, lane, i)
        chunks = runtime.astream_past(tap, **options)
        return cast("AsyncGenerator[Chunk, None]", chunks)

    def _limit(self) -> asyncio.Timeout:
        """End the wait for an engine that does not end an answer by itself."""
        return asyncio.timeout(max(0.0, self._deadline - time.monotonic()) + GRACE_S)

    def _count(self, i: int, chunk: Chunk, now: float) -> None:
        """Note tokens that came."""
        n, job = len(chunk.token_ids), self._job
        if not n:
            return
        before, self._last[i] = self._last.get(i, job.created), now
        job.first_token = now if job.first_token is None else job.first_token
        job.last_token = now
        job.n_generated += n
        self._services.token(job, n, now - before)

    def _finish(self, i: int, answer: Generation) -> None:
        """Note an answer that ended.

        Raises:
            ApiError: 504, its time was over before its first token; 503, it was cut from inside.
        """
        job = self._job
        job.generations.append(answer)
        job.adapter = answer.adapter or job.adapter
        if i == 0 or self._begun[i].prompt != self._begun[i - 1].prompt:
            job.n_prompt += answer.stats.n_prompt
        if answer.finish_reason == "timeout" and not answer.token_ids:
            raise TimeoutError(f"no token came within {self._asked.timeout_s:g} s")
        if answer.finish_reason == "cancelled":
            raise ApiError(503, "the answer was cancelled by the server", retry_after_s=1)
        self._found[i] = answer
        self._origins.remember(answer.id, self._asked.named.name)

    def _refusal(self, error: Exception) -> ApiError:
        options = self._begun[0].options if self._begun else {}
        return blame(error, self._asked.question.prompt_field, options)


def _written_by(model: Who | None) -> Fields | None:
    """Tell, of a pair of models, who wrote a piece."""
    return {"edgeroute": {"model": model}} if model else None
