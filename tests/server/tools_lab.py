"""Tools, chat templates of several families in small, and what is made of an answer."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from edgeroute.server.tool_calls import CallArguments, CallBegin, Part, TextPart

CITY = {"type": "string", "maxLength": 12}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"$ref": "#/$defs/small"},
            },
            "required": ["a", "b"],
            "$defs": {"small": {"enum": [1, 2, 3]}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, ADD, NOW]


def is_valid(name: str, arguments: Any) -> bool:
    """Whether arguments match the schema of one of TOOLS."""
    if name == "now":
        return bool(arguments == {})
    if name == "add":
        good = set(arguments) == {"a", "b"} and type(arguments["a"]) is int
        return good and 0 <= arguments["a"] <= 99 and arguments["b"] in (1, 2, 3)
    good = {"city"} <= set(arguments) <= {"city", "unit"} and isinstance(arguments["city"], str)
    return good and len(arguments["city"]) <= 12 and arguments.get("unit", "C") in ("C", "F")


def joined(parts: Iterable[Part]) -> tuple[str, list[tuple[str, str]]]:
    """Return the text, and each call's name and arguments; checks numbers and ids."""
    text, calls, ids = "", list[tuple[str, str]](), set[str]()
    for part in parts:
        if isinstance(part, TextPart):
            assert part.text
            text += part.text
        elif isinstance(part, CallBegin):
            assert part.index == len(calls)
            assert part.id.startswith("call_") and len(part.id) == 29
            ids.add(part.id)
            calls.append((part.name, ""))
        else:
            assert isinstance(part, CallArguments) and part.text
            assert part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    assert len(ids) == len(calls)
    return text, calls


def parsed(calls: Iterable[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(text)) for name, text in calls]


def said(name: str, arguments: Any, call_id: str = "call_1") -> Mapping[str, Any]:
    """A call as a client sends it back."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}CALLS<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = _CHATML.replace("CALLS", "")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
QWEN = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}" + (
    _CHATML.replace(
        "CALLS",
        "{% for c in m.tool_calls or [] %}<tool_call>\n"
        "{% set c = c.function %}"
        '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}",
    )
)
QWEN_TEXT = QWEN.replace("c.arguments | tojson", "c.arguments")
QWEN_XML = QWEN.replace("</tool_call>", "<function=f></tool_call>")
TAGS = (
    "{% if tools %}{% for t in tools %}<function>{{ t.function.name }}\n{% endfor %}{% endif %}"
    + (
        _CHATML.replace(
            "CALLS",
            "{% for c in m.tool_calls or [] %}{% set c = c.function %}"
            "\n<tool_call>\n<function={{ c.name }}>\n"
            "{% for name, value in c.arguments | items %}<parameter={{ name }}>\n"
            "{{ value | tojson if value is mapping else value | string }}\n</parameter>\n"
            "{% endfor %}</function>\n</tool_call>{% endfor %}",
        )
    )
)
MISTRAL_V3 = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]{{ eos_token }}'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.tool_call_id }} {{ m.content }}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V11 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments }}{% endfor %}{% endfor %}"
)
LLAMA3 = (
    "{% if tools %}Respond in the format {\"name\": NAME, \"parameters\": ARGUMENTS}."
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{\"name\": \"{{ m.tool_calls[0].function.name }}\", \"parameters\": "
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
    "<|eot_id|>{% endfor %}"
)  # fmt: skip
