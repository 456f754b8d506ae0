"""Bodies: every field's bounds, what is taken without effect, and what is refused with a word."""

from typing import Any

import pytest

from edgeroute.server.bodies import ChatBody, CompletionBody, EmbeddingBody, FeedbackBody
from edgeroute.server.chat import ChatQuestion
from edgeroute.server.completions import CompletionQuestion, split_inputs
from edgeroute.server.errors import ApiError
from edgeroute.server.naming import Named, choose_adapter, find_model
from edgeroute.server.reading import MAX_VALUES, parse_body
from edgeroute.server.records import ServerParams
from tests.server.lab import OneModel

PARAMS = ServerParams()


def encoded(value: object) -> bytes:
    import json

    return json.dumps(value).encode()


def ask_chat(**fields: Any) -> dict[str, Any]:
    """What the engine is asked for by a chat request of these fields."""
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    return ChatQuestion(parse_body(encoded(body), ChatBody), PARAMS)._options


def ask_completion(**fields: Any) -> CompletionQuestion:
    body = {"prompt": "hi"} | fields
    return CompletionQuestion(parse_body(encoded(body), CompletionBody), PARAMS)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask_chat(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff", b'{"messages": "\xff"}', b'{"a": NaN}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": []} x',
    b'{"metadata": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_000 + b"}",
    b'{"tools": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", b"\0" * 100,
    b'{"prompt": [' + b"1," * (MAX_VALUES + 1) + b"1]}",
])  # fmt: skip
def test_what_is_no_request_is_a_400(raw: bytes) -> None:
    for kind in (ChatBody, CompletionBody, EmbeddingBody, FeedbackBody):
        with pytest.raises(ApiError) as caught:
            parse_body(raw, kind)
        assert caught.value.status == 400
        assert len(caught.value.message) < 600


def test_an_unknown_field_is_refused_as_openai_does() -> None:
    error = refusal(temprature=1)
    assert error.message == "Unrecognized request argument supplied: temprature"
    assert error.param == "temprature"
    error = refusal(edgeroute={"topk": 1})
    assert error.param == "edgeroute"
    assert "topk" in error.message
    error = refusal(messages=[{"role": "user", "content": "x", "cache": 1}])
    assert error.param == "messages[0]"


@pytest.mark.parametrize(("name", "values"), [
    ("n", [0, -1, 17, 1.5, True, "2", 10**30]),
    ("temperature", [-0.1, 2.1, "1", 1e300, True]),
    ("top_p", [-0.1, 1.1]),
    ("presence_penalty", [-2.1, 2.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("seed", [2**63, -(2**63) - 1, 1.5, "1", 10**30]),
    ("stop", ["", [""], ["x"] * 65, "x" * 1025, [1], 1]),
    ("max_tokens", [0, -1, 2**31, 1.5, "1"]),
    ("max_completion_tokens", [0, -1, 2**31]),
    ("logprobs", [1, "true"]),
    ("logit_bias", [{"1": 101}, {"1": -101}, {"1": "x"}, {str(i): 1 for i in range(1025)}]),
    ("stream", [1, "true"]),
    ("stream_options", [{"include_usage": 1}, {"x": 1}, True]),
    ("messages", [[], [{}], ["x"], [{"role": "boss", "content": "x"}], "x", {},
                  [{"role": "user", "content": 1}], [{"role": "user", "content": "x"}] * 2049]),
    ("model", ["", "x" * 257, 1]),
    ("response_format", [{"type": "xml"}, {}, "json", {"type": "json_object", "x": 1}]),
    ("tools", [{}, "x", [1], [{}] * 129]),
    ("user", ["x" * 513, 1]),
    ("metadata", ["x", {str(i): "x" for i in range(65)}]),
    ("edgeroute", [{"top_k": -1}, {"min_p": 1.1}, {"repeat_penalty": 0}, {"timeout_s": 0},
                   {"timeout_s": 1e9}, {"prefix": "some"}, {"grammar": ""}, {"depth": ""},
                   {"session": "x" * 257}, {"stats": 1}, {"adapter": {"x": 101}}, [], "x"]),
])  # fmt: skip
def test_bounds_of_chat(name: str, values: list[object]) -> None:
    for value in values:
        error = refusal(**{name: value})
        assert error.param is not None, value
        assert error.param.startswith(name)


@pytest.mark.parametrize(("name", "values"), [
    ("max_tokens", [-1, 2**31]), ("logprobs", [-1, 6, True]), ("best_of", [0, 21]),
    ("prompt", [1, {}, [[-1]], [[2**31]], [1.5]]), ("echo", [1]),
])  # fmt: skip
def test_bounds_of_completions(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ApiError) as caught:
            ask_completion(**{name: value})
        assert (caught.value.param or "").startswith(name)


def test_what_is_missing_is_named() -> None:
    for kind, name in ((ChatBody, "messages"), (CompletionBody, "prompt"),
                       (EmbeddingBody, "input"), (FeedbackBody, "id")):  # fmt: skip
        with pytest.raises(ApiError, match="Missing required parameter") as caught:
            parse_body(b"{}", kind)
        assert (caught.value.param, caught.value.code) == (name, "missing_required_parameter")


@pytest.mark.parametrize("fields", [
    {"user": "u"}, {"metadata": {"a": "b"}}, {"store": False}, {"service_tier": "auto"},
    {"service_tier": "default"}, {"safety_identifier": "s"}, {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"}, {"prediction": {"type": "content", "content": "x"}},
    {"modalities": ["text"]}, {"reasoning_effort": "none"}, {"verbosity": "medium"},
    {"parallel_tool_calls": True}, {"stream": True, "stream_options": {}},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
    {name: None for name in ("store", "audio", "tools", "stop", "n", "seed", "edgeroute",
                             "web_search_options", "functions", "model", "stream_options")},
])  # fmt: skip
def test_fields_without_effect_change_nothing(fields: dict[str, Any]) -> None:
    assert ask_chat(**fields) == ask_chat()


@pytest.mark.parametrize("fields", [
    {"store": True}, {"service_tier": "flex"}, {"modalities": ["text", "audio"]},
    {"modalities": []}, {"audio": {"voice": "x"}}, {"reasoning_effort": "high"},
    {"verbosity": "low"}, {"web_search_options": {}}, {"functions": [{"name": "f"}]},
    {"function_call": "auto"},
])  # fmt: skip
def test_fields_that_would_change_the_answer_are_refused(fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert error.param in fields
    assert error.code == "unsupported_parameter"
    assert "leave it out" in error.message


def test_stream_options_need_a_stream() -> None:
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"


@pytest.mark.parametrize(("message", "param"), [
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
     "messages[0].content[0]"),
    ({"role": "user", "content": [{"type": "text", "text": "a"},
                                  {"type": "input_audio", "input_audio": {}}]},
     "messages[0].content[1]"),
    ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages[0].content[0]"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
    ({"role": "user"}, "messages[0].content"),
    ({"role": "assistant", "content": None}, "messages[0].content"),
    ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
    ({"role": "assistant", "content": "x", "function_call": {}}, "messages[0].function_call"),
    ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
])  # fmt: skip
def test_a_message_that_is_no_text_names_the_part(message: dict[str, Any], param: str) -> None:
    assert refusal(messages=[message]).param == param


def test_texts_of_a_message_are_put_together() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse_body(encoded({"messages": [
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": None, "annotations": [], "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]}), ChatBody)  # fmt: skip
    user, refused, calls, result = ChatQuestion(body, PARAMS)._messages
    assert user == {"role": "user", "content": "ab", "name": "Ada"}
    assert refused == {"role": "assistant", "content": "no"}
    assert calls["content"] == ""
    assert calls["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert result == {"role": "tool", "content": "1", "tool_call_id": "c"}


def test_sampling_is_openais_unless_asked() -> None:
    assert ask_chat() == {"temperature": 1.0, "max_tokens": 2**31 - 1}
    asked = ask_chat(
        temperature=0, top_p=0.5, presence_penalty=1, frequency_penalty=-1, seed=-1, stop=["x"],
        logit_bias={"5": -100}, max_completion_tokens=9, logprobs=True, top_logprobs=3,
        edgeroute={"top_k": 4, "min_p": 0.1, "repeat_penalty": 1.1, "depth": "full",
                   "steps": "off", "speculate": False, "prefix": "all", "session": "s"},
    )  # fmt: skip
    assert asked == {
        "temperature": 0, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": -1,
        "seed": 2**63 - 1, "stop": ["x"], "logit_bias": {5: -100}, "max_tokens": 9, "logprobs": 3,
        "top_k": 4, "min_p": 0.1, "repeat_penalty": 1.1, "depth": "full", "steps": "off",
        "speculate": False, "prefix": "all", "session": "s",
    }  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), [
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"), ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
     "response_format.json_schema.name"),
    ({"response_format": {"type": "json_object"}, "edgeroute": {"grammar": "x"}},
     "edgeroute.grammar"),
    ({"n": 2, "edgeroute": {"session": "s"}}, "n"),
])  # fmt: skip
def test_what_cannot_go_together(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize(("fields", "param"), [
    ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"), ({"echo": True, "logprobs": 1},
                                                               "echo"),
    ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 5, "n": 13}, "prompt"),
    ({"prompt": ["a", "b"], "edgeroute": {"session": "s"}}, "prompt"),
])  # fmt: skip
def test_what_completions_refuse(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask_completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_the_server_bounds_all_answers() -> None:
    body = parse_body(encoded({"prompt": "x", "max_tokens": 99}), CompletionBody)
    assert CompletionQuestion(body, ServerParams(max_tokens=7))._options["max_tokens"] == 7
    body = parse_body(encoded({"prompt": "x"}), CompletionBody)
    assert CompletionQuestion(body, ServerParams(max_tokens=70))._options["max_tokens"] == 16


def test_inputs_of_one_kind() -> None:
    assert split_inputs("a", "input") == ["a"]
    assert split_inputs(["a", "b"], "input") == ["a", "b"]
    assert split_inputs([1, 2], "input") == [[1, 2]]
    assert split_inputs([[1], [2, 3]], "input") == [[1], [2, 3]]
    for wrong in ([], ["a", 1], [[1], 2], [[1], "a"]):
        with pytest.raises(ApiError) as caught:
            split_inputs(wrong, "input")  # type: ignore[arg-type]
        assert caught.value.param == "input"


class Named2(OneModel):
    """Several names, of which none is opened here."""

    def __init__(self, *names: str) -> None:
        self._names = names

    @property
    def names(self) -> tuple[str, ...]:
        return self._names


def test_names_of_models() -> None:
    models = Named2("first", "second", "a:b", "a")
    assert find_model(models, None) == Named("first")
    assert find_model(models, "base") == Named("first")
    assert find_model(models, "base:poems") == Named("first", "poems")
    assert find_model(models, "second:auto") == Named("second", "auto")
    assert find_model(models, "a:b") == Named("a:b")
    assert find_model(models, "a:b:c") == Named("a:b", "c")
    assert find_model(models, "a:c") == Named("a", "c")
    assert find_model(Named2("x", "base"), "base:y") == Named("base", "y")
    for unknown in ("third", "firsts", "first:", ":", "base:", "First", "\n" * 99):
        with pytest.raises(ApiError, match="does not exist") as caught:
            find_model(models, unknown)
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        assert caught.value.param == "model"
    with pytest.raises(ApiError) as caught:
        find_model(Named2(), "base")
    assert caught.value.status == 404


def test_an_adapter_is_named_once() -> None:
    assert choose_adapter(Named("a", "x"), None) == "x"
    assert choose_adapter(Named("a"), {"x": 0.5}) == {"x": 0.5}
    assert choose_adapter(Named("a"), None) is None
    with pytest.raises(ApiError) as caught:
        choose_adapter(Named("a", "x"), "x")
    assert caught.value.param == "edgeroute.adapter"
