"""The application: routes of all parts behind the same guards."""

import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from edgeroute.server.errors import ApiError, as_api_error
from edgeroute.server.records import Services


def make_app(
    services: Services, routes: Sequence[BaseRoute], guards: Sequence[Middleware] = ()
) -> Starlette:
    """Put an application together.

    Args:
        services: what the routes stand on; found again as `request.app.state.services`.
        routes: of all parts.
        guards: outermost first.
    """

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield

    app = Starlette(
        routes=list(routes), middleware=list(guards), lifespan=life,
        exception_handlers={
            ApiError: _tell, HTTPException: _tell_http, Exception: _tell,
        },
    )  # fmt: skip
    app.router.redirect_slashes = False  # a path has one spelling; no client needs another
    app.state.services = services
    return app


async def _tell(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _tell_http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {
        404: f"there is no {request.url.path!r:.200} here",
        405: f"{request.method} is not allowed for {request.url.path!r:.200}",
    }
    detail = error.detail if isinstance(error, HTTPException) else "an internal error"
    return ApiError(status, words.get(status, detail)).response()
