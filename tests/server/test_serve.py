"""`edgeroute serve` as a process: how it begins, what it says, and how it ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from edgeroute.cli import cli
from edgeroute.runtime.errors import UsageError
from edgeroute.server import connection
from edgeroute.server.records import ServerParams
from edgeroute.server.serve import Built, Server, build, listen, urls
from tests.server.fleet_lab import shelf_model
from tests.server.raw import connect, exchange, heard, statuses

WAIT_S = 40.0
COMMAND = [sys.executable, "-m", "edgeroute", "serve"]
SETTINGS = ["--threads", "1", "--n-ctx", "4096", "--port", "0", "--json"]
LONG = {"model": "base", "prompt": "Once upon a time", "stream": True, "temperature": 1, "seed": 3,
        "logit_bias": {"0": -100, "2": -100}}  # fmt: skip

# Runs the server, but once a file is there its engine computes for ever.
HANG = """
import os, sys, time
from edgeroute.cli import main
from edgeroute.runtime.device import Device
from edgeroute.server import serve
mark, real = sys.argv[1], Device.compute
def compute(device, graph):
    while os.path.exists(mark):
        time.sleep(0.05)
    return real(device, graph)
Device.compute, serve.CLOSE_S = compute, 0.5
sys.argv[1:] = sys.argv[2:]
main()
"""

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to be heard")


class Process:
    """A server in a process of its own, ready to be called."""

    def __init__(
        self, *arguments: str, env: dict[str, str] | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:  # fmt: skip
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | (env or {}),
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.told: dict[str, Any] = json.loads(line)
        self.url: str = self.told["url"]

    def ask(self, **more: Any) -> httpx2.Response:
        body = LONG | {"stream": False, "max_tokens": 4} | more
        return httpx2.post(f"{self.url}/v1/completions", json=body, timeout=WAIT_S)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit code and what was logged."""
        _, log = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, log


@contextmanager
def started(
    *arguments: str, env: dict[str, str] | None = None, command: Sequence[str] = COMMAND
) -> Iterator[Process]:
    found = Process(*arguments, env=env, command=command)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


@needs_signals
def test_it_serves_and_sigterm_lets_a_stream_finish(tiny_path: Path) -> None:
    with started(str(tiny_path), *SETTINGS) as server:
        assert server.told["models"] == ["tiny-llama"] and server.told["needs_key"] is False
        assert server.ask().json()["usage"]["completion_tokens"] == 4
        assert httpx2.get(f"{server.url}/health/ready").status_code == 200
        assert "uvicorn" not in str(httpx2.get(f"{server.url}/health/live").headers).lower()
        body = LONG | {"max_tokens": 150, "stream_options": {"include_usage": True}}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=WAIT_S) as it:
            lines = it.iter_lines()
            first = next(line for line in lines if line.startswith("data:"))
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][5:])["usage"]["completion_tokens"] == 150, first
        code, log = server.end()
        assert code == 0 and "Traceback" not in log
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health/live")


@needs_signals
def test_what_does_not_end_within_the_grace_is_cancelled(tiny_path: Path, tmp_path: Path) -> None:
    config = tmp_path / "edgeroute.toml"
    config.write_text(
        "[server]\ngrace_s = 0.5\nport = 0\n"
        f"[models.tiny]\nmodel = '{tiny_path}'\nn_ctx = 100000\nkv_type = 'q8_0'\nthreads = 1\n"
    )
    with started("--config", str(config), "--json") as server:
        body = LONG | {"max_tokens": 90_000}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=WAIT_S) as it:
            lines = it.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            server.process.send_signal(signal.SIGTERM)
            try:
                rest = list(lines)
            except httpx2.TransportError:
                rest = []
        assert "data: [DONE]" not in rest
        code, log = server.end()
        assert code == 0 and "have 0.5 s" in log


@needs_signals
@pytest.mark.parametrize("kinds", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_the_second_signal_ends_at_once(tiny_path: Path, kinds: tuple[str, str]) -> None:
    with started(str(tiny_path), *SETTINGS) as server:
        body = LONG | {"max_tokens": 4000}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=WAIT_S) as it:
            lines = it.iter_lines()  # dropped, it would close the connection
            next(lines)
            server.process.send_signal(getattr(signal, kinds[0]))
            time.sleep(0.3)
            assert server.process.poll() is None  # it waits for the stream
            server.process.send_signal(getattr(signal, kinds[1]))
            assert server.end()[0] == 130


@needs_signals
def test_an_engine_that_hangs_fails_its_requests_and_does_not_keep_the_process(
    tiny_path: Path, tmp_path: Path
) -> None:
    mark, config = tmp_path / "hang", tmp_path / "edgeroute.toml"
    config.write_text(
        "[server]\nport = 0\nwatchdog_s = 0.5\ngrace_s = 0.5\nmemory = '1GiB'\n"
        f"[models.tiny]\nmodel = '{tiny_path}'\nthreads = 1\n"
    )
    command = [sys.executable, "-c", HANG, str(mark), "serve"]
    with started("--config", str(config), "--json", command=command) as server:
        text = server.ask().json()["choices"][0]["text"]
        mark.touch()
        failed = server.ask()
        assert failed.status_code == 503 and "Retry-After" in failed.headers
        assert failed.json()["error"]["code"] == "engine_stopped"
        mark.unlink()
        assert server.ask().json()["choices"][0]["text"] == text
        mark.touch()
        caught = threading.Thread(target=lambda: server.ask(max_tokens=50))
        caught.start()
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        code, log = server.end()
        caught.join(WAIT_S)
        assert code == 0 and "is given up" in log


def test_after_a_kill_the_next_one_serves_on_the_same_port(tiny_path: Path) -> None:
    with started(str(tiny_path), *SETTINGS) as server:
        text = server.ask().json()["choices"][0]["text"]
        server.process.kill()
        server.process.wait(WAIT_S)
    port = server.url.rpartition(":")[2]
    with started(str(tiny_path), *SETTINGS, "--port", port) as again:
        assert again.url == server.url
        assert again.ask().json()["choices"][0]["text"] == text


def test_several_models_of_a_file_answer_with_a_key(tiny_path: Path, tmp_path: Path) -> None:
    key = "a-key-of-a-test"
    (tmp_path / "edgeroute.toml").write_text(
        "[server]\nport = 0\nmemory = '1GiB'\nsessions = 'talks'\n"
        f"[models.one]\nmodel = '{tiny_path}'\nthreads = 1\n"
        f"[models.two]\nmodel = '{tiny_path}'\nthreads = 1\nn_ctx = 512\n"
    )
    env = {"EDGEROUTE_API_KEY": key}
    with started("--config", str(tmp_path / "edgeroute.toml"), "--json", env=env) as server:
        assert server.told["models"] == ["one", "two"] and server.told["needs_key"] is True
        assert server.ask().status_code == 401
        with httpx2.Client(headers={"Authorization": f"Bearer {key}"}) as client:
            models = client.get(f"{server.url}/v1/models").json()["data"]
            assert {"one", "two"} <= {each["id"] for each in models}
            for name in ("one", "two", "base"):
                body = LONG | {"model": name, "stream": False, "max_tokens": 3}
                answer = client.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S)
                assert answer.json()["usage"]["completion_tokens"] == 3
            told = client.post(f"{server.url}/edgeroute/models/two/unload").json()
            assert told["state"] == "closed"
            page = client.get(f"{server.url}/metrics").text
            assert "edgeroute_http_answers" in page
        assert key not in str(server.told)
        server.process.terminate()
        if sys.platform != "win32":
            code, log = server.end()
            assert code == 0 and key not in log


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_the_service_manager_hears_of_it(tiny_path: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(WAIT_S)
        env = {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "400000"}
        with started(str(tiny_path), *SETTINGS, env=env) as server:
            heard = [manager.recv(500) for _ in range(3)]
            assert any(each.startswith(b"READY=1\nSTATUS=serving tiny-llama") for each in heard)
            assert b"WATCHDOG=1" in heard
            server.process.terminate()
            while not manager.recv(500).startswith(b"STOPPING=1"):
                continue
            assert server.end()[0] == 0


# what is refused before anything is served


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=WAIT_S)


def test_a_port_in_use_is_a_sentence(tiny_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = run(str(tiny_path), "--port", port, "--json")
    assert done.returncode == 2
    words = f"port {port} of 127.0.0.1 is in use by another program; choose another by --port"
    assert words in done.stderr and "Traceback" not in done.stderr
    assert words in json.loads(done.stdout)["error"]["message"]
    assert "opening" not in done.stderr  # no model was opened for it


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "there is no API key"),
        (["--port", "70000"], 2, "from 0 to 65535"),
        (["--n-ctx", "1"], 2, "n_ctx"),
        (["--memory", "2MiB"], 4, "not even paged|over the budget"),
        (["--api-key-file", "no-such-file"], 2, "cannot be read"),
        (["--config", "no-such.toml"], 2, "MODEL and --config exclude each other"),
        (["--host", "203.0.113.7", "--api-key-file", "KEYS"], 2, "this machine has no address"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_exit_code(
    tiny_path: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "keys").write_text("a-key-of-a-test")
    given = [str(tmp_path / "keys") if each == "KEYS" else each for each in arguments]
    result = CliRunner().invoke(cli, ["serve", str(tiny_path), "--port", "0", *given])
    assert result.exit_code == code, result.output
    assert any(each in result.output for each in words.split("|")), result.output


def test_without_the_extra_the_command_to_get_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    result = CliRunner().invoke(cli, ["serve"])
    assert result.exit_code == 2
    assert "needs msgspec, which is not installed" in result.output
    assert "pip install 'edgeroute[serve]'" in result.output


# sockets and connections


def test_a_name_with_several_addresses_has_one_port() -> None:
    sockets = listen("localhost", 0)
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        assert all(url.startswith(("http://127.0.0.1:", "http://[::1]:")) for url in urls(sockets))
    finally:
        for each in sockets:
            each.close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_ours_is_a_sentence(host: str) -> None:
    with pytest.raises(UsageError, match="this machine has no address"):
        listen(host, 0)


@contextmanager
def within(built: Built) -> Iterator[str]:
    """Run a whole server in a thread of this process."""
    sockets = listen("127.0.0.1", 0)
    ready, server = threading.Event(), Server(built)
    server._tell_started = ready.set
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_with_care(sockets)))
    url = urls(sockets)[0]
    thread.start()
    try:
        assert ready.wait(WAIT_S)
        yield url
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert built.fleet.close(20)


def test_hostile_connections_are_closed_and_the_server_answers_on(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that say nothing, or begin a request and go on for ever, hold no place."""
    monkeypatch.setattr(connection, "HEAD_S", 0.4)
    params = ServerParams(memory=1 << 30, max_header_bytes=4096, sessions=tmp_path)
    with within(build(params, [shelf_model("red", tiny_path)])) as url:
        silent = connect(url)
        slow = exchange(
            url, b"GET / HT", 0.2, b"TP/1.1\r\nHost: 127", 0.4, b".0.0.1\r\n", end=False
        )
        assert slow == b"" and heard(silent) == b""
        silent.close()
        huge = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"
        assert statuses(exchange(url, huge, end=True)) in ([400], [431], [])
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9  # of TLS
        assert statuses(exchange(url, hello, end=True)) == [400]
        with httpx2.Client() as client:  # a head that came in time may be followed by a long rest
            for _ in range(3):
                assert client.get(f"{url}/health/live").status_code == 200
                time.sleep(0.5)
            answer = client.get(f"{url}/health/ready")
            assert answer.status_code == 200, answer.text
