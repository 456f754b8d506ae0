"""What a caller asks of a Runtime: checked, encoded, and made a Request, in the caller's thread."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeroute.config import RunParams, check_steps
from edgeroute.options import KNOWN, MAX_TOOLS, SAMPLING, Message, Options
from edgeroute.request import NO_SOURCE, Outcome, Request, Source
from edgeroute.runtime.errors import ContextError, UsageError
from edgeroute.runtime.records import SamplingParams
from edgeroute.runtime.sampler import Sampler
from edgeroute.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.embedding import EmbedRequest
    from edgeroute.loaded import LoadedModel
    from edgeroute.runtime.tokenizer import Tokenizer


class Asking:
    """Turns arguments into requests for a Runtime's model. Thread-safe: it changes nothing."""

    def __init__(self, model: "Callable[[], LoadedModel]") -> None:
        """Begin; `model` gives what answers now, which may have been opened again."""
        self._model = model

    @property
    def _loaded(self) -> "LoadedModel":
        return self._model()

    @property
    def _params(self) -> RunParams:
        return self._loaded.params

    def request(
        self, prompt: str | None, options: Options, emit: Callable[[Outcome], None], *,
        streaming: bool,
    ) -> Request:  # fmt: skip
        """Check a call's arguments and encode its prompt.

        Raises:
            UsageError: an option is unknown or out of range, or the prompt does not fit.
            GrammarError, TemplateError: a constraint or the chat template cannot be used.
        """
        with self._loaded.in_use():
            return self._request(prompt, options, emit, streaming=streaming)

    def _request(
        self, prompt: str | None, options: Options, emit: Callable[[Outcome], None], *,
        streaming: bool,
    ) -> Request:  # fmt: skip
        unknown = options.keys() - KNOWN
        if unknown:
            raise UsageError(f"generate has no option {', '.join(sorted(map(repr, unknown)))}")
        adapter = self.adapter(options.get("adapter"))
        if options.get("score") is not None and (streaming or not isinstance(adapter, str)):
            raise UsageError("score takes whole answers of adapter='auto', not streams or others")
        max_tokens = _count("max_tokens", options.get("max_tokens", 128))
        deadline = _deadline(options.get("timeout_s"))
        prefix = options.get("prefix", "exact")
        if prefix not in ("exact", "all", "off"):
            raise UsageError(f"prefix must be exact, all or off, got {prefix!r}")
        depth_full = self._wants_full(options.get("depth"))
        steps = self._steps(options.get("steps"))
        small_adapter = self._small_adapter(options.get("small_adapter"), steps)
        chosen: dict[str, Any] = {
            name: value for name, value in options.items() if name in SAMPLING and value is not None
        }
        params = SamplingParams(**chosen)
        stop = options.get("stop") or ()
        tokenizer = self._loaded.tokenizer
        piece = tokenizer.pieces(params.shown_tokens)
        text = TextStream(piece, (stop,) if isinstance(stop, str) else stop)
        messages, tools = options.get("messages"), _tools(options)
        ids = self._encode(prompt, messages, options.get("prompt_ids"), tools=tools)
        source = Source(prompt, None if messages is None else tuple(messages), tools)
        other_ids, other_sampler = self._other(steps, source, params, ids)
        return Request(
            source=source, asked_steps=steps, other_prompt_ids=other_ids,
            other_sampler=other_sampler, prompt_ids=ids,
            max_tokens=max_tokens, sampler=Sampler(params, tokenizer, ids),
            text=text, emit=emit, streaming=streaming, prefix=prefix, adapter=adapter,
            small_adapter=small_adapter, speculate=bool(options.get("speculate", True)),
            depth_full=depth_full, deadline=deadline, session=self._session(options.get("session")),
        )  # fmt: skip

    def embedding(
        self, inputs: Sequence[str | Sequence[int]], emit: Callable[[Outcome], None], *,
        adapter: str | Mapping[str, float] | None, timeout_s: float | None,
    ) -> "EmbedRequest":  # fmt: skip
        """Check and encode what `embed` takes.

        Raises:
            UsageError: no text or too many, an empty one, or an adapter that is unknown or auto.
            ContextError: a text has more tokens than the context has room for.
        """
        with self._loaded.in_use():
            return self._embedding(inputs, emit, adapter=adapter, timeout_s=timeout_s)

    def _embedding(
        self, inputs: Sequence[str | Sequence[int]], emit: Callable[[Outcome], None], *,
        adapter: str | Mapping[str, float] | None, timeout_s: float | None,
    ) -> "EmbedRequest":  # fmt: skip
        from edgeroute.embedding import MAX_INPUTS, EmbedRequest

        if isinstance(inputs, str) or not isinstance(inputs, Sequence) or not inputs:
            raise UsageError("embed takes a list of texts, or of lists of token ids; pass [text]")
        if len(inputs) > MAX_INPUTS:
            raise UsageError(f"{len(inputs)} inputs are over the limit of {MAX_INPUTS}; pass fewer")
        chosen = self.adapter(adapter)
        if isinstance(chosen, str):
            raise UsageError(
                f"adapter={chosen!r} would choose another one for every input, and their vectors "
                "could not be compared; name one, or leave it out"
            )
        deadline = _deadline(timeout_s)
        ids = [self._embed_ids(i, each) for i, each in enumerate(inputs)]
        tokenizer = self._loaded.tokenizer
        return EmbedRequest(
            inputs=ids, prompt_ids=ids[0], max_tokens=1, emit=emit, streaming=False,
            sampler=Sampler(SamplingParams(), tokenizer), text=TextStream(tokenizer.piece, ()),
            prefix="off", adapter=chosen, depth_full=True, asked_steps="off", speculate=False,
            deadline=deadline,
        )  # fmt: skip

    def _embed_ids(self, i: int, given: object) -> list[int]:
        try:
            if isinstance(given, str):
                return self._encode(given, None, None)
            if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray):
                return self._encode(None, None, given)
        except UsageError as error:
            raise type(error)(f"input {i}: {error}") from error
        raise UsageError(f"input {i} must be a str or token ids, got {type(given).__name__}")

    def adapter(self, asked: str | Mapping[str, float] | None) -> Mapping[str, float] | str | None:
        """Check what `generate` would take as `adapter`, and return it as factors by name.

        Raises:
            UsageError: there is no such adapter, or a factor is out of range.
        """
        if asked is None:
            return None
        adapters = self.adapters()
        from edgeroute.adapters import parse_adapter

        return parse_adapter(asked, adapters.store.knows)

    def adapters(self) -> "Adapters":
        """Return the library.

        Raises:
            UsageError: there is none.
        """
        found = self._loaded.adapters
        if found is None:
            raise UsageError("this Runtime has no adapters; open it with adapters=FOLDER")
        return found

    def _small_adapter(
        self, asked: str | Mapping[str, float] | None, steps: str
    ) -> Mapping[str, float] | None:
        """Check what `generate` would take as `small_adapter`, and return it as factors by name.

        Raises:
            UsageError: the small model has no such adapter, or writes no steps.
        """
        if asked is None:
            return None
        small = self._loaded.small
        library = None if small is None else small.adapters
        if library is None:
            raise UsageError("this Runtime has no adapters for a small model; open it with small= "
                             "and small_adapters=FOLDER")  # fmt: skip
        if steps == "off":
            raise UsageError("small_adapter is for answers in steps, and this one is written by "
                             "the large model alone; leave it out, or ask for steps")  # fmt: skip
        from edgeroute.adapters import parse_adapter

        there = ", ".join(library.store.names[:8])
        try:
            found = parse_adapter(asked, library.store.knows)
        except UsageError as error:
            raise UsageError(f"small_adapter: {error}; the small model has {there}") from error
        if isinstance(found, str):
            raise UsageError(f"small_adapter={found!r}: the prompt chooses only among the large "
                             f"model's adapters; name one of {there}")  # fmt: skip
        return found

    def _session(self, asked: str | None) -> str | None:
        """Check what `generate` would take as `session`.

        Raises:
            UsageError: it is no name, or this Runtime keeps no sessions.
        """
        if asked is None:
            return None
        from edgeroute.session_folder import check_session_name

        if self._params.sessions is None:
            raise UsageError("this Runtime keeps no sessions; open it with sessions=FOLDER")
        return check_session_name(asked)

    def _wants_full(self, asked: str | None) -> bool:
        """Check what `generate` would take as `depth`.

        Raises:
            UsageError: it is neither `full` nor what this Runtime was opened with.
        """
        if asked in (None, "full"):
            return asked == "full"
        if asked == self._params.depth:
            return False
        raise UsageError(
            f"depth must be full, or the plan that this Runtime was opened with "
            f"({self._params.depth!r}), got {asked!r}; open one with depth={asked!r}"
        )

    def _steps(self, asked: str | None) -> str:
        """Check what `generate` would take as `steps`, and return what is to be done.

        Raises:
            UsageError: it is no policy, or there is no second model to write steps.
        """
        spec = asked or self._params.steps
        if not self._params.steps_on:
            if asked not in (None, "auto", "off"):
                raise UsageError(
                    f"steps={asked!r} needs two models that write; open the Runtime with small= "
                    "or remote=, and neither steps='off' nor speculate='small'"
                )
            return "off"
        # Also the Runtime's own: what vocabularies the pair has was not known before it was loaded.
        check_steps(spec, remote=self._params.remote is not None, same=self._same)
        return spec

    @property
    def _same(self) -> bool:
        """Whether both models of a pair, if there is one, have one vocabulary."""
        small = self._loaded.small
        return small is None or small.tokenizer is self._loaded.tokenizer

    def _other(
        self, steps: str, source: Source, params: SamplingParams, ids: Sequence[int]
    ) -> tuple[list[int], Callable[[int], Sampler] | None]:
        """Return the prompt for the other model of a pair, and what makes its samplers.

        Where vocabularies are the same, those are for drafts, which a grammar looks at only once
        they are checked.

        Raises:
            UsageError: something was asked for in tokens, which two vocabularies do not share.
        """
        small = self._loaded.small
        if steps != "off" and source == NO_SOURCE and (small is None or not self._same):
            raise UsageError(
                "prompt_ids are tokens of one vocabulary, and the models of this pair have two; "
                "pass prompt or messages, or steps='off'"
            )
        if small is None or steps == "off":
            return [], None
        quiet = dataclasses.replace(params, logprobs=None)
        if self._same:
            if params.temperature <= 0:
                return [], None
            free = dataclasses.replace(quiet, grammar=None, json_schema=None)
            return [], _samplers(free, small.tokenizer, ids)
        if params.logprobs is not None or params.logit_bias:
            raise UsageError(
                "logprobs and logit_bias name tokens of one vocabulary, and the models of this "
                "pair have two; leave them out, or pass steps='off'"
            )
        theirs = self._encode(
            source.prompt, source.messages, None, small.tokenizer, tools=source.tools
        )
        return theirs, _samplers(quiet, small.tokenizer, theirs)

    def _encode(
        self, prompt: str | None, messages: Sequence[Message] | None, ids: Sequence[int] | None,
        tokenizer: "Tokenizer | None" = None, *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:  # fmt: skip
        """Turn exactly one of prompt, messages and token ids into a prompt that fits."""
        if sum(each is not None for each in (prompt, messages, ids)) != 1:
            raise UsageError("pass exactly one of prompt, messages and prompt_ids")
        tokenizer, limit = tokenizer or self._loaded.tokenizer, self._params.n_ctx
        if prompt is not None:
            if not isinstance(prompt, str):
                raise UsageError(f"prompt must be a str, got {type(prompt).__name__}")
            found = tokenizer.encode(
                prompt, add_special=True, parse_special=False, max_tokens=limit
            )
        elif messages is not None:
            # Jinja costs 50 ms to import, which plain prompts need not pay.
            from edgeroute.runtime.template import encode_chat

            found = encode_chat(tokenizer, messages, tools=tools, max_tokens=limit)
        else:
            found = list(ids or ())
            n_vocab = tokenizer.n_vocab
            if any(
                isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n_vocab for i in found
            ):
                raise UsageError(f"prompt_ids must be whole numbers from 0 to {n_vocab - 1}")
        if not found:
            raise UsageError("the prompt is empty, and this model adds no token of its own")
        if len(found) > limit:
            raise ContextError(
                f"the prompt has {len(found)} tokens, over n_ctx={limit}; raise n_ctx"
            )
        return found


def _samplers(
    params: SamplingParams, tokenizer: "Tokenizer", ids: Sequence[int]
) -> Callable[[int], Sampler]:
    """Return what makes samplers that draw independently of each other and of the request's."""

    def make(n: int) -> Sampler:
        seed = None if params.seed is None else (params.seed + 1 + n) % (1 << 64)
        return Sampler(dataclasses.replace(params, seed=seed), tokenizer, ids)

    return make


def _tools(options: Options) -> tuple[Mapping[str, object], ...] | None:
    """Check what `generate` takes as `tools`, as far as no template is needed for it."""
    tools = options.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise UsageError(f"tools must be a list of dicts, got {tools!r:.80}")
    if len(tools) > MAX_TOOLS:
        raise UsageError(f"{len(tools)} tools were given, the limit is {MAX_TOOLS}")
    if options.get("messages") is None:
        raise UsageError("tools are told to the model by its chat template; pass messages")
    return tuple(tools) or None


def _deadline(timeout_s: float | None) -> float | None:
    """Return until when an answer may take, in `time.monotonic`."""
    if timeout_s is None:
        return None
    if not 0 < timeout_s < 1e9:
        raise UsageError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
    return time.monotonic() + timeout_s


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise UsageError(f"{name} must be a whole number from 0 on, got {value!r}")
    return value
