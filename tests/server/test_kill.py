"""A server that is killed, with no chance to tidy up: the next one serves, with what was saved."""

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute.tools.bench.serve_http import Exchange, fetch, request_bytes
from edgeroute.tools.bench.serve_servers import (
    COMMAND,
    KEY,
    Served,
    ServedModel,
    ServerPlan,
    configuration,
)

CHAT = "/v1/chat/completions"
FIRST = "Tell me of the river and the bridge and the garden behind the station."
WAIT_S = 30.0
# Runs the server, but the first call of one function of `os` for a session's file says so and
# never returns. Files of sessions are the only ones that are synced or get a name ending so.
HANG = """
import os, sys, time
import edgeroute.__main__  # imports of the package may use the function as well
from edgeroute.cli import main
name, mark = sys.argv[1:3]
real = getattr(os, name)
def hang(*args):
    if name != "replace" or str(args[1]).endswith(".session"):
        open(mark, "w").close()
        time.sleep(600)
    return real(*args)
setattr(os, name, hang)
sys.argv[1:] = sys.argv[3:]
main()
"""

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def plan(tiny_path: Path, tmp_path: Path) -> ServerPlan:
    """A server of the tiny model that keeps sessions in the test's folder."""
    model = ServedModel(path=tiny_path, threads=1, n_ctx=2048, n_seq=2)
    server = {"api_key_file": "key", "sessions": str(tmp_path / "sessions")}
    return ServerPlan(
        name="edgeroute", command=COMMAND, ready="/health/ready", key=KEY,
        files={"key": KEY, "edgeroute.toml": configuration(model, server, {})},
    )  # fmt: skip


def body(*contents: str, **more: Any) -> dict[str, Any]:
    """A chat whose turns are the user's and the assistant's in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content}
                for i, content in enumerate(contents)]  # fmt: skip
    return {"model": "base", "messages": messages, "max_tokens": 8, "temperature": 0.0, **more}


def ask(server: Served, asked: dict[str, Any]) -> dict[str, Any]:
    head, told = asyncio.run(fetch(server.address, CHAT, asked))
    assert head.status == 200, told
    answer = json.loads(told)
    assert isinstance(answer, dict)
    return answer


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def sessions(server: Served) -> list[dict[str, Any]]:
    head, told = asyncio.run(fetch(server.address, "/edgeroute/sessions"))
    assert head.status == 200, told
    found = json.loads(told)
    return list(found["data"] if isinstance(found, dict) else found)


def kill(server: Served) -> None:
    server.process.kill()
    server.process.wait(WAIT_S)


async def begin_stream(server: Served, asked: dict[str, Any]) -> Exchange:
    """Return a stream of which the first text has come."""
    exchange = await Exchange.open(server.address)
    await exchange.send(request_bytes(server.address, CHAT, asked | {"stream": True}))
    assert (await exchange.head()).status == 200
    async for data in exchange.events():
        if json.loads(data)["choices"][0]["delta"].get("content"):
            return exchange
    raise AssertionError("the stream ended at once")


def test_after_a_kill_in_the_middle_of_answers_the_next_one_serves(plan: ServerPlan) -> None:
    async def kill_in_the_middle(server: Served) -> None:
        streams = [await begin_stream(server, body(f"{i} {FIRST}", max_tokens=1500))
                   for i in range(2)]  # fmt: skip
        kill(server)
        for stream in streams:
            async with stream:
                with pytest.raises(Exception, match=r"cut off|reset"):
                    async for _ in stream.events():
                        pass

    with Served(plan) as server:
        port, expected = server.address.port, text(ask(server, body(FIRST)))
        asyncio.run(kill_in_the_middle(server))
    with Served(plan, port) as server:
        assert text(ask(server, body(FIRST))) == expected


def test_a_kill_while_a_session_is_saved_leaves_the_last_whole_save(
    plan: ServerPlan, tmp_path: Path
) -> None:
    named = {"edgeroute": {"session": "talk", "stats": True}}
    with Served(plan) as server:
        answer = text(ask(server, body(FIRST, **named)))
        deadline = time.monotonic() + WAIT_S
        while not (saved := sessions(server)):
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.02)
        expected = text(ask(server, body(FIRST, answer, "And then?")))
        kill(server)
    for name in ("fsync", "replace"):
        mark = tmp_path / f"in-{name}"
        hangs = replace(plan, command=(sys.executable, "-c", HANG, name, str(mark), *COMMAND[3:]))
        with Served(hangs) as server:
            assert text(ask(server, body(FIRST, answer, "And then?", **named))) == expected
            deadline = time.monotonic() + WAIT_S
            while not mark.exists():
                assert time.monotonic() < deadline, f"a save did not come to {name}"
                time.sleep(0.01)
            kill(server)
    assert list((tmp_path / "sessions").glob("**/*.part")), "it was killed in the middle of a save"
    with Served(plan) as server:
        assert sessions(server) == saved
        again = ask(server, body(FIRST, answer, "And then?", **named))
        assert text(again) == expected
        restored = again["edgeroute"]["stats"]["session"]
        assert restored["restored_tokens"] > 0 and restored["not_restored"] is None
