"""A hub on loopback that speaks the Hugging Face protocol as huggingface_hub uses it.

Two servers on two ports: the hub answers HEAD and GET on /OWNER/REPO/resolve/REV/FILE with the
file's metadata and a redirect, the CDN serves the body with ranges. `Behaviour` says what goes
wrong; `requests` and `n_sent` say what clients really did.
"""

import gzip
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgeroute.models import catalogue, hub
from edgeroute.models.catalogue import CatalogueEntry, HubSource

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
SPEC = "hf:owner/repo/sub/tiny-q4.gguf"
HUB = HubSource(repo="owner/repo", file="tiny.gguf")
BODY = b"GGUF" + bytes(range(256)) * 800
SHA256 = hashlib.sha256(BODY).hexdigest()
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True, kw_only=True)
class Behaviour:
    """What the hub serves and how it misbehaves. Statuses are popped, one per request."""

    body: bytes
    etag: str | None = None  # None: the true sha256 of `body`
    size: int | None = None  # None: the true length
    redirect: str = "cdn"  # "cdn" | "none" | "loop" | any address
    head_statuses: list[int] = field(default_factory=list)
    body_statuses: list[int] = field(default_factory=list)
    error_code: str = ""
    extra_headers: dict[str, str] = field(default_factory=dict)
    truncations: list[int] = field(default_factory=list)  # bytes after which to hang up
    ignore_range: bool = False
    lie_range: bool = False
    compress: bool = False
    pause_after: int | None = None  # bytes after which to wait for `resume`


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request: which server, method, path, and headers in lower case."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    """Both servers, their behaviour and what they saw."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[Seen] = []
        self.n_sent = 0
        self.paused, self.resume = threading.Event(), threading.Event()
        self._servers = [_server(self, name) for name in ("hub", "cdn")]
        self.endpoint, self.cdn = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def bodies(self) -> list[Seen]:
        """The requests that asked for a body."""
        return [seen for seen in self.requests if seen.server == "cdn" or seen.method == "GET"]

    def location(self) -> str:
        """Where the hub's HEAD sends clients."""
        kind = self.behaviour.redirect
        named = {"cdn": f"{self.cdn}/blob?signature=x", "loop": f"{self.cdn}/loop"}
        return named.get(kind, kind)

    def close(self) -> None:
        """Stop both servers and let every waiting request end."""
        self.resume.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Hub]:
    """Run a hub for the length of a with block."""
    hub = Hub(behaviour)
    try:
        yield hub
    finally:
        hub.close()


def _server(hub: Hub, name: str) -> ThreadingHTTPServer:
    handler = type(f"{name}Handler", (_Handler,), {"hub": hub, "server_name": name})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or that hang up on purpose are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    server_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Tests read `requests`, not a log."""

    def do_HEAD(self) -> None:
        self._see()
        self._metadata()

    def do_GET(self) -> None:
        self._see()
        if self.path == "/loop":
            self._headers(302, {"Location": "/loop", "Content-Length": "0"})
        elif self.server_name == "hub" and "/resolve/" not in self.path:
            self._headers(404, {"Content-Length": "0"})
        elif self.server_name == "hub" and self.hub.behaviour.redirect != "none":
            self._metadata()
        else:
            self._body()

    def _see(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        seen = Seen(server=self.server_name, method=self.command, path=self.path, headers=headers)
        self.hub.requests.append(seen)

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _metadata(self) -> None:
        what = self.hub.behaviour
        status = what.head_statuses.pop(0) if what.head_statuses else 302
        headers = {"Content-Length": "0", **what.extra_headers}
        if status >= 400:
            if what.error_code:
                headers["X-Error-Code"] = what.error_code
            self._headers(status, headers)
            return
        etag = hashlib.sha256(what.body).hexdigest() if what.etag is None else what.etag
        size = str(len(what.body) if what.size is None else what.size)
        headers["X-Repo-Commit"] = COMMIT
        headers["X-Linked-Etag"], headers["X-Linked-Size"] = f'"{etag}"', size
        headers["ETag"] = '"not-the-content"'
        if what.redirect == "none":
            self._headers(200, headers | {"Content-Length": size})
            return
        self._headers(302, headers | {"Location": self.hub.location()})

    def _body(self) -> None:
        what = self.hub.behaviour
        if what.body_statuses:
            headers = {"Content-Length": "0", **what.extra_headers}
            self._headers(what.body_statuses.pop(0), headers)
            return
        body, status, headers = what.body, 200, dict(what.extra_headers)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match and not what.ignore_range:
            first, n_body = int(match[1]), len(body)
            end = min(n_body, int(match[2]) + 1) if match[2] else n_body
            body, status = body[first:end], 206
            told = 0 if what.lie_range else first
            headers["Content-Range"] = f"bytes {told}-{end - 1}/{n_body}"
        if what.compress:
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
        self._headers(status, headers | {"Content-Length": str(len(body))})
        self._send(body)

    def _send(self, body: bytes) -> None:
        what, n_limit = self.hub.behaviour, len(body)
        if what.truncations:
            n_limit = min(n_limit, what.truncations.pop(0))
        for first in range(0, n_limit, 4096):
            if what.pause_after is not None and first >= what.pause_after:
                self.hub.paused.set()
                self.hub.resume.wait(60)
            chunk = body[first : min(first + 4096, n_limit)]
            try:
                self.wfile.write(chunk)
            except OSError:
                break
            self.hub.n_sent += len(chunk)
        self.close_connection = n_limit < len(body)


@contextmanager
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, token, index or configuration of this machine reaches a test."""
    from huggingface_hub import close_session, constants

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "PIP_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # for child processes
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(hub, "BACKOFF_S", 0.01)
    monkeypatch.setattr(hub, "REPORT_BYTES", 8192)
    close_session()
    yield
    close_session()


def add_entry(monkeypatch: pytest.MonkeyPatch, *sources, sha256: str = SHA256) -> CatalogueEntry:
    """Put an entry named `tiny` into the catalogue for one test."""
    entry = CatalogueEntry(
        name="tiny",
        architecture="llama",
        licence="MIT",
        n_bytes=len(BODY),
        sha256=sha256,
        sources=sources,
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", entry)
    return entry


def leftovers(tmp_path: Path) -> dict[str, int]:
    """Every file of the models folder but locks, with its size."""
    root = tmp_path / "models"
    files = (f for f in root.rglob("*") if f.is_file() and f.suffix != ".lock")
    return {f.relative_to(root).as_posix(): f.stat().st_size for f in files}
