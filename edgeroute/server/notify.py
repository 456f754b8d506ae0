"""systemd's notifications: datagrams to the socket that NOTIFY_SOCKET names; none without it.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

SOCKET_ENV, PERIOD_ENV, PID_ENV = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
MAX_STATUS_CHARS: Final = 200
_MIN_PERIOD_S: Final = 0.05

_log = logging.getLogger(__name__)


class Notifier:
    """Tells the service manager how the server is; does nothing where there is none.

    Args:
        env: the environment.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        found = os.environ if env is None else env
        self._address = _address(found.get(SOCKET_ENV, ""))
        self.period_s = _period_s(found) if self._address else None
        """Seconds after which the manager ends a server that said nothing; None: never."""

    def ready(self, status: str) -> None:
        """Say that requests are taken."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def alive(self) -> None:
        """Say that nothing is stuck."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1\nSTATUS=letting running answers end")

    async def keep_alive(self, healthy: Callable[[], bool]) -> None:
        """Say so at half of the period, while it is true; returns where nobody wants to know.

        The event loop says it: one that is stuck is silent, too.
        """
        while self.period_s is not None:
            if healthy():
                self.alive()
            await asyncio.sleep(self.period_s / 2)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError as error:  # a manager that does not listen is no reason to end
            _log.warning(
                "the service manager cannot be told %r: %s", text.partition("\n")[0], error
            )


def _address(text: str) -> str:
    """Return where to send to; @ at the beginning stands for an abstract name's zero byte."""
    if not hasattr(socket, "AF_UNIX") or not text.startswith(("/", "@")):
        return ""
    return "\0" + text[1:] if text.startswith("@") else text


def _period_s(env: Mapping[str, str]) -> float | None:
    text, pid = env.get(PERIOD_ENV, ""), env.get(PID_ENV, "")
    mine = not pid or pid == str(os.getpid())
    if not mine or not text.isascii() or not text.isdigit() or len(text) > 18 or not int(text):
        return None
    return max(_MIN_PERIOD_S, int(text) / 1e6)


def _line(text: str) -> str:
    """Cut a text to one line."""
    return " ".join(text.split())[:MAX_STATUS_CHARS]
