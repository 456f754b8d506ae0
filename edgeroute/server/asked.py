"""What chat and completions have in common: a question that becomes answers in a shape."""

import hashlib
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from edgeroute import __version__
from edgeroute.engine import Runtime
from edgeroute.server.naming import Adapter, Named
from edgeroute.server.records import Endpoint
from edgeroute.stats import Chunk, Generation

Fields = dict[str, Any]


class Choice(Protocol):
    """One answer on its way into an endpoint's shape.

    Fields are those of a stream's `choices[i]`, without index and finish_reason.
    """

    def begin(self) -> Iterable[Fields]:
        """Return what a stream begins with."""

    def take(self, chunk: Chunk) -> Iterable[Fields]:
        """Take a piece in; return what a stream shows of it."""

    def plain(self, text: str) -> Fields | None:
        """Return what a stream shows of a piece of text; None where pieces must be taken in."""

    def end(self) -> Iterable[Fields]:
        """Take the answer's end; return what was held back, and the last piece's fields last."""

    @property
    def n_calls(self) -> int:
        """Calls to tools that the answer has."""

    def whole(self) -> Fields:
        """Return what an answer that is not streamed shows, once it has ended."""


class Begun(NamedTuple):
    """A choice, and how to generate it."""

    options: dict[str, Any]
    choice: Choice
    prompt: int
    """Number of its prompt."""


class Question(Protocol):
    """A checked request."""

    @property
    def prompt_field(self) -> str:
        """Name of the field with the prompt, for errors."""

    def begin(self, runtime: Runtime) -> Sequence[Begun]:
        """Prepare all choices, prompt by prompt; may take long, so that it is called in a thread.

        Raises:
            ApiError: 400, with the field at fault.
            EdgerouteError: see `Runtime.generate`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Names by which an endpoint's answers are told.

    Attributes:
        endpoint: as jobs name it.
        prefix: of ids.
        whole: `object` of an answer.
        chunk: `object` of a piece.
    """

    endpoint: Endpoint
    prefix: str
    whole: str
    chunk: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request to chat or completions.

    Attributes:
        named: the model, and what its name says of adapters.
        adapter: to be used, wherever it was named.
        stream: whether pieces are sent as they come.
        with_usage: whether a stream ends with the usage.
        with_stats: whether statistics are told.
        timeout_s: from the request to the answer's end.
    """

    shape: Shape
    question: Question
    named: Named
    adapter: Adapter | None
    stream: bool
    with_usage: bool
    with_stats: bool
    timeout_s: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, runtime: Runtime) -> Fields:
        """Return what an answer and each of its pieces begin with."""
        return {
            "id": f"{self.shape.prefix}-{self.id}",
            "object": self.shape.chunk if self.stream else self.shape.whole,
            "created": self.created,
            "model": self.named.label,
            "system_fingerprint": fingerprint(runtime),
        }


def fingerprint(runtime: Runtime) -> str:
    """Name version, model file and settings: where it is the same, so are answers to one seed."""
    told = f"{__version__}|{runtime.path.name}|{runtime.params}"
    return "fp_" + hashlib.sha256(told.encode(errors="replace")).hexdigest()[:10]


def usage(begun: Sequence[Begun], found: Sequence[Generation]) -> Fields:
    """Count tokens: of each prompt once, of all its choices together.

    Args:
        begun: the choices.
        found: their answers, in the same order.
    """
    n_prompt = n_cached = 0
    for i, (each, answer) in enumerate(zip(begun, found, strict=True)):
        if i == 0 or each.prompt != begun[i - 1].prompt:
            n_prompt += answer.stats.n_prompt
            n_cached += answer.stats.n_cached
    n_completion = sum(answer.stats.n_generated for answer in found)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def facts(answer: Generation, *, with_stats: bool) -> Fields:
    """Return what only edgeroute tells of an answer; `id` is what feedback is given for."""
    found: Fields = {
        "id": answer.id,
        "adapter": answer.adapter,
        "seed": answer.seed,
        "finish_reason": answer.finish_reason,
    }
    return found | {"stats": answer.stats.to_dict()} if with_stats else found


def finish_reason(answer: Generation, n_calls: int) -> str:
    """Translate why an answer ended.

    One that its time limit cut is told as `length`, the only word OpenAI has for an answer that
    a limit cut; `edgeroute.finish_reason` says `timeout`.
    """
    if answer.finish_reason == "stop":
        return "tool_calls" if n_calls else "stop"
    return "length"
