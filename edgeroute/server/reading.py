"""A request's body, from bytes to a checked record."""

import asyncio
import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from edgeroute.server.errors import ApiError
from edgeroute.server.records import ServerParams

MAX_VALUES: Final = 1 << 17
"""Commas in a body: while more than those are decoded, for 30 ms, nobody else is served."""
SMALL_BYTES: Final = 1 << 16
_PLACE = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`$", re.DOTALL)

T = TypeVar("T")


async def read_body(request: Request, params: ServerParams, parse: Callable[[bytes], T]) -> T:
    """Read a request's body and make something of it; of a large one, beside the event loop.

    Args:
        request: whose body was not read.
        params: its limits.
        parse: raises ApiError for what cannot be used.

    Raises:
        ApiError: 408 it came too slowly; 413 it is too large; 499 the client left; or of `parse`.
    """
    try:
        async with asyncio.timeout(params.stall_s):
            raw = await _receive(request, params.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the request's body did not come within {params.stall_s:g} s"
        ) from None
    except ClientDisconnect:
        raise ApiError(499, "the client left") from None
    return parse(raw) if len(raw) <= SMALL_BYTES else await asyncio.to_thread(parse, raw)


async def _receive(request: Request, max_bytes: int) -> bytes:
    """Take a body in, no further than it may be long."""
    parts, n_bytes = [], 0
    async for part in request.stream():
        n_bytes += len(part)
        if n_bytes > max_bytes:
            raise ApiError(413, f"the body has over {max_bytes} bytes, which is the limit")
        parts.append(part)
    return b"".join(parts)


def parse_body(raw: bytes, kind: type[T]) -> T:
    """Check a body against its record.

    Raises:
        ApiError: 400, with the field at fault.
    """
    if raw.count(b",") > MAX_VALUES:
        raise ApiError(400, f"the body has over {MAX_VALUES} values, which is the limit")
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        words = f"{error!s:.300}" if raw else "it is empty"
        raise ApiError(400, f"the body is not JSON: {words}") from None
    except RecursionError:
        raise ApiError(400, "the body nests too deeply") from None


def _refusal(words: str) -> ApiError:
    """Say what msgspec found as OpenAI would, with the place in OpenAI's notation."""
    found = _PLACE.search(words)
    place = "" if found is None else found[1].replace("[...]", "")
    words = words if found is None else words[: found.start()]
    unknown, missing = _UNKNOWN.search(words), _MISSING.search(words)
    if unknown is not None and not place:
        name = unknown[1][:200]
        return ApiError(400, f"Unrecognized request argument supplied: {name}", param=name)
    if missing is not None:
        name = f"{place}.{missing[1]}".lstrip(".")
        return ApiError(400, f"Missing required parameter: {name!r}", param=name,
                        code="missing_required_parameter")  # fmt: skip
    if not place:
        return ApiError(400, f"the body is refused: {words:.300}")
    return ApiError(400, f"Invalid {place[:200]!r}: {words:.300}", param=place[:200])
