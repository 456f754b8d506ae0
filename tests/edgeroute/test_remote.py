"""A remote model that works, one that fails in every way, and a key that nobody gets to see."""

import contextlib
import gc
import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgeroute import remote_http
from edgeroute.remote import RemoteModel
from edgeroute.remote_address import KEY_ENV
from edgeroute.remote_step import RemotePrompt, RemoteStep
from edgeroute.runtime.errors import UsageError
from tests.edgeroute.remote_server import RemoteServer, Reply, Seen, event

KEY = "sk-very-secret-4711"
WORDS = ["Two ", "and ", "two ", "make ", "vier, ", "né ", "四", "😀", "."]
TEXT = "".join(WORDS).encode()
PROMPT = RemotePrompt(prompt="2+2? ", answer="Well: ")
CHAT = RemotePrompt(messages=({"role": "user", "content": "2+2?"},), answer="Well: ")
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Woken(RemoteModel):
    """A remote model and the event that its wake sets."""

    def __init__(self, remote: str, key: str = "", timeout_s: float = PATIENCE_S) -> None:
        self.woken = threading.Event()
        super().__init__(remote, self.woken.set, timeout_s=timeout_s, env={KEY_ENV: key})

    def read(self, step: RemoteStep) -> bytes:
        """Poll a step to its end, and only when woken."""
        text = bytearray()
        while True:
            done = step.done
            text += step.poll()
            if done:
                return bytes(text)
            assert self.woken.wait(PATIENCE_S), "nobody woke the engine"
            self.woken.clear()

    def failure(self, prompt: RemotePrompt = PROMPT) -> str:
        """Write a step that must fail, and say how."""
        step = self.write(prompt, max_tokens=20)
        self.read(step)
        assert step.finish is None and step.failure is not None
        return step.failure


@contextlib.contextmanager
def opened(server: RemoteServer | str, **settings: Any) -> Iterator[Woken]:
    remote = server if isinstance(server, str) else server.remote
    model = Woken(remote, **settings)
    try:
        yield model
    finally:
        model.close()


def words(body: dict[str, Any]) -> list[str]:
    return WORDS


def replying(*parts: bytes, **fields: Any) -> Callable[[Seen], Reply]:
    return lambda seen: Reply(body=parts, **fields)


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["completions", "chat"])
def test_writes_a_step(prompt: RemotePrompt) -> None:
    with RemoteServer(words, model="org/big:7b") as server, opened(server) as model:
        assert not server.seen and not server.n_connections, "no connection before the first step"
        step = model.write(prompt, max_tokens=20, temperature=0.5, top_p=0.9, seed=7 << 40 | 7)
        assert model.read(step) == TEXT
        assert (step.finish, step.failure) == ("stop", None)
        short = model.write(prompt, max_tokens=2)
        assert model.read(short) == b"Two and " and short.finish == "length"
        listing, first, second = server.seen
    assert listing.path == "/v1/models" and model.name == "org/big:7b"
    assert first.path == ("/v1/chat/completions" if prompt.chat else "/v1/completions")
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 7}
    shared = {"model": "org/big:7b", "stream": True}
    if prompt.chat:
        asked: dict[str, Any] = {
            "messages": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "Well: "},
            ],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
    else:
        asked = {"prompt": "2+2? Well: "}
    assert first.body == {**shared, **asked, **sampling, "max_tokens": 20}
    assert second.body == {**shared, **asked, "max_tokens": 2}
    assert "authorization" not in first.headers
    assert (model.n_calls, model.n_failures) == (2, 0)


def test_a_chat_without_an_answer_asks_for_a_new_message() -> None:
    assert RemotePrompt(messages=({"role": "user"},)).body() == {"messages": [{"role": "user"}]}
    with pytest.raises(UsageError, match="give one of them"):
        RemotePrompt(prompt="a", messages=())


def test_a_named_model_is_not_looked_up_and_the_connection_is_kept() -> None:
    with RemoteServer(words) as server, opened(f"{server.remote}/#a#b") as model:
        assert model.name == "a#b"
        for _ in range(3):
            assert model.read(model.write(PROMPT, max_tokens=20)) == TEXT
            assert server.wait(lambda each: not model._tasks)  # the stream's end was read
        assert [seen.body["model"] for seen in server.seen] == ["a#b"] * 3
        assert server.n_connections == 1


def test_steps_run_beside_each_other() -> None:
    met = threading.Barrier(4)

    def answer(body: dict[str, Any]) -> Iterator[str]:
        met.wait(PATIENCE_S)
        yield from body["prompt"].split("|")

    with RemoteServer(answer) as server, opened(server.remote + "#m") as model:
        prompts = [f"a{i}|b|c" for i in range(4)]
        steps = [model.write(RemotePrompt(prompt=text), max_tokens=9) for text in prompts]
        assert [model.read(each) for each in steps] == [f"a{i}bc".encode() for i in range(4)]


def test_write_and_poll_never_wait_and_the_latency_is_measured() -> None:
    with (
        RemoteServer(words, latency_s=0.3, token_s=0.02) as server,
        opened(server.remote + "#m") as model,
    ):
        assert model.first_s is None and model.token_s is None
        step = model.write(PROMPT, max_tokens=20)
        assert step.poll() == b"" and not step.done
        assert model.read(step) == TEXT
        assert model.first_s is not None and model.first_s >= 0.3
        assert model.token_s is not None and model.token_s >= 0.015
        stats = model.stats()
    assert stats["first_s"] == model.first_s and stats["token_s"] == model.token_s
    assert stats["available"] is True and stats["last_failure"] is None


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["completions", "chat"])
def test_a_server_killed_in_mid_answer(prompt: RemotePrompt) -> None:
    with RemoteServer(words) as server, opened(server.remote + "#m") as model:
        server.kill(after=3)
        step = model.write(prompt, max_tokens=20)
        assert model.read(step) == b"Two and two "
        assert step.failure is not None and "broke off" in step.failure
        assert server.host in step.failure and not model.available
        second = model.write(prompt, max_tokens=20)
        assert second.done and second.failure is not None
        assert "was not asked" in second.failure and "broke off" in second.failure
        assert (model.n_calls, model.n_failures) == (1, 1)
        model._health._retry_at_s = 0.0  # as if the pause were over
        assert model.available
        assert "connection refused" in model.failure()
        assert (model.n_calls, model.n_failures) == (2, 2)


def test_a_success_after_a_failure_closes_the_circuit() -> None:
    with RemoteServer(words) as server, opened(server.remote + "#m") as model:
        server.garbage(after=2)
        assert "sent what is no answer" in model.failure()
        server.heal()
        model._health._retry_at_s = 0.0
        assert model.read(model.write(PROMPT, max_tokens=20)) == TEXT
        assert model.available and model._health.begin() is not None


@pytest.mark.parametrize(
    ("after", "said"), [(0, "sent no text within 1 s"), (3, "fell silent: no text for 1 s")]
)
def test_a_server_that_falls_silent(after: int, said: str) -> None:
    with RemoteServer(words) as server, opened(server.remote + "#m", timeout_s=1) as model:
        server.slow(after=after)
        step = model.write(PROMPT, max_tokens=20)
        assert model.read(step) == "".join(WORDS[:after]).encode()
        assert step.failure is not None and said in step.failure
        assert server.wait(lambda each: each.n_cancelled == 1), "the connection was left open"


def test_comments_that_keep_a_connection_alive_do_not_count_as_text() -> None:
    def comments() -> Iterator[bytes]:
        while True:
            yield b": still here\n\n"
            time.sleep(0.05)

    with (
        RemoteServer(reply=lambda seen: Reply(body=comments())) as server,
        opened(server.remote + "#m", timeout_s=0.3) as model,
    ):
        assert "sent no text within 0.3 s" in model.failure()


def test_a_trickle_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_http, "N_TIMEOUTS", 2)
    with (
        RemoteServer(lambda body: itertools.repeat("a"), token_s=0.05) as server,
        opened(server.remote + "#m", timeout_s=0.5) as model,
    ):
        step = model.write(PROMPT, max_tokens=1000)
        assert set(model.read(step)) == {ord("a")}
        assert step.failure is not None and "did not finish a step within 1 s" in step.failure


PAGE = b"<html>\x1b[31mNot found</html>"
HOSTILE: dict[str, tuple[Reply, str]] = {
    "html": (Reply(kind="text/html", body=(PAGE,)), "sent 'text/html', not an event stream"),
    "json": (Reply(kind="application/json", body=(b"{}",)), "not an event stream"),
    "no type": (Reply(kind="", body=(b"",)), "sent 'no type', not an event stream"),
    "gzip": (Reply(headers={"content-encoding": "gzip"}), "content-encoding 'gzip' unasked"),
    "empty": (Reply(), "closed the connection in mid-answer"),
    "cut": (Reply(body=(event("a"), b"data: {")), "sent what is no answer"),
    "no end": (Reply(body=(event("a"),)), "closed the connection in mid-answer"),
    "done at once": (Reply(body=(b"data: [DONE]\n\n",)), "without an answer"),
    "not json": (Reply(body=(b"data: {]\n\n",)), "an event is not JSON"),
    "not an object": (Reply(body=(b"data: [1]\n\n",)), "a list of 1"),
    "not utf-8": (Reply(body=(b'data: {"choices": "\xff"}\n\n',)), "an event is not JSON"),
    "nested": (Reply(body=(b"data: " + b"[" * 100_000 + b"\n\n",)), "an event "),
    "no choices": (Reply(body=(b'data: {"a": 1}\n\n',)), "without choices"),
    "null choice": (Reply(body=(b'data: {"choices": [null]}\n\n',)), "its choice is missing"),
    "text": (Reply(body=(b'data: {"choices": [{"text": 5}]}\n\n',)), "its text is 5"),
    "reason": (Reply(body=(b'data: {"choices": [{"finish_reason": {}}]}\n\n',)), "object of 0"),
    "filter": (Reply(body=(event("a", "content_filter"),)), "by 'content_filter'"),
    "error": (Reply(body=(b'data: {"error": {"message": "out\\n of mem"}}\n\n',)), "out of mem"),
    "line": (Reply(body=(b"data: ", *[b"x" * 65536] * 17)), "a line longer than 1 MiB"),
    "lines": (Reply(body=(b"data: " + b"x" * 65536 + b"\n",) * 17), "an event larger than 1 MiB"),
    "500": (Reply(status=500, kind="text/html", body=(PAGE,)), "answered HTTP 500"),
    "404": (Reply(status=404, body=(b'{"message": "no\x00 model"}',)), "answered HTTP 404"),
    "503": (Reply(status=503, body=(b'{"error": "loading model"}',)), "HTTP 503: loading model"),
    "204": (Reply(status=204), "answered HTTP 204"),
    "endless": (Reply(status=500, body=itertools.repeat(b"x" * 65536)), "where a line would do"),
    "400 seed": (Reply(status=400, body=(b'{"error": "seed"}',)), "answered HTTP 400: seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_what_is_no_answer(case: str) -> None:
    reply, said = HOSTILE[case]
    with (
        RemoteServer(reply=lambda seen: reply) as server,
        opened(server.remote + "#m") as model,
    ):
        failure = model.failure()
    assert said in failure and failure.startswith(f"the remote model at {server.host} ")
    assert failure.isprintable() and len(failure) < 400
    assert model.stats()["last_failure"] == failure and model.n_failures == 1


def test_text_that_came_with_garbage_is_delivered() -> None:
    with (
        RemoteServer(reply=replying(event("good") + b"data: {]\n\n")) as server,
        opened(server.remote + "#m") as model,
    ):
        step = model.write(PROMPT, max_tokens=20)
        assert model.read(step) == b"good" and step.failure is not None


def test_bytes_that_are_not_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"\x15\x03\x01 SSH-2.0 hello\r\n\r\n" * 100)

        thread = threading.Thread(target=serve)
        thread.start()
        with opened(f"http://127.0.0.1:{listener.getsockname()[1]}#m") as model:
            assert "broke off" in model.failure()
        thread.join()


@pytest.mark.parametrize("reply", [b"<html>", b"{}", b'{"data": []}', b'{"data": [{"id": ""}]}'])
def test_a_list_without_a_model(reply: bytes) -> None:
    with RemoteServer(reply=replying(reply)) as server, opened(server) as model:
        assert "add #NAME to the address" in model.failure()
        assert model.name == server.host


def test_redirects_are_not_followed() -> None:
    with RemoteServer(words) as other:
        moved = replying(status=307, headers={"location": f"{other.remote}/completions"})
        with RemoteServer(reply=moved) as server, opened(server.remote + "#m", key=KEY) as model:
            assert "redirects elsewhere (HTTP 307), which is not followed" in model.failure()
        assert not other.seen


def test_stop_closes_the_connection() -> None:
    endless = RemoteServer(lambda body: itertools.repeat("a "), token_s=0.005)
    with endless as server, opened(server.remote + "#m") as model:
        step = model.write(PROMPT, max_tokens=100_000)
        while not step.poll():
            assert model.woken.wait(PATIENCE_S)
            model.woken.clear()
        step.stop()
        assert step.done and step.poll() == b"" and (step.finish, step.failure) == (None, None)
        assert server.wait(lambda each: each.n_cancelled == 1), "the server still writes"
        step.stop()
        assert server.wait(lambda each: not model._tasks)
        assert model.available and model.first_s is not None
        server.latency_s = 600
        step = model.write(PROMPT, max_tokens=100_000)
        assert server.wait(lambda each: len(each.seen) == 2)
        step.stop()
        assert server.wait(lambda each: each.n_cancelled == 2), "it waits for a first text"
        model.write(PROMPT, max_tokens=5).stop()  # before its task ever ran
        assert server.wait(lambda each: not model._tasks)
        assert model.available and model.n_failures == 0
        model._health.failed(0, "it was down")
        model._health._retry_at_s = 0.0
        model.write(PROMPT, max_tokens=5).stop()  # a trial that showed nothing
        assert server.wait(lambda each: not model._tasks and model.available)


@pytest.mark.parametrize("when", ["connecting", "waiting", "writing"])
def test_close_ends_a_running_step(when: str) -> None:
    endless = RemoteServer(lambda body: itertools.repeat("a "), token_s=0.005)
    with endless as server:
        if when == "waiting":
            server.latency_s = 600
        model = Woken(server.remote + "#m")
        step = model.write(PROMPT, max_tokens=100_000)
        if when != "connecting":
            assert server.wait(lambda each: bool(each.seen))
        model.close()
        model.close()
        assert not any(each.name == "edgeroute-remote" for each in threading.enumerate())
        model.read(step)
        assert step.failure is not None and "was closed in mid-answer" in step.failure
        late = model.write(PROMPT, max_tokens=5)
        assert late.done and late.failure is not None and "is closed" in late.failure
        assert not model.available and model.n_failures == 0


def test_a_model_never_used_closes() -> None:
    Woken("http://127.0.0.1:9").close()


def test_a_lookup_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def getaddrinfo(*args: object, **kwargs: object) -> list[object]:
        over.wait(PATIENCE_S)
        raise socket.gaierror(-2, "name not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    before = set(threading.enumerate())
    with opened("http://nowhere.invalid/v1#m", timeout_s=2) as model:
        assert "cannot be reached: no connection within 1 s" in model.failure()
        model._health._retry_at_s = 0.0
        step = model.write(PROMPT, max_tokens=5)
        model.close()
        assert step.failure is not None
        waiting = set(threading.enumerate()) - before
        names = {each.name for each in waiting}  # others are waited for as the process exits
        assert names == {"edgeroute-remote-lookup"}
    over.set()


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: object, **kwargs: object) -> list[object]:
        raise socket.gaierror(-2, "Name not\x1b[31m known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with opened("https://nowhere.invalid/v1#m") as model:
        failure = model.failure()
        assert "cannot be reached: [Errno -2] Name not" in failure and failure.isprintable()


@pytest.mark.parametrize("field", ["continue_final_message", "add_generation_prompt", "seed"])
def test_a_refused_field_is_left_out(field: str) -> None:
    with (
        RemoteServer(words, refuses=[field]) as server,
        opened(server.remote + "#m") as model,
    ):
        for _ in range(2):
            step = model.write(CHAT, max_tokens=20, seed=3)
            assert model.read(step) == TEXT and step.failure is None
        first, again, later = (set(seen.body) for seen in server.seen)
    assert field in first
    gone = {"seed"} if field == "seed" else {"continue_final_message", "add_generation_prompt"}
    assert first - again == gone and again == later
    assert model.n_calls == 2


def test_fields_refused_one_by_one_are_all_left_out() -> None:
    refused = ["seed", "continue_final_message", "add_generation_prompt"]
    with RemoteServer(words, refuses=refused) as server, opened(server.remote + "#m") as model:
        assert model.read(model.write(CHAT, max_tokens=20, seed=3)) == TEXT
        assert len(server.seen) == 3 and not set(refused) & server.seen[-1].body.keys()


def test_a_field_named_for_another_reason_is_sent_again() -> None:
    reply = Reply(status=400, body=(b'{"error": "no seed grows here"}',))
    with (
        RemoteServer(words, reply=lambda seen: reply) as server,
        opened(server.remote + "#m") as model,
    ):
        step = model.write(PROMPT, max_tokens=20, seed=3)
        model.read(step)
        assert step.failure is not None and "HTTP 400: no seed grows here" in step.failure
        assert ["seed" in seen.body for seen in server.seen] == [True, False]
        server.reply, model._health._retry_at_s = lambda seen: None, 0.0
        assert model.read(model.write(PROMPT, max_tokens=20, seed=3)) == TEXT
        assert server.seen[-1].body["seed"] == 3


def test_a_needed_field_that_is_refused_is_a_failure() -> None:
    with RemoteServer(refuses=["max_tokens"]) as server, opened(server.remote + "#m") as model:
        assert "HTTP 400: Unrecognized request argument supplied: max_tokens" in model.failure()
        assert len(server.seen) == 1


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e9, True, "5", None])
def test_timeouts_are_checked(timeout_s: Any) -> None:
    with pytest.raises(UsageError, match="the remote timeout must be"):
        RemoteModel("http://127.0.0.1", lambda: None, timeout_s=timeout_s, env={})


# The key


def _dump(thing: object, seen: set[int]) -> str:
    """Text of an object and all that it holds, as a debugger would show it."""
    if id(thing) in seen:
        return ""
    seen.add(id(thing))
    held = vars(thing) if hasattr(thing, "__dict__") else {}
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    inner = [*held.values(), *(getattr(thing, name, None) for name in slots)]
    ours = [each for each in inner if type(each).__module__.startswith("edgeroute")]
    return f"{thing!r} {thing} {held!r}" + "".join(_dump(each, seen) for each in ours)


def test_the_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    with RemoteServer(words, key=KEY) as server, opened(server, key=KEY) as model:
        step = model.write(PROMPT, max_tokens=20)
        assert model.read(step) == TEXT
        assert server.seen[-1].headers["authorization"] == f"Bearer {KEY}"
        texts += [_dump(model, set()), _dump(step, set()), repr(model.stats())]
        server.key = "another"
        failure = model.failure()
        assert "refused the key (HTTP 401)" in failure and KEY_ENV in failure
        texts += [failure, _dump(model, set()), repr(model.stats())]
    said = json.dumps({"error": {"message": f"bad {KEY}, {KEY}!"}}).encode()
    for reply in (Reply(status=500, body=(said,)), Reply(body=(b"data: " + said + b"\n\n",))):
        with (
            RemoteServer(reply=lambda seen, reply=reply: reply) as server,  # type: ignore[misc]
            opened(server.remote + "#m", key=KEY) as model,
        ):
            texts.append(model.failure())
            assert "bad [key], [key]!" in texts[-1]
    texts.append(caplog.text)
    assert "secret" not in "".join(texts)


def test_no_key_in_plain_text_to_the_public() -> None:
    for remote in ("http://8.8.8.8/v1", "http://api.example.com:80", "http://[2001:db8::1]/v1"):
        with pytest.raises(UsageError, match="use https, or unset EDGEROUTE_REMOTE_KEY") as caught:
            RemoteModel(remote, lambda: None, env={KEY_ENV: KEY})
        assert KEY not in str(caught.value) and KEY not in repr(caught.value)
        RemoteModel(remote, lambda: None, env={}).close()
    for remote in ("https://api.example.com", "http://10.1.2.3", "http://box:8000", "http://a.lan"):
        RemoteModel(remote, lambda: None, env={KEY_ENV: KEY}).close()


def test_a_private_name_with_a_public_address_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with RemoteServer(words) as server:
        remote = f"http://localhost:{server.host.split(':')[1]}/v1#m"
        with opened(remote, key=KEY) as model:
            assert model.read(model.write(PROMPT, max_tokens=20)) == TEXT
        monkeypatch.setattr(remote_http, "is_private", lambda ip: ip != "127.0.0.1")
        with opened(remote, key=KEY) as model:
            failure = model.failure()
            assert "public address 127.0.0.1" in failure and "was not sent" in failure
        with opened(remote) as model:  # nothing to hide
            assert model.read(model.write(PROMPT, max_tokens=20)) == TEXT
        assert ["authorization" in seen.headers for seen in server.seen] == [True, False]
    gc.collect()  # the refused connection was closed: a warning would fail this test


def test_proxies_serve_but_never_see_a_key_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    through = replying(event("by proxy", "stop"))
    with RemoteServer(words) as server, RemoteServer(reply=through) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        with opened(server.remote + "#m") as model:
            assert model.read(model.write(PROMPT, max_tokens=20)) == b"by proxy"
        assert [seen.path for seen in proxy.seen] == [f"{server.remote}/completions"]
        with opened(server.remote + "#m", key=KEY) as model:
            assert model.read(model.write(PROMPT, max_tokens=20)) == TEXT
        assert len(proxy.seen) == 1
