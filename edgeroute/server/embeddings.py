"""POST /v1/embeddings: texts or token ids in, vectors of length 1 out.

`dimensions` is refused unless it is what the model has: its vectors were not trained to mean
anything when they are cut.
"""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeroute.embedding import MAX_INPUTS, Embeddings
from edgeroute.runtime.errors import ClosedError
from edgeroute.server.bodies import EmbeddingBody
from edgeroute.server.completions import split_inputs
from edgeroute.server.errors import ApiError
from edgeroute.server.naming import Named, check_adapter, find_model
from edgeroute.server.options import blame, check_ids
from edgeroute.server.reading import parse_body, read_body
from edgeroute.server.records import Job, Services
from edgeroute.server.reporting import reported, request_id
from edgeroute.server.waiting import unless_left

Inputs = Sequence[str | Sequence[int]]
Vectors = npt.NDArray[np.float32]
NO_OPTIONS: Final[dict[str, Any]] = {}


def routes(services: Services) -> list[Route]:
    """Return the route."""

    async def embeddings(request: Request) -> Response:
        body, inputs = await read_body(request, services.params, _parse)
        named = find_model(services.models, body.model)
        job = Job(id=request_id(request.scope), endpoint="embeddings", model=named.name,
                  adapter=named.adapter)  # fmt: skip
        with reported(services, job):
            found = await unless_left(request.receive, _embed(services, named, inputs, job))
            told = await asyncio.to_thread(_tell, found, named, body)
        return Response(told, media_type="application/json")

    return [Route("/v1/embeddings", embeddings, methods=["POST"], name="embeddings")]


def _parse(raw: bytes) -> tuple[EmbeddingBody, Inputs]:
    """Return the body and its inputs, of which none is empty.

    Raises:
        ApiError: 400, there is none, or too many, or the body is malformed.
    """
    body = parse_body(raw, EmbeddingBody)
    inputs = split_inputs(body.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs were given, the limit is {MAX_INPUTS}; send "
                            "several requests", param="input")  # fmt: skip
    for i, each in enumerate(inputs):
        if not each:
            raise ApiError(400, f"input {i} is empty; pass a text or token ids", param="input")
    return body, inputs


async def _embed(services: Services, named: Named, inputs: Inputs, job: Job) -> Embeddings:
    """Compute the vectors.

    Raises:
        ApiError: what the request has wrong, or why the engine could not.
    """
    deadline = job.created + services.params.timeout_s
    async with services.models.use(named.name, deadline=deadline) as use:
        job.started = time.monotonic()
        left_s = deadline - job.started
        try:
            check_adapter(use.runtime, named, named.adapter)
            await asyncio.to_thread(check_ids, use.runtime, inputs, "input")
            if left_s <= 0:
                raise TimeoutError("the time for this request was over before it began")
            found = await use.runtime.aembed(inputs, adapter=named.adapter, timeout_s=left_s)
        except Exception as error:
            if isinstance(error, ClosedError):
                use.broke()
            raise blame(error, "input", NO_OPTIONS) from error
    job.n_prompt = sum(found.n_tokens)
    return found


def _tell(found: Embeddings, named: Named, body: EmbeddingBody) -> bytes:
    """Return the response's body; row by row, for nobody else runs while one is encoded.

    Raises:
        ApiError: 400, vectors of another length were asked for.
    """
    n_embd = found.vectors.shape[1]
    if body.dimensions not in (None, n_embd):
        raise ApiError(
            400, f"vectors of this model have {n_embd} dimensions and mean nothing when they are "
            f"cut; leave out dimensions={body.dimensions}", param="dimensions",
        )  # fmt: skip
    in_base64 = body.encoding_format == "base64"
    rows = []
    for i, row in enumerate(found.vectors):
        vector = _base64(row) if in_base64 else row.tolist()
        entry = {"object": "embedding", "index": i, "embedding": vector}
        rows.append(msgspec.Raw(msgspec.json.encode(entry)))
    n_tokens = sum(found.n_tokens)
    return msgspec.json.encode({
        "object": "list",
        "data": rows,
        "model": named.label,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    })  # fmt: skip


def _base64(row: Vectors) -> str:
    """Return a vector's F32 bytes, the lowest first, as OpenAI's clients read them."""
    return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode()
