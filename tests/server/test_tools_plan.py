"""What is made of tools, tool_choice and messages before anything is generated."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime import gbnf, gbnf_check
from edgeroute.runtime.template import render
from edgeroute.server.errors import ApiError
from edgeroute.server.tool_calls import ToolPlan, messages_for, plan_tools
from edgeroute.server.tool_styles import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    TAGGED,
    Style,
    traits_of,
)
from tests.server import tools_lab as lab

USER = {"role": "user", "content": "Hi"}


def plan(
    tools: Any = lab.TOOLS, choice: Any = "auto", template: str = lab.QWEN, **more: Any
) -> Any:
    return plan_tools(tools, choice, chat_template=template, **({"parallel": True} | more))


def tool(**changes: Any) -> list[Any]:
    return [{"type": "function", "function": lab.WEATHER["function"] | changes}]


def named(name: Any) -> Any:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: Any, *names: str) -> Any:
    listed = {"mode": mode, "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": listed}


def deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(n):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


def with_properties(**properties: Any) -> Any:
    return tool(parameters={"type": "object", "properties": properties}, strict=True)


@pytest.mark.parametrize(("tools", "choice", "mode", "names"), [
    (lab.TOOLS, None, "auto", ["get_weather", "add", "now"]),
    (lab.TOOLS, "auto", "auto", ["get_weather", "add", "now"]),
    (lab.TOOLS, "required", "required", ["get_weather", "add", "now"]),
    (lab.TOOLS, named("add"), "required", ["add"]),
    (lab.TOOLS, allowed("auto", "now", "add"), "auto", ["add", "now"]),
    (lab.TOOLS, allowed("required", "now"), "required", ["now"]),
    (lab.TOOLS, "none", None, []),
    ([], None, None, []),
    ([], "auto", None, []),
    ([], "none", None, []),
])  # fmt: skip
def test_choices(tools: Any, choice: Any, mode: str | None, names: list[str]) -> None:
    found = plan(tools, choice)
    if mode is None:
        assert found is None
        return
    assert isinstance(found, ToolPlan)
    assert [*found.callable] == names and found.required == (mode == "required")
    told = [t["function"]["name"] for t in found.options["tools"]]
    assert told == ["get_weather", "add", "now"]  # the model is told of all
    assert found.parallel == (choice != named("add"))


BAD: dict[str, tuple[Any, Any, str, str]] = {
    "no list": ({}, None, "tools", "must be a list"),
    "too many": ([lab.NOW] * 129, None, "tools", "limit is 128"),
    "no tool": (["x"], None, r"tools\[0\].type", "no other tools"),
    "other type": ([{"type": "web_search"}], None, r"tools\[0\].type", "no other tools"),
    "no function": ([{"type": "function"}], None, r"tools\[0\].function", "must be"),
    "no name": (tool(name=None), None, r"tools\[0\].function.name", "letters"),
    "quotes in the name": (tool(name='a"b'), None, r"tools\[0\].function.name", "letters"),
    "line in the name": (tool(name="a\n"), None, r"tools\[0\].function.name", "letters"),
    "marker as name": (tool(name="<tool_call>"), None, r"tools\[0\].function.name", "letters"),
    "long name": (tool(name="a" * 65), None, r"tools\[0\].function.name", "letters"),
    "empty name": (tool(name=""), None, r"tools\[0\].function.name", "letters"),
    "twice": ([lab.NOW, lab.NOW], None, r"tools\[1\].function.name", "twice"),
    "description": (tool(description=7), None, r"tools\[0\].function.description", "text"),
    "long description": (
        tool(description="x" * 20_000), None, r"tools\[0\].function.description", "at most"
    ),
    "strict": (tool(strict="yes"), None, r"tools\[0\].function.strict", "true or false"),
    "schema": (tool(parameters=[]), None, r"tools\[0\].function.parameters", "JSON schema"),
    "schema of text": (
        tool(parameters={"type": "string"}), None, r"tools\[0\].function.parameters", "'object'"
    ),
    "unknown type": (with_properties(a={"type": "word"}), None, "parameters", "type must be"),
    "remote $ref": (with_properties(a={"$ref": "http://x/y"}), None, "parameters", "inside"),
    "look-around": (
        with_properties(a={"type": "string", "pattern": "(?=a)"}), None, "parameters", "look-ar"
    ),
    "60,000 properties": (
        with_properties(**{f"p{i}": {} for i in range(60_000)}), None, "parameters", "too large"
    ),
    "deep": (tool(parameters=deep(50)), None, "parameters", "too large"),
    "very deep": (tool(parameters=deep(900)), None, "parameters", "too large"),
    "huge enum": (with_properties(a={"enum": [*range(5000)]}), None, "parameters", "at most 1000"),
    "huge number": (
        with_properties(a={"type": "integer", "minimum": 10**400}), None, "parameters", "finite"
    ),
    "all large": (
        [*(tool(name=f"f{i}", description="x" * 16_000)[0] for i in range(30))], None,
        r"tools\[\d+\]", "characters or more",
    ),
    "unknown choice": (lab.TOOLS, "any", "tool_choice", "must be 'none'"),
    "choice of nothing": (lab.TOOLS, {}, "tool_choice", "must be 'none'"),
    "choice of no type": (lab.TOOLS, 7, "tool_choice", "must be 'none'"),
    "unknown function": (lab.TOOLS, named("shell"), "tool_choice", "not among"),
    "no function chosen": (lab.TOOLS, named(None), "tool_choice", "must be"),
    "required of none": ([], "required", "tool_choice", "needs tools"),
    "named of none": ([], named("add"), "tool_choice", "not among"),
    "allowed none": (lab.TOOLS, allowed("auto"), "allowed_tools", "must be"),
    "allowed in no mode": (lab.TOOLS, allowed(None, "add"), "allowed_tools", "must be"),
    "allowed unknown": (lab.TOOLS, allowed("auto", "add", "x"), r"tools\[1\]", "not among"),
    "allowed too many": (lab.TOOLS, allowed("auto", *["add"] * 200), "allowed_tools", "limit"),
}  # fmt: skip


@pytest.mark.parametrize(("tools", "choice", "param", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_tools_are_refused_by_name(tools: Any, choice: Any, param: str, reason: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(ApiError, match=reason) as caught:
        plan(tools, choice)
    assert caught.value.status == 400
    assert re.search(param, str(caught.value.param))
    assert len(caught.value.message) < 2000
    assert time.thread_time() - began_s < 5  # measured: 0.1 s at most


SOME = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(
        ["function", "object", "add", "string", "auto", "required", "allowed_tools", "#", ""]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "type", "function", "name", "parameters", "properties", "strict", "tools", "mode",
        "description", "allowed_tools", "required", "items", "anyOf", "$ref", "role", "id",
        "content", "tool_calls", "tool_call_id", "arguments",
    ]), inner, max_size=5),
    max_leaves=15,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(SOME, SOME)
def test_any_data_is_a_plan_or_an_error_400(tools: Any, choice: Any) -> None:
    for listed in (tools, [tools], [{"type": "function", "function": tools}]):
        try:
            found = plan(listed, choice)
        except ApiError as error:
            assert error.status == 400
        else:
            assert found is None or gbnf.parse(found.options["grammar"])


PLANS = {template: plan(template=template) for template in (lab.PLAIN, lab.QWEN)}


@settings(deadline=None, max_examples=300)
@given(SOME, SOME)
def test_any_data_is_messages_or_an_error_400(first: Any, second: Any) -> None:
    calls = {"role": "assistant", "tool_calls": second}
    for template, made in PLANS.items():
        for messages in (first, [first, second], [USER, calls], [USER, {"role": "tool"} | calls]):
            try:
                found = messages_for(template, messages, made)
            except ApiError as error:
                assert error.status == 400
            else:
                assert render(template, found, bos_token="", eos_token="", tools=[lab.ADD])


@pytest.mark.parametrize(("template", "style", "objects", "short", "system"), [
    (lab.PLAIN, None, False, False, True),
    (lab.NO_SYSTEM, None, False, False, False),
    (lab.QWEN, HERMES, True, False, True),
    (lab.QWEN_TEXT, HERMES, False, False, True),
    (lab.QWEN_XML, None, False, False, True),
    (lab.TAGS, TAGGED, True, False, True),
    (lab.TAGS.replace("</parameter>", ""), None, False, False, True),
    (lab.QWEN.replace("{% if tools %}", "{% if 0 %}"), None, False, False, True),
    (lab.MISTRAL_V3, MISTRAL, True, True, False),
    (lab.MISTRAL_V11, MISTRAL_ARGS, False, False, True),
    (lab.LLAMA3, LLAMA, True, False, True),
    ("{{", None, False, False, False),
    (None, None, False, False, True),
])  # fmt: skip
def test_what_templates_can_do(
    template: str | None, style: Style | None, objects: bool, short: bool, system: bool
) -> None:
    found = traits_of(template)
    assert found.style is style
    assert (found.wants_objects, found.short_ids, found.has_system) == (objects, short, system)


ARGUMENTS = '{"city": "Paris",  "x": [1, 2.50]}'
TURNS: list[Any] = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None,
     "tool_calls": [lab.said("get_weather", ARGUMENTS, "call_abcdefghijkl")]},
    {"role": "tool", "tool_call_id": "call_abcdefghijkl", "content": "rain"},
]  # fmt: skip


def prompt(template: str, turns: list[Any] = TURNS, **more: Any) -> str:
    found = plan(template=template, **more)
    messages = messages_for(template, turns, found)
    tools = None if found is None else found.options.get("tools")
    return render(template, messages, bos_token="<s>", eos_token="</s>", tools=tools)


def test_arguments_as_templates_want_them() -> None:
    compact = json.dumps(json.loads(ARGUMENTS))
    assert f'"arguments": {compact}}}' in prompt(lab.QWEN)
    assert f'"arguments": {ARGUMENTS}}}' in prompt(lab.QWEN_TEXT)
    assert f'"parameters": {compact}}}' in prompt(lab.LLAMA3)
    assert f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}" in prompt(lab.MISTRAL_V11)
    for template in (lab.QWEN, lab.QWEN_TEXT, lab.LLAMA3, lab.MISTRAL_V11):
        assert "rain" in prompt(template) and "Weather of a place" in prompt(template)


def test_ids_of_nine_letters_where_they_must_be() -> None:
    found = prompt(lab.MISTRAL_V3, TURNS[1:])
    short = found.split('"id": "')[1][:9]
    assert short.isalnum() and f"[TOOL_RESULTS] {short} rain" in found
    kept = json.loads(json.dumps(TURNS[1:]).replace("call_abcdefghijkl", "abcdefXY9"))
    assert "[TOOL_RESULTS] abcdefXY9 rain" in prompt(lab.MISTRAL_V3, kept)


def test_templates_without_tools_are_told_in_plain_messages() -> None:
    found = prompt(lab.PLAIN)
    assert found.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions")
    assert '"description": "Weather of a place"' in found
    call = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}<|im_end|>" in found
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in found
    without = prompt(lab.PLAIN, choice="none")
    assert "You can call" not in without and call in without
    assert prompt(lab.PLAIN, [USER]).startswith("<|im_start|>system\nYou can call functions")
    first = prompt(lab.NO_SYSTEM, [USER])
    assert first.startswith("<|im_start|>user\nYou can call") and "plain words.\n\nHi<" in first


def test_results_join_the_next_message_of_the_user() -> None:
    turns = [*TURNS, {**TURNS[-1], "content": "sun"}, {"role": "user", "content": "And?"}]
    found = messages_for(lab.PLAIN, turns, None)
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user"]
    assert found[-1]["content"] == (
        "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>\nAnd?"
    )


def test_results_are_given_the_name_of_their_function() -> None:
    assert messages_for(lab.QWEN, TURNS, None)[-1]["name"] == "get_weather"


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "not JSON": ([lab.said("f", "{")], r"messages\[1\].tool_calls\[0\].function.arguments"),
    "a list": ([lab.said("f", [1])], r"messages\[1\].tool_calls\[0\].function.arguments"),
    "NaN": ([lab.said("f", '{"a": NaN}')], r"function.arguments"),
    "deep": ([lab.said("f", "[" * 100_000)], r"function.arguments"),
    "digits": ([lab.said("f", '{"a": ' + "9" * 5000 + "}")], r"function.arguments"),
    "long": ([lab.said("f", " " * 300_000)], r"function.arguments"),
    "number": ([{**lab.said("f", {}), "function": {"name": "f", "arguments": 7}}], "arguments"),
    "no name": ([{**lab.said("f", {}), "function": {"arguments": "{}"}}], "function.name"),
    "no id": ([{**lab.said("f", {}), "id": None}], r"tool_calls\[0\].id"),
    "other type": ([{**lab.said("f", {}), "type": "custom"}], r"tool_calls\[0\].type"),
    "no call": ([lab.said("f", {}), 7], r"tool_calls\[1\]"),
    "no list": ("x", r"messages\[1\].tool_calls"),
    "too many": ([lab.said("f", {})] * 200, r"messages\[1\].tool_calls"),
}


@pytest.mark.parametrize(("calls", "param"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
@pytest.mark.parametrize("template", [lab.QWEN, lab.PLAIN], ids=["native", "plain"])
def test_malformed_calls_are_refused_by_name(calls: Any, param: str, template: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages_for(template, [USER, {"role": "assistant", "tool_calls": calls}], None)
    assert caught.value.status == 400 and re.search(param, str(caught.value.param))


def test_a_result_needs_the_id_of_its_call() -> None:
    with pytest.raises(ApiError, match=r"messages\[1\].tool_call_id must be"):
        messages_for(lab.QWEN, [USER, {"role": "tool", "content": "x"}], None)


def test_messages_without_tools_stay_as_they_are() -> None:
    turns = [USER, {"role": "assistant", "content": "Yes?", "tool_calls": []}, USER]
    for template in (lab.PLAIN, lab.QWEN, "{{", None):
        assert messages_for(template, turns, None) == [
            USER, {"role": "assistant", "content": "Yes?"}, USER
        ]  # fmt: skip


HARD: dict[str, Any] = {
    "mail": {"type": "string", "format": "email"},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "any": {"not": {"type": "null"}},
}


@pytest.mark.parametrize("name", HARD)
def test_strict_is_all_or_nothing_and_others_are_enforced_as_far_as_that_goes(name: str) -> None:
    schema = {"type": "object", "properties": {name: HARD[name], "n": {"enum": [1, 2]}}}
    with pytest.raises(ApiError, match="cannot be enforced") as caught:
        plan(tool(parameters=schema, strict=True))
    assert caught.value.param == "tools[0].function.parameters"
    for strict in ({}, {"strict": None}, {"strict": False}):
        found = plan(tool(parameters=schema, **strict))
        assert '"1" | "2"' in found.options["grammar"]
        assert found.options["tools"][0]["function"]["parameters"] == schema  # told as it is


def test_no_parameters_are_no_arguments() -> None:
    for parameters in (None, {}, {"type": "object", "properties": {}}):
        grammar = plan(tool(parameters=parameters)).options["grammar"]
        assert 'f0-root ::= "{" ws "}"\n' in grammar
    assert "f0-root ::= object\n" in plan(tool(parameters={"type": "object"})).options["grammar"]


@pytest.mark.parametrize("template", [lab.PLAIN, lab.QWEN, lab.MISTRAL_V3, lab.LLAMA3])
def test_128_tools_are_no_trouble(template: str) -> None:
    tools = [tool(name=f"function_number_{i}")[0] for i in range(128)]
    began_s = time.thread_time()
    found = plan(tools, template=template)
    gbnf_check.check(gbnf.parse(found.options["grammar"]))
    assert time.thread_time() - began_s < 10  # measured: 0.7 s at most
