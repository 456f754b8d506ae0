"""The public face: a Runtime answers prompts, from any thread, sync or async.

One thread owns ggml. Calls queue to it and decode together in one batch.
"""

import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from edgeroute.asking import Asking
from edgeroute.config import RunParams, merge_settings
from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.models.pull import pull, resolve
from edgeroute.opening import Opening
from edgeroute.options import Message, Options, Score, Settings
from edgeroute.request import Outcome, Request
from edgeroute.runtime import machine
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CatalogueError, ClosedError, EdgerouteError
from edgeroute.runtime.threads import ThreadPolicy
from edgeroute.stats import Chunk, Generation
from edgeroute.stream import Stream

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.scheduler import Scheduler

Command = Callable[[], None]
"""What the engine thread does for another between two tokens; it raises nothing."""
STALL_POLL_S = 0.02
"""How often cancels and deadlines are looked for while only adapters are waited for."""


class Runtime(Closing):
    """A model in memory that answers; use it as a context manager or call `close`.

    Thread-safe: any number of threads and event loops may call it at once.

    Args:
        model: catalogue name, `hf:owner/repo/file.gguf`, or path to a .gguf file. A
            catalogue's default model is pulled on first use; others must be pulled before.

    Raises:
        EdgerouteError: see LoadedModel, and UsageError for a setting out of range.
    """

    def __init__(self, model: str | Path | None = None, **settings: Unpack[Settings]) -> None:
        self.params: RunParams = merge_settings(settings)
        self.path = _find(model)
        self._inbox: queue.SimpleQueue[Request | Command | None] = queue.SimpleQueue()
        self._closing = False
        self._failure: BaseException | None = None
        self._gate = threading.Lock()  # orders "is it open?" against "now it is closed"
        ready: Future[tuple[LoadedModel, Scheduler]] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(ready,), name="edgeroute-engine", daemon=True
        )
        self._thread.start()
        self._loaded, self._scheduler = ready.result()
        self._asking = Asking(self._loaded, self.params)

    def feedback(self, generation_id: str, reward: float) -> None:
        """Tell what an answer was worth: 0 useless, 1 perfect.

        `adapter="auto"` learns from it, and so does `steps="accuracy:..."`.

        Raises:
            UsageError: no such answer, its feedback was given before, or another reward.
        """
        routing, adapters = self._scheduler.steps, self._loaded.adapters

        def learn() -> None:
            taken = routing is not None and routing.choice.feedback(generation_id, reward)
            if not taken or (adapters is not None and adapters.routing.awaits(generation_id)):
                self._asking.adapters().routing.feedback(generation_id, reward)

        self._on_engine(learn)

    def add_adapter(self, path: str | Path) -> str:
        """Check an adapter and put it into the library, also while requests run.

        One of the same name is replaced; requests that use it end with it.

        Returns:
            Its name.

        Raises:
            AdapterFileError: it does not fit this model, or is damaged.
            CapacityError: it does not fit the slots or the budget.
        """
        adapters = self._asking.adapters()
        file = adapters.open(path)
        self._on_engine(lambda: adapters.add(file))
        return file.name

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out of the library; requests that use it end with it.

        Raises:
            UsageError: there is none of that name.
        """
        adapters = self._asking.adapters()
        self._on_engine(lambda: adapters.remove(name))

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that requests may ask for, sorted."""
        return [] if self._loaded.adapters is None else self._loaded.adapters.store.names

    # one answer

    def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Generation:
        """Answer a prompt, or chat messages, and return the whole answer.

        Ctrl-C cancels the answer and leaves the runtime usable.

        Raises:
            UsageError: an option is unknown or out of range, or the prompt does not fit.
            GrammarError, TemplateError: a constraint or the chat template cannot be used.
            ClosedError: the runtime was closed.
        """
        with self._listen(prompt, options, streaming=False) as stream:
            for chunk in stream:
                if chunk.generation is not None:
                    return self._scored(chunk.generation, options.get("score"))
        raise ClosedError("the engine ended without an answer")

    def _scored(self, generation: Generation, score: Score | None) -> Generation:
        if score is not None:
            self.feedback(generation.id, score(generation))
        return generation

    def stream(self, prompt: str | None = None, **options: Unpack[Options]) -> Stream:
        """Answer piece by piece; `cancel` or `close` on the iterator ends it early.

        Errors in the arguments are raised here, not at the first piece.
        """
        return self._listen(prompt, options, streaming=True)

    async def agenerate(self, prompt: str | None = None, **options: Unpack[Options]) -> Generation:
        """Answer without blocking the event loop; cancelling the task cancels the answer."""
        import asyncio  # 25 ms that synchronous callers need not pay

        async for chunk in self._alisten(prompt, options, streaming=False):
            if chunk.generation is not None:
                score, found = options.get("score"), chunk.generation
                return await asyncio.to_thread(self._scored, found, score) if score else found
        raise ClosedError("the engine ended without an answer")

    def astream(
        self, prompt: str | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Chunk]:
        """Answer piece by piece on the event loop; closing the iterator cancels the rest."""
        return self._alisten(prompt, options, streaming=True)

    def stats(self) -> dict[str, object]:
        """Return what the runtime holds and has done, as plain JSON types."""
        loaded, scheduler = self._loaded, self._scheduler
        steps = scheduler.n_decode_steps
        plan = loaded.depth or loaded.no_depth
        depth = {} if plan is None else {"depth": plan.stats()}
        experts = {} if loaded.experts is None else {"experts": loaded.experts.stats()}
        layers = {} if loaded.layers is None else {"layers": loaded.layers.stats()}
        adapters = {} if loaded.adapters is None else {"adapters": loaded.adapters.stats()}
        routing = {} if scheduler.steps is None else {"steps": scheduler.steps.stats()}
        drafts: dict[str, object] = {
            "on": False, "why": loaded.why_no_drafts(self.params.speculate)
        } if scheduler.speculation is None else scheduler.speculation.stats()  # fmt: skip
        return (
            {
                "model": str(self.path),
                "arch": loaded.model.hparams.arch,
                "load_s": round(loaded.load_s, 6),
                "memory": {entry.owner: entry.n_bytes for entry in loaded.ledger.entries()},
                "memory_bytes": loaded.ledger.used_bytes,
                "budget_bytes": loaded.ledger.budget_bytes,
                "kv_cells": loaded.kv.n_cells,
                "kv_free_cells": loaded.kv.n_free_cells,
                "kv_kept_cells": scheduler.prefix.n_kept_cells,
                "reused_cells": scheduler.prefix.n_reused_cells,
                "running": scheduler.n_running,
                "waiting": scheduler.n_waiting + self._inbox.qsize(),
                "finished": scheduler.n_finished,
                "decode_steps": steps,
                "mean_batch": round(scheduler.n_decode_tokens / steps, 3) if steps else 0.0,
                "graphs_built": loaded.forward.graphs.n_built,
                "threads": scheduler.threads.n_threads,
                "threads_max": scheduler.threads.n_max,
                "thread_changes": scheduler.threads.n_changes,
            }
            | experts
            | layers
            | adapters
            | {"speculation": drafts}
            | depth
            | routing
        )

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids as `generate` does with a prompt."""
        return self._loaded.encode(text)

    def close(self) -> None:
        """End running requests with ClosedError and free everything; safe to call twice."""
        with self._gate:
            self._closing = True
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # requests

    def check_adapter(
        self, asked: str | Mapping[str, float] | None
    ) -> Mapping[str, float] | str | None:
        """Check what `generate` would take as `adapter`, and return it as factors by name.

        Raises:
            UsageError: there is no such adapter, or a factor is out of range.
        """
        return self._asking.adapter(asked)

    def _on_engine(self, action: Command) -> None:
        """Have the engine thread do something between two tokens; raise what that raises."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except BaseException as error:  # the caller's, not the engine's
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._gate:
            self._check_open()
            self._inbox.put(run)
        done.result()

    def _submit(self, request: Request) -> None:
        with self._gate:
            try:
                self._check_open()
            except ClosedError:
                request.sampler.close()
                raise
            self._inbox.put(request)
            guard = self._scheduler.depth_guard
            if guard is not None and guard.checking:
                self._loaded.device.stop_flag.set()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine stopped: {self._failure}") from self._failure
        if self._closing:
            raise ClosedError("this Runtime was closed; make a new one")

    def _listen(self, prompt: str | None, options: Options, *, streaming: bool) -> Stream:
        inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._check_open()
        request = self._asking.request(prompt, options, inbox.put, streaming=streaming)
        self._submit(request)
        return Stream(request, inbox)

    async def _alisten(
        self, prompt: str | None, options: Options, *, streaming: bool
    ) -> AsyncIterator[Chunk]:
        import asyncio  # 25 ms that synchronous callers need not pay

        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Outcome] = asyncio.Queue()

        def emit(outcome: Outcome) -> None:
            # A loop that closed meanwhile has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, outcome)

        self._check_open()
        ask = self._asking.request
        request = await asyncio.to_thread(ask, prompt, options, emit, streaming=streaming)
        self._submit(request)
        try:
            while True:
                outcome = await inbox.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                if outcome.finish_reason is not None:
                    return
        finally:
            request.cancel()

    # the engine thread

    def _serve(self, ready: "Future[tuple[LoadedModel, Scheduler]]") -> None:
        """Load, loop until closed, free: the whole life of the engine thread."""
        meter = machine.LoadMeter()  # its first reading covers the time of loading
        try:
            opening = Opening(self.path)
            # Imported now, not at the top: the vocabulary is being read meanwhile.
            from edgeroute.loaded import LoadedModel

            loaded = LoadedModel(self.path, self.params, opening, lambda: self._inbox.put(None))
        except BaseException as error:
            ready.set_exception(error)
            return
        with contextlib.closing(loaded):
            try:
                scheduler = self._make_scheduler(loaded, meter)
            except BaseException as error:
                ready.set_exception(error)
                return
            ready.set_result((loaded, scheduler))
            self._loop(scheduler)
            if scheduler.steps is not None:
                scheduler.steps.close()

    def _make_scheduler(self, loaded: "LoadedModel", meter: machine.LoadMeter) -> "Scheduler":
        from edgeroute.scheduler import Scheduler

        params = self.params
        n_max = params.threads or machine.usable_cores()
        fixed = params.threads is not None
        policy = ThreadPolicy(n_max, meter, time.monotonic, fixed=fixed)
        scheduler = Scheduler(
            loaded.forward, loaded.ledger, policy, n_ctx=params.n_ctx,
            n_ubatch=params.n_ubatch, max_batch=params.max_batch or loaded.max_batch,
            is_eog=loaded.tokenizer.is_eog, experts=loaded.experts, adapters=loaded.adapters,
            layers=loaded.layers,
        )  # fmt: skip
        if loaded.why_no_drafts(params.speculate) is None:
            # Models that do not draft should not wait for its import.
            from edgeroute.speculation import Speculation

            scheduler.speculation = Speculation(loaded, params, scheduler.is_eog)
        if params.steps_on:
            # One model alone should not wait for what two need.
            from edgeroute.step_choice import open_routing

            scheduler.steps = open_routing(scheduler, loaded, params, lambda: self._inbox.put(None))
        if loaded.depth is not None:
            from edgeroute.depth import Depth
            from edgeroute.depth_guard import DepthGuard

            scheduler.depth = loaded.depth
            if isinstance(loaded.depth, Depth):
                scheduler.depth_guard = DepthGuard(
                    loaded.depth, loaded.forward, scheduler.prefix, params.n_ubatch
                )
        return scheduler

    def _loop(self, scheduler: "Scheduler") -> None:
        error: BaseException = ClosedError("this Runtime was closed while the request ran")
        try:
            while not self._closing:
                if not scheduler.busy and self._inbox.empty():
                    scheduler.use_the_pause()
                if scheduler.stalled and scheduler.busy:
                    self._receive(scheduler, wait_s=STALL_POLL_S)
                else:
                    self._receive(scheduler, wait_s=0.0 if scheduler.busy else None)
                scheduler.step()
        except BaseException as failure:  # a bug: everyone waiting must hear of it
            with self._gate:
                self._failure = failure
            error = ClosedError(f"the engine stopped: {failure!r}")
            error.__cause__ = failure
        while not self._inbox.empty():
            self._receive(scheduler, wait_s=0.0)
        scheduler.fail_all(error)

    def _receive(self, scheduler: "Scheduler", *, wait_s: float | None) -> None:
        """Take what has arrived; sleep up to `wait_s` until something does, None for ever."""
        while wait_s != 0.0 or not self._inbox.empty():
            with contextlib.suppress(queue.Empty):
                arrived = self._inbox.get(timeout=wait_s)
                if isinstance(arrived, Request):
                    scheduler.submit(arrived)
                elif arrived is not None:
                    arrived()
            wait_s = 0.0


def generate(
    prompt: str | None = None, *, model: str | Path | None = None, **options: Unpack[Options]
) -> Generation:
    """Answer one prompt with a model that is loaded for it and closed after.

    For more than one answer, keep a Runtime.
    """
    with Runtime(model) as runtime:
        return runtime.generate(prompt, **options)


def _find(model: str | Path | None) -> Path:
    """Find a model's file; the default model is pulled when it is not there yet."""
    spec = DEFAULT_MODEL if model is None else str(model)
    try:
        return resolve(spec)
    except CatalogueError:
        if spec != DEFAULT_MODEL:
            raise
    return pull(spec).path


__all__ = ["EdgerouteError", "Message", "Options", "Runtime", "Settings", "generate"]
