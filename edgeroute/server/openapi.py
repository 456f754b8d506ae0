"""`/openapi.json`: a description of the endpoints, made of the records that requests are read into.

What is described is what is checked: the same bounds, the same names, nothing beside.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edgeroute import __version__
from edgeroute.server.bodies import ChatBody, CompletionBody, EmbeddingBody, FeedbackBody
from edgeroute.server.fields import RULES
from edgeroute.server.records import ServerParams, Services

Json = dict[str, Any]
PATH: Final = "/openapi.json"
SCHEMAS: Final = "#/components/schemas/"
BODIES: Final = (ChatBody, CompletionBody, EmbeddingBody, FeedbackBody)


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What was wrong: `param` names the field, `code` is a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, kw_only=True):
    """Any answer with a status from 400 on."""

    error: ErrorDetail


def _object(*required: str, **fields: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": fields}


_TEXT: Final[Json] = {"type": "string"}
_COUNT: Final[Json] = {"type": "integer", "minimum": 0}
_LIST: Final[Json] = {"type": "array", "items": {"type": "object"}}
_USAGE: Final = _object("prompt_tokens", "total_tokens", prompt_tokens=_COUNT, total_tokens=_COUNT)
_ANSWER: Final = _object(
    "id", "object", "created", "model", "choices", "usage",
    id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, choices=_LIST, usage=_USAGE,
)  # fmt: skip
_VECTORS: Final = _object(
    "object", "data", "model", "usage", object=_TEXT, data=_LIST, model=_TEXT, usage=_USAGE
)
_MODEL: Final = _object(
    "id", "object", "created", "owned_by", id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT
)
_MODELS: Final = _object("object", "data", object=_TEXT, data={"type": "array", "items": _MODEL})
_TOOL: Final = _object(
    "type", "function",
    type={"const": "function"},
    function=_object(
        "name", name={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}, description=_TEXT,
        parameters={"type": "object"},
    ),
)  # fmt: skip


def _answers(kind: str, schema: Json, *more: str) -> Json:
    """Return the responses of an operation: its success in these media types, and refusals."""
    refused = {"application/json": {"schema": {"$ref": SCHEMAS + "ErrorBody"}}}
    content = {kind: {"schema": schema}} | {each: {"schema": _TEXT} for each in more}
    return {
        "200": {"description": "What was asked for.", "content": content},
        "4XX": {"description": "The request is refused.", "content": refused},
        "503": {"description": "No room now; `Retry-After` says when.", "content": refused},
        "504": {"description": "It took too long.", "content": refused},
    }


def _post(name: str, told: str, body: type, answer: Json, *streams: str) -> Json:
    schema = {"$ref": SCHEMAS + body.__name__}
    return {"post": {
        "operationId": name, "summary": told,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _answers("application/json", answer, *streams),
    }}  # fmt: skip


def _get(name: str, told: str, answer: Json, kind: str = "application/json", **more: Any) -> Json:
    answers = _answers(kind, answer)
    return {"get": {"operationId": name, "summary": told, "responses": answers} | more}


def _paths() -> Json:
    stream = "text/event-stream"
    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/chat/completions": _post("chat", "Answer a conversation.", ChatBody, _ANSWER, stream),
        "/v1/completions": _post("complete", "Continue texts.", CompletionBody, _ANSWER, stream),
        "/v1/embeddings": _post("embed", "Turn texts into vectors.", EmbeddingBody, _VECTORS),
        "/v1/feedback": _post(
            "feedback", "Say what an answer was worth.", FeedbackBody, _object("id", id=_TEXT)
        ),
        "/v1/models": _get("models", "List models and adapters.", _MODELS),
        "/v1/models/{name}": _get("model", "Tell of one of them.", _MODEL, parameters=[named]),
        "/health/live": _get("live", "Say that the server answers.", _object(), security=[]),
        "/health/ready": _get("ready", "Say that a token can be generated.", _object()),
        "/metrics": _get("metrics", "Tell figures for Prometheus.", _TEXT, "text/plain"),
    }


def _narrow(fields: Json) -> None:
    """Say of a body's fields what is checked beside their types."""
    for name, rule in RULES.items():
        if name in fields:
            fields[name] = {"enum": [None, *rule.taken], "description": f"Else: {rule.why}."}
    for option in fields.get("logit_bias", {}).get("anyOf", []):
        if option["type"] == "object":
            option["propertyNames"] = {"pattern": "^[0-9]{1,10}$"}
    for option in fields.get("tools", {}).get("anyOf", []):
        if option["type"] == "array":
            option["items"] = _TOOL


@functools.cache
def description() -> Mapping[str, Any]:
    """Return the OpenAPI description, without what depends on a server's settings."""
    _, found = msgspec.json.schema_components([*BODIES, ErrorBody], ref_template=SCHEMAS + "{name}")
    for body in BODIES:
        _narrow(found[body.__name__]["properties"])
    for name in ("audio", "function_call"):
        found["Message"]["properties"][name] = {"type": "null"}
    keys = {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgeroute", "version": __version__},
        "paths": _paths(),
        "components": {"schemas": found, "securitySchemes": {"key": keys}},
    }


def described(params: ServerParams) -> Json:
    """Return the description of one server: with keys, where it wants them."""
    return {**description(), **({"security": [{"key": []}]} if params.api_keys else {})}


def routes(services: Services) -> list[BaseRoute]:
    """Return the route of the description."""
    text = msgspec.json.encode(described(services.params))

    async def show(request: Request) -> Response:
        return Response(text, media_type="application/json")

    return [Route(PATH, show)]
