"""What the service manager hears, over the sockets that it gives."""

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute.server.notify import Notifier

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket that a manager would listen on, and what NOTIFY_SOCKET then has."""
    if request.param == "abstract" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux has abstract sockets")
    name = str(tmp_path / "n") if request.param == "file" else f"@edgeroute-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        sock.settimeout(5)
        yield name, sock


def test_it_says_ready_status_and_stopping(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.period_s is None
    notifier.ready("serving red\nREADY=0")
    assert sock.recv(500) == b"READY=1\nSTATUS=serving red READY=0"
    notifier.ready("x" * 1000)
    assert sock.recv(2000) == b"READY=1\nSTATUS=" + b"x" * 200
    notifier.stopping()
    assert sock.recv(500).startswith(b"STOPPING=1\nSTATUS=")


def test_it_is_alive_only_while_it_is_healthy(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(env)
    assert notifier.period_s == 0.2
    answers = iter([True, False, True])
    asked: list[bool] = []

    def healthy() -> bool:
        asked.append(next(answers))
        return asked[-1]

    async def work() -> None:
        with pytest.raises(RuntimeError):  # what the end of the answers becomes
            await notifier.keep_alive(healthy)

    asyncio.run(work())
    assert asked == [True, False, True]
    assert [sock.recv(100) for _ in range(2)] == [b"WATCHDOG=1"] * 2
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(100)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "/no/such/socket"},
        {"WATCHDOG_USEC": "1000000"},
    ],
)
def test_without_a_manager_nothing_happens(env: dict[str, str]) -> None:
    notifier = Notifier(env)
    notifier.ready("x")
    notifier.alive()
    notifier.stopping()
    assert notifier.period_s is None
    asyncio.run(notifier.keep_alive(lambda: 1 // 0 > 0))


@pytest.mark.parametrize(
    "more",
    [
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "many"},
        {"WATCHDOG_USEC": "٣"},
        {"WATCHDOG_USEC": "9" * 100},
        {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
def test_a_watchdog_that_is_none_of_ours_is_none(more: dict[str, str]) -> None:
    assert Notifier({"NOTIFY_SOCKET": "@x"} | more).period_s is None
