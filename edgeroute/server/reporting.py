"""A request's record, from its begin to its end, whatever ends it."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Scope

from edgeroute.server.errors import as_api_error
from edgeroute.server.records import Job, Services, new_request_id


def request_id(scope: Scope) -> str:
    """Return the id that the guard gave a request, or a new one."""
    found = scope.get("state", {}).get("request_id")
    return found if isinstance(found, str) else new_request_id()


@contextmanager
def reported(services: Services, job: Job) -> Iterator[None]:
    """Tell all observers of a request, and how it ended.

    A status that the block set is kept. One that is cancelled, as by a server that ends, counts
    as left.
    """
    services.began(job)
    try:
        yield
        job.status = 200 if job.status is None else job.status
    except Exception as error:
        refusal = as_api_error(error)
        job.status, job.error = refusal.status, refusal.message
        raise
    except (asyncio.CancelledError, GeneratorExit):
        job.status, job.error = 499, "the request was cancelled"
        raise
    finally:
        job.ended = time.monotonic()
        services.ended(job)
