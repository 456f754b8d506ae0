"""The dashboard at `/`: one page of files that come with the package, without a build step."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edgeroute.server.records import Services

FILES: Final = {
    "index.html": "text/html; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "app.js": "text/javascript; charset=utf-8",
    "format.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "heat.js": "text/javascript; charset=utf-8",
    "panels.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
}
"""All that is served, by name, and what it is."""
HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """A file in memory, with what its headers say."""

    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, name: str) -> "StaticFile":
        """Read one of FILES from the package.

        Raises:
            FileNotFoundError: the package was installed without it.
        """
        body = (resources.files("edgeroute.server") / "static" / name).read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return cls(body=body, media_type=FILES[name], etag=etag)

    async def answer(self, request: Request) -> Response:
        """Send it, or 304 where the browser has it."""
        headers = HEADERS | {"ETag": self.etag}
        known = request.headers.get("if-none-match", "")
        if self.etag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def routes(services: Services) -> list[BaseRoute]:
    """Return a route for each file, and for `/`; none where the dashboard is switched off.

    They hold no secrets: the page asks for an API key and sends it with what it asks for.
    """
    if not services.params.dashboard:
        return []
    files = {name: StaticFile.read(name) for name in FILES}
    pages: list[BaseRoute] = [Route("/", files["index.html"].answer)]
    return pages + [
        Route(f"/static/{name}", each.answer) for name, each in files.items()
        if name != "index.html"
    ]  # fmt: skip
