"""GET /v1/models: the configured models, and their adapters as models of their own."""

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgeroute.adapter_routing import POLICIES
from edgeroute.server.errors import ApiError
from edgeroute.server.naming import Named, find_model
from edgeroute.server.records import ModelFacts, Services

AUTO = "auto"


def routes(services: Services) -> list[Route]:
    """Return the routes of the list and of one entry."""

    async def listed(request: Request) -> Response:
        models = services.models
        entries = [each for name in models.names for each in _entries(models.facts(name))]
        return JSONResponse({"object": "list", "data": entries})

    async def one(request: Request) -> Response:
        named = find_model(services.models, request.path_params["name"])
        return JSONResponse(_entry(named, services.models.facts(named.name)))

    return [
        Route("/v1/models", listed, methods=["GET"], name="models"),
        Route("/v1/models/{name:path}", one, methods=["GET"], name="model"),
    ]


def _entries(facts: ModelFacts) -> Iterator[dict[str, Any]]:
    """Tell of a model, of each of its adapters, and of the choice among them."""
    yield _entry(Named(facts.name), facts)
    for adapter in (AUTO, *facts.adapters) if facts.adapters else ():
        yield _entry(Named(facts.name, adapter), facts)


def _entry(named: Named, facts: ModelFacts) -> dict[str, Any]:
    """Tell of one entry.

    Raises:
        ApiError: 404, the model has no such adapter.
    """
    adapter = named.adapter
    if adapter is not None and not _has(facts, adapter):
        there = ", ".join(facts.adapters[:20]) or "none"
        raise ApiError(
            404, f"the model {facts.name!r} has no adapter {adapter!r:.80}; there are: {there}",
            param="model", code="model_not_found",
        )  # fmt: skip
    return {
        "id": named.label, "object": "model", "created": facts.created, "owned_by": "edgeroute",
        "edgeroute": {
            "model": facts.name, "adapter": adapter, "state": facts.state, "n_ctx": facts.n_ctx,
            "n_bytes": facts.n_bytes,
        },
    }  # fmt: skip


def _has(facts: ModelFacts, adapter: str) -> bool:
    return adapter in facts.adapters or (bool(facts.adapters) and adapter in POLICIES)
