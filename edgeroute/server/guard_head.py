"""What a request's head must be: small, for this host, from an allowed page, with a key.

A page of any site can make a browser send requests to this machine. Three things keep it out: the
Host header must name this server, so a name that was rebound to a loopback address is
refused (CVE-2024-28224); the Origin header, which browsers add to what scripts and forms send, must
be this server's or a configured one; and answers carry no permission for other origins to read.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
from typing import Final

from starlette.types import Scope

from edgeroute.server.errors import ApiError
from edgeroute.server.records import ServerParams

METHODS: Final = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
MAX_HEADERS: Final = 100
MAX_TARGET_BYTES: Final = 4096
"""Of path and query."""
PUBLIC: Final = frozenset({"/", "/health/live"})
"""Paths that need no key: whether the process lives, and the dashboard's page, which holds no
data: what it shows, it asks for with the key that is typed into it."""
PUBLIC_FOLDER: Final = "/static/"
"""Files of the dashboard; the same for everybody."""
WILDCARDS: Final = ("", "0.0.0.0", "::")
WRONG_KEY_S: Final = 0.2
"""How long a wrong key waits for its refusal."""
MAX_DELAYED: Final = 64
"""Wrong keys that wait at once; one more is refused without a wait, so that they hold little."""
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_TOKEN: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
MAX_ASKED_HEADERS: Final = 32


class Head:
    """Headers of one request, by name.

    Args:
        scope: of ASGI; its header names are lower-case.
    """

    def __init__(self, scope: Scope) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.scheme: str = scope.get("scheme", "http")
        self.n_target = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        self.raw: list[tuple[bytes, bytes]] = list(scope["headers"])

    def all(self, name: bytes) -> list[bytes]:
        """Return every value of a header."""
        return [value for key, value in self.raw if key == name]

    def one(self, name: bytes) -> str | None:
        """Return a header that may come once at most; None where it does not.

        Raises:
            ApiError: 400, it comes twice or is not ASCII.
        """
        found = self.all(name)
        if len(found) > 1 or (found and not found[0].isascii()):
            raise ApiError(400, f"the header {name.decode()} must come once, and in ASCII")
        return found[0].decode().strip() if found else None

    @property
    def public(self) -> bool:
        """Whether it asks for what needs no key."""
        return self.path in PUBLIC or self.path.startswith(PUBLIC_FOLDER)

    @property
    def has_body(self) -> bool:
        """Whether a body comes, or may come, after it."""
        lengths = self.all(b"content-length")
        return bool(self.all(b"transfer-encoding")) or any(x.strip(b"0") for x in lengths)

    @property
    def request_id(self) -> str | None:
        """Return the client's own id of the request, where it is fit to be repeated."""
        found = self.all(b"x-request-id")
        fit = len(found) == 1 and _REQUEST_ID.fullmatch(found[0]) is not None
        return found[0].decode() if fit else None


def check_shape(head: Head, params: ServerParams) -> None:
    """Check method, path and size.

    Raises:
        ApiError: 400, 405, 414 or 431.
    """
    if head.method not in METHODS:
        raise ApiError(405, f"the method must be one of {', '.join(METHODS)}")
    if head.n_target > MAX_TARGET_BYTES:
        raise ApiError(414, f"path and query have {head.n_target} bytes; at most "
                            f"{MAX_TARGET_BYTES} are taken")  # fmt: skip
    if len(head.raw) > MAX_HEADERS:
        raise ApiError(431, f"{len(head.raw)} headers came; at most {MAX_HEADERS} are taken")
    n_bytes = sum(len(name) + len(value) for name, value in head.raw)
    if n_bytes > params.max_header_bytes:
        raise ApiError(431, f"the headers have {n_bytes} bytes; at most "
                            f"{params.max_header_bytes} are taken")  # fmt: skip
    strange = any(ord(c) < 0x20 or ord(c) == 0x7F for c in head.path)
    if strange or not head.path.startswith("/") or {".", ".."} & set(head.path.split("/")):
        raise ApiError(400, "the path must begin with / and have neither control characters "
                            "nor . and .. as parts")  # fmt: skip


class HostCheck:
    """Which names the Host header may have, with any port.

    Loopback's, the address that is listened on, and the configured ones. A server that listens on
    every address takes any literal address too: only a name can be rebound by others.
    """

    def __init__(self, params: ServerParams) -> None:
        self._any_address = params.host in WILDCARDS
        named = [*params.allowed_hosts, *([] if self._any_address else [params.host])]
        self._names = {"localhost", *(_bare(name.lower()) for name in named)}

    def __call__(self, head: Head) -> str:
        """Return the Host header, in lower case.

        Raises:
            ApiError: 400, there is none, or several, or it is malformed; 403, another host.
        """
        given = head.one(b"host")
        if not given:
            raise ApiError(400, "the request has no Host header")
        match = _HOST.fullmatch(given.lower())
        if match is None or int(match[2] or 0) > 0xFFFF:
            raise ApiError(400, f"the Host header {given!r:.80} is not a host with a port")
        name = _bare(match[1])
        if name not in self._names and not self._is_ours(name):
            raise ApiError(
                403, f"this server does not answer for the host {name!r:.80}; "
                "add it to allowed_hosts if it should", code="host_not_allowed",
            )  # fmt: skip
        return given.lower()

    def _is_ours(self, name: str) -> bool:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address


def _bare(name: str) -> str:
    return name.removeprefix("[").removesuffix("]").removesuffix(".")


class OriginCheck:
    """Which pages may send requests, and which of other origins may read the answers."""

    def __init__(self, params: ServerParams) -> None:
        self._origins = {origin.lower().rstrip("/") for origin in params.cors_origins}
        self.any = "*" in self._origins

    def __call__(self, head: Head, host: str) -> str | None:
        """Return the origin that is to be told that it may read; None where nobody is.

        Raises:
            ApiError: 403, the request comes from a page that may not send it.
        """
        origin = head.one(b"origin")
        if origin is None:
            site = head.one(b"sec-fetch-site")
            # Of what a page of another origin embeds or links to, only a link that opens the
            # dashboard is welcome.
            opens = head.method in ("GET", "HEAD") and head.public
            opens = opens and head.one(b"sec-fetch-mode") == "navigate"
            if site in ("cross-site", "same-site") and not (self.any or opens):
                raise _foreign("another site")
            return None
        if self.any or origin.lower() in self._origins:
            return origin
        scheme, _, rest = origin.lower().partition("://")
        same = rest == host and scheme in ("http", "https")
        # Behind a proxy that ends TLS the scheme differs; on this machine that is another server.
        local = _is_loopback(_bare((_HOST.fullmatch(host) or [None, ""])[1] or ""))
        if same and (scheme == head.scheme or not local):
            return None
        raise _foreign(repr(origin[:80]))


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _foreign(who: str) -> ApiError:
    return ApiError(403, f"a page of {who} may not use this server; add its origin to "
                         "cors_origins if it should", code="origin_not_allowed")  # fmt: skip


def preflight(head: Head) -> list[tuple[bytes, bytes]] | None:
    """Answer the question that a browser asks before another origin's request; None if none is.

    The headers that it names are allowed: which they are protects nothing here, for cookies and
    the browser's own credentials are neither asked for nor used.
    """
    if head.method != "OPTIONS" or head.one(b"access-control-request-method") is None:
        return None
    asked = (head.one(b"access-control-request-headers") or "").encode().split(b",")
    names = [name.strip() for name in asked[:MAX_ASKED_HEADERS]]
    fit = b", ".join(name for name in names if _TOKEN.fullmatch(name))
    found = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-max-age", b"600"),
    ]
    if fit:
        found.append((b"access-control-allow-headers", fit))
    if head.one(b"access-control-request-private-network") == "true":
        found.append((b"access-control-allow-private-network", b"true"))
    return found


def cors_headers(origin: str) -> list[tuple[bytes, bytes]]:
    """Return what lets an origin read an answer; never with credentials."""
    return [
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-expose-headers", b"x-request-id, retry-after"),
        (b"vary", b"origin"),
    ]


class KeyCheck:
    """Whether a request has one of the configured keys.

    Compared are hashes, all of one length, in constant time, and always all of them: neither the
    length of a key nor which of several it nearly was shows in the time.
    """

    def __init__(self, params: ServerParams) -> None:
        self._keys = [_digest(key.encode()) for key in params.api_keys]
        self._n_delayed = 0

    async def __call__(self, head: Head) -> bool:
        """Return whether the request has shown a key; False where none is needed.

        Raises:
            ApiError: 401, it has none or a wrong one, after a short wait.
        """
        if not self._keys:
            return False
        shown = self._shown(head)
        matches = [hmac.compare_digest(key, one) for one in shown for key in self._keys]
        if any(matches):
            return True
        if head.public:
            return False
        if shown:
            await self._wait()
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
        raise ApiError(401, "an API key is needed: send it as `Authorization: Bearer KEY`",
                       code="missing_api_key")  # fmt: skip

    def _shown(self, head: Head) -> list[bytes]:
        bearer, _, token = (head.one(b"authorization") or "").partition(" ")
        own = head.one(b"x-api-key")
        found = [token.strip()] if bearer.lower() == "bearer" else []
        return [_digest(each.encode()) for each in [*found, *([own] if own else [])]]

    async def _wait(self) -> None:
        if self._n_delayed >= MAX_DELAYED:
            return
        self._n_delayed += 1
        try:
            await asyncio.sleep(WRONG_KEY_S)
        finally:
            self._n_delayed -= 1


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
