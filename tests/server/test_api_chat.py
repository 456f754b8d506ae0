"""Chat: shapes, streams that say what whole answers say, constraints, tools, names of models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from tests.server.api_lab import CHAT, HELLO, Api, api, chat_text, choice, events

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
COLOUR = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}},
    "required": ["name", "dark"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tiny_path: Path) -> Iterator[Api]:
    with Runtime(tiny_path, n_ctx=1024, n_kv=8192, threads=1) as runtime, api(runtime) as found:
        yield found


def stream(served: Api, **body: Any) -> list[dict[str, Any]]:
    answer = served.post(CHAT, HELLO | body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    return events(answer.text)


def test_a_whole_answer(served: Api) -> None:
    told = served.chat(max_tokens=7, temperature=0)
    assert set(told) == {"id", "object", "created", "model", "system_fingerprint", "choices",
                         "usage", "edgeroute"}  # fmt: skip
    assert told["id"].startswith("chatcmpl-")
    assert (told["object"], told["model"]) == ("chat.completion", "base")
    assert told["system_fingerprint"].startswith("fp_")
    (only,) = told["choices"]
    assert only["message"].keys() == {"role", "content", "refusal"}
    assert only["message"]["role"] == "assistant"
    assert (only["index"], only["finish_reason"], only["logprobs"]) == (0, "length", None)
    messages = [dict(each) for each in HELLO["messages"]]
    direct = served.runtime.generate(messages=messages, max_tokens=7)
    assert only["message"]["content"] == direct.text
    usage = told["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["prompt_tokens"] == direct.stats.n_prompt
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert told["edgeroute"]["id"].startswith("gen-")
    assert told["edgeroute"]["stats"]["n_generated"] == 7
    assert told["edgeroute"]["adapter"] is None


def test_cached_tokens_are_told(served: Api) -> None:
    long = {"messages": [{"role": "user", "content": "hello there " * 30}]}
    first = served.chat(**long, max_tokens=2, temperature=0, edgeroute={"prefix": "off"})
    again = served.chat(**long, max_tokens=2, temperature=0)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"][0]["message"] == first["choices"][0]["message"]


def test_statistics_only_where_they_are_wanted(served: Api) -> None:
    told = served.chat(max_tokens=2, edgeroute={"stats": False})["edgeroute"]
    assert set(told) == {"id", "adapter", "seed", "finish_reason"}


def test_a_stream_says_what_a_whole_answer_says(served: Api) -> None:
    ask = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "n": 3, "logprobs": True,
           "top_logprobs": 2}  # fmt: skip
    whole = served.chat(**ask)
    told = stream(served, **ask, stream_options={"include_usage": True})
    assert {event["object"] for event in told} == {"chat.completion.chunk"}
    assert len({event["id"] for event in told}) == 1
    *pieces, last = told
    assert last["choices"] == []
    cut = {k: v for k, v in whole["usage"].items() if k != "prompt_tokens_details"}
    assert {k: v for k, v in last["usage"].items() if k != "prompt_tokens_details"} == cut
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in pieces)
    for i in range(3):
        first, *_, end = choice(pieces, i)
        assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert end["delta"] == {}
        expected = whole["choices"][i]
        assert end["finish_reason"] == expected["finish_reason"]
        assert chat_text(pieces, i) == expected["message"]["content"]
        figures = [each["logprobs"]["content"] for each in choice(pieces, i) if each["logprobs"]]
        tokens = [entry["token"] for part in figures for entry in part]
        assert tokens == [entry["token"] for entry in expected["logprobs"]["content"]]
    told_of = [event["edgeroute"] for event in pieces if "edgeroute" in event]
    assert len({each["id"] for each in told_of}) == 3
    texts = {each["message"]["content"] for each in whole["choices"]}
    assert len(texts) == 3, "each choice draws by itself"
    assert len(whole["edgeroute"]["choices"]) == 3


def test_without_usage_nothing_is_said_of_it(served: Api) -> None:
    told = stream(served, max_tokens=3)
    assert all("usage" not in event for event in told)
    assert told[-1]["choices"][0]["finish_reason"] == "length"


def test_the_same_seed_gives_the_same_answer(served: Api) -> None:
    ask = {"max_tokens": 30, "temperature": 1.2, "top_p": 0.9, "edgeroute": {"top_k": 50}}
    texts = [served.chat(**ask, seed=seed)["choices"][0]["message"]["content"]
             for seed in (7, 7, 8, -3, -3)]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]
    told = served.chat(**ask)
    again = served.chat(**ask, seed=told["edgeroute"]["seed"])
    assert again["choices"] == told["choices"]


def test_log_probabilities(served: Api) -> None:
    told = served.chat(max_tokens=5, temperature=0, logprobs=True, top_logprobs=3)
    content = told["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        values = [each["logprob"] for each in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert entry["logprob"] == values[0] <= 0
    none = served.chat(max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in none)


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(served: Api) -> None:
    ask: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 11}
    text = served.chat(**ask)["choices"][0]["message"]["content"]
    stop = text[10:13]
    told = served.chat(**ask, stop=["never there", stop])["choices"][0]
    assert told["message"]["content"] == text[: text.index(stop)]
    assert told["finish_reason"] == "stop"
    pieces = stream(served, **ask, stop=stop)
    assert chat_text(pieces) == text[: text.index(stop)]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_biased_tokens(served: Api) -> None:
    told = served.chat(max_tokens=4, temperature=0, logit_bias={"65": 100}, logprobs=True)
    tokens = {entry["token"] for entry in told["choices"][0]["logprobs"]["content"]}
    assert len(tokens) == 1
    error = served.refused(CHAT, HELLO | {"logit_bias": {"99999": 1}})
    assert error["param"] == "logit_bias"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_obeys_its_schema(served: Api, streaming: bool) -> None:
    wanted = {"type": "json_schema",
              "json_schema": {"name": "colour", "schema": COLOUR, "strict": True}}  # fmt: skip
    ask = {"response_format": wanted, "temperature": 1.5, "seed": 2, "max_tokens": 200}
    if streaming:
        text = chat_text(stream(served, **ask))
    else:
        text = served.chat(**ask)["choices"][0]["message"]["content"]
    found = json.loads(text)
    assert set(found) == {"name", "dark"}
    assert found["name"] in ("red", "blue")


def test_json_object(served: Api) -> None:
    told = served.chat(
        response_format={"type": "json_object"}, max_tokens=30, temperature=1, seed=1
    )
    assert told["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize("schema", [
    {"type": "strin"}, {"type": "object", "madeUp": 1}, {"$ref": "#/nowhere"},
    {"type": "string", "pattern": "("}, {"enum": []}, {"anyOf": []},
])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_a_schema_that_cannot_be_enforced_is_a_400(
    served: Api, schema: dict[str, Any], streaming: bool
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = served.refused(CHAT, HELLO | {"response_format": wanted, "stream": streaming})
    assert error["param"] == "response_format"
    assert error["code"] == "invalid_grammar"


def test_a_grammar_of_ones_own(served: Api) -> None:
    told = served.chat(edgeroute={"grammar": 'root ::= "yes" | "no"'}, max_tokens=20)
    assert told["choices"][0]["message"]["content"] in ("yes", "no")
    error = served.refused(CHAT, HELLO | {"edgeroute": {"grammar": "root = x"}})
    assert error["param"] == "edgeroute.grammar"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_that_is_required_comes(served: Api, streaming: bool) -> None:
    ask = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False,
           "max_tokens": 200, "temperature": 1.0, "seed": 4}  # fmt: skip
    if streaming:
        parts = choice(stream(served, **ask))
        calls = [each["delta"]["tool_calls"][0] for each in parts if "tool_calls" in each["delta"]]
        assert calls[0]["id"]
        assert (calls[0]["index"], calls[0]["type"]) == (0, "function")
        assert calls[0]["function"] == {"name": "weather", "arguments": ""}
        arguments = "".join(each["function"]["arguments"] for each in calls)
        reason = parts[-1]["finish_reason"]
    else:
        told = served.chat(**ask)["choices"][0]
        (call,) = told["message"]["tool_calls"]
        assert told["message"]["content"] is None
        assert call["function"]["name"] == "weather"
        arguments, reason = call["function"]["arguments"], told["finish_reason"]
    found = json.loads(arguments)
    assert found["city"] in ("Paris", "Rome")
    assert found["days"] in (1, 2)
    assert reason == "tool_calls"


def test_a_conversation_with_calls_is_taken(served: Api) -> None:
    called = {"id": "call_1", "type": "function",
              "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    told = served.chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather in Rome?", "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[WEATHER], tool_choice="none", max_tokens=3,
    )  # fmt: skip
    assert "tool_calls" not in told["choices"][0]["message"]


@pytest.mark.parametrize(("fields", "param"), [
    ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
     "tool_choice"),
    ({"tools": [WEATHER], "edgeroute": {"grammar": 'root ::= "x"'}}, "edgeroute.grammar"),
])  # fmt: skip
def test_tools_that_cannot_be_used(served: Api, fields: dict[str, Any], param: str) -> None:
    assert (served.refused(CHAT, HELLO | fields)["param"] or "").startswith(param)


def test_a_developer_is_the_system_where_the_template_knows_no_other(served: Api) -> None:
    asked = [served.chat(messages=[{"role": role, "content": "Be brief."},
                                   {"role": "user", "content": "hi"}], max_tokens=5, temperature=0)
             for role in ("developer", "system")]  # fmt: skip
    assert asked[0]["usage"]["prompt_tokens"] == asked[1]["usage"]["prompt_tokens"]
    assert asked[0]["choices"] == asked[1]["choices"]


def test_models_that_are_not_there(served: Api) -> None:
    for name in ("nope", "base:poems", "base:auto"):
        error = served.refused(CHAT, HELLO | {"model": name}, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    error = served.refused(CHAT, HELLO | {"edgeroute": {"adapter": "poems"}})
    assert error["param"] == "edgeroute.adapter"


def test_a_prompt_too_long_is_told_as_openai_does(served: Api) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 2000}]}
    for streaming in (False, True):
        error = served.refused(CHAT, long | {"stream": streaming})
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_no_limit_means_what_the_context_has_left(served: Api) -> None:
    told = served.chat(temperature=0, logit_bias={"65": 100})  # one letter for ever
    assert told["choices"][0]["finish_reason"] == "length"
    assert told["usage"]["total_tokens"] == 1025  # the last token needs no cell


def test_other_methods_are_refused(served: Api) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        assert served.client.request(method, CHAT).status_code == 405


def test_jobs_tell_what_happened(served: Api) -> None:
    served.watcher.tokens.clear()
    told = served.chat(max_tokens=9, temperature=0, n=2)
    job = served.last_job()
    assert (job.status, job.error, job.endpoint, job.model) == (200, None, "chat", "base")
    assert (job.n_generated, job.streaming, len(job.generations)) == (18, False, 2)
    assert job.n_prompt == told["usage"]["prompt_tokens"]
    assert job.started is not None and job.first_token is not None
    assert job.last_token is not None and job.ended is not None
    assert job.created <= job.started <= job.first_token <= job.last_token <= job.ended
    assert sum(n for _, n, _ in served.watcher.tokens) == 18
    assert all(seconds >= 0 for _, _, seconds in served.watcher.tokens)
    served.refused(CHAT, HELLO | {"edgeroute": {"grammar": "x"}})
    job = served.last_job()
    assert job.status == 400
    assert job.error is not None and "grammar" in job.error


def test_a_real_model_says_the_same_both_ways(smollm2: Runtime) -> None:
    ask = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 16,
           "temperature": 0}  # fmt: skip
    with api(smollm2) as served:
        whole = served.chat(**ask)["choices"][0]["message"]["content"]
        assert chat_text(stream(served, **ask)) == whole
        assert whole == smollm2.generate(messages=ask["messages"], max_tokens=16).text
