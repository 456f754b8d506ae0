"""Calls read out of an answer while it is written, wherever it is cut."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeroute.server.tool_calls import CallArguments, CallBegin, Part, TextPart, ToolReader
from edgeroute.server.tool_styles import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, Style
from tests.server.tools_lab import joined, parsed

NAMES = ("get_weather", "get_weather_2", "add")
STYLES = {"hermes": HERMES, "mistral": MISTRAL, "args": MISTRAL_ARGS, "llama": LLAMA}

PARIS, SUM = '{"city": "Paris"}', '{"a": 1, "b": [2, {"c": "}]\\"{"}]}'
H1 = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
H2 = f'<tool_call>{{"name":"add","arguments":{SUM}}}</tool_call>'
B1 = f'{{"name": "get_weather", "arguments": {PARIS}}}'
L1 = f'{{"name": "add", "parameters": {SUM}}}'
P, S = ("get_weather", PARIS), ("add", SUM)

CASES: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    "nothing": ("hermes", "", "", []),
    "text": ("hermes", " a <b> \n", " a <b> \n", []),
    "call": ("hermes", H1, "", [P]),
    "text, then a call": ("hermes", f"Let me see.\n\n{H1}\n", "Let me see.", [P]),
    "two calls": ("hermes", f"{H1}\n{H2}", "", [P, S]),
    "text between and behind": ("hermes", f"a\n{H1} b {H2} c", "abc", [P, S]),
    "a name that begins another": (
        "hermes", H1.replace("weather", "weather_2"), "", [("get_weather_2", PARIS)]
    ),
    "marker twice": ("hermes", "<tool_call>" + H1, "<tool_call>", [P]),
    "marker begun twice": ("hermes", "<tool_<tool_" + H1, "<tool_<tool_", [P]),
    "unknown name": ("hermes", H1.replace("weather", "wether"), None, []),
    "no object": ("hermes", H1.replace(PARIS, '"x"'), None, []),
    "marker alone": ("hermes", "the tag <tool_call> is", None, []),
    "marker cut": ("hermes", "the tag <tool_ca", None, []),
    "head cut": ("hermes", '<tool_call>\n{"name": "ad', None, []),
    "arguments cut": ("hermes", H1[:60], "", [("get_weather", PARIS[:11])]),
    "end cut": ("hermes", H1[:-3], "", [P]),
    "no end": ("hermes", H1.replace("</tool_call>", "and on"), "}\nand on", [P]),
    "too much space": ("hermes", H1.replace(": ", ":" + " " * 70), None, []),
    "bare": ("hermes", f" {B1}", "", [P]),
    "bare, several": ("hermes", f"{B1}\n{B1.replace(PARIS, '{}')}", "",
                      [P, ("get_weather", "{}")]),
    "fenced": ("hermes", f"```json\n{B1}\n```", "", [P]),
    "fenced without a name": ("hermes", f"```\n{B1}\n```\n", "", [P]),
    "bare behind text": ("hermes", f"So: {B1}", None, []),
    "bare of an unknown name": ("hermes", '{"name": "Ann", "arguments": {}}', None, []),
    "other JSON": ("hermes", '```json\n{"name": "get_weather"}\n```', None, []),
    "mistral": ("mistral", f"[TOOL_CALLS][{B1}]", "", [P]),
    "mistral, two": ("mistral", f"[TOOL_CALLS] [{B1}, {B1}]", "", [P, P]),
    "mistral, cut between": ("mistral", f"[TOOL_CALLS] [{B1},", "", [P]),
    "mistral, bare": ("mistral", B1, None, []),
    "mistral, text in brackets": ("mistral", "[TOOL] [1]", None, []),
    "args": ("args", f"ok [TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[ARGS]{SUM}",
             "ok", [P, S]),
    "args, unknown": ("args", "[TOOL_CALLS]shell[ARGS]{}", None, []),
    "llama": ("llama", f"\n{L1}", "", [S]),
    "llama, text": ("llama", f"It is {L1}", None, []),
    "llama, other JSON": ("llama", '{"name": "Ann"}', None, []),
    "llama, something behind": ("llama", f"{L1} {L1}", L1, [S]),
}  # fmt: skip


def read(style: Style, pieces: list[str], parallel: bool = True) -> list[Part]:
    reader = ToolReader(style, NAMES, parallel=parallel)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    assert reader.n_calls == sum(isinstance(part, CallBegin) for part in parts)
    assert reader.push("more") == reader.finish() == []
    return parts


@pytest.mark.parametrize(("style", "answer", "text", "calls"), CASES.values(), ids=CASES.keys())
def test_answers(style: str, answer: str, text: str | None, calls: list[Any]) -> None:
    """`None` stands for text that comes out as it went in."""
    expected = (answer if text is None else text, calls)
    assert joined(read(STYLES[style], [answer])) == expected
    assert joined(read(STYLES[style], list(answer))) == expected


@pytest.mark.parametrize(
    ("answer", "text"), [(f"{H1} {H2}", ""), (f"{B1}\n{B1}", ""), (f"a{H1}b{H1}", "a")]
)
def test_only_the_first_call_where_there_may_be_one(answer: str, text: str) -> None:
    assert joined(read(HERMES, [answer], parallel=False)) == (text, [P])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolReader(HERMES, NAMES, parallel=True)
    assert reader.push(H1[:45]) == []
    begin, *rest = reader.push(H1[45:51])
    assert isinstance(begin, CallBegin) and rest == [CallArguments(0, '{"')]
    assert reader.push("ci") == [CallArguments(0, "ci")]
    assert not reader.done and reader.n_calls == 1


def test_text_is_not_held_longer_than_needed() -> None:
    reader = ToolReader(HERMES, NAMES, parallel=True)
    assert reader.push("Hello <") == [TextPart("Hello")]
    assert reader.push("b>") == [TextPart(" <b>")]


FRAGMENTS = st.sampled_from([
    H1, H2, B1, L1, f"[TOOL_CALLS] [{B1}, ", B1, "]", f"[TOOL_CALLS]add[ARGS]{SUM}",
    "<tool_call>", "</tool_call>", "<", "{", "}", '"', "```json\n", "```", "\n", " ", "é", "a",
    '{"name": "', "get_weather", "add", '", "arguments": ', "[TOOL_CALLS]", "[ARGS]", "\\", ",",
]) | st.text(max_size=5)  # fmt: skip


@given(
    style=st.sampled_from(sorted(STYLES)),
    fragments=st.lists(FRAGMENTS, max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    parallel=st.booleans(),
)
@example("hermes", ["<tool_call>", H1, "<", "x"], [3, 11, 12, 40], True)
def test_cuts_change_nothing(
    style: str, fragments: list[str], cuts: list[int], parallel: bool
) -> None:
    whole = "".join(fragments)
    at = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(at)]
    once = joined(read(STYLES[style], [whole], parallel))
    assert joined(read(STYLES[style], pieces, parallel)) == once
    assert joined(read(STYLES[style], list(whole), parallel)) == once
    text, calls = once
    if not calls:
        assert text == whole
    assert parallel or len(calls) <= 1


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_any_arguments_come_through(value: Any) -> None:
    text = json.dumps({"v": value}, ensure_ascii=False)
    for style, key in ((HERMES, "arguments"), (LLAMA, "parameters")):
        answer = f'{{"name": "add", "{key}": {text}}}'
        if style.marker:
            answer = f"<tool_call>\n{answer}\n</tool_call>"
        assert parsed(joined(read(style, list(answer)))[1]) == [("add", {"v": value})]


def test_a_hostile_answer_costs_little() -> None:
    """Nothing is read over and over: a second of text would take minutes if it were."""
    reader = ToolReader(HERMES, NAMES, parallel=True)
    for text in ("<tool_call>" * 20_000, "<tool_call>\n" + " " * 200_000, '{"name": "add"' * 9999):
        for i in range(0, len(text), 1000):
            reader.push(text[i : i + 1000])
    reader.finish()
    assert reader.n_calls == 0
