"""A large model behind an OpenAI-compatible endpoint, for the steps the small one should not write.

The engine's thread starts steps and polls them; it never waits here. One thread of this
module's own runs all requests in an event loop.
"""

import math
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from edgeroute.remote_address import parse_remote
from edgeroute.remote_health import Health
from edgeroute.remote_step import Call, RemotePrompt, RemoteStep
from edgeroute.remote_stream import AnswerStream
from edgeroute.runtime.errors import UsageError

if TYPE_CHECKING:
    import asyncio

__all__ = ["RemoteModel", "RemotePrompt", "RemoteStep"]

TIMEOUT_S: Final = 20.0
MAX_TIMEOUT_S: Final = 3600.0
CLOSE_S: Final = 5.0
"""For the thread's end; nothing in it waits, so this is seen only on a starved machine."""


class RemoteModel:
    """A model that another machine runs.

    Lifetime: `close` ends its thread, its connections and the steps that still run.
    """

    def __init__(
        self,
        remote: str,
        wake: Callable[[], None],
        *,
        timeout_s: float = TIMEOUT_S,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Check the settings; no connection is opened before the first step.

        Args:
            remote: `http://host:port/v1#model`; without a model, the first that it lists.
            wake: called from another thread whenever a step has text or ended; must return
                at once and raise nothing.
            timeout_s: wait for a first text, and between two. A connection must stand within
                CONNECT_S or half of it; a step as a whole may take N_TIMEOUTS times as long.
            env: where EDGEROUTE_REMOTE_KEY is looked for; None is this process's environment.

        Raises:
            UsageError: an address, key or time that cannot be used.
        """
        # 50 ms that those without a remote model need not pay.
        import asyncio

        from edgeroute.remote_http import Endpoint

        number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
        if not number or not math.isfinite(timeout_s) or not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise UsageError(
                f"the remote timeout must be above 0 and at most {MAX_TIMEOUT_S:g} s, "
                f"got {timeout_s!r:.80}"
            )
        self._address = parse_remote(remote)
        self._endpoint = Endpoint(self._address, float(timeout_s), env)
        self._wake = wake
        self._health = Health()
        self._lock = threading.Lock()
        self._closed = False
        self._closing = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """The model's name there; its host until that is known."""
        return self._endpoint.name

    @property
    def available(self) -> bool:
        """Whether a step may be asked for now: not while a failure is fresh, nor once closed."""
        return not self._closed and self._health.available

    @property
    def n_calls(self) -> int:
        """Steps asked for."""
        return self._health.n_calls

    @property
    def n_failures(self) -> int:
        """Those that failed."""
        return self._health.n_failures

    @property
    def first_s(self) -> float | None:
        """Mean seconds to a step's first text; None until measured."""
        return self._health.first_s

    @property
    def token_s(self) -> float | None:
        """Mean seconds from one token to the next; None until measured."""
        return self._health.token_s

    def stats(self) -> dict[str, object]:
        """Return what happened so far, without secrets."""
        return {
            "host": self._address.host,
            "model": self.name,
            "available": self.available,
            "n_calls": self.n_calls,
            "n_failures": self.n_failures,
            "first_s": self.first_s,
            "token_s": self.token_s,
            "last_failure": self._health.last_failure,
        }

    def write(
        self,
        text: RemotePrompt,
        *,
        max_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> RemoteStep:
        """Start a step and return at once.

        Where `available` is false, the step has failed already. None leaves a value to the
        server.
        """
        # Of a seed 31 bits: servers refuse what does not fit their integer.
        low = None if seed is None else seed & 0x7FFFFFFF
        chosen = {"temperature": temperature, "top_p": top_p, "seed": low}
        fields = {name: value for name, value in chosen.items() if value is not None}
        step = RemoteStep(self._wake, self._stop)
        with self._lock:
            epoch = None if self._closed else self._health.begin()
            if epoch is not None:
                call = Call(
                    step=step,
                    health=self._health,
                    epoch=epoch,
                    path="/chat/completions" if text.chat else "/completions",
                    body={**text.body(), "max_tokens": max_tokens, "stream": True, **fields},
                    stream=AnswerStream(chat=text.chat, max_tokens=max_tokens),
                )
                self._running().call_soon_threadsafe(self._spawn, call)
                return step
        why = "is closed" if self._closed else self._health.why_not()
        step.end(failure=self._endpoint.said(why))
        return step

    def close(self) -> None:
        """End the steps that run, which then have failed, and the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._closing.set)
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _running(self) -> "asyncio.AbstractEventLoop":
        """The event loop, whose thread the first step starts. The lock is held."""
        import asyncio

        from edgeroute.remote_http import Lookups

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.set_default_executor(Lookups())
            self._thread = threading.Thread(
                target=self._run, args=(self._loop,), name="edgeroute-remote", daemon=True
            )
            self._thread.start()
        return self._loop

    def _run(self, loop: "asyncio.AbstractEventLoop") -> None:
        try:
            loop.run_until_complete(self._until_closed())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    async def _until_closed(self) -> None:
        import asyncio

        await self._closing.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._endpoint.close()

    def _spawn(self, call: Call) -> None:
        import asyncio

        def ended(task: asyncio.Task[None]) -> None:
            # Not in the coroutine: a task cancelled before it ran never enters it.
            self._tasks.discard(task)
            call.stop()
            call.step.end(failure=self._endpoint.said("was closed in mid-answer"))

        task = asyncio.get_running_loop().create_task(self._endpoint.write(call))
        call.step.task = task
        self._tasks.add(task)
        task.add_done_callback(ended)

    def _stop(self, step: RemoteStep) -> None:
        def cancel() -> None:
            if step.task is not None:
                step.task.cancel()

        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(cancel)
