"""Messages of a conversation with tools, as a chat template wants them.

OpenAI's clients send the arguments of calls as JSON text; many templates want data. Where a
template knows no tools, they are described in the system message, and calls and results are
written into plain messages.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.template import check_messages
from edgeroute.server.errors import ApiError
from edgeroute.server.tool_grammar import Function
from edgeroute.server.tool_styles import HERMES, Message, Traits

MAX_CALLS_OF_MESSAGE: Final = 128
MAX_ID_CHARS: Final = 256
MAX_ARGUMENT_CHARS: Final = 1 << 18

_ID_LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def convert(
    messages: Sequence[Message], traits: Traits, functions: Sequence[Function], *, many: bool
) -> list[Message]:
    """Check calls and results in messages, and write them as the template wants them.

    Args:
        messages: as OpenAI's clients send them.
        traits: of the template.
        functions: what the model is to be told of where the template cannot.
        many: whether it may be told to write several calls.

    Raises:
        ApiError: 400, a message is malformed; `param` names it.
    """
    try:
        checked = check_messages(messages)
    except UsageError as error:
        raise ApiError(400, str(error), param="messages") from None
    names: dict[str, str] = {}
    done = [_checked(message, i, names) for i, message in enumerate(checked)]
    if traits.style is None:
        return _folded(done, functions, has_system=traits.has_system, many=many)
    return [_native(message, traits) for message in done]


def _checked(message: dict[str, Any], i: int, names: dict[str, str]) -> dict[str, Any]:
    """Check one message's calls, or add the name of the function whose result it is.

    Args:
        message: with its content as one text.
        i: its number.
        names: functions by the ids of the calls so far; added to.
    """
    if message["role"] == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str) or not 0 < len(call_id) <= MAX_ID_CHARS:
            raise _bad(i, "tool_call_id", f"must be the id of a call, a text, got {call_id!r:.80}")
        return {"name": names.get(call_id, "unknown"), **message}
    calls = message.pop("tool_calls", None)
    if not calls:
        return message
    if message["role"] != "assistant" or not isinstance(calls, list | tuple):
        raise _bad(i, "tool_calls", "must be a list, in a message of the assistant")
    if len(calls) > MAX_CALLS_OF_MESSAGE:
        raise _bad(i, "tool_calls", f"has {len(calls)} calls, the limit is {MAX_CALLS_OF_MESSAGE}")
    message["tool_calls"] = [_call(call, i, j) for j, call in enumerate(calls)]
    names.update((call["id"], call["function"]["name"]) for call in message["tool_calls"])
    return message


def _call(call: object, i: int, j: int) -> dict[str, Any]:
    """Check one call; its arguments come back as the JSON text of an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _bad(i, f"tool_calls[{j}]", "must be {'id', 'type': 'function', 'function': {...}}")
    if call.get("type", "function") != "function":
        raise _bad(i, f"tool_calls[{j}].type", f"must be 'function', got {call['type']!r:.80}")
    call_id, name = call.get("id"), function.get("name")
    if not isinstance(call_id, str) or not 0 < len(call_id) <= MAX_ID_CHARS:
        raise _bad(i, f"tool_calls[{j}].id", f"must be a text, got {call_id!r:.80}")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_CHARS:
        raise _bad(i, f"tool_calls[{j}].function.name", f"must be a text, got {name!r:.80}")
    text = _arguments(function.get("arguments"), i, j)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def _arguments(value: object, i: int, j: int) -> str:
    place = f"tool_calls[{j}].function.arguments"
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(text) > MAX_ARGUMENT_CHARS:
            raise _bad(i, place, f"has {len(text)} characters, limit {MAX_ARGUMENT_CHARS}")
        data = json.loads(text.strip() or "{}", parse_constant=_no_constant)
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad(i, place, f"is not JSON: {error!s:.200}") from None
    if not isinstance(data, dict):
        raise _bad(i, place, f"must be the JSON text of an object, got {text!r:.80}")
    return text.strip() or "{}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad(i: int, field: str, problem: str) -> ApiError:
    return ApiError(400, f"messages[{i}].{field} {problem}", param=f"messages[{i}].{field}")


def _native(message: dict[str, Any], traits: Traits) -> Message:
    """Write calls and results as a template that knows them wants them."""
    if message["role"] == "tool" and traits.short_ids:
        return {**message, "tool_call_id": _short(message["tool_call_id"])}
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        name, text = call["function"]["name"], call["function"]["arguments"]
        arguments = _told_arguments(text, traits)
        call_id = _short(call["id"]) if traits.short_ids else call["id"]
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
    return {**message, "tool_calls": calls}


def _told_arguments(text: str, traits: Traits) -> object:
    """Arguments of a call as a template wants them; with tags, what is no text as its JSON."""
    if not traits.wants_objects:
        return text
    found = json.loads(text)
    if traits.style is None or not traits.style.tagged:
        return found
    return {
        name: each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
        for name, each in found.items()
    }


def _short(call_id: str) -> str:
    """Nine letters and digits, the same for the same id."""
    if len(call_id) == 9 and all(c in _ID_LETTERS for c in call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _folded(
    messages: Sequence[dict[str, Any]], functions: Sequence[Function], *, has_system: bool,
    many: bool,
) -> list[Message]:  # fmt: skip
    """Write everything about tools into the contents of plain messages."""
    found: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results and message["role"] != "user":
            found.append({"role": "user", "content": "\n".join(results)})
            results.clear()
        content = "\n".join([*results, message["content"]])
        results.clear()
        for call in message.pop("tool_calls", ()):
            content = f"{content}\n{_written(call)}" if content else _written(call)
        found.append({**message, "content": content})
    if results:
        found.append({"role": "user", "content": "\n".join(results)})
    return _told(found, describe(functions, many=many), has_system) if functions else found


def _written(call: Mapping[str, Any]) -> str:
    """A call of an earlier turn, as the model would have written it."""
    name, text = json.dumps(call["function"]["name"]), call["function"]["arguments"]
    return f'{HERMES.marker}\n{{"name": {name}, "arguments": {text}{HERMES.after}'


def _told(messages: list[Message], told: str, has_system: bool) -> list[Message]:
    """Add a text to the system message, or where there can be none to the first one."""
    first = messages[0]
    if first["role"] in ("system", "developer") or not has_system:
        is_user = first["role"] not in ("system", "developer")
        pair = (told, first["content"]) if is_user else (first["content"], told)
        return [{**first, "content": "\n\n".join(text for text in pair if text)}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def describe(functions: Sequence[Function], *, many: bool) -> str:
    """Tell a model that was not trained on it which functions there are and how to call them."""
    lines = (json.dumps(f.told()["function"], ensure_ascii=False) for f in functions)
    several = " You may write several such calls, one after the other." if many else ""
    return (
        "You can call functions. These are their descriptions in JSON, one a line:\n<tools>\n"
        + "\n".join(lines)
        + "\n</tools>\nTo call a function, write its name and its arguments like this:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {"KEY": "VALUE"}}\n</tool_call>\n'
        f"Its result comes back within <tool_response></tool_response>.{several} "
        "Call functions only where they help; otherwise answer in plain words."
    )
