"""Admin calls: load and unload models, add and remove their adapters.

They are refused where no API key is configured: any page or program on this machine could call
them. No path from a request reaches the file system: an adapter is named, and its name is looked
for in the list of what lies in the folders that the configuration gives.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from edgeroute.models.adapter_file import adapter_name
from edgeroute.models.adapter_library import entries
from edgeroute.runtime.errors import AdapterFileError, CapacityError, UsageError
from edgeroute.server.errors import ApiError
from edgeroute.server.records import Models, Services

_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class _Added(msgspec.Struct, forbid_unknown_fields=True):
    """What is sent to add an adapter."""

    name: str


class Admin:
    """The admin calls. The event loop owns it."""

    def __init__(self, services: Services) -> None:
        self._models: Models = services.models
        self._params = services.params
        self._adding = asyncio.Lock()
        """One adapter at a time is read from the disk and checked."""

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        model = "/edgeroute/models/{name}"
        return [
            Route(f"{model}/load", self.load, methods=["POST"]),
            Route(f"{model}/unload", self.unload, methods=["POST"]),
            Route(f"{model}/adapters", self.adapters, methods=["GET"]),
            Route(f"{model}/adapters", self.add, methods=["POST"]),
            Route(f"{model}/adapters/{{adapter}}", self.remove, methods=["DELETE"]),
        ]

    async def load(self, request: Request) -> Response:
        """Open a model."""
        name = self._model(request)
        await self._models.load(name)
        return self._told(name)

    async def unload(self, request: Request) -> Response:
        """Close a model that is idle."""
        name = self._model(request)
        await self._models.unload(name)
        return self._told(name)

    async def adapters(self, request: Request) -> Response:
        """List a model's adapters, and those of its folders that could be added."""
        name = self._model(request)
        found = await _available(self._models.facts(name).adapter_folders)
        async with self._models.use(name, deadline=self._deadline(), counts=False) as use:
            known = use.runtime.adapters
        return JSONResponse({"adapters": known, "available": sorted(set(found) - set(known))})

    async def add(self, request: Request) -> Response:
        """Add an adapter of the folders, or read one anew that was replaced there."""
        name = self._model(request)
        try:
            sent = msgspec.json.decode(await request.body(), type=_Added)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise ApiError(400, f'send {{"name": "ADAPTER"}}: {error}', param="name") from error
        wanted = _adapter(sent.name, 400)
        folders = self._models.facts(name).adapter_folders
        if not folders:
            raise ApiError(409, f"the model {name!r} has no folder of adapters; name one by "
                           f"models.{name}.adapters and restart the server")  # fmt: skip
        async with self._models.use(name, deadline=self._deadline()) as use, self._adding:
            runtime, found = use.runtime, await _available(folders)
            if wanted not in found:
                listed = ", ".join(sorted(found)[:20]) or "none"
                raise ApiError(404, f"there is no adapter {wanted!r} in the folders of {name!r}; "
                               f"there are: {listed}", code="adapter_not_found")  # fmt: skip
            try:
                await asyncio.to_thread(runtime.add_adapter, found[wanted])
            except AdapterFileError as error:
                raise ApiError(422, f"the adapter {wanted!r} cannot be used: "
                               f"{_without(error, found[wanted])}") from error  # fmt: skip
            except CapacityError as error:
                raise ApiError(409, f"{error}; give the model more by models.{name}.memory",
                               code="does_not_fit") from error  # fmt: skip
            return JSONResponse({"adapters": runtime.adapters})

    async def remove(self, request: Request) -> Response:
        """Take an adapter out of a model; its file stays."""
        name = self._model(request)
        wanted = _adapter(request.path_params["adapter"], 404)
        async with self._models.use(name, deadline=self._deadline()) as use:
            try:
                await asyncio.to_thread(use.runtime.remove_adapter, wanted)
            except UsageError as error:
                raise ApiError(404, str(error), code="adapter_not_found") from error
            return JSONResponse({"adapters": use.runtime.adapters})

    def _model(self, request: Request) -> str:
        """Return which model is meant.

        Raises:
            ApiError: 403, there is no API key; 404, there is no such model.
        """
        if not self._params.api_keys:
            raise ApiError(
                403, "admin calls need an API key, and none is configured; put one into the "
                "environment's EDGEROUTE_API_KEY or a file that server.api_key_file names, and "
                "restart the server", code="no_api_key",
            )  # fmt: skip
        return self._models.facts(request.path_params["name"]).name

    def _told(self, name: str) -> Response:
        facts = self._models.facts(name)
        return JSONResponse({"name": name, "state": facts.state, "n_bytes": facts.n_bytes})

    def _deadline(self) -> float:
        return time.monotonic() + self._params.timeout_s


def routes(services: Services) -> list[BaseRoute]:
    """Return the routes of admin calls."""
    return Admin(services).routes()


def _adapter(name: str, status: int) -> str:
    if not _NAME.fullmatch(name):
        raise ApiError(status, f"{name!r:.80} is no name of an adapter: up to 64 letters, digits "
                       "and ._-", param="name")  # fmt: skip
    return name


async def _available(folders: Sequence[Path]) -> dict[str, Path]:
    """List what lies in the configured folders, by name."""

    def look() -> dict[str, Path]:
        return {adapter_name(path): path for folder in folders for path in entries(folder)}

    try:
        return await asyncio.to_thread(look)
    except AdapterFileError as error:
        raise ApiError(409, f"the adapters' folders cannot be listed: {error}") from error


def _without(error: Exception, path: Path) -> str:
    """Say what is wrong without the place where the file lies."""
    return str(error).replace(str(path), path.name)
