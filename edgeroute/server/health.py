"""Health: `/health/live` says that the server answers, `/health/ready` that a model does.

A check of readiness generates one token. All who ask meanwhile share it, and its result serves
for a second, so that no number of probes costs more than one token a second.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from edgeroute.engine import Runtime
from edgeroute.options import Options
from edgeroute.runtime.errors import ClosedError, EdgerouteError
from edgeroute.server.errors import ApiError
from edgeroute.server.records import Models, Services, Use

READY_S: Final = 5.0
"""Longest time of a check."""
KEPT_S: Final = 1.0
"""How long its result serves."""
PROMPT: Final = "Hi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check found: the model that answered, and in which time; or why none did.

    Also models that could not be opened the last time, and why.
    """

    model: str | None
    seconds: float
    why: str | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        """Return what is told of it."""
        if self.why is not None:
            return ApiError(503, self.why, code="not_ready", retry_after_s=READY_S).response()
        told: dict[str, object] = {"status": "ready", "model": self.model}
        told["seconds"] = round(self.seconds, 4)
        return JSONResponse(told | ({"failed": self.failed} if self.failed else {}))


class Readiness:
    """Checks whether a token can be generated. The event loop owns it.

    The default model is asked if it is open, else another that is, so that probes do not push
    models out of memory; where none is open, the default one is opened.
    """

    def __init__(self, models: Models, *, limit_s: float = READY_S) -> None:
        self._models, self._limit_s = models, limit_s
        self._checking: asyncio.Task[Verdict] | None = None
        self._last: tuple[float, Verdict] | None = None
        self.n_checked = 0

    async def verdict(self) -> Verdict:
        """Return the newest result, or make one together with all who ask now."""
        if self._last is not None and time.monotonic() - self._last[0] < KEPT_S:
            return self._last[1]
        if self._checking is None:
            self._checking = asyncio.create_task(self._check())
        return await asyncio.shield(self._checking)  # who leaves does not end it for others

    async def _check(self) -> Verdict:
        self.n_checked += 1
        began = time.monotonic()
        name = self._chosen()
        why: str | None = None
        try:
            async with asyncio.timeout(self._limit_s + 1.0):  # should an engine not keep its time
                why = await self._generate(name, began + self._limit_s)
        except TimeoutError:
            why = self._late(name)
        except ApiError as error:
            why = error.message
        except EdgerouteError as error:
            why = f"the model {name!r} does not answer: {error}"
        finally:
            self._checking = None
        seconds = time.monotonic() - began
        facts = map(self._models.facts, self._models.names)
        failed = {each.name: each.failed for each in facts if each.failed is not None}
        verdict = Verdict(model=name, seconds=seconds, why=why, failed=failed)
        self._last = time.monotonic(), verdict
        return verdict

    def _chosen(self) -> str:
        names = self._models.names
        return next((name for name in names if self._models.peek(name) is not None), names[0])

    async def _generate(self, name: str, deadline: float) -> str | None:
        """Have a model write a token; say why it did not."""
        async with self._models.use(name, deadline=deadline, counts=False) as use:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return f"opening the model {name!r} has just ended"
            try:
                answer = await use.runtime.agenerate(PROMPT, **_options(use, left_s))
            except ClosedError:
                use.broke()
                raise
            return self._late(name) if answer.finish_reason == "timeout" else None

    def _late(self, name: str) -> str:
        """Say why no token came in time."""
        runtime = self._models.peek(name)
        words = f"the model {name!r} wrote no token within {self._limit_s:g} s"
        return words if runtime is None else f"{words}: {_busy(runtime)}"


def _options(use: Use, left_s: float) -> Options:
    """Ask for as little as can be: one token, by the model alone, that nothing is kept of."""
    found: Options = {"max_tokens": 1, "prefix": "off", "speculate": False, "timeout_s": left_s}
    if use.runtime.params.steps_on:
        found["steps"] = "off"
    return found


def _busy(runtime: Runtime) -> str:
    stats, pulse = runtime.stats(), runtime.pulse()
    return (f"{stats['running']} requests run and {stats['waiting']} wait, and its last sign of "
            f"life was {pulse.idle_s:.1f} s ago; it is busy with {pulse.doing}")  # fmt: skip


def routes(services: Services) -> list[BaseRoute]:
    """Return the two routes."""
    readiness = Readiness(services.models)

    async def live(request: Request) -> Response:
        told: dict[str, Any] = {"status": "live"}
        states = services.models.snapshot()["models"]
        return JSONResponse(told | {"open": sum(each["state"] == "open" for each in states)})

    async def ready(request: Request) -> Response:
        return (await readiness.verdict()).response()

    return [Route("/health/live", live), Route("/health/ready", ready)]
