"""The public face: a Runtime answers prompts, from any thread, sync or async.

One thread owns ggml. Calls queue to it and decode together in one batch.
"""

import queue
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from edgeroute.asking import Asking
from edgeroute.config import RunParams, merge_settings
from edgeroute.engine_stats import runtime_stats
from edgeroute.engine_thread import EngineThread
from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.models.pull import pull, resolve
from edgeroute.options import Message, Options, Score, Settings
from edgeroute.pulse import Pulse
from edgeroute.request import Outcome, Request
from edgeroute.residency import residency
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CatalogueError, ClosedError, EdgerouteError, UsageError
from edgeroute.stats import Chunk, Generation
from edgeroute.stream import Ask, Chunks, Stream, Tap, hear

if TYPE_CHECKING:
    from edgeroute.embedding import Embeddings, EmbedRequest
    from edgeroute.loaded import LoadedModel
    from edgeroute.runtime.tokenizer import Tokenizer
    from edgeroute.scheduler import Scheduler
    from edgeroute.session_folder import SavedSession
    from edgeroute.sessions import Sessions


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
        self._engine = EngineThread(self.path, self.params)
        self._asking = Asking(lambda: self._loaded)

    @property
    def _loaded(self) -> "LoadedModel":
        """What answers now: another one after a device was lost."""
        return self._engine.parts.loaded

    @property
    def _scheduler(self) -> "Scheduler":
        return self._engine.parts.scheduler

    def feedback(self, generation_id: str, reward: float) -> None:
        """Tell what an answer was worth: 0 useless, 1 perfect.

        `adapter="auto"` learns from it, and so does `steps="accuracy:..."`.

        Raises:
            UsageError: no such answer, its feedback was given before, or another reward.
        """

        def learn() -> None:
            routing, adapters = self._scheduler.steps, self._loaded.adapters
            taken = routing is not None and routing.choice.feedback(generation_id, reward)
            if not taken or (adapters is not None and adapters.routing.awaits(generation_id)):
                self._asking.adapters().routing.feedback(generation_id, reward)

        self._engine.order(learn)

    def mark_trace(self, label: str) -> None:
        """Enter into the trace's file that what follows is a new sequence, of a domain `label`.

        Raises:
            UsageError: no trace is recorded, or the label is too long.
        """
        if self._loaded.experts is None:
            raise UsageError("no trace is recorded: nothing is paged; open the Runtime with "
                             "trace=FILE and a memory budget below a model with experts"
                             )  # fmt: skip

        def mark() -> None:
            store = self._loaded.experts
            if store is not None:  # not opened again meanwhile, with all experts in memory
                store.mark(label)

        self._engine.order(mark)

    def add_adapter(self, path: str | Path) -> str:
        """Check an adapter and put it into the library, also while requests run.

        One of the same name is replaced; requests that use it end with it.

        Returns:
            Its name.

        Raises:
            AdapterFileError: it does not fit this model, or is damaged.
            CapacityError: it does not fit the slots or the budget.
        """
        file = self._asking.adapters().open(path)
        self._engine.order(lambda: self._asking.adapters().add(file))
        return file.name

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out of the library; requests that use it end with it.

        Raises:
            UsageError: there is none of that name.
        """
        self._asking.adapters()
        self._engine.order(lambda: self._asking.adapters().remove(name))

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that requests may ask for, sorted."""
        return [] if self._loaded.adapters is None else self._loaded.adapters.store.names

    def sessions(self) -> "list[SavedSession]":
        """List the saved sessions of this model, newest first.

        Raises:
            UsageError: this Runtime keeps no sessions.
        """
        return self._sessions.all_saved()

    def remove_session(self, name: str) -> int:
        """Delete a saved session of this model; return how many files it had.

        Raises:
            UsageError: this Runtime keeps no sessions.
        """
        return self._sessions.remove(name)

    @property
    def _sessions(self) -> "Sessions":
        found = self._scheduler.sessions
        if found is None:
            raise UsageError("this Runtime keeps no sessions; open it with sessions=FOLDER")
        return found

    # one answer

    def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Generation:
        """Answer a prompt, or chat messages, and return the whole answer.

        Ctrl-C cancels the answer and leaves the runtime usable.

        Raises:
            UsageError: an option is unknown or out of range, or the prompt does not fit.
            GrammarError, TemplateError: a constraint or the chat template cannot be used.
            DeviceLostError: a device is gone, and the model cannot be opened without it.
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

        async for chunk in hear(self._ask(prompt, options, streaming=False), self._engine):
            if chunk.generation is not None:
                score, found = options.get("score"), chunk.generation
                return await asyncio.to_thread(self._scored, found, score) if score else found
        raise ClosedError("the engine ended without an answer")

    def astream(
        self, prompt: str | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Chunk]:
        """Answer piece by piece on the event loop; closing the iterator cancels the rest."""
        return self.astream_past(None, prompt, **options)

    def astream_past(
        self, tap: Tap | None, prompt: str | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Chunk]:
        """Do the same, but let `tap` have pieces first, in the engine's thread: see `Tap`.

        For servers, where to wake an event loop for every token would cost more than the token's
        way to its reader.
        """
        return hear(self._ask(prompt, options, streaming=True), self._engine, tap)

    # vectors

    def embed(
        self, inputs: Sequence[str | Sequence[int]], *,
        adapter: str | Mapping[str, float] | None = None, timeout_s: float | None = None,
    ) -> "Embeddings":  # fmt: skip
        """Turn texts, or token ids, into vectors of length 1: means of final hidden states.

        It is computed a ubatch at a time, between the tokens of running answers, and takes
        turns with other requests between two texts.

        Raises:
            UsageError: no input, an empty one, too many, or an adapter that cannot serve.
            ContextError: an input has more tokens than `n_ctx`.
            CapacityError: the budget has no room for hidden states.
            DeadlineError: not all was ready within `timeout_s` seconds.
            ClosedError: the runtime was closed.
        """
        inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._engine.check_open()
        ask = self._asking.embedding
        request = ask(inputs, inbox.put, adapter=adapter, timeout_s=timeout_s)
        self._engine.submit(request)
        try:
            for _ in Chunks(inbox):
                pass
        finally:
            request.cancel()
        return request.embeddings()

    async def aembed(
        self, inputs: Sequence[str | Sequence[int]], *,
        adapter: str | Mapping[str, float] | None = None, timeout_s: float | None = None,
    ) -> "Embeddings":  # fmt: skip
        """Embed without blocking the event loop; cancelling the task cancels the work."""
        made: list[EmbedRequest] = []

        def ask(emit: Callable[[Outcome], None]) -> Request:
            request = self._asking.embedding(inputs, emit, adapter=adapter, timeout_s=timeout_s)
            made.append(request)
            return request

        async for _ in hear(ask, self._engine):
            pass
        return made[0].embeddings()

    # what others may look at, and do, from any thread

    def stats(self) -> dict[str, object]:
        """Return what the runtime holds and has done, as plain JSON types."""
        parts, engine = self._engine.parts, self._engine
        found = runtime_stats(parts.loaded, parts.scheduler, n_queued=engine.n_queued)
        return engine.losses.add_to(found)

    def residency(self) -> dict[str, object] | None:
        """Return which experts, layers and adapters are in memory; None where all always are.

        Plain JSON types: `experts` with a bitmap per layer, `layers`, `adapters`; those that
        come and go.
        """
        return residency(self._loaded)

    def pulse(self) -> Pulse:
        """Tell whether the engine thread works, and since when nothing has come of it."""
        return self._engine.pulse()

    def interrupt(self) -> None:
        """Stop what the device computes now, and end no request.

        A batch of a prompt is computed again; a token, which is over soon, is not stopped.
        """
        self._engine.interrupt()

    def abandon(self, error: BaseException) -> int:
        """Give up an engine thread that hangs: end all requests with `error`, once each.

        Later calls raise ClosedError. Should the thread come back, it says nothing more to those
        requests, and frees everything.

        Returns:
            Requests and commands that were ended.
        """
        return self._engine.abandon(error)

    @property
    def stuck_bytes(self) -> int:
        """Bytes that an abandoned engine thread still holds; 0 once it has freed them."""
        return self._engine.stuck_bytes

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's vocabulary, safe to use from any thread.

        Lifetime: until the Runtime is closed; later calls raise ClosedError.
        """
        return self._loaded.tokenizer

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids as `generate` does with a prompt."""
        return self._loaded.encode(text)

    def close(self) -> None:
        """End running requests with ClosedError and free everything; safe to call twice.

        After `abandon` it waits two seconds at most: `stuck_bytes` then says what stays behind.
        """
        self._engine.close()

    # requests

    def check_adapter(
        self, asked: str | Mapping[str, float] | None
    ) -> Mapping[str, float] | str | None:
        """Check what `generate` would take as `adapter`, and return it as factors by name.

        Raises:
            UsageError: there is no such adapter, or a factor is out of range.
        """
        return self._asking.adapter(asked)

    def _listen(self, prompt: str | None, options: Options, *, streaming: bool) -> Stream:
        inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._engine.check_open()
        request = self._asking.request(prompt, options, inbox.put, streaming=streaming)
        self._engine.submit(request)
        return Stream(request, inbox)

    def _ask(self, prompt: str | None, options: Options, *, streaming: bool) -> Ask:
        return lambda emit: self._asking.request(prompt, options, emit, streaming=streaming)


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
