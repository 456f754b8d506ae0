"""Bytes on a socket as no client library would send them."""

import contextlib
import re
import socket
import time
from urllib.parse import urlsplit


def connect(base: str, timeout_s: float = 20.0) -> socket.socket:
    """Open a connection to a server under test."""
    address = urlsplit(base)
    assert address.hostname == "127.0.0.1" and address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=timeout_s)


def exchange(base: str, *pieces: bytes | float, end: bool = False) -> bytes:
    """Send pieces, pausing where one is a number of seconds, and return all that comes back.

    Args:
        base: `http://127.0.0.1:PORT`.
        pieces: to send.
        end: whether to say that nothing more will be sent; a server may take that for leaving.
    """
    with connect(base) as wire:
        with contextlib.suppress(OSError):  # what it said before it closed still counts
            for piece in pieces:
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    wire.sendall(piece)
            if end:
                wire.shutdown(socket.SHUT_WR)
        return heard(wire)


def heard(wire: socket.socket) -> bytes:
    """Read until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := wire.recv(65536):
            found += piece
    return found


def statuses(answer: bytes) -> list[int]:
    """Return the status of every answer in what came back, those of 1xx left out."""
    found = [int(match) for match in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    return [status for status in found if status >= 200]


def request(
    method: str = "GET", path: str = "/health/live", *headers: str, body: bytes = b""
) -> bytes:
    """Return one request; a body gets its length and type unless headers say otherwise."""
    names = {header.partition(":")[0].lower() for header in headers}
    lines = [f"{method} {path} HTTP/1.1", *headers]
    lines += [] if "host" in names else ["Host: localhost"]
    if body:
        lines += [] if "content-type" in names else ["Content-Type: application/json"]
        if not names & {"content-length", "transfer-encoding"}:
            lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
