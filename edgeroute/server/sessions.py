"""Saved sessions: list those of the models that are open, delete one.

A request names its session in `edgeroute.session`; that is a name, never a path. Deleting is an
admin call: it is refused where no API key is configured.
"""

import asyncio
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from edgeroute.engine import Runtime
from edgeroute.server.errors import ApiError
from edgeroute.server.records import Services
from edgeroute.session_folder import SessionFolder, check_session_name, default_folder

MAX_LISTED: Final = 1000
"""Sessions of one answer, the newest; `n_sessions` counts all."""


class SessionCalls:
    """The calls about saved sessions. The event loop owns it."""

    def __init__(self, services: Services) -> None:
        self._models, self._params = services.models, services.params
        self._turn = asyncio.Lock()
        """One call at a time reads the folder."""

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/edgeroute/sessions", self.listed, methods=["GET"]),
            Route("/edgeroute/sessions/{name}", self.remove, methods=["DELETE"]),
        ]

    async def listed(self, request: Request) -> Response:
        """List the sessions of the models that are open, newest first."""
        async with self._turn:
            found = await asyncio.to_thread(_list, self._open())
        return JSONResponse({
            "object": "list", "limit_bytes": self._params.sessions_bytes,
            "n_sessions": len(found), "data": found[:MAX_LISTED],
        })  # fmt: skip

    async def remove(self, request: Request) -> Response:
        """Delete a session, of whatever model and adapter."""
        if not self._params.api_keys:
            raise ApiError(
                403, "deleting sessions needs an API key, and none is configured; put one into "
                "the environment's EDGEROUTE_API_KEY or a file that server.api_key_file names, "
                "and restart the server", code="no_api_key",
            )  # fmt: skip
        name = check_session_name(request.path_params["name"])
        folder = SessionFolder(self._params.sessions or default_folder())
        runtimes = [runtime for _, runtime in self._open()]
        async with self._turn:
            n_files = await asyncio.to_thread(_remove, runtimes, folder, name)
        if not n_files:
            raise ApiError(404, f"there is no saved session {name!r}", code="session_not_found")
        return JSONResponse({"name": name, "deleted": True, "files": n_files})

    def _open(self) -> list[tuple[str, Runtime]]:
        """Return the models that are open and keep sessions."""
        pairs = [(name, self._models.peek(name)) for name in self._models.names]
        return [(name, each) for name, each in pairs if each and each.params.sessions is not None]


def routes(services: Services) -> list[BaseRoute]:
    """Return the routes about saved sessions."""
    return SessionCalls(services).routes()


def _list(models: list[tuple[str, Runtime]]) -> list[dict[str, Any]]:
    found = [
        {"name": each.name, "model": model, "adapter": each.adapter_names, "depth": each.plan,
         "n_tokens": each.n_tokens, "bytes": each.n_bytes, "saved": each.saved}
        for model, runtime in models for each in runtime.sessions()
    ]  # fmt: skip
    return sorted(found, key=lambda each: (-each["saved"], each["name"]))


def _remove(runtimes: list[Runtime], folder: SessionFolder, name: str) -> int:
    """Delete what is saved, and what is being saved of models that are open."""
    return sum(runtime.remove_session(name) for runtime in runtimes) + folder.remove(name)
