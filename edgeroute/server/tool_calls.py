"""Tools of a chat request: checked, told to the model, enforced by a grammar, and read back."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from edgeroute.options import MAX_TOOLS
from edgeroute.runtime.errors import GrammarError
from edgeroute.server.errors import ApiError
from edgeroute.server.tool_grammar import Calls, Function, call_grammar, function_rules, tag_forms
from edgeroute.server.tool_messages import convert
from edgeroute.server.tool_reader import CallArguments, CallBegin, Part, TextPart, ToolReader
from edgeroute.server.tool_styles import HERMES, Message, Style, Traits, traits_of
from edgeroute.server.tool_tags import Forms

__all__ = [
    "CallArguments", "CallBegin", "Part", "TextPart", "ToolPlan", "ToolReader", "messages_for",
    "plan_tools",
]  # fmt: skip

Mode = Literal["none", "auto", "required"]
Choice = str | Mapping[str, Any] | None

MAX_DESCRIPTION_CHARS: Final = 1 << 14
MAX_TOOLS_CHARS: Final = 1 << 18
"""Names, descriptions and schemas of all tools together."""

NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")
_NO_ARGUMENTS: Final[Mapping[str, Any]] = {
    "type": "object", "properties": {}, "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """What one request does about tools; `plan_tools` makes it.

    Attributes:
        functions: all that the model is told of.
        callable: names of those it may call.
        required: whether it has to call one.
        parallel: whether it may call several; where the template knows no tools, it may not.
        traits: what the chat template makes of tools.
        options: what goes into `generate`: `grammar` and `shown_tokens`, and `tools` where the
            template knows them. None of them may be overwritten.
        forms: how arguments are written, by function, where each has a tag of its own.
    """

    functions: tuple[Function, ...]
    callable: tuple[str, ...]
    required: bool
    parallel: bool
    traits: Traits
    options: dict[str, Any]
    forms: Mapping[str, Forms] = field(default_factory=dict)

    @property
    def style(self) -> Style:
        """Syntax of the calls."""
        return self.traits.style or HERMES

    def reader(self) -> ToolReader:
        """Return what takes one answer apart."""
        return ToolReader(self.style, self.callable, parallel=self.parallel, forms=self.forms)


def plan_tools(
    tools: Sequence[Mapping[str, Any]],
    choice: Choice,
    *,
    parallel: bool,
    chat_template: str | None,
    answer_schema: Mapping[str, Any] | str | None = None,
) -> ToolPlan | None:
    """Decide what to tell the model and what it may write.

    Schemas and templates may be large: call it off the event loop.

    Args:
        tools: as the request has them.
        choice: `tool_choice` of the request; None is auto, or none where there are no tools.
        parallel: `parallel_tool_calls` of the request.
        chat_template: the model's, as its file has it.
        answer_schema: JSON schema that an answer without a call has to match.

    Returns:
        None where no call may come.

    Raises:
        ApiError: 400 with `param`, for tools or a choice that are malformed, too large, or
            need what no grammar can enforce.
    """
    functions = _functions(tools)
    mode, chosen = _choice(choice, [f.name for f in functions])
    if mode == "none" or not functions:
        return None
    traits = traits_of(chat_template)
    named = isinstance(choice, Mapping) and choice.get("type") == "function"
    callable_ = [f for f in functions if f.name in chosen]
    # A model that was not trained on tools, and has to call, calls on and on.
    many = parallel and not named and traits.style is not None
    calls = Calls(
        style=traits.style or HERMES, functions=callable_, required=mode == "required",
        many=many, answer_schema=answer_schema,
    )  # fmt: skip
    try:
        grammar = call_grammar(calls)
        forms = {f.name: tag_forms(f) for f in callable_ if calls.style.tagged}
    except GrammarError as error:
        raise ApiError(400, str(error), param="tools") from None
    options: dict[str, Any] = {"grammar": grammar, "shown_tokens": calls.style.shown}
    if traits.style is not None:
        options["tools"] = [f.told() for f in functions]
    return ToolPlan(
        functions=functions, callable=tuple(f.name for f in callable_), required=calls.required,
        parallel=calls.many, traits=traits, options=options, forms=forms,
    )  # fmt: skip


def messages_for(
    template: str | None, messages: Sequence[Message], plan: ToolPlan | None
) -> list[Message]:
    """Write messages as the chat template wants them, with calls, results and perhaps tools.

    Args:
        template: the model's, as its file has it.
        messages: as the request has them: arguments of calls as JSON text.
        plan: of the same request and template.

    Raises:
        ApiError: 400, a message is malformed; `param` names it.
    """
    if plan is None:
        traits = traits_of(template) if _about_tools(messages) else Traits(style=None)
        return convert(messages, traits, (), many=False)
    return convert(messages, plan.traits, plan.functions, many=plan.parallel)


def _about_tools(messages: object) -> bool:
    """Whether there are calls or results in what may be messages."""
    listed = messages if isinstance(messages, list | tuple) else ()
    return any(
        m.get("role") == "tool" or bool(m.get("tool_calls"))
        for m in listed
        if isinstance(m, Mapping)
    )


def _functions(tools: object) -> tuple[Function, ...]:
    if not isinstance(tools, list | tuple):
        raise ApiError(400, f"tools must be a list, got {type(tools).__name__}", param="tools")
    if len(tools) > MAX_TOOLS:
        raise ApiError(
            400, f"{len(tools)} tools were given, the limit is {MAX_TOOLS}", param="tools"
        )
    found: dict[str, Function] = {}
    n_chars = 0
    for i, tool in enumerate(tools):
        function = _function(tool, i)
        if function.name in found:
            raise _bad(i, ".function.name", f"{function.name!r} is there twice")
        found[function.name] = function
        n_chars += _size(function, i)
        if n_chars > MAX_TOOLS_CHARS:
            raise _bad(i, "", f"and those before it have {n_chars} characters or more, the limit "
                       f"is {MAX_TOOLS_CHARS}")  # fmt: skip
    return tuple(found.values())


def _function(tool: object, i: int) -> Function:
    """Check one tool as far as its schema need not be translated."""
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise _bad(i, ".type", "must be 'function'; there are no other tools here")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _bad(i, ".function", "must be {'name', 'description', 'parameters'}")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or NAME.match(name) is None:
        raise _bad(i, ".function.name", "must be 1 to 64 letters, digits, underscores or dashes, "
                   f"got {name!r:.80}")  # fmt: skip
    if description is None:
        description = ""
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARS:
        raise _bad(i, ".function.description",
                   f"must be a text of at most {MAX_DESCRIPTION_CHARS} characters")  # fmt: skip
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _bad(i, ".function.strict", f"must be true or false, got {strict!r:.80}")
    parameters = _parameters(function.get("parameters"), i)
    return Function(name=name, description=description, parameters=parameters, strict=bool(strict))


def _parameters(schema: object, i: int) -> Mapping[str, Any]:
    """Check that a schema is one of objects; where it names no property, there is none."""
    if schema is None:
        return _NO_ARGUMENTS
    if not isinstance(schema, Mapping):
        raise _bad(i, ".function.parameters", f"must be a JSON schema, got {schema!r:.80}")
    if not schema:
        return _NO_ARGUMENTS
    if schema.get("type") != "object":
        raise _bad(i, ".function.parameters",
                   f"must be of type 'object', got {schema.get('type')!r:.80}")  # fmt: skip
    if schema.get("properties") == {} and "additionalProperties" not in schema:
        return {**schema, "additionalProperties": False}
    return schema


def _size(function: Function, i: int) -> int:
    """Translate a schema, so that an error names its tool; return the grammar's characters."""
    try:
        _, rules = function_rules(function, i)
    except GrammarError as error:
        raise _bad(i, ".function.parameters", f"cannot be enforced: {error}") from None
    n_rules = sum(len(name) + len(body) for name, body in rules.items())
    return len(function.name) + len(function.description) + n_rules


def _choice(choice: Choice, names: Sequence[str]) -> tuple[Mode, Sequence[str]]:
    """Return how free the model is, and which functions it may call."""
    if choice is None or choice in ("none", "auto"):
        return ("none" if choice == "none" else "auto"), names
    if choice == "required":
        _need_tools(names)
        return "required", names
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return "required", [_named(choice, "tool_choice", names)]
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), names)
    raise ApiError(
        400, "tool_choice must be 'none', 'auto', 'required', {'type': 'function', 'function': "
        f"{{'name': ...}}}} or one of type 'allowed_tools', got {choice!r:.80}",
        param="tool_choice",
    )  # fmt: skip


def _allowed(allowed: object, names: Sequence[str]) -> tuple[Mode, Sequence[str]]:
    listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
    mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(listed, list | tuple) or not listed:
        raise ApiError(
            400, "tool_choice.allowed_tools must be {'mode': 'auto' or 'required', 'tools': [...]}",
            param="tool_choice.allowed_tools",
        )  # fmt: skip
    if len(listed) > MAX_TOOLS:
        raise ApiError(400, f"tool_choice allows {len(listed)} tools, the limit is {MAX_TOOLS}",
                       param="tool_choice.allowed_tools")  # fmt: skip
    place = "tool_choice.allowed_tools.tools"
    chosen = [_named(each, f"{place}[{i}]", names) for i, each in enumerate(listed)]
    return ("required" if mode == "required" else "auto"), chosen


def _named(choice: object, place: str, names: Sequence[str]) -> str:
    """The name of a function that a choice points to."""
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ApiError(400, f"{place} must be {{'type': 'function', 'function': {{'name': ...}}}}",
                       param=place)  # fmt: skip
    if name not in names:
        raise ApiError(400, f"{place} names {name!r:.80}, which is not among the tools",
                       param=place)  # fmt: skip
    return name


def _need_tools(names: Sequence[str]) -> None:
    if not names:
        raise ApiError(400, "tool_choice needs tools, and there are none", param="tool_choice")


def _bad(i: int, field: str, problem: str) -> ApiError:
    return ApiError(400, f"tools[{i}]{field} {problem}", param=f"tools[{i}]{field}")
