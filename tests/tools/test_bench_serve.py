"""The serve benchmark: what it takes for a fault, and one short real run of each part.

No speed and no memory is asserted anywhere.
"""

import asyncio
import json
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeroute.commands import bench as command
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.tools.bench import pairs, serve_load, serve_throughput, serve_visits
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.bench.serve_http import Address, BrokenAnswer, Exchange, fetch, request_bytes
from edgeroute.tools.bench.serve_load import LoadParams, growth, in_use, percentile
from edgeroute.tools.bench.serve_outcome import BUSY, Outcome, Place, Tally
from edgeroute.tools.bench.serve_servers import (
    KEY,
    Served,
    ServedModel,
    ServerPlan,
    configuration,
    native_peer,
    our_server,
    python_peer,
)
from edgeroute.tools.bench.serve_throughput import ThroughputParams
from edgeroute.tools.bench.serve_visits import VISITS, Visit

DONE = b"data: [DONE]\n\n"
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'


@pytest.fixture
def params(tiny_path: Path) -> BenchParams:
    return BenchParams(
        path=tiny_path, name="tiny", threads=1, reps=1, tokens=12, warmup=0, pause_s=0.0,
    )  # fmt: skip


def quiet(line: str) -> None:
    """Drop a line of progress."""


def against(answer: bytes, act: Callable[[Address], Awaitable[object]]) -> object:
    """Act on a server that answers every request by the same bytes and hangs up."""

    async def everything() -> object:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(x.split(b":")[1]) for x in head.split(b"\r\n")
                           if x.lower().startswith(b"content-length")), 0)  # fmt: skip
            await reader.readexactly(length)
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await act(Address(port=server.sockets[0].getsockname()[1]))

    return asyncio.run(everything())


def plain(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*parts: bytes, end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + body + (b"0\r\n\r\n" if end else b"")


async def read_events(address: Address) -> list[str]:
    async with await Exchange.open(address) as exchange:
        await exchange.send(request_bytes(address, "/", {}))
        await exchange.head()
        return [event async for event in exchange.events()]


# HTTP


def test_a_request_is_what_it_should_be() -> None:
    address = Address(port=1, key="k")
    sent = request_bytes(address, "/x", {"a": 1}, headers={"Authorization": "", "X-A": "b"})
    head, _, body = sent.partition(b"\r\n\r\n")
    assert json.loads(body) == {"a": 1} and b"Content-Length: 8" in head and b"X-A: b" in head
    assert head.startswith(b"POST /x HTTP/1.1\r\nHost: 127.0.0.1:1\r\n")
    assert b"Authorization" not in head
    assert b"Authorization: Bearer k" in request_bytes(address, "/x")
    assert request_bytes(address, "/x").startswith(b"GET ")


def test_events_may_be_cut_anywhere_into_chunks() -> None:
    whole = b": ping\r\n\r\ndata: {}\r\n\r\n" + TEXT + b"data: a\ndata: b\n\n" + DONE
    expected = ["{}", TEXT[6:-2].decode(), "a\nb", "[DONE]"]
    assert against(chunked(whole), read_events) == expected
    assert against(chunked(*(bytes([byte]) for byte in whole)), read_events) == expected


@pytest.mark.parametrize("answer", [
    b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0-x\r\n\r\n", chunked(TEXT, end=False),
    chunked(TEXT[:20]), plain(200, b"x" * 9)[:-3], b"HTTP/1.1 200 OK\r\n" + b"a" * 99_999,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
])  # fmt: skip
def test_what_is_cut_off_is_broken(answer: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        against(answer, read_events)


def test_fetch_reads_all_three_kinds_of_bodies() -> None:
    def get(address: Address) -> Awaitable[object]:
        return fetch(address, "/")

    for answer in (plain(200, b"body"), chunked(b"bo", b"dy"), b"HTTP/1.1 200 OK\r\n\r\nbody"):
        head, body = against(answer, get)  # type: ignore[misc]
        assert (head.status, body) == (200, b"body")


# visits


def place(address: Address, seed: int = 1) -> Place:
    return Place(address=address, rng=random.Random(seed), model="base", n_ctx=256,
                 max_body_bytes=1000, stall_s=0.01)  # fmt: skip


def visited(answer: bytes, make: Visit) -> Outcome:
    found = against(answer, lambda address: serve_visits.visit(make, place(address)))
    assert isinstance(found, Outcome)
    return found


def test_a_whole_stream_is_no_fault() -> None:
    found = visited(chunked(TEXT, TEXT, END, DONE), serve_visits.chat_stream)
    assert (found.status, found.ended, found.n_events, found.fault) == (200, "done", 2, None)
    assert found.ttft_s is not None
    told = b'data: {"error":{"message":"m","type":"server_error","code":"timeout"}}\n\n'
    found = visited(chunked(TEXT, told), serve_visits.chat_stream)
    assert (found.ended, found.fault) == ("error", None)


@pytest.mark.parametrize(("answer", "words"), [
    (chunked(TEXT, END), "ended by"),
    (chunked(TEXT, END, end=False), "cut off"),
    (chunked(TEXT, DONE, TEXT), "after [DONE]"),
    (chunked(b"data: {]\n\n", DONE), "another form"),
    (chunked(b'data: {"error":{"message":"m","type":"server_error","code":null}}\n\n'), "failed"),
    (plain(500, b"{}"), "status 500"),
    (plain(502, b"{}"), "status 502"),
    (plain(400, b"{}"), "status 400"),
    (plain(503, b"{}"), "without Retry-After"),
    (plain(429, b"{}", "Retry-After: soon"), "without Retry-After"),
    (plain(503, b"{}", "Retry-After: 1", "content-type: application/json"), "without a message"),
    (b"", "cut off"),
])  # fmt: skip
def test_what_must_not_come_is_a_fault(answer: bytes, words: str) -> None:
    assert words in (visited(answer, serve_visits.chat_stream).fault or "none")


def test_a_server_may_be_busy() -> None:
    for status in BUSY:
        found = visited(plain(status, b"", "Retry-After: 2"), serve_visits.chat_stream)
        assert (found.status, found.ended, found.fault) == (status, "whole", None)


def test_bad_requests_must_be_refused() -> None:
    for make in (serve_visits.garbage, serve_visits.wrong_key, serve_visits.unknown_model,
                 serve_visits.no_http):  # fmt: skip
        assert "status 200" in (visited(plain(200, b"{}"), make).fault or "")
        assert "status 500" in (visited(plain(500, b"{}"), make).fault or "")
    assert visited(plain(401, b"{}"), serve_visits.wrong_key).fault is None
    assert visited(b"", serve_visits.no_http).fault is None


def test_a_server_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_visits, "VISIT_S", 0.05)

    async def wait(place: Place) -> Outcome:
        await asyncio.sleep(60)
        return Outcome(kind="never")

    found = asyncio.run(serve_visits.visit(wait, place(Address(port=1))))
    assert "no end" in (found.fault or "")
    refused = asyncio.run(serve_visits.visit(serve_visits.looks, place(Address(port=1))))
    assert "Error" in (refused.fault or "")


def test_a_tally_adds_up() -> None:
    tally = Tally()
    tally.add(Outcome(kind="a", status=200, ended="done", ttft_s=0.5, n_events=3))
    tally.add(Outcome(kind="a", status=429, ended="whole"))
    for i in range(30):
        tally.add(Outcome(kind="b", fault=f"f{i}"))
    assert tally.statuses == {"a": {"200": 1, "429": 1}, "b": {"left": 30}}
    assert tally.ends == {"done": 1, "whole": 1, "left": 30} and tally.ttft_s == [0.5]
    assert (tally.n_visits, tally.n_events, tally.n_faults) == (32, 3, 30)
    assert len(tally.faults) == 20 and tally.faults[0] == "b: f0"


# load


def test_growth_compares_medians_of_both_ends() -> None:
    rss = [(0.0, 100), (1.0, 100), (2.0, 900), (5.0, 500), (8.0, 110), (9.0, 110), (10.0, 1)]
    assert growth(rss, 2.0) == (pytest.approx(0.1), 100, 110)
    assert growth([(0.0, 7)], 60.0) == (0.0, 7, 7)
    with pytest.raises(EdgerouteError, match="no memory"):
        growth([], 1.0)
    assert serve_load.by_minute([(1.0, 5 << 20), (61.0, 7 << 20), (62.0, 9 << 20)]) == [
        5 << 20, 8 << 20,
    ]  # fmt: skip


def test_percentiles() -> None:
    values = [float(x) for x in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (51.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0 and percentile([], 0.5) != percentile([], 0.5)


def test_what_is_in_use_is_read_from_metrics() -> None:
    page = """# HELP edgeroute_kv_cells Cells.
edgeroute_kv_cells{model="a",state="all"} 512.0
edgeroute_kv_cells{model="a",state="free"} 300.0
edgeroute_kv_cells{model="a",state="kept"} 200.0
edgeroute_requests_in_flight{endpoint="chat",model="a"} 2.0
edgeroute_requests_in_flight{endpoint="embeddings",model="a"} 1.0
edgeroute_engine_requests{model="a",state="running"} 1.0
edgeroute_engine_requests{model="a",state="waiting"} 0.0
"""
    assert in_use(page) == {"edgeroute_kv_cells": 12.0, "edgeroute_requests_in_flight": 3.0,
                            "edgeroute_engine_requests": 1.0}  # fmt: skip
    with pytest.raises(BrokenAnswer, match="edgeroute_kv_cells"):
        in_use("\n".join(line for line in page.splitlines() if "kv" not in line))


@pytest.mark.timeout(60)
def test_a_short_load_on_a_tiny_model(params: BenchParams) -> None:
    found = serve_load.run(
        params, quiet, LoadParams(n_clients=4, seconds=1.5, stall_s=0.5, warmup_s=0.5)
    )
    result, demands = found.results[0], {each.what.split(",")[0]: each for each in found.criteria}
    assert result["faults"] == []
    assert result["n_visits"] >= 10 and result["n_streams"] >= 1  # type: ignore[operator]
    assert demands["answers that must not come"].met
    assert demands["held for requests after the last"].met
    assert demands["ready and answering as before"].met
    assert json.dumps(found.to_dict())


def test_every_kind_of_visit_goes_well_once(params: BenchParams) -> None:
    """Those that a short load of few clients may not come to."""
    model = ServedModel(path=params.path, threads=1, n_ctx=serve_load.N_CTX, n_seq=2)
    plan = serve_load.loaded_server(model, max_body_bytes=1 << 20, stall_s=0.5, max_waiting=8)
    with Served(plan) as server:
        assert server.rss_bytes > 0

        async def everything() -> list[Outcome]:
            at = replace(place(server.address), n_ctx=serve_load.N_CTX, max_body_bytes=1 << 20,
                         stall_s=0.5)  # fmt: skip
            return [await serve_visits.visit(make, at) for make in VISITS]

        outcomes = asyncio.run(everything())
    assert [each for each in outcomes if each.fault is not None] == []
    assert {"left", "whole", "done"} <= {each.ended for each in outcomes}
    assert {401, 404, 413} <= {each.status for each in outcomes}


# throughput


def answered(address: Address) -> Awaitable[object]:
    return serve_throughput.ask(address, {"max_tokens": 9})


def test_tokens_are_counted_by_what_was_asked_for_where_all_came() -> None:
    found = against(chunked(TEXT, END, DONE), answered)
    assert isinstance(found, serve_throughput.Answered) and found.n_tokens == 9
    stopped = chunked(TEXT, TEXT, END.replace(b"length", b"stop"), DONE)
    found = against(stopped, answered)
    assert isinstance(found, serve_throughput.Answered) and found.n_tokens == 2
    assert found.first <= found.ended


@pytest.mark.parametrize("answer", [
    plain(500, b"no"), chunked(TEXT, END), chunked(TEXT, DONE), chunked(TEXT, END, end=False),
])  # fmt: skip
def test_half_answers_do_not_count(answer: bytes) -> None:
    with pytest.raises(EdgerouteError):
        against(answer, answered)


def test_prompts_are_the_same_for_all_servers_and_new_each_run() -> None:
    wanted = ThroughputParams()
    asked = [str(serve_throughput.question((4, run, i), wanted)["messages"])
             for run in (1, 2) for i in range(4)]  # fmt: skip
    assert len({text[:40] for text in asked}) == 8
    assert serve_throughput.question((4, 1, 0), wanted) == serve_throughput.question(
        (4, 1, 0), wanted
    )


def test_peers_are_set_up_alike(tmp_path: Path) -> None:
    model = ServedModel(path=tmp_path / 'a "b".gguf', threads=3, n_ctx=512, n_seq=16)
    native, python = native_peer("server", model), python_peer("python", model)
    options = dict(zip(native.command[1::2], native.command[2::2], strict=True))
    assert options["-c"] == str(512 * 16) and options["-np"] == "16" and options["-t"] == "3"
    settings = dict(zip(python.command[3::2], python.command[4::2], strict=True))
    assert settings["--n_threads"] == settings["--n_threads_batch"] == "3"
    ours = our_server(model, max_batch=16)
    assert "n_kv = 8192" in ours.files["edgeroute.toml"] and "max_batch 16" in ours.name
    assert '"b' in configuration(model, {}, {}) and '\\"b' in configuration(model, {}, {})


def test_a_server_that_ends_says_why() -> None:
    code = "print('no such model'); raise SystemExit(3)"
    with pytest.raises(EdgerouteError, match=r"status 3[\s\S]*no such model"):
        Served(ServerPlan(name="broken", command=(sys.executable, "-c", code), key=KEY))


@pytest.mark.timeout(60)
def test_a_short_comparison(params: BenchParams) -> None:
    """Ours under two settings stands for servers of others, which tests do not have."""
    lines: list[str] = []
    wanted = ThroughputParams(n_clients=(1, 3), n_tokens=8, n_words=8)
    found = serve_throughput.run(params, lines.append, wanted)
    assert [each["n_clients"] for each in found.results] == [1, 3]
    for result in found.results:
        servers = result["servers"]
        assert isinstance(servers, dict) and set(servers) == {
            "edgeroute",
            "edgeroute, max_batch 16",
        }
        assert all(each["median"] > 0 and len(each["values"]) == 1 for each in servers.values())
    assert len(found.rows) == 4 and found.criteria == ()
    assert any("run 1/1" in line for line in lines)


def test_a_rate_is_tokens_from_asking_to_the_last_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(address: Address, body: object) -> serve_throughput.Answered:
        return serve_throughput.Answered(100.5, 104.0, 20)

    monkeypatch.setattr(serve_throughput, "ask", ask)
    monkeypatch.setattr(serve_throughput.time, "monotonic", lambda: 100.0)
    rounds = serve_throughput.Rounds(3, ThroughputParams(), warmup=1)
    measure: pairs.Runner = rounds.runner("a", Address(port=1))
    assert (measure(), measure()) == (15.0, 15.0)
    assert rounds.firsts == {"a": [0.5] * 3}, "the warm-up must not count"


def test_the_command_refuses_two_loads(tiny_path: Path) -> None:
    done = CliRunner().invoke(command.command, [
        "serve", "--model", str(tiny_path), "--part", "load", "--clients", "2", "--clients", "3",
    ])  # fmt: skip
    assert done.exit_code == 2 and "one number" in done.output
