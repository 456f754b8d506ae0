"""HTTP as badly behaved as wanted: one request on a connection of its own, over asyncio.

A client library would hide what this is for: leaving in the middle, reading slowly, sending what
is no request. It also costs a core that the server needs.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from edgeroute.runtime.errors import EdgerouteError

_MAX_LINE: Final = 64 << 10
_SLOW_BYTES: Final = 4096
"""Receive buffer of a slow reader, so that what it leaves piles up at the server."""


class BrokenAnswer(EdgerouteError):
    """The server closed the connection in the middle, or what came is no HTTP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens, and the key it wants."""

    port: int
    host: str = "127.0.0.1"
    key: str | None = None

    @property
    def url(self) -> str:
        """Base URL without a slash at its end."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Status and headers of an answer; names of headers are lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


def request_bytes(
    address: Address, path: str, body: bytes | Mapping[str, Any] | None = None, *,
    headers: Mapping[str, str] | None = None, keep: bool = False,
) -> bytes:  # fmt: skip
    """Put a request together: a GET without a body, else a POST of JSON.

    Args:
        headers: replace the usual ones; an empty value leaves one out.
        keep: leave the connection open for another request.
    """
    sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    usual = {"Host": f"{address.host}:{address.port}", "Accept": "*/*",
             "Connection": "keep-alive" if keep else "close"}  # fmt: skip
    if body is not None:
        usual |= {"Content-Type": "application/json", "Content-Length": str(len(sent))}
    if address.key is not None:
        usual["Authorization"] = f"Bearer {address.key}"
    usual |= headers or {}
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in usual.items() if value]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + sent


class Exchange:
    """A connection, and the answers that come on it. An asynchronous context manager."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._head: Head | None = None

    @classmethod
    async def open(cls, address: Address, *, slow: bool = False) -> Self:
        """Connect; `slow` takes in little that is not read.

        Raises:
            OSError: nobody listens.
        """
        sock = socket.socket()
        try:
            sock.setblocking(False)
            if slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BYTES)
            await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
            limit = _SLOW_BYTES if slow else _MAX_LINE
            reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):  # the other side may have gone first
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Leave at once, without a farewell."""
        self._writer.transport.abort()

    async def send(self, data: bytes) -> None:
        """Send bytes as they are.

        Raises:
            OSError: the server has closed the connection.
        """
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> Head:
        """Read status and headers.

        Raises:
            BrokenAnswer: there is none.
        """
        words = (await self._line()).split(None, 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise BrokenAnswer(f"not the first line of an answer: {words!r:.80}")
        headers = {}
        while line := await self._line():
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self._head = Head(status=int(words[1]), headers=headers)
        return self._head

    async def body(self) -> bytes:
        """Read the rest of an answer.

        Raises:
            BrokenAnswer: it is cut off.
        """
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield an answer's bytes as they come.

        Raises:
            BrokenAnswer: it is cut off.
        """
        assert self._head is not None, "read the head first"
        headers = self._head.headers
        try:
            if headers.get("transfer-encoding", "").lower() == "chunked":
                while n_bytes := int((await self._line()).partition(";")[0], 16):
                    yield await self._reader.readexactly(n_bytes)
                    await self._line()
                while await self._line():  # trailers
                    pass
            elif "content-length" in headers:
                yield await self._reader.readexactly(int(headers["content-length"]))
            elif self._head.status not in (204, 304):
                yield await self._reader.read()
        except (ValueError, asyncio.IncompleteReadError) as error:
            raise BrokenAnswer(f"an answer was cut off: {error!s:.120}") from error

    async def events(self) -> AsyncIterator[str]:
        """Yield the data of each server-sent event.

        Raises:
            BrokenAnswer: the stream is cut off, inside an event or between chunks.
        """
        rest = b""
        async for part in self.parts():
            *whole, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in whole:
                lines = [x[5:].lstrip() for x in event.split(b"\n") if x.startswith(b"data:")]
                if lines:  # else a comment that keeps the connection alive
                    yield b"\n".join(lines).decode()
        if rest.strip():
            raise BrokenAnswer(f"a stream ended inside an event: {rest!r:.80}")

    async def _line(self) -> str:
        try:
            line = await self._reader.readuntil(b"\r\n")
        except asyncio.IncompleteReadError as error:
            raise BrokenAnswer("the connection was cut off before an answer was whole") from error
        except asyncio.LimitOverrunError as error:
            raise BrokenAnswer("a line of an answer is too long") from error
        return line[:-2].decode("latin-1")


async def fetch(
    address: Address, path: str, body: bytes | Mapping[str, Any] | None = None, *,
    headers: Mapping[str, str] | None = None,
) -> tuple[Head, bytes]:  # fmt: skip
    """Ask and read the whole answer.

    Raises:
        OSError: nobody listens.
        BrokenAnswer: no whole answer came.
    """
    async with await Exchange.open(address) as exchange:
        await exchange.send(request_bytes(address, path, body, headers=headers))
        head = await exchange.head()
        return head, await exchange.body()
