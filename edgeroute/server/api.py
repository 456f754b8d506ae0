"""The OpenAI-compatible endpoints, as routes."""

from collections.abc import Callable
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeroute.server import chat, completions, embeddings, feedback, listing
from edgeroute.server.answering import Answering
from edgeroute.server.asked import Asked, Question, Shape
from edgeroute.server.bodies import Body, ChatBody, CompletionBody
from edgeroute.server.naming import choose_adapter, find_model
from edgeroute.server.options import extension
from edgeroute.server.origins import Origins
from edgeroute.server.reading import parse_body, read_body
from edgeroute.server.records import Job, ServerParams, Services
from edgeroute.server.reporting import request_id

B = TypeVar("B", bound=Body)


def routes(services: Services) -> list[Route]:
    """Return all of them."""
    origins = Origins()
    chatting = Generating(services, origins, chat.SHAPE, ChatBody, chat.ChatQuestion)
    completing = Generating(
        services, origins, completions.SHAPE, CompletionBody, completions.CompletionQuestion
    )
    return [
        Route("/v1/chat/completions", chatting, methods=["POST"], name="chat"),
        Route("/v1/completions", completing, methods=["POST"], name="completions"),
        *embeddings.routes(services),
        *listing.routes(services),
        *feedback.routes(services, origins),
    ]


class Generating(Generic[B]):
    """An endpoint that generates, as an ASGI application.

    Args:
        services: what it stands on.
        origins: remembers answers.
        shape: of its answers.
        kind: of its bodies.
        ask: makes a question of a body.
    """

    def __init__(
        self, services: Services, origins: Origins, shape: Shape, kind: type[B],
        ask: Callable[[B, ServerParams], Question],
    ) -> None:  # fmt: skip
        self._services, self._origins = services, origins
        self._shape, self._kind, self._question = shape, kind, ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        params = self._services.params
        body, question = await read_body(Request(scope, receive), params, self._parse)
        asked = self._ask(body, question)
        adapter = asked.adapter if isinstance(asked.adapter, str) else None
        job = Job(id=request_id(scope), endpoint=self._shape.endpoint, model=asked.named.name,
                  adapter=adapter, streaming=asked.stream)  # fmt: skip
        await Answering(self._services, asked, job, self._origins)(scope, receive, send)

    def _parse(self, raw: bytes) -> tuple[B, Question]:
        body = parse_body(raw, self._kind)
        return body, self._question(body, self._services.params)

    def _ask(self, body: B, question: Question) -> Asked:
        named, more = find_model(self._services.models, body.model), extension(body)
        options, longest_s = body.stream_options, self._services.params.timeout_s
        return Asked(
            shape=self._shape, question=question, named=named,
            adapter=choose_adapter(named, more.adapter), stream=bool(body.stream),
            with_usage=options is not None and bool(options.include_usage),
            with_stats=more.stats, timeout_s=min(longest_s, more.timeout_s or longest_s),
        )  # fmt: skip
