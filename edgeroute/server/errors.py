"""Errors as OpenAI's clients expect them: a status and one JSON object."""

import math
from typing import Final

from starlette.responses import JSONResponse, Response

from edgeroute.runtime.errors import (
    CapacityError,
    ClosedError,
    DeviceLostError,
    EdgerouteError,
    NeverFitsError,
    TemplateError,
    UsageError,
)

KINDS: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 409: "conflict_error",
    413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    431: "invalid_request_error", 499: "cancelled", 503: "overloaded_error",
    504: "timeout_error",
}  # fmt: skip
"""The `type` of an error by status; others are the request's fault below 500, else ours."""
DEVICE_S: Final = 5.0
"""When a device that was lost may be back."""


class ApiError(Exception):
    """What a request is refused with.

    Args:
        status: HTTP status.
        message: what failed, the value, the limit and the remedy.
        param: field of the request that is at fault.
        code: short word for programs, such as `model_not_found`.
        retry_after_s: when another try may succeed.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        """Return the JSON object that tells it."""
        ours = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = KINDS.get(self.status, ours)
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> Response:
        """Return the whole answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """Say what a failure means to a client.

    What is the request's fault is a 4xx; an engine that stopped is 503, for the next request
    gets a new one, and so is a device that is gone; anything unforeseen is 500, without its
    inner details.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError | TemplateError):
        return ApiError(400, str(error))
    if isinstance(error, NeverFitsError):
        return ApiError(400, str(error), code="does_not_fit")
    if isinstance(error, CapacityError):
        return ApiError(503, str(error), code="does_not_fit", retry_after_s=5)
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="engine_stopped", retry_after_s=1)
    if isinstance(error, DeviceLostError):
        return ApiError(503, str(error), code="device_lost", retry_after_s=DEVICE_S)
    if isinstance(error, EdgerouteError):
        return ApiError(500, str(error))
    return ApiError(500, "an internal error; the server's log has it under this request's id")
