"""Requests to an OpenAI-compatible endpoint: sent with care, answered by anybody.

All of it runs in one event loop. Failures are StreamErrors whose message completes `HOST ...`.
"""

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from edgeroute.models.adapter_json import one_line, parse_object
from edgeroute.remote_address import KEY_ENV, MAX_MODEL, RemoteAddress, is_private, key_for
from edgeroute.remote_step import Call
from edgeroute.remote_stream import StreamError, reason_of
from edgeroute.runtime.errors import AdapterFileError

if TYPE_CHECKING:
    import httpx2

CONNECT_S: Final = 5.0
"""Until a connection stands, TLS included; half the timeout where that is less."""
N_TIMEOUTS: Final = 15
"""As many times the timeout may a step take as a whole."""
DRAIN_S: Final = 1.0
"""After an answer's end, for the end of its stream: only then can the connection be kept."""
KEEP_S: Final = 3.0
"""For an idle connection; common servers close theirs after 5 s, which must not cross a call."""
MAX_REPLY_BYTES: Final = 1 << 20
"""Of a reply that is no stream: an error, or the list of models."""

CONTINUE_FIELDS: Final = frozenset(("continue_final_message", "add_generation_prompt"))
OPTIONAL_FIELDS: Final = frozenset((*CONTINUE_FIELDS, "seed"))
"""Left out where an endpoint refuses them by name."""

_REFUSED: Final = {
    401: f"refused the key (HTTP 401); set the right one by {KEY_ENV}",
    403: f"refused access (HTTP 403); the key of {KEY_ENV}, if any, does not allow it",
}


class Endpoint:
    """An endpoint and what was learned of it.

    Lifetime: `close` closes its connections.
    """

    def __init__(
        self, address: RemoteAddress, timeout_s: float, env: Mapping[str, str] | None
    ) -> None:
        """Prepare requests; no connection is opened.

        Raises:
            UsageError: the environment's key cannot be sent there.
        """
        import httpx2

        key = key_for(address, env)
        # The client's record of headers hides the key in its repr, so no dump of ours shows it.
        self._headers = httpx2.Headers({"accept-encoding": "identity", "user-agent": "edgeroute"})
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._guarded = key is not None and address.plain
        self._extensions = {"trace": _check_peer} if self._guarded else {}
        self._address = address
        self._timeout_s = timeout_s
        self._client: httpx2.AsyncClient | None = None
        self._left_out: frozenset[str] = frozenset()
        self._model = address.model

    @property
    def name(self) -> str:
        """The model's name there; the host until that is known."""
        return self._model or self._address.host

    def said(self, text: str) -> str:
        """Make a failure's sentence: one line that names the host and never holds the key."""
        key = self._headers.get("authorization", "").removeprefix("Bearer ")
        if key:
            text = text.replace(key, "[key]")
        return f"the remote model at {self._address.host} {one_line(text)[:300]}"

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def write(self, call: Call) -> None:
        """Run a call until its answer ended; a failure is noted in the call, never raised.

        Raises:
            CancelledError: somebody cancelled it.
        """
        import httpx2

        try:
            client = self._connected()  # the first time a while, which is not the server's
            async with asyncio.timeout(self._timeout_s) as limit:
                await self._exchange(client, call, limit)
        except StreamError as error:
            failure = str(error)
        except httpx2.ConnectTimeout:
            failure = f"cannot be reached: no connection within {self._connect_s:g} s"
        except TimeoutError:
            failure = self._overdue(call)
        except httpx2.ConnectError as error:
            failure = f"cannot be reached: {_cause(error)}"
        except httpx2.HTTPError as error:
            failure = f"broke off: {_cause(error)}"
        except Exception as error:
            # Whatever it is, the engine waits for this step, and the answer can go on locally.
            failure = f"could not be asked: {type(error).__name__}: {_cause(error)}"
        else:
            return
        call.fail(self.said(failure))

    @property
    def _connect_s(self) -> float:
        return min(CONNECT_S, self._timeout_s / 2)

    def _overdue(self, call: Call) -> str:
        clock = asyncio.get_running_loop().time  # the monotonic clock
        if clock() - call.began_s >= N_TIMEOUTS * self._timeout_s:
            return f"did not finish a step within {N_TIMEOUTS * self._timeout_s:g} s"
        if call.first_s is None:
            return f"sent no text within {self._timeout_s:g} s"
        return f"fell silent: no text for {self._timeout_s:g} s"

    def _connected(self) -> "httpx2.AsyncClient":
        import httpx2

        if self._client is None:
            self._client = httpx2.AsyncClient(
                headers=self._headers,
                timeout=httpx2.Timeout(None, connect=self._connect_s),
                limits=httpx2.Limits(keepalive_expiry=KEEP_S),
                follow_redirects=False,  # a redirect would take the prompt and the key elsewhere
                trust_env=not self._guarded,  # nor does a key in plain text pass through a proxy
            )
        return self._client

    async def _exchange(
        self, client: "httpx2.AsyncClient", call: Call, limit: asyncio.Timeout
    ) -> None:
        """Send the request, and again without the fields that the endpoint refuses by name."""
        left_out = self._left_out
        fields = {"model": await self._model_name(client), **call.body}
        while True:
            body = {name: value for name, value in fields.items() if name not in left_out}
            async with client.stream(
                "POST",
                self._address.base + call.path,
                json=body,
                headers={"accept": "text/event-stream"},
                extensions=self._extensions,
            ) as response:
                if response.status_code == 200:
                    self._left_out = left_out
                    await self._read(call, response, limit)
                    return
                reply = await _bounded(response)
            named = _named(reply) & body.keys() if response.status_code in (400, 422) else set()
            if not named:
                raise StreamError(_refusal(response, reply))
            left_out |= named | (CONTINUE_FIELDS if named & CONTINUE_FIELDS else set())

    async def _model_name(self, client: "httpx2.AsyncClient") -> str:
        """The model to ask for: the one that was named, or the first that is listed."""
        if self._model is not None:
            return self._model
        url = f"{self._address.base}/models"
        async with client.stream("GET", url, extensions=self._extensions) as response:
            reply = await _bounded(response)
        if response.status_code != 200:
            raise StreamError(_refusal(response, reply))
        try:
            listed = parse_object(reply, "its list of models").get("data")
        except AdapterFileError as error:
            raise StreamError(f"names no model: {error}; add #NAME to the address") from None
        first = listed[0] if isinstance(listed, list) and listed else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_MODEL or not name.isprintable():
            raise StreamError("names no model in its list; add #NAME to the address")
        self._model = name
        return name

    async def _read(self, call: Call, response: "httpx2.Response", limit: asyncio.Timeout) -> None:
        """Read a streamed answer to its end."""
        _check_type(response)
        clock, stream = asyncio.get_running_loop().time, call.stream
        last_s = call.began_s + N_TIMEOUTS * self._timeout_s
        async for chunk in response.aiter_raw():
            n_choices = stream.n_choices
            try:
                stream.push(chunk)
            finally:
                call.deliver()
            if call.is_over:
                continue
            if stream.finish is not None:
                call.finish()
                limit.reschedule(clock() + DRAIN_S)
            elif stream.n_choices > n_choices:  # comments to keep a connection do not count
                limit.reschedule(min(clock() + self._timeout_s, last_s))
        if not call.is_over:
            stream.close()
            call.deliver()
            call.finish()


class Lookups(ThreadPoolExecutor):
    """Resolves names in threads that nobody waits for: a lookup may hang past every timeout."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        future.set_running_or_notify_cancel()
        threading.Thread(target=run, name="edgeroute-remote-lookup", daemon=True).start()
        return future


async def _check_peer(event: str, info: Mapping[str, Any]) -> None:
    """Before a key goes out in plain text: a name that looks private must lead nowhere else."""
    if event != "connection.connect_tcp.complete":
        return
    peer = str(info["return_value"].get_extra_info("server_addr")[0])
    if not is_private(peer):
        await info["return_value"].aclose()
        raise StreamError(
            f"has the public address {peer}, where the key would travel in plain text by http; "
            f"it was not sent: use https, or unset {KEY_ENV}"
        )


async def _bounded(response: "httpx2.Response") -> bytes:
    """Read a short reply."""
    reply = bytearray()
    async for chunk in response.aiter_raw():
        reply += chunk
        if len(reply) > MAX_REPLY_BYTES:
            raise StreamError(f"sent more than {MAX_REPLY_BYTES >> 20} MiB where a line would do")
    return bytes(reply)


def _check_type(response: "httpx2.Response") -> None:
    kind = response.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "text/event-stream":
        raise StreamError(f"sent {one_line(kind)[:80] or 'no type'!r}, not an event stream")
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise StreamError(f"sent content-encoding {one_line(encoding)[:40]!r} unasked")


def _named(reply: bytes) -> set[str]:
    """Which optional fields an error names."""
    return {name for name in OPTIONAL_FIELDS if re.search(rb"\b%s\b" % name.encode(), reply)}


def _refusal(response: "httpx2.Response", reply: bytes) -> str:
    """Say what a status means; of the reply only an error's message is repeated."""
    status = response.status_code
    if status in _REFUSED:
        return _REFUSED[status]  # servers repeat keys in these
    if 300 <= status < 400:
        return f"redirects elsewhere (HTTP {status}), which is not followed; give that address"
    reason = ""
    with contextlib.suppress(AdapterFileError):  # many are pages for people
        reason = reason_of(parse_object(reply, "the reply"))
    return f"answered HTTP {status}{': ' if reason else ''}{reason}"


def _cause(error: BaseException) -> str:
    """The sentence in an error's chain that says most."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionRefusedError):
            return "connection refused"
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
