"""POST /v1/chat/completions: messages in, one or several messages of the assistant out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from edgeroute.engine import Runtime
from edgeroute.server.asked import Begun, Fields, Shape
from edgeroute.server.bodies import ChatBody, Message, Part
from edgeroute.server.errors import ApiError
from edgeroute.server.logprobs import Spelling, joined
from edgeroute.server.options import (
    chat_max_tokens,
    check_bias,
    common_options,
    extension,
    format_options,
    max_tokens,
    nth_seed,
)
from edgeroute.server.records import ServerParams
from edgeroute.server.tool_calls import (
    CallBegin,
    TextPart,
    ToolPlan,
    ToolReader,
    messages_for,
    plan_tools,
)
from edgeroute.server.tool_calls import Part as AnswerPart
from edgeroute.stats import Chunk

SHAPE: Final = Shape(
    endpoint="chat", prefix="chatcmpl", whole="chat.completion", chunk="chat.completion.chunk"
)
KEPT_KEYS: Final = ("name", "tool_call_id", "reasoning_content")
"""Of a message, what chat templates are given beside role, content and calls."""


class ChatQuestion:
    """A chat request whose fields are checked as far as no model is needed for it.

    Raises:
        ApiError: 400, with the field at fault.
    """

    prompt_field = "messages"

    def __init__(self, body: ChatBody, params: ServerParams) -> None:
        self._body = body
        self._format = format_options(body.response_format)
        if self._format and extension(body).grammar is not None:
            raise ApiError(400, "response_format and edgeroute.grammar exclude each other",
                           param="edgeroute.grammar")  # fmt: skip
        self._options = (
            common_options(body)
            | max_tokens(chat_max_tokens(body), None, params)
            | _logprobs(body)
        )  # fmt: skip
        self._messages = [_message(each, i) for i, each in enumerate(body.messages)]

    def begin(self, runtime: Runtime) -> Sequence[Begun]:
        """Prepare all choices; see Question."""
        tokenizer, body = runtime.tokenizer, self._body
        template = tokenizer.chat_template
        check_bias(runtime, self._options)
        plan = self._plan(template)
        messages = messages_for(template, _known_roles(self._messages, template), plan)
        options = self._options | {"messages": messages}
        options |= self._format if plan is None else plan.options
        if plan is not None or any(_about_tools(each) for each in self._messages):
            options |= _written_here(runtime, self._options)
        spelling = Spelling(tokenizer) if body.logprobs else None
        found = []
        for i in range(body.n or 1):
            reader = None if plan is None else plan.reader()
            found.append(Begun(nth_seed(options, i), ChatChoice(reader, spelling), 0))
        return found

    def _plan(self, template: str | None) -> ToolPlan | None:
        body = self._body
        if not body.tools and body.tool_choice in (None, "none", "auto"):
            return None
        plan = plan_tools(
            body.tools or [], body.tool_choice, parallel=body.parallel_tool_calls is not False,
            chat_template=template, answer_schema=self._format.get("json_schema"),
        )  # fmt: skip
        if plan is not None and "grammar" in self._options:
            raise ApiError(400, "edgeroute.grammar and tools exclude each other: calls have a "
                                "grammar of their own", param="edgeroute.grammar")  # fmt: skip
        return plan


class ChatChoice:
    """A message of the assistant as it is written.

    Args:
        reader: finds calls to tools; None where none may come.
        spelling: spells log-probabilities where they were asked for.
    """

    def __init__(self, reader: ToolReader | None, spelling: Spelling | None) -> None:
        self._reader, self._spelling = reader, spelling
        self._texts: list[str] = []
        self._calls: list[tuple[CallBegin, list[str]]] = []
        self._logprobs: list[Fields | None] = []

    @property
    def n_calls(self) -> int:
        """Calls so far."""
        return len(self._calls)

    def begin(self) -> Iterable[Fields]:
        """Return the role, which comes first."""
        yield _delta({"role": "assistant", "content": "", "refusal": None})

    def take(self, chunk: Chunk) -> Iterable[Fields]:
        """Take a piece in; see Choice."""
        parts: Sequence[AnswerPart] = [TextPart(chunk.text)] if chunk.text else []
        if self._reader is not None:
            parts = self._reader.push(chunk.text)
        found = None if self._spelling is None else self._spelling.chat(chunk.logprobs)
        self._logprobs.append(found)
        deltas = [self._part(part) for part in parts]
        if found is not None and not deltas:
            deltas = [{"content": ""}]  # so that no token's figures are lost with its text
        return [_delta(each, found if i == 0 else None) for i, each in enumerate(deltas)]

    def plain(self, text: str) -> Fields | None:
        """Return what a stream shows of a text without calls or figures; see Choice."""
        if self._reader is not None or self._spelling is not None:
            return None
        return _delta({"content": text})

    def end(self) -> Iterable[Fields]:
        """Take the end in; see Choice."""
        held = [] if self._reader is None else self._reader.finish()
        return [*(_delta(self._part(part)) for part in held), _delta({})]

    def whole(self) -> Fields:
        """Return the whole message; see Choice."""
        text = "".join(self._texts)
        message: Fields = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.name, "arguments": "".join(arguments)}}
                for call, arguments in self._calls
            ]  # fmt: skip
        return {"message": message, "logprobs": joined(self._logprobs)}

    def _part(self, part: AnswerPart) -> Fields:
        """Keep a part, and return it as a stream shows it."""
        if isinstance(part, TextPart):
            self._texts.append(part.text)
            return {"content": part.text}
        if isinstance(part, CallBegin):
            self._calls.append((part, []))
            function: Fields = {"name": part.name, "arguments": ""}
            call = {"index": part.index, "id": part.id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        self._calls[part.index][1].append(part.text)
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def _about_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def _written_here(runtime: Runtime, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what keeps a remote model out of an answer about tools.

    It would be told neither of the tools nor of the syntax that their grammar enforces, and of
    earlier calls as the template here has them.

    Raises:
        ApiError: 400, the request asks for its steps all the same.
    """
    if runtime.params.remote is None:
        return {}
    if options.get("steps") not in (None, "off", "small"):
        raise ApiError(400, f"edgeroute.steps is {options['steps']!r:.80}, but with tools the "
                       "remote model writes nothing: it does not know how the model here calls "
                       "them; leave edgeroute.steps out", param="edgeroute.steps")  # fmt: skip
    return {"steps": "off"}


def _delta(delta: Fields, logprobs: Fields | None = None) -> Fields:
    return {"delta": delta, "logprobs": logprobs}


def _logprobs(body: ChatBody) -> dict[str, int]:
    """Return how many rivals of each token are wanted, if any figures are.

    Raises:
        ApiError: 400, rivals without figures.
    """
    if body.logprobs:
        return {"logprobs": body.top_logprobs or 0}
    if body.top_logprobs is not None:
        raise ApiError(400, "top_logprobs is only allowed where logprobs is true",
                       param="top_logprobs")  # fmt: skip
    return {}


def _message(given: Message, i: int) -> dict[str, Any]:
    """Return a message as templates are given it.

    Raises:
        ApiError: 400, it has something that is no text, or nothing.
    """
    place = f"messages[{i}]"
    for name in ("audio", "function_call"):
        if getattr(given, name) is not None:
            why = "text only" if name == "audio" else "tool_calls instead"
            raise ApiError(400, f"{place}.{name} is not supported; pass {why}",
                           param=f"{place}.{name}")  # fmt: skip
    if given.role == "function":
        raise ApiError(400, f"{place}.role 'function' is the older form of 'tool'; pass that",
                       param=f"{place}.role")  # fmt: skip
    found: dict[str, Any] = {"role": given.role}
    content = given.content
    if isinstance(content, list):
        content = "".join(_text(part, f"{place}.content[{j}]") for j, part in enumerate(content))
    if content is None:
        content = given.refusal
    if content is None and not given.tool_calls:
        raise ApiError(400, f"{place}.content is missing; pass a text",
                       param=f"{place}.content")  # fmt: skip
    found["content"] = content or ""
    for name in KEPT_KEYS:
        value = getattr(given, name)
        if value is not None:
            found[name] = value
    if given.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": call.type,
             "function": {"name": call.function.name, "arguments": call.function.arguments}}
            for call in given.tool_calls
        ]  # fmt: skip
    return found


def _text(part: Part, place: str) -> str:
    found = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if found is None:
        raise ApiError(
            400, f"{place} is of type {part.type!r:.80} and has no text; models here read text "
            "only: pass {'type': 'text', 'text': ...}", param=place,
        )  # fmt: skip
    return found


def _known_roles(
    messages: Sequence[Mapping[str, Any]], template: str | None
) -> list[Mapping[str, Any]]:
    """Name the developer as the template does: only few know that role, and others mean system."""
    knows = template is not None and "developer" in template
    return [
        {**each, "role": "system"} if each["role"] == "developer" and not knows else each
        for each in messages
    ]
