"""What clients do to a server under load: ask well, ask badly, leave at any moment, read slowly."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from edgeroute.tools.bench.serve_http import BrokenAnswer, Exchange, fetch, request_bytes
from edgeroute.tools.bench.serve_outcome import (
    Outcome,
    Place,
    Reading,
    check_refusal,
    stream,
    whole,
)

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
VISIT_S: Final = 180.0
_TOOL: Final = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"where": {"enum": ["here", "there"]}},
    "required": ["where"], "additionalProperties": False,
}}}  # fmt: skip
_SCHEMA: Final = {"type": "json_schema", "json_schema": {"name": "s", "schema": {
    "type": "object", "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"], "additionalProperties": False,
}}}  # fmt: skip
_GARBAGE: Final = (
    b"", b"{", b"\x00\xff\xfe" * 50, b"null", b"[]", b"[" * 5000, b'{"a":' * 5000,
    b'{"model":"base"}', b'{"model":"base","messages":[]}', b'{"model":"base","messages":"hi"}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"max_tokens":-1}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"max_tokens":1e400}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"temperature":"hot"}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"n":100000}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"stop":[[]]}',
    b'{"model":"base","messages":[{"role":"nobody","content":{"a":1}}]}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"response_format":'
    b'{"type":"json_schema","json_schema":{"name":"s","schema":{"type":"what"}}}}',
    b'{"model":"base","messages":[{"role":"user","content":"a"}],"tools":[{"type":"x"}],'
    b'"tool_choice":"required"}',
    b'{"model":"base","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
)  # fmt: skip


# visits


async def chat_stream(place: Place) -> Outcome:
    """A chat, streamed to its end, at times with usage, stop texts, two answers or a schema."""
    more: dict[str, Any] = place.rng.choice((
        {}, {"stream_options": {"include_usage": True}}, {"stop": ["the", "\n"]}, {"n": 2},
        {"response_format": _SCHEMA}, {"logprobs": True, "top_logprobs": 2},
    ))  # fmt: skip
    return await stream(place, "stream", CHAT, place.chat(**more))


async def chat_whole(place: Place) -> Outcome:
    """A chat answered at once."""
    more: dict[str, Any] = place.rng.choice(({}, {"n": 2}, {"response_format": _SCHEMA}))
    return await whole(place, "chat", CHAT, place.chat(**more))


async def tools(place: Place) -> Outcome:
    """A tool that must be called, streamed or not."""
    body = place.chat(tools=[_TOOL], tool_choice="required", max_tokens=48)
    if place.rng.random() < 0.5:
        return await whole(place, "tools", CHAT, body)
    return await stream(place, "tools", CHAT, body)


async def completion(place: Place) -> Outcome:
    """A plain completion, streamed."""
    body = {"model": place.model, "prompt": place.words(20), "max_tokens": 16, "stop": "zzz"}
    return await stream(place, "completion", TEXT, body)


async def embeddings(place: Place) -> Outcome:
    """Vectors of a few texts."""
    body = {"model": place.model, "input": [place.words(8), place.words(40)],
            "encoding_format": place.rng.choice(("float", "base64"))}  # fmt: skip
    return await whole(place, "embeddings", VECTORS, body)


async def cancel(place: Place) -> Outcome:
    """A stream that is left after some texts."""
    reading = Reading(leave_after=place.rng.randint(0, 8))
    return await stream(place, "cancel", CHAT, place.chat(max_tokens=200), reading)


async def leave_in_prefill(place: Place) -> Outcome:
    """A long prompt whose sender leaves while it is computed."""
    outcome = Outcome(kind="prefill")
    body = place.chat(place.n_ctx // 6, max_tokens=50, stream=place.rng.random() < 0.5)
    async with await Exchange.open(place.address) as exchange:
        await exchange.send(request_bytes(place.address, CHAT, body))
        await asyncio.sleep(place.rng.random() * 0.5)
        exchange.abort()
    return outcome


async def leave_in_body(place: Place) -> Outcome:
    """A request of which only a part is sent."""
    whole = request_bytes(place.address, CHAT, place.chat(100))
    async with await Exchange.open(place.address) as exchange:
        await exchange.send(whole[: place.rng.randrange(1, len(whole))])
        await asyncio.sleep(place.rng.random() * 0.3)
        if place.rng.random() < 0.5:
            exchange.abort()
    return Outcome(kind="half request")


async def garbage(place: Place) -> Outcome:
    """What is no request of any kind: the answer is a 4xx."""
    path = place.rng.choice((CHAT, TEXT, VECTORS, "/v1/feedback"))
    return await whole(place, "garbage", path, place.rng.choice(_GARBAGE),
                        (400, 401, 404, 413, 415, 422, 431))  # fmt: skip


async def no_http(place: Place) -> Outcome:
    """Bytes that are no HTTP: 400, or the connection is closed."""
    outcome = Outcome(kind="no http")
    async with await Exchange.open(place.address) as exchange:
        await exchange.send(place.rng.randbytes(200) + b"\r\n\r\n")
        try:
            outcome.status = (await exchange.head()).status
            outcome.ended = "whole"
        except BrokenAnswer:
            return outcome
    if outcome.status is not None and not 400 <= outcome.status < 500:
        outcome.fault = f"status {outcome.status} for bytes that are no HTTP"
    return outcome


async def oversized(place: Place) -> Outcome:
    """A body over the limit, sent whole or only announced: 413."""
    outcome, n_bytes = Outcome(kind="oversized"), place.max_body_bytes + 1
    told = request_bytes(place.address, CHAT, b"", headers={"Content-Length": str(n_bytes)})
    async with await Exchange.open(place.address) as exchange:
        await exchange.send(told)
        if place.rng.random() < 0.5:
            try:
                await exchange.send(b" " * n_bytes)
            except OSError:
                return outcome  # refused while we sent: its answer may be lost then
        try:
            head = await exchange.head()
        except (BrokenAnswer, OSError):
            return outcome
        outcome.status, outcome.ended = head.status, "whole"
        if head.status != 413:
            outcome.fault = f"status {head.status} for {n_bytes} bytes"
    return outcome


async def wrong_key(place: Place) -> Outcome:
    """A key that is not one, or none."""
    key = place.rng.choice(("Bearer wrong", "Basic abc", ""))
    return await whole(place, "wrong key", CHAT, place.chat(), (401,), Authorization=key)


async def unknown_model(place: Place) -> Outcome:
    """A model that is not there."""
    return await whole(place, "no model", CHAT, place.chat(model="../../etc/passwd"), (404,))


async def slow_reader(place: Place) -> Outcome:
    """A long stream that is read slowly and at times left; the server may end it by an error."""
    reading = Reading(slow=True, pause_s=place.stall_s * place.rng.choice((0.004, 0.04)),
                      leave_after=place.rng.choice((None, 20)))  # fmt: skip
    body = place.chat(max_tokens=100, logprobs=True, top_logprobs=5)
    return await stream(place, "slow reader", CHAT, body, reading)


async def stalled_reader(place: Place) -> Outcome:
    """A long stream of which nothing is read for long: the server may give it up."""
    body = place.chat(max_tokens=200, logprobs=True, top_logprobs=5, stream=True)
    outcome = Outcome(kind="stalled reader")
    async with await Exchange.open(place.address, slow=True) as exchange:
        await exchange.send(request_bytes(place.address, CHAT, body))
        await asyncio.sleep(place.stall_s * 1.5)
        try:
            head = await exchange.head()
            outcome.status = head.status
            await exchange.body()
            outcome.ended = "whole"
        except (OSError, BrokenAnswer):
            return outcome
    return outcome


async def session(place: Place) -> Outcome:
    """A chat whose state is saved on disk under a name that others use as well."""
    kept = {"session": f"s{place.rng.randrange(4)}"}
    return await stream(place, "session", CHAT, place.chat(40, edgeroute=kept))


async def watches(place: Place) -> Outcome:
    """A dashboard that is closed after some events."""
    outcome = Outcome(kind="dashboard")
    async with await Exchange.open(place.address) as exchange:
        await exchange.send(request_bytes(place.address, "/edgeroute/live"))
        head = await exchange.head()
        outcome.status = head.status
        if head.status != 200:
            await check_refusal(exchange, head, outcome, (200,))
            return outcome
        n_seen = 0
        async for _ in exchange.events():
            n_seen += 1
            if n_seen >= 3:
                break
        exchange.abort()
    return outcome


async def looks(place: Place) -> Outcome:
    """What programs that watch a server ask for."""
    path = place.rng.choice(("/", "/v1/models", "/health/live", "/health/ready", "/metrics"))
    return await whole(place, "look", path, None)


async def kept_connection(place: Place) -> Outcome:
    """A bad request and a good one on the same connection: the second is answered well."""
    outcome, address = Outcome(kind="kept"), place.address
    async with await Exchange.open(address) as exchange:
        await exchange.send(request_bytes(address, CHAT, b"{", keep=True))
        head = await exchange.head()
        outcome.status = head.status
        await check_refusal(exchange, head, outcome, (400,))
        if outcome.fault or head.headers.get("connection", "").lower() == "close":
            return outcome
        await exchange.send(request_bytes(address, CHAT, place.chat(max_tokens=4)))
        head = await exchange.head()
        outcome.status = head.status
        await check_refusal(exchange, head, outcome, (200,))
    return outcome


Visit = Callable[[Place], Awaitable[Outcome]]
VISITS: Final[Mapping[Visit, int]] = {
    chat_stream: 24, chat_whole: 8, tools: 5, completion: 8, embeddings: 6, cancel: 14,
    leave_in_prefill: 8, leave_in_body: 4, garbage: 8, no_http: 2, oversized: 1, wrong_key: 3,
    unknown_model: 2, slow_reader: 4, stalled_reader: 1, session: 4, watches: 2, looks: 4,
    kept_connection: 3,
}  # fmt: skip
"""Each with how often it is made, in comparison."""


async def visit(make: Visit, place: Place) -> Outcome:
    """Make one visit; whatever goes wrong in it becomes its fault."""
    kind = make.__name__
    try:
        async with asyncio.timeout(VISIT_S):
            return await make(place)
    except TimeoutError:
        return Outcome(kind=kind, fault=f"no end within {VISIT_S:.0f} s")
    except (OSError, BrokenAnswer) as error:
        return Outcome(kind=kind, fault=f"{type(error).__name__}: {error}")
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # not the JSON it should be
        return Outcome(kind=kind, fault=f"an answer of another form: {error!r}")


async def answer_of(place: Place, prompt: str) -> str:
    """Return the greedy answer to a fixed prompt, as a sample of the server's health.

    Raises:
        BrokenAnswer: it is refused.
    """
    body = {"model": place.model, "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 16, "temperature": 0.0}  # fmt: skip
    head, told = await fetch(place.address, CHAT, body)
    if head.status != 200:
        raise BrokenAnswer(f"status {head.status}: {told!r:.300}")
    return str(json.loads(told)["choices"][0]["message"]["content"])
