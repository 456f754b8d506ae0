"""One step that a remote model writes: what it is asked, and what came back so far."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeroute.remote_health import Health
from edgeroute.remote_stream import AnswerStream, Finish
from edgeroute.runtime.errors import UsageError

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePrompt:
    """What a remote model continues: a plain text, or a conversation, and the answer so far.

    Attributes:
        prompt: plain text; the answer is put behind it (`/completions`).
        messages: of the conversation; a non-empty answer becomes the last message, an
            assistant's, which the server is asked to go on with (`/chat/completions`).
        answer: what was written so far, whole characters only.
    """

    prompt: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    answer: str = ""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise UsageError("a remote prompt is either a plain text or messages; give one of them")

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return self.messages is not None

    def body(self) -> dict[str, object]:
        """Return the fields of the request that hold the text."""
        if self.messages is None:
            return {"prompt": f"{self.prompt}{self.answer}"}
        messages = [dict(message) for message in self.messages]
        if not self.answer:
            return {"messages": messages}
        return {
            "messages": [*messages, {"role": "assistant", "content": self.answer}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }


class RemoteStep:
    """A step that a remote model is writing. One thread polls it, another feeds it.

    Attributes:
        finish: why the server ended the answer; None if the step failed or was stopped.
        failure: what went wrong, a sentence; None if nothing did.
    """

    def __init__(self, wake: Callable[[], None], cancel: Callable[["RemoteStep"], None]) -> None:
        self.finish: Finish | None = None
        self.failure: str | None = None
        self.task: asyncio.Task[None] | None = None  # belongs to the event loop's thread
        self._wake = wake
        self._cancel = cancel
        self._lock = threading.Lock()
        self._text = bytearray()
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether it ended: finished, failed or stopped.

        Read it before `poll`: what is polled after it was true is the last text.
        """
        with self._lock:
            return self._ended

    def poll(self) -> bytes:
        """Return the text that arrived since the last poll: UTF-8, whole characters."""
        with self._lock:
            text = bytes(self._text)
            self._text.clear()
            return text

    def stop(self) -> None:
        """Ask for no more: text not polled is dropped, the connection closed, the work ended."""
        with self._lock:
            self._text.clear()
            if self._ended:
                return
            self._ended = True
        self._cancel(self)

    def feed(self, text: bytes) -> None:
        """Hand text to the polling thread."""
        with self._lock:
            if self._ended:
                return
            self._text += text
        self._wake()

    def end(self, *, finish: Finish | None = None, failure: str | None = None) -> None:
        """Say that the writing ended; only the first time counts."""
        with self._lock:
            if self._ended:
                return
            self.finish, self.failure, self._ended = finish, failure, True
        self._wake()


@dataclass(slots=True, kw_only=True)
class Call:
    """A step's request while it runs, in the event loop's thread. Times are monotonic seconds."""

    step: RemoteStep
    health: Health
    epoch: int
    path: str
    body: dict[str, object]
    stream: AnswerStream
    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0
    is_over: bool = False

    def deliver(self) -> None:
        """Hand over what text the stream holds."""
        if text := self.stream.take():
            self.last_s = time.monotonic()
            if self.first_s is None:
                self.first_s = self.last_s
            self.step.feed(text)

    def finish(self) -> None:
        """The server ended the answer."""
        self.is_over = True
        self._went_well()
        self.step.end(finish=self.stream.finish)

    def fail(self, failure: str) -> None:
        """The call failed, unless the answer was whole before."""
        if not self.is_over:
            self.is_over = True
            self.health.failed(self.epoch, failure)
            self.step.end(failure=failure)

    def stop(self) -> None:
        """Nobody wants more; what came says that the server is well."""
        if not self.is_over:
            self.is_over = True
            if self.first_s is None:
                self.health.released(self.epoch)
            else:
                self._went_well()

    def _went_well(self) -> None:
        self.health.succeeded(self.epoch)
        if self.first_s is not None:
            n_gaps = self.stream.n_texts - 1
            token_s = (self.last_s - self.first_s) / n_gaps if n_gaps > 0 else None
            self.health.measured(self.first_s - self.began_s, token_s)
