"""Calls with a tag for each argument: their grammar, how they are read, and told to templates."""

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeroute.runtime import gbnf
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.template import render
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.server.errors import ApiError
from edgeroute.server.tool_calls import (
    CallArguments,
    CallBegin,
    Part,
    ToolPlan,
    messages_for,
    plan_tools,
)
from tests.runtime.grammar_lab import accepts
from tests.server import tools_lab as lab

TEXT = {"type": "string"}
MAYBE = {"anyOf": [TEXT, {"type": "null"}]}
UNIT = {"$ref": "#/$defs/unit"}
EDIT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "edit",
        "parameters": {
            "type": "object",
            "properties": {
                "path": TEXT, "text": MAYBE, "unit": UNIT, "n": {"type": "integer"},
                "day": {"type": "string", "format": "date"},
                "tags": {"type": "array", "items": TEXT}, "any": {},
            },
            "required": ["path"],
            "$defs": {"unit": {"type": "string", "enum": ["C", "F"]}},
        },
    },
}  # fmt: skip
FREE = {"type": "function", "function": {"name": "free", "parameters": {
    "type": "object", "additionalProperties": {"type": ["string", "null"]},
}}}  # fmt: skip
TOOLS = [EDIT, FREE, *lab.TOOLS]


def plan(tools: list[Any] = TOOLS, choice: Any = "auto", parallel: bool = True) -> ToolPlan:
    found = plan_tools(tools, choice, parallel=parallel, chat_template=lab.TAGS)
    assert found is not None and found.style.tagged
    return found


def call(name: str, *arguments: tuple[str, str]) -> str:
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"


def read(found: ToolPlan, pieces: list[str]) -> list[Part]:
    reader = found.reader()
    return [part for piece in pieces for part in reader.push(piece)] + reader.finish()


CODE = "if a < b:\n\n    print(\"</parameter>\", '\\n')\t# é"
CASES: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "no arguments": (call("now"), "", [("now", {})]),
    "text as it is": (call("edit", ("path", CODE)), "", [("edit", {"path": CODE})]),
    "no text": (call("edit", ("path", "")), "", [("edit", {"path": ""})]),
    "lines before and behind": (
        call("edit", ("path", "\n\na\n\n")), "", [("edit", {"path": "\n\na\n\n"})]
    ),
    "a text that looks like JSON": (call("edit", ("path", "{1}")), "", [("edit", {"path": "{1}"})]),
    "nothing": (call("edit", ("path", "null"), ("text", "null")), "",
                [("edit", {"path": "null", "text": None})]),
    "what begins as nothing": (call("edit", ("path", "a"), ("text", "null\nnul")), "",
                               [("edit", {"path": "a", "text": "null\nnul"})]),
    "half of nothing": (call("edit", ("path", "a"), ("text", "nul")), "",
                        [("edit", {"path": "a", "text": "nul"})]),
    "each kind": (
        call("edit", ("path", "a"), ("text", "b"), ("unit", "F"), ("n", "-12"),
             ("day", "2024-02-28"), ("tags", '["x", "</parameter>"]'), ("any", '{"a": [1]}')), "",
        [("edit", {"path": "a", "text": "b", "unit": "F", "n": -12, "day": "2024-02-28",
                   "tags": ["x", "</parameter>"], "any": {"a": [1]}})],
    ),
    "names of the model's choice": (call("free", ("x", "null"), ("y-2", "z")), "",
                                    [("free", {"x": None, "y-2": "z"})]),
    "numbers": (call("add", ("a", "7"), ("b", "2")), "", [("add", {"a": 7, "b": 2})]),
    "text, then two calls": (f"So:\n{call('now')}\n{call('add', ('a', '7'), ('b', '2'))}", "So:",
                             [("now", {}), ("add", {"a": 7, "b": 2})]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Iterator[Tokenizer]:
    with GGUFFile.open(smollm2_path) as file, Tokenizer.open(file) as opened:
        yield opened


@pytest.mark.parametrize(("answer", "text", "calls"), CASES.values(), ids=CASES.keys())
def test_what_is_written_is_admitted_and_read(
    tokenizer: Tokenizer, answer: str, text: str, calls: list[Any]
) -> None:
    free, forced = (plan(choice=choice).options["grammar"] for choice in ("auto", "required"))
    assert accepts(tokenizer, free, answer)
    assert accepts(tokenizer, forced, answer) == (not text)
    for pieces in ([answer], list(answer)):
        found, made = lab.joined(read(plan(), pieces))
        assert (found, lab.parsed(made)) == (text, calls)


@pytest.mark.parametrize("answer", [
    call("edit"), call("edit", ("n", "1")), call("edit", ("path", "a"), ("n", "one")),
    call("edit", ("path", "a"), ("unit", "K")), call("edit", ("path", "a"), ("unit", '"C"')),
    call("edit", ("path", "a"), ("day", "2024-02-30")), call("edit", ("path", "a"), ("x", "1")),
    call("edit", ("path", "a"), ("tags", "[x]")), call("edit", ("path", "a"), ("path", "b")),
    call("add", ("a", "100"), ("b", "2")), call("now", ("x", "1")), call("shell"),
    call("now")[:-1], call("now") + "more", call("edit", ("path", "a")).replace("\n</p", "</p"),
    call("get_weather", ("city", 13 * "x")), call("get_weather", ("city", "a\nb")),
])  # fmt: skip
def test_what_a_schema_excludes_is_not_admitted(tokenizer: Tokenizer, answer: str) -> None:
    assert not accepts(tokenizer, plan().options["grammar"], answer)


def test_arguments_come_as_they_are_written() -> None:
    reader = plan().reader()
    begin, first = reader.push("<tool_call>\n<function=edit>\n<para")
    assert isinstance(begin, CallBegin) and first == CallArguments(0, "{")
    assert reader.push('meter=path>\na"b') == [CallArguments(0, '"path": "a\\"b')]
    assert reader.push("\n</param") == []
    assert reader.push("s\n</parameter>") == [CallArguments(0, '\\n</params"')]
    assert reader.push("\n<parameter=text>\nnu") == [CallArguments(0, ', "text": ')]
    assert reader.push("m") == [CallArguments(0, '"num')]
    assert reader.push("\n</parameter>\n</function>") == [CallArguments(0, '"}')]


def test_only_the_first_call_where_there_may_be_one() -> None:
    found = plan(parallel=False)
    _, calls = lab.joined(read(found, [f"{call('now')}\n{call('free')}"]))
    assert calls == [("now", "{}")]


@pytest.mark.parametrize("name", ["a>b", "<x", "a\nb", ""])
def test_names_that_no_tag_can_have_are_refused(name: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {name: TEXT},
    }}}  # fmt: skip
    with pytest.raises(ApiError, match="cannot be named in this model's syntax") as caught:
        plan([tool])
    assert caught.value.status == 400 and caught.value.param == "tools"


# whatever the grammar can produce

WORDS = st.sampled_from(["a", "null", "C", "x y", "</parameter>", "true", "é"])
CORES = st.one_of(
    st.just(TEXT), st.just({"type": "string", "format": "date"}), st.just({}), st.just(UNIT),
    st.just({"type": "string", "pattern": r"^[a-c]{1,3}\.\d$"}), st.just({"type": "number"}),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
              st.integers(0, 5), st.integers(0, 9)),
    st.builds(lambda words: {"enum": words}, st.lists(WORDS, min_size=1, max_size=3)),
    st.builds(lambda word: {"const": word}, WORDS | st.integers(0, 9)),
    st.builds(lambda kinds: {"type": kinds}, st.lists(st.sampled_from(
        ["string", "null", "boolean", "integer"]), min_size=1, max_size=3, unique=True)),
    st.just({"enum": ["C", None, 3]}), st.just({"type": "integer", "minimum": -3, "maximum": 12}),
)  # fmt: skip
SCHEMAS = st.recursive(
    CORES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, st.just({"type": "null"}) | inner),
        st.builds(lambda each: {"type": "array", "items": each, "maxItems": 3}, inner),
        st.builds(lambda each: {"type": "object", "properties": {"k": each}}, inner),
        st.builds(lambda each: {"allOf": [each]}, inner),
    ),
    max_leaves=4,
)
DEFINITIONS = {"unit": {"type": "string", "enum": ["C", "F"]}}
PLAIN = {"string": str, "number": int | float, "integer": int, "boolean": bool,
         "null": type(None), "array": list, "object": dict}  # fmt: skip


def is_valid(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value matches one of SCHEMAS."""
    if "$ref" in schema:
        return value in ("C", "F")
    for word in ("anyOf", "allOf"):
        if word in schema:
            return any(is_valid(value, each) for each in schema[word])
    if "enum" in schema or "const" in schema:
        return any(json.dumps(value) == json.dumps(each)
                   for each in schema.get("enum", [schema.get("const")]))  # fmt: skip
    kinds = schema.get("type", list(PLAIN))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if isinstance(value, bool) and "boolean" not in kinds:
        return False
    if not any(isinstance(value, PLAIN[kind]) for kind in kinds):
        return False
    if isinstance(value, str):
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
        shape = schema.get("pattern") or (r"^\d{4}-\d\d-\d\d$" if "format" in schema else "")
        return fits and re.search(shape, value) is not None
    if isinstance(value, int) and "minimum" in schema:
        return bool(schema["minimum"] <= value <= schema["maximum"])
    if isinstance(value, list) and "items" in schema:
        return len(value) <= 3 and all(is_valid(each, schema["items"]) for each in value)
    if isinstance(value, dict) and "properties" in schema:
        return all(name == "k" and is_valid(each, schema["properties"]["k"])
                   for name, each in value.items())  # fmt: skip
    return True


def derive(grammar: str, rng: random.Random) -> str:
    """Write what a grammar admits but for upper bounds of repetitions, by chance.

    It ends soon once it has grown.
    """
    rules = gbnf.parse(grammar)
    depth = [10**9] * len(rules.names)  # of the shortest derivation
    changed = True
    while changed:
        changed = False
        for i, ways in enumerate(rules.alternatives):
            best = min(_cost(way, depth) for way in ways)
            changed, depth[i] = changed or best < depth[i], min(best, depth[i])
    todo: list[gbnf.Symbol] = [rules.ids["root"]]
    found: list[str] = []
    n_steps = 0
    while todo:
        n_steps += 1
        symbol = todo.pop()
        if isinstance(symbol, gbnf.Chars):
            liked = [c for c in 'a<>/parmete\n"\\ln{:é' if symbol.matches(ord(c))]
            low, high = symbol.ranges[0] if not symbol.negated else (0x20, 0x7E)
            other = next(chr(c) for c in (rng.randint(low, min(high, low + 80)), *range(32, 400))
                         if symbol.matches(c))  # fmt: skip
            found.append(rng.choice(liked) if liked and rng.random() < 0.7 else other)
            continue
        ways = rules.alternatives[symbol]
        if n_steps > 300:
            least = min(_cost(way, depth) for way in ways)
            ways = [way for way in ways if _cost(way, depth) == least]
        todo.extend(reversed(rng.choice(ways)))
    return "".join(found)


def _cost(way: gbnf.Sequence, depth: list[int]) -> int:
    return 1 + sum(depth[each] if isinstance(each, int) else 0 for each in way)


SHAPES = st.dictionaries(st.sampled_from(["a", "b c", "n"]), SCHEMAS, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    members=SHAPES, others=st.none() | SCHEMAS, n_required=st.integers(0, 3),
    seed=st.integers(0, 1 << 32),
)  # fmt: skip
@example(
    members={"a": {"anyOf": [{"enum": ["null"]}, {"type": "null"}]}}, others=None, n_required=1,
    seed=3,
)  # fmt: skip
def test_what_the_grammar_writes_is_read_as_valid_arguments(
    tokenizer: Tokenizer, members: dict[str, Any], others: Any, n_required: int, seed: int
) -> None:
    """However it is cut; and what is optional may be missing, but nothing else."""
    required = list(members)[:n_required]
    parameters = {"type": "object", "properties": members, "required": required,
                  "additionalProperties": False if others is None else others,
                  "$defs": DEFINITIONS}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    found, rng = plan([tool], "required"), random.Random(seed)
    for _ in range(3):
        answer = derive(found.options["grammar"], rng)
        if not accepts(tokenizer, found.options["grammar"], answer):  # it is beyond a bound
            continue
        cuts = sorted(rng.randrange(len(answer) + 1) for _ in range(6))
        pieces = [answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(answer)])]
        text, calls = lab.joined(read(found, pieces))
        assert text == "" and calls
        assert (text, calls) == lab.joined(read(found, [answer])), answer
        for _, arguments in lab.parsed(calls):
            assert set(required) <= set(arguments), answer
            for name, value in arguments.items():
                assert is_valid(value, members[name] if members else others), answer


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["path", "x"]), st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)))  # fmt: skip
def test_calls_of_earlier_turns_are_told_as_they_are_to_be_written(arguments: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object",
        "properties": {name: TEXT if isinstance(each, str) else {"not a text": True}
                       for name, each in arguments.items()},
    }}}  # fmt: skip
    found = plan([tool])
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [lab.said("f", arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    messages = messages_for(lab.TAGS, turns, found)
    prompt = render(lab.TAGS, messages, bos_token="", eos_token="", tools=found.options["tools"])
    assert "<|im_start|>tool\ndone" in prompt
    texts = [each for each in arguments.values() if isinstance(each, str)]
    if not any("\n</parameter>" in f"\n{each}" for each in texts):
        said = prompt[prompt.index("<tool_call>") : prompt.rindex("</tool_call>") + 12]
        _, calls = lab.joined(read(found, [said]))
        assert lab.parsed(calls) == [("f", arguments)]
