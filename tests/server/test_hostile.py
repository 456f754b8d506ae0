"""Requests that have ended other servers: each is refused or answered, and the next one works.

Numbers L#... are issues of llama.cpp whose cases are tried here.
"""

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute.server import connection
from tests.server.api_lab import CHAT, COMPLETIONS, HELLO, events
from tests.server.raw import connect, exchange, request, statuses
from tests.server.whole_lab import KEY, Whole, whole

EMBEDDINGS = "/v1/embeddings"
POSTS = (CHAT, COMPLETIONS, EMBEDDINGS, "/v1/feedback")
AUTH = f"Authorization: Bearer {KEY}"
CANARY = "canary7f3a"


@pytest.fixture(scope="module")
def served(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tiny_path, tmp_path_factory.mktemp("sessions")) as found:
        yield found


@pytest.fixture(autouse=True)
def _healthy_after(served: Whole) -> Iterator[None]:
    yield
    served.check()


def by_schema(schema: object, **more: object) -> dict[str, Any]:
    named = {"name": "x", "schema": schema}
    form = {"type": "json_schema", "json_schema": named}
    return HELLO | {"max_tokens": 4, "response_format": form} | more


def by_grammar(grammar: str) -> dict[str, Any]:
    return HELLO | {"max_tokens": 4, "edgeroute": {"grammar": grammar}}


def nested(n: int, inner: object) -> object:
    for _ in range(n):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


# grammars and schemas

GROUPS = 60_000


@pytest.mark.parametrize(
    "grammar",
    ["root ::= " + "(" * GROUPS + '"a"' + ")" * GROUPS, 'root ::= "a" ' + '("a") ' * (GROUPS // 3),
     "root ::= root", 'root ::= root "a"', "root ::= a\na ::= b\nb ::= a", "root ::= ((((",
     'root ::= "a"{1000000000}', 'root ::= (("a"{500}){500}){500}', 'root ::= ("a"*)*',
     "root ::= [", "root ::= [z-a]", 'root ::= "\\x"', 'root ::= "\\u{110000}"', "x ::= root",
     "root ::= missing", "a" * 100_000, "\x00", "root ::= \"a\x00b\""],
)  # fmt: skip
def test_grammars_that_exhaust_or_crash_a_matcher(served: Whole, grammar: str) -> None:
    """L#26600: 60,000 groups overflowed the stack of the process."""
    answer = served.post(CHAT, by_grammar(grammar))
    assert answer.status_code in (200, 400), answer.text
    if "*)*" not in grammar and "{500}" not in grammar and grammar != "\x00":
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(" * 20_000 + ")" * 20_000},
        {"type": "string", "pattern": "(((("}, {"type": "string", "pattern": "^((a+)+)+$"},
        {"type": "string", "pattern": "^(a{1000}){1000}$"},
        {"type": "string", "pattern": "^(?=x)y$"}, {"type": "string", "pattern": "^(a)\\1$"},
        {"type": "string", "pattern": "^[z-a]$"}, {"type": "string", "pattern": 7},
        {"type": "string", "pattern": "^" + "a?" * 5000 + "$"},
        {"type": "string", "minLength": 10**9}, {"type": "string", "minLength": -1},
        {"type": "string", "minLength": 5, "maxLength": 2}, {"type": "array", "minItems": 10**9},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**18},
        {"type": "integer", "minimum": 10**300, "maximum": 10**301},
        {"enum": list(range(60_000))}, {"enum": []}, {"enum": 7}, {"const": {"a": [1] * 5000}},
        {"anyOf": []}, {"anyOf": [{"type": "string"}] * 20_000}, {"anyOf": "x"}, {"allOf": [7]},
        {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"$ref": "http://127.0.0.1:9/x.json"},
        {"$ref": "file:///etc/passwd"}, {"$ref": "../../../etc/passwd"}, {"$ref": 7},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "nonsense"}, {"type": ["string", "nonsense"]}, {"type": 7}, {"type": []},
        {"type": "object", "properties": 7}, {"type": "object", "properties": {"a": 7}},
        {"type": "object", "required": "a"}, {"type": "object", "required": [7]},
        {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}},
        {"type": "object", "properties": {"": {}, "\x00": {}, '"': {}}, "required": ["\x00"]},
        {"type": "string", "format": "\x00"}, {"not": {}}, {"if": {}},
        {"type": "array", "items": [7]},
        nested(25, {"type": "string"}),
    ],
    ids=lambda schema: json.dumps(schema)[:50],
)  # fmt: skip
def test_schemas_that_exhaust_or_confuse_a_compiler(served: Whole, schema: object) -> None:
    """L#25308 (patterns), L#19051 and L#24144 (what is no schema was taken for no constraint)."""
    answer = served.post(CHAT, by_schema(schema))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"]


@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"type": 7}, {"enum": []}, {"enum": 7}, {"anyOf": []}, {"$ref": "#/no"},
     {"$ref": "file:///etc/passwd"}, {"type": "string", "pattern": "(((("}, {"anyOf": "x"},
     {"type": "string", "pattern": "^(?=x)y$"}, {"type": "object", "properties": 7},
     {"type": "object", "required": "a"}, {"type": "string", "minLength": 5, "maxLength": 2},
     {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}],
    ids=json.dumps,
)  # fmt: skip
def test_a_constraint_that_cannot_be_kept_is_never_dropped(served: Whole, schema: object) -> None:
    """L#19051, L#24144: other servers then answered without any."""
    assert served.post(CHAT, by_schema(schema)).status_code == 400
    if isinstance(schema, dict):
        function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
        tools = [{"type": "function", "function": function}]
        answer = served.post(CHAT, HELLO | {"tools": tools, "tool_choice": "required"})
        assert answer.status_code == 400, answer.text


def test_deep_json_in_any_field(served: Whole) -> None:
    """L#27434."""
    for path in POSTS:
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            for n in (65, 1000, 100_000):
                body = b'{"metadata":' + opening * n + b"1" + closing * n + b"}"
                answer = served.send(path, body)
                assert answer.status_code == 400, (path, n)
                assert answer.json()["error"]["code"] == "json_too_deep"
                assert served.send(path, opening * n).status_code == 400


def test_schemas_as_deep_as_json_may_be(served: Whole) -> None:
    for n in (10, 20, 28):
        answer = served.post(CHAT, by_schema(nested(n, {"type": "null"})))
        assert answer.status_code in (200, 400), answer.text


def test_wide_json_is_refused(served: Whole) -> None:
    body = b'{"metadata": {"a": [' + b"[]," * 600_000 + b"[]]}}"
    assert served.send(CHAT, body).json()["error"]["code"] == "json_too_large"
    body = b'{"user": "' + b"x" * (9 << 20) + b'"}'
    assert served.send(CHAT, body).status_code == 413


# paths

TRICKS = [
    "../" * 8 + "etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
    "..%5c..%5cwindows", "%2fetc%2fpasswd", "....//....//x", "%00", "a%00b", "%0d%0aset-cookie:x=1",
    "%252e%252e%252f", "C:%5cx", "%c0%ae%c0%ae/", "~root", "con", "a" * 3000, "%ff%fe", ".", "..",
    "file:%2f%2f%2fetc%2fpasswd", "base:..%2f..%2fx", "base:%00", "base::", ":", "base%20",
]  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_no_path_parameter_leads_anywhere(served: Whole, trick: str) -> None:
    for method, path in (
        ("GET", f"/v1/models/{trick}"), ("POST", f"/edgeroute/models/{trick}/load"),
        ("POST", f"/edgeroute/models/base/{trick}"), ("DELETE", f"/edgeroute/sessions/{trick}"),
        ("DELETE", f"/edgeroute/models/base/adapters/{trick}"), ("GET", f"/static/{trick}"),
        ("GET", f"/{trick}"),
    ):  # fmt: skip
        found = exchange(served.url, request(method, path, AUTH, "Connection: close"))
        assert statuses(found)[0] in (400, 403, 404, 405, 414), (path, found[:200])
        assert b"root:" not in found
        assert b"\r\nset-cookie" not in found.lower()


def test_no_path_of_a_body_reaches_the_file_system(served: Whole, tmp_path: Path) -> None:
    """Not even to ask whether a file is there."""
    seen: list[str] = []
    watching = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        touches = event in (
            "open",
            "os.listdir",
            "os.scandir",
            "os.mkdir",
            "os.remove",
            "os.rename",
        )
        if watching and touches and CANARY in str(args[:1]):
            seen.append(f"{event} {args[0]!r}")

    target = tmp_path / f"{CANARY}.json"
    target.write_text("{}")
    sys.addaudithook(hook)  # there is no way to take it off; it rests after this test
    try:
        open(target).close()
        assert len(seen) == 1  # it does look
        for name in (str(target), f"../{CANARY}", f"file://{target}", f"{CANARY}", f"..\\{CANARY}"):
            bodies: list[dict[str, Any]] = [{"model": name}, {"model": f"base:{name}"}]
            bodies += [
                {"edgeroute": {key: name}}
                for key in ("adapter", "depth", "steps", "session", "grammar")
            ]
            bodies += [{"edgeroute": {"adapter": {name: 1.0}}}, {"user": name}]
            bodies.append({"tools": [{"type": "function", "function": {"name": name}}]})
            for body in bodies:
                answer = served.post(CHAT, HELLO | {"max_tokens": 1} | body)
                assert answer.status_code in (200, 400, 404), answer.text
            answer = served.post(CHAT, by_schema({"$ref": name}))
            assert answer.status_code == 400
            url = {"type": "image_url", "image_url": {"url": f"file://{target}"}}
            message = {"role": "user", "content": [url]}
            assert served.post(CHAT, {"messages": [message]}).status_code == 400
    finally:
        watching = False
    assert len(seen) == 1, seen


# who asks


def test_nothing_works_without_the_key(served: Whole) -> None:
    """CVE-2025-63389: every endpoint of another server was open to anyone who reached it."""
    body = json.dumps(HELLO).encode()
    for path in POSTS:
        found = exchange(served.url, request("POST", path, "Connection: close", body=body))
        assert statuses(found) == [401], path
    for path in ("/v1/models", "/metrics", "/health/ready", "/openapi.json", "/edgeroute/live"):
        found = exchange(served.url, request("GET", path, "Connection: close"))
        assert statuses(found) == [401], path


def test_another_sites_page_can_do_nothing(served: Whole) -> None:
    """CVE-2024-28224 and plain forms: by a rebound name, by its origin, or by its content type."""
    body = json.dumps(HELLO).encode()
    for headers in (
        ("Host: evil.example", "Origin: http://evil.example"), ("Origin: https://evil.example",),
        ("Origin: null",), ("Sec-Fetch-Site: cross-site",),
    ):  # fmt: skip
        ask = request("POST", CHAT, AUTH, "Connection: close", *headers, body=body)
        assert statuses(exchange(served.url, ask)) == [403], headers
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ):
        ask = request("POST", CHAT, AUTH, "Connection: close", f"Content-Type: {kind}", body=body)
        assert statuses(exchange(served.url, ask)) == [415], kind


# bytes


def test_small_pieces_are_sent_at_once(served: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this every answer, and every token of a stream, came 40 ms late."""
    found: list[int] = []
    real = connection.Connection.connection_made

    def made(self: connection.Connection, transport: asyncio.Transport) -> None:
        sock = transport.get_extra_info("socket")
        found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        real(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", made)
    exchange(served.url, request("GET", "/health/live", "Connection: close"))
    assert found and all(found)


def test_two_requests_in_one_packet_are_two_requests(served: Whole) -> None:
    one = json.dumps(HELLO | {"max_tokens": 1}).encode()
    first = request("POST", CHAT, AUTH, body=one)
    last = request("GET", "/v1/models", AUTH, "Connection: close")
    assert statuses(exchange(served.url, first + first + last)) == [200, 200, 200]


def test_a_smuggled_request_is_not_answered(served: Whole) -> None:
    body = json.dumps(HELLO | {"max_tokens": 1}).encode()
    chunked = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    both = request("POST", CHAT, AUTH, "Content-Type: application/json", "Connection: close",
                   f"Content-Length: {len(chunked)}", "Transfer-Encoding: chunked")  # fmt: skip
    found = exchange(served.url, both + chunked + request("GET", "/v1/models", AUTH))
    assert statuses(found) in ([200], [400])
    assert b'"object":"list"' not in found


def test_a_client_that_leaves_at_any_point(served: Whole) -> None:
    body = json.dumps(HELLO | {"max_tokens": 20, "stream": True}).encode()
    whole_request = request("POST", CHAT, AUTH, body=body)
    for n in (1, 20, len(whole_request) - len(body), len(whole_request) - 1, len(whole_request)):
        with connect(served.url) as wire:
            wire.sendall(whole_request[:n])
    for n_read in (1, 100, 1000):
        with connect(served.url) as wire:
            wire.sendall(whole_request)
            wire.recv(n_read)


def test_garbage_beside_a_stream_does_not_disturb_it(served: Whole) -> None:
    found: list[str] = []

    def listen() -> None:
        answer = served.post(CHAT, HELLO | {"max_tokens": 20, "stream": True, "temperature": 0})
        found.append(answer.text)

    threads = [threading.Thread(target=listen) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        exchange(served.url, b"\x00\xff" * 500, end=True)
        served.send(CHAT, b"[" * 10_000)
        served.post(CHAT, by_grammar("root ::= (((("))
        served.post(CHAT, HELLO | {"max_tokens": -1})
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    texts = {json.dumps([each["choices"][0]["delta"] for each in events(text)]) for text in found}
    assert len(texts) == 1


def test_the_log_and_the_answers_hold_no_secrets(
    served: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "edgeroute.server"):
        prompt = [{"role": "user", "content": CANARY}]
        served.post(CHAT, {"messages": prompt, "max_tokens": 2})
        served.post(CHAT, {"messages": prompt, "max_tokens": -1})
        served.post(CHAT, {"messages": prompt, "user": CANARY, "edgeroute": {"grammar": "(("}})
        served.send(CHAT, f'{{"messages": [{{"content": "{CANARY}"'.encode())
        served.client.get("/v1/models", params={"key": CANARY})
    assert caplog.records
    told = " ".join(str(vars(record)) for record in caplog.records if record.name != "httpx2")
    assert CANARY not in told
    assert KEY not in told
