"""Addresses of remote models, when to leave one alone, and streams cut and forged at will."""

import pytest

from edgeroute.remote_address import KEY_ENV, is_private, key_for, parse_remote
from edgeroute.remote_health import MAX_RETRY_S, RETRY_S, Health
from edgeroute.remote_stream import MAX_EVENT_BYTES, MAX_STREAM_BYTES, AnswerStream, StreamError
from edgeroute.runtime.errors import UsageError
from tests.edgeroute.remote_server import event

KEY = "sk-very-secret-4711"
WORDS = ["Two ", "and ", "two ", "make ", "vier, ", "né ", "四", "😀", "."]
TEXT = "".join(WORDS).encode()


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "k" * 5000])
def test_what_is_no_key_is_not_repeated(key: str) -> None:
    with pytest.raises(UsageError, match=f"{len(key)} characters \\(not shown\\)") as caught:
        key_for(parse_remote("https://a.example"), {KEY_ENV: key})
    assert key not in str(caught.value)
    assert key_for(parse_remote("https://a.example"), {KEY_ENV: "  "}) is None
    assert key_for(parse_remote("https://a.example"), {KEY_ENV: f" {KEY}\n"}) == KEY


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    assert key_for(parse_remote("https://a.example")) == KEY


# Addresses


def test_addresses() -> None:
    plain = parse_remote(" http://127.0.0.1:8080/v1/#org/model:7b ")
    assert plain.base == "http://127.0.0.1:8080/v1" and plain.model == "org/model:7b"
    assert plain.plain and (plain.host, plain.hostname) == ("127.0.0.1:8080", "127.0.0.1")
    bare = parse_remote("https://api.example.com")
    assert bare.base == "https://api.example.com/v1" and bare.model is None and not bare.plain
    assert parse_remote("http://[::1]:9/openai/v2").base == "http://[::1]:9/openai/v2"
    assert parse_remote("http://[::1]:9").hostname == "::1"


@pytest.mark.parametrize(
    "remote",
    ["", "  ", "localhost:8080", "ftp://a/v1", "http://", "http:///v1", "http://a:x/v1", "a b",
     "http://a:99999999/v1", "http://a/\x00", "http://a/#m\x1b[0m", "http://a/#" + "m" * 300,
     "http://a/" + "b" * 3000],
)  # fmt: skip
def test_what_is_no_address(remote: str) -> None:
    with pytest.raises(UsageError, match="remote") as caught:
        parse_remote(remote)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("remote", [f"https://me:{KEY}@a/v1", f"https://a/v1?key={KEY}#m"])
def test_secrets_in_an_address_are_refused_and_not_repeated(remote: str) -> None:
    with pytest.raises(UsageError, match=KEY_ENV) as caught:
        parse_remote(remote)
    assert KEY not in str(caught.value)


def test_which_addresses_are_private() -> None:
    ours = ["127.0.0.1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.1.1",
            "::1", "fd00::1", "fe80::1", "fe80::1%3", "::ffff:10.0.0.1"]  # fmt: skip
    theirs = ["8.8.8.8", "172.32.0.1", "100.64.0.1", "192.0.2.1", "0.0.0.0", "2001:db8::1",
              "::ffff:8.8.8.8", "64:ff9b::a00:1"]  # fmt: skip
    assert all(map(is_private, ours)) and not any(map(is_private, theirs))


# The circuit


def test_the_pause_doubles_and_one_call_is_the_trial() -> None:
    now = 100.0
    health = Health(clock=lambda: now)
    assert [health.begin(), health.begin()] == [0, 0]
    for _ in range(2):  # both ran when the server died: one pause, not two
        health.failed(0, "it died")
    assert health.n_failures == 2 and not health.available and health.begin() is None
    assert "in 5.0 s after: it died" in health.why_not()
    pause = RETRY_S
    for _ in range(6):
        now += pause - 0.01
        assert not health.available and health.begin() is None
        now += 0.02
        assert health.available
        epoch = health.begin()
        assert epoch is not None and not health.available and health.begin() is None
        assert "is under way" in health.why_not()
        health.released(epoch)
        assert health.available and health.begin() == epoch
        health.failed(epoch, "again")
        pause = min(2 * pause, MAX_RETRY_S)
    assert pause == MAX_RETRY_S
    health.succeeded(0)  # began long ago: says nothing of now
    assert not health.available
    now += pause
    epoch = health.begin()
    assert epoch is not None
    health.succeeded(epoch)
    assert health.available and health.begin() == epoch and health.begin() == epoch
    health.failed(epoch, "later")
    now += RETRY_S
    assert health.available, "the pause began anew"


def test_means_follow() -> None:
    health = Health()
    health.measured(1.0, None)
    assert (health.first_s, health.token_s) == (1.0, None)
    health.measured(2.0, 0.5)
    assert health.first_s == pytest.approx(1.2) and health.token_s == 0.5


# The stream


def _read(raw: bytes, size: int, chat: bool = False) -> tuple[str, AnswerStream]:
    stream, text = AnswerStream(chat=chat, max_tokens=100), b""
    for at in range(0, len(raw), size):
        stream.push(raw[at : at + size])
        text += stream.take()
        text.decode()  # whole characters at every moment
    stream.close()
    return (text + stream.take()).decode(), stream


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("chat", [False, True])
def test_streams_cut_anywhere(end: bytes, chat: bool) -> None:
    parts = [event(word, None, chat) for word in WORDS]
    parts.insert(1, b": a comment\n\nevent: message\nid: 7\nretry: 10\n\nnothing\n\n")
    parts.insert(3, b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n')
    parts.insert(4, b'data: {"choices":\ndata:[{"index": 0, "text": "", "delta": {}}]}\n\n')
    parts += [event(None, None, chat), event("", "length", chat)]
    parts += [b'data: {"choices": [], "usage": {}}\n\n', b"data: [DONE]\n\n", event("no", None)]
    raw = b"".join(parts).replace(b"\n", end)
    for size in (1, 2, 3, 5, 7, 64, len(raw)):
        text, stream = _read(raw, size, chat)
        assert text.encode() == TEXT and stream.finish == "length", size
        assert stream.n_texts == len(WORDS) and stream.n_choices == len(WORDS) + 3


def test_ends_of_answers() -> None:
    assert _read(event("a") + b"data: [DONE]\n\n", 9)[1].finish == "stop"
    assert _read(event("a", "eos"), 9)[1].finish == "stop"
    assert _read(event("a") + event("", "stop").rstrip(), 9)[0] == "a"  # no blank line at the end
    tool = b'data: {"choices": [{"delta": {"content": "a", "tool_calls": [1], "refusal": 2}}]}\n\n'
    assert _read(tool + event("b", "stop", True), 9, chat=True)[0] == "ab"


def test_characters_escaped_in_halves() -> None:
    high, low = event("x\ud83d"), event("\ude00y")
    end = event("", "stop")
    assert _read(high + low + end, 9)[0] == "x😀y"
    assert _read(high + event("") + event("") + low + end, 9)[0] == "x😀y"
    assert _read(event("\ud83d") + event("\ude00") + end, 9)[0] == "😀"
    assert _read(high + event("y") + end, 9)[0] == "x\ufffdy"
    assert _read(event("\ude00") + end, 9)[0] == "\ufffd"
    assert _read(high + end, 9)[0] == "x"  # half a character is no text


def test_streams_are_bounded() -> None:
    stream = AnswerStream(chat=False, max_tokens=4)
    with pytest.raises(StreamError, match="more text than the tokens"):
        for _ in range(100):
            stream.push(event("x" * 500))
    assert 0 < len(stream.take()) <= 4 * 256 + 4096
    stream = AnswerStream(chat=False, max_tokens=4)
    with pytest.raises(StreamError, match="more than 32 MiB"):
        for _ in range(MAX_STREAM_BYTES // 65536 + 1):
            stream.push(b":" + b"x" * 65535 if not stream._line else b"\n" + b"x" * 65535)
    stream = AnswerStream(chat=False, max_tokens=4)
    stream.push(b":" + b"x" * (MAX_EVENT_BYTES - 1))
    with pytest.raises(StreamError, match="a line longer"):
        stream.push(b"x")


def test_text_before_garbage_is_kept() -> None:
    stream = AnswerStream(chat=False, max_tokens=4)
    with pytest.raises(StreamError):
        stream.push(event("good") + b"data: {]\n\n" + event("bad"))
    assert stream.take() == b"good"
