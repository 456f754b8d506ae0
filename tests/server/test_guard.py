"""The head of a request: who may ask, from which page, for which host, with which key."""

import asyncio
import hmac
import re
from dataclasses import replace

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.server import guard_head
from edgeroute.server.guard import guards
from edgeroute.server.records import ServerParams
from tests.server.asgi import HOST, Ask, Header, Reply, answer
from tests.server.guard_lab import KEYED, PLAIN, SHARED, app, ask

# request ids


@pytest.mark.parametrize("given", ["a", "req-1", "0b9f6a1e-58a1-4bd5-9a35-6f1c0b3b1b1a", "x" * 64])
def test_a_sane_request_id_is_taken_over(given: str) -> None:
    reply = ask(HOST, ("x-request-id", given))
    assert reply["x-request-id"] == given
    assert given in reply.body.decode()


@pytest.mark.parametrize(
    "given", ["", "x" * 65, "a b", "a\r\nset-cookie: x=1", 'a"b', "<b>", "é", "../x", "\x00", "-a"]
)
def test_any_other_request_id_is_replaced(given: str) -> None:
    """A client's text in a header or a log line must not become another header or line."""
    reply = ask(HOST, ("x-request-id", given))
    assert re.fullmatch(r"req-[0-9a-f]{24}", reply["x-request-id"])
    assert not reply.has("set-cookie")


def test_two_request_ids_are_none() -> None:
    reply = ask(HOST, ("x-request-id", "a"), ("x-request-id", "b"))
    assert reply["x-request-id"].startswith("req-")


def test_ids_differ() -> None:
    assert ask(HOST)["x-request-id"] != ask(HOST)["x-request-id"]


# host


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:8080", "127.8.8.8", "[::1]:65535"]
)
def test_loopback_hosts_are_ours(host: str) -> None:
    assert ask(("host", host)).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil-localhost", "192.168.1.9:8080", "0.0.0.0",
     "127.0.0.1.evil.example", "[fe80::1]", "2130706433", "0x7f.1"],
)  # fmt: skip
def test_a_rebound_name_is_refused(host: str) -> None:
    """CVE-2024-28224: the browser believes that evil.example is at 127.0.0.1, and asks there."""
    reply = ask(("host", host), ("origin", f"http://{host}"))
    assert reply.status == 403
    assert reply.error["code"] == "host_not_allowed"
    assert "allowed_hosts" in reply.error["message"]


@pytest.mark.parametrize(
    "headers",
    [(), (("host", ""),), (HOST, HOST), (("host", "localhost"), ("host", "evil.example")),
     (("host", "localhost:80:80"),), (("host", "localhost:99999"),), (("host", "me@localhost"),),
     (("host", "localhost/x"),), (("host", "local host"),), (("host", "localhost:"),),
     (("host", "localhöst"),)],
)  # fmt: skip
def test_a_missing_doubled_or_malformed_host_is_400(headers: tuple[Header, ...]) -> None:
    assert ask(*headers).status == 400


def test_configured_hosts_are_ours() -> None:
    params = ServerParams(host="10.0.0.5", allowed_hosts=("robot.local", "FE80::1"))
    for host, status in {
        "robot.local:8080": 200, "Robot.Local": 200, "10.0.0.5:1": 200, "[fe80::1]": 200,
        "127.0.0.1": 200, "10.0.0.6": 403, "other.local": 403,
    }.items():  # fmt: skip
        assert ask(("host", host), params=params).status == status, host


def test_a_server_on_all_addresses_takes_addresses_but_no_unknown_names() -> None:
    params = ServerParams(host="0.0.0.0", api_keys=("k",))
    for host, status in {"192.168.1.9:8080": 401, "[fe80::1]": 401, "evil.example": 403}.items():
        assert ask(("host", host), params=params).status == status, host


# origin


@pytest.mark.parametrize(
    "headers",
    [(), (("origin", "http://localhost:8080"),), (("origin", "HTTP://LOCALHOST:8080"),),
     (("sec-fetch-site", "same-origin"),), (("sec-fetch-site", "none"),)],
)  # fmt: skip
def test_programs_and_our_own_page_may_ask(headers: tuple[Header, ...]) -> None:
    reply = ask(HOST, *headers)
    assert reply.status == 200
    assert not reply.has("access-control-allow-origin")


@pytest.mark.parametrize(
    "headers",
    [(("origin", "https://evil.example"),), (("origin", "null"),), (("origin", ""),),
     (("origin", "http://localhost:3000"),), (("origin", "http://localhost"),),
     (("origin", "https://localhost:8080"),), (("origin", "file://"),),
     (("origin", "http://localhost:8080.evil.example"),),
     (("origin", "http://localhost:8080, https://evil.example"),),
     (("sec-fetch-site", "cross-site"),), (("sec-fetch-site", "same-site"),),
     (("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")),
     (("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"))],
)  # fmt: skip
def test_other_pages_may_not(headers: tuple[Header, ...]) -> None:
    reply = ask(HOST, *headers)
    assert reply.status == 403
    assert reply.error["code"] == "origin_not_allowed"
    assert not reply.has("access-control-allow-origin")


def test_a_link_may_open_the_dashboard_but_not_embed_it() -> None:
    link = (("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"))
    reply = ask(HOST, *link, path="/")
    assert reply.status == 200
    assert "frame-ancestors 'none'" in reply["content-security-policy"]
    assert reply["x-frame-options"] == "DENY"


def test_two_origins_are_refused() -> None:
    origins = [("origin", "http://localhost:8080")] * 2
    assert ask(HOST, *origins).status == 400


def test_behind_a_proxy_with_tls_the_page_is_still_ours() -> None:
    params = ServerParams(allowed_hosts=("robot.example",))
    headers = (("host", "robot.example"), ("origin", "https://robot.example"))
    assert ask(*headers, params=params).status == 200


# CORS


def test_a_configured_origin_may_ask_and_read() -> None:
    for params in (SHARED, replace(SHARED, cors_origins=("HTTPS://App.example/",))):
        reply = ask(HOST, ("origin", "https://app.example"), params=params)
        assert reply.status == 200
        assert reply["access-control-allow-origin"] == "https://app.example"
        assert reply["vary"] == "origin"
        assert not reply.has("access-control-allow-credentials")


def test_a_preflight_is_answered_without_key_and_body() -> None:
    """Browsers send it without the Authorization header; the openai client adds many headers."""
    params = replace(SHARED, api_keys=("k",))
    names = "authorization, content-type, x-stainless-lang, bad\x01name"
    reply = answer(app(params), Ask(method="OPTIONS", headers=[
        HOST, ("origin", "https://app.example"), ("access-control-request-method", "POST"),
        ("access-control-request-headers", names),
        ("access-control-request-private-network", "true"),
    ]))  # fmt: skip
    assert reply.status == 204
    assert reply.body == b""
    assert reply["access-control-allow-origin"] == "https://app.example"
    wanted = "authorization, content-type, x-stainless-lang"
    assert reply["access-control-allow-headers"] == wanted
    assert reply["access-control-allow-private-network"] == "true"
    assert not reply.has("access-control-allow-credentials")


def test_a_preflight_of_another_origin_is_refused() -> None:
    headers = (HOST, ("origin", "https://evil.example"), ("access-control-request-method", "POST"))
    for params in (PLAIN, SHARED):
        reply = answer(app(params), Ask(method="OPTIONS", headers=headers))
        assert reply.status == 403
        assert not reply.has("access-control-allow-origin")


def test_a_refused_key_can_be_read_by_a_configured_origin() -> None:
    params = replace(SHARED, api_keys=("k",))
    reply = ask(HOST, ("origin", "https://app.example"), params=params)
    assert reply.status == 401
    assert reply["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/models", 200), ("/breaks", 500), ("/wrong", 400), ("/refuses", 429), ("/none", 404),
     ("/v1/models/" + 5000 * "x", 414), ("/text/event-stream", 200), ("/text/plain", 200)],
)  # fmt: skip
def test_a_configured_origin_reads_every_answer_failures_too(path: str, status: int) -> None:
    """A page hears of an error without these headers as of a network that is down."""
    origin = ("origin", "https://app.example")
    reply = ask(HOST, origin, params=SHARED, path=path)
    assert reply.status == status
    assert reply["access-control-allow-origin"] == "https://app.example"
    assert reply["access-control-expose-headers"] == "x-request-id, retry-after"
    assert reply["vary"] == "origin"
    for params, asked in ((SHARED, (HOST,)), (PLAIN, (HOST, ("origin", "http://localhost:8080")))):
        assert not ask(*asked, params=params, path=path).has("access-control-allow-origin")


def test_a_head_that_is_too_large_is_refused_in_words_that_the_page_can_read() -> None:
    params = replace(SHARED, max_header_bytes=200)
    reply = ask(HOST, ("origin", "https://app.example"), ("x-long", 300 * "x"), params=params)
    assert reply.status == 431 and reply["access-control-allow-origin"] == "https://app.example"
    reply = ask(HOST, ("origin", "https://evil.example"), ("x-long", 300 * "x"), params=params)
    assert reply.status == 403 and not reply.has("access-control-allow-origin")


def test_every_origin_with_keys_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="cors_origins has"):
        guards(ServerParams(cors_origins=("*",), api_keys=("k",)))


def test_every_origin_without_keys_is_the_owners_choice() -> None:
    params = ServerParams(cors_origins=("*",))
    for origin in ("https://any.example", "null"):
        reply = ask(HOST, ("origin", origin), params=params)
        assert reply["access-control-allow-origin"] == origin


# keys


@pytest.mark.parametrize(
    "headers",
    [(("authorization", "Bearer first-key"),), (("authorization", "bearer  first-key "),),
     (("x-api-key", "first-key"),), (("authorization", "Basic abc"), ("x-api-key", "first-key")),
     (("authorization", "Bearer wrong"), ("x-api-key", "first-key"))],
)  # fmt: skip
def test_a_key_opens(headers: tuple[Header, ...]) -> None:
    reply = ask(HOST, *headers, params=KEYED)
    assert reply.status == 200
    assert b'"has_key":true' in reply.body


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_head, "WRONG_KEY_S", 0.0)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "headers",
    [(), (("authorization", ""),), (("authorization", "Bearer"),),
     (("authorization", "first-key"),),
     (("authorization", "Bearer first-ke"),), (("authorization", "Bearer first-key1"),),
     (("authorization", "Bearer FIRST-KEY"),), (("authorization", "Basic first-key"),),
     (("x-api-key", ""),), (("x-api-key", "Bearer first-key"),)],
)  # fmt: skip
def test_no_key_or_a_wrong_one_is_401(headers: tuple[Header, ...]) -> None:
    for path in ("/v1/models", "/metrics", "/no/such/path", "/static", "/health/ready"):
        reply = ask(HOST, *headers, params=KEYED, path=path)
        assert reply.status == 401, path
        assert reply["www-authenticate"] == "Bearer"
        assert reply.error["type"] == "authentication_error"
        assert "first-key" not in reply.body.decode()


@pytest.mark.usefixtures("hasty")
def test_a_header_of_a_key_that_comes_twice_is_refused() -> None:
    keys = [("authorization", "Bearer wrong"), ("authorization", "Bearer first-key")]
    assert ask(HOST, *keys, params=KEYED).status == 400
    assert ask(HOST, ("authorization", "Bearer second-key-é"), params=KEYED).status == 400


@pytest.mark.parametrize("path", ["/", "/health/live", "/static/app.js"])
def test_what_is_public_needs_no_key(path: str) -> None:
    assert ask(HOST, params=KEYED, path=path).status == 200


@pytest.mark.parametrize(
    "path", ["/static/../v1/models", "/static/./../v1/models", "//v1/models", "/health/live/x"]
)
def test_no_path_slips_through_what_is_public(path: str) -> None:
    assert ask(HOST, params=KEYED, path=path).status in (400, 401, 404)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys, whole hashes of equal length, also after one has matched."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def watch(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(guard_head.hmac, "compare_digest", watch)
    assert ask(HOST, ("authorization", "Bearer first-key"), params=KEYED).status == 200
    assert compared == [(32, 32), (32, 32)]


def test_wrong_keys_wait_but_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    waiting: list[asyncio.Future[None]] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        waiting.append(asyncio.get_running_loop().create_future())
        await waiting[-1]

    monkeypatch.setattr(guard_head, "MAX_DELAYED", 3)
    monkeypatch.setattr(guard_head.asyncio, "sleep", sleep)

    async def flood() -> list[Reply]:
        one, wrong = app(KEYED), Ask(headers=[HOST, ("x-api-key", "wrong")])
        right = Ask(headers=[HOST, ("x-api-key", "first-key")])
        asked = [asyncio.ensure_future(wrong(one)) for _ in range(5)]
        done, _ = await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert all(task.result().status == 401 for task in done)
        assert (await right(one)).status == 200  # nobody else waits for them
        for future in waiting:
            future.set_result(None)
        return await asyncio.gather(*asked)

    assert [reply.status for reply in asyncio.run(flood())] == [401] * 5
    assert slept == [guard_head.WRONG_KEY_S] * 3


# shape


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PUT", "PATCH", "DEBUG", "get", "X" * 9000])
def test_other_methods_are_refused(method: str) -> None:
    assert answer(app(), Ask(method=method)).status == 405


def test_headers_are_limited_in_bytes_and_number() -> None:
    big = ("x-a", "v" * PLAIN.max_header_bytes)
    assert ask(HOST, big).status == 431
    assert ask(HOST, *[(f"x-{i}", "v") for i in range(200)]).status == 431
    assert ask(HOST, *[(f"x-{i}", "v") for i in range(90)]).status == 200


def test_path_and_query_are_limited() -> None:
    assert ask(HOST, path="/" + "a" * 5000).status == 414
    assert answer(app(), Ask(query=b"a=1&" * 5000)).status == 414


@pytest.mark.parametrize(
    "path",
    ["/../etc/passwd", "/v1/../../x", "/v1/models/..", "/v1/./models", "/a\x00b", "/a\nb", "/a\x7f",
     "http://evil.example/", "*", "", "v1/models"],
)  # fmt: skip
def test_paths_that_are_no_paths_are_refused(path: str) -> None:
    assert ask(HOST, path=path).status == 400
