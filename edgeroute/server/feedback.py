"""POST /v1/feedback: what an answer was worth, for the model that gave it to learn from."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.server.bodies import FeedbackBody
from edgeroute.server.errors import ApiError, as_api_error
from edgeroute.server.origins import MAX_REMEMBERED, Origins
from edgeroute.server.reading import parse_body, read_body
from edgeroute.server.records import Services


def routes(services: Services, origins: Origins) -> list[Route]:
    """Return the route; `origins` knows which model an answer came from."""

    async def feedback(request: Request) -> Response:
        body = await read_body(request, services.params, _parse)
        name = origins.find(body.id)
        if name is None:
            raise ApiError(
                404, f"there is no answer {body.id!r:.80}: feedback is taken for the last "
                f"{MAX_REMEMBERED} answers since the server began, by the id that is told in "
                "their field edgeroute", param="id", code="answer_not_found",
            )  # fmt: skip
        runtime = services.models.peek(name)
        if runtime is None:
            raise ApiError(409, f"the model {name!r} was closed since that answer; what could "
                                "be learned from it is gone", param="id")  # fmt: skip
        try:  # it waits until the engine is between two tokens
            await asyncio.to_thread(runtime.feedback, body.id, body.reward)
        except EdgerouteError as error:  # perhaps that nothing learns from this answer
            raise as_api_error(error) from error
        return JSONResponse({"object": "feedback", "id": body.id, "model": name,
                             "reward": body.reward})  # fmt: skip

    return [Route("/v1/feedback", feedback, methods=["POST"], name="feedback")]


def _parse(raw: bytes) -> FeedbackBody:
    return parse_body(raw, FeedbackBody)
