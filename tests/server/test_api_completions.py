"""Completions: several prompts, echo, the older shape of log-probabilities, streams."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from tests.server.api_lab import COMPLETIONS, Api, api, choice, events


@pytest.fixture(scope="module")
def served(tiny_path: Path) -> Iterator[Api]:
    with Runtime(tiny_path, n_ctx=256, n_kv=4096, threads=1) as runtime, api(runtime) as found:
        yield found


def stream(served: Api, **body: Any) -> list[dict[str, Any]]:
    answer = served.post(COMPLETIONS, {"prompt": "hello there"} | body | {"stream": True})
    assert answer.status_code == 200, answer.text
    return events(answer.text)


def text_of(told: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(each["text"] for each in choice(told, index))


def test_a_whole_answer(served: Api) -> None:
    told = served.complete(temperature=0)
    assert told["id"].startswith("cmpl-")
    assert told["object"] == "text_completion"
    (only,) = told["choices"]
    assert set(only) == {"text", "index", "logprobs", "finish_reason"}
    direct = served.runtime.generate("hello there", max_tokens=16)
    assert only["text"] == direct.text
    assert told["usage"]["prompt_tokens"] == direct.stats.n_prompt
    assert told["usage"]["completion_tokens"] == 16, "OpenAI's default"
    assert only["finish_reason"] == "length"


def test_prompts_and_choices_are_numbered_prompt_by_prompt(served: Api) -> None:
    ask: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "n": 2}
    alone = [served.complete(prompt=prompt, **ask) for prompt in ("hello there", "good day to you")]
    both = served.complete(prompt=["hello there", "good day to you"], **ask)
    expected = [each["text"] for told in alone for each in told["choices"]]
    assert [each["text"] for each in both["choices"]] == expected
    assert [each["index"] for each in both["choices"]] == [0, 1, 2, 3]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert both["usage"][name] == sum(told["usage"][name] for told in alone)
    told = stream(served, prompt=["hello there", "good day to you"], **ask)
    assert [text_of(told, i) for i in range(4)] == expected


def test_token_ids_are_a_prompt(served: Api) -> None:
    ids = served.runtime.encode("hello there")
    by_text, by_ids = served.complete(temperature=0), served.complete(prompt=ids, temperature=0)
    assert by_ids["choices"] == by_text["choices"]
    several = served.complete(prompt=[ids, ids[:3]], temperature=0)
    assert several["choices"][0]["text"] == by_text["choices"][0]["text"]
    for wrong in ([99999], [[5], [99999]]):
        error = served.refused(COMPLETIONS, {"prompt": wrong})
        assert error["param"] == "prompt"


def test_log_probabilities_have_their_older_shape(served: Api) -> None:
    ask: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logprobs": 2}
    told = served.complete(**ask)["choices"][0]["logprobs"]
    assert set(told) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(part) for part in told.values()} == {8}
    for value, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) == 2
        assert value == max(top.values())
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"])
    streamed = [each["logprobs"] for each in choice(stream(served, **ask)) if each["logprobs"]]
    for name, whole in told.items():
        assert [item for part in streamed for item in part[name]] == whole
    assert served.complete(max_tokens=3, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is (
        None
    )


def test_echo(served: Api) -> None:
    plain = served.complete(temperature=0, max_tokens=5)["choices"][0]["text"]
    ids = served.runtime.encode("hello there")
    for prompt in ("hello there", ids):
        echoed = served.complete(prompt=prompt, temperature=0, max_tokens=5, echo=True)
        assert echoed["choices"][0]["text"] == "hello there" + plain
    told = stream(served, temperature=0, max_tokens=5, echo=True)
    assert text_of(told) == "hello there" + plain
    nothing = served.complete(max_tokens=0, echo=True)
    assert nothing["choices"][0] == {"index": 0, "text": "hello there", "logprobs": None,
                                     "finish_reason": "length"}  # fmt: skip
    assert nothing["usage"]["completion_tokens"] == 0


def test_a_stream_ends_with_its_reason_and_usage(served: Api) -> None:
    told = stream(served, max_tokens=4, temperature=0, stream_options={"include_usage": True})
    assert told[-1]["usage"]["completion_tokens"] == 4
    assert told[-2]["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    ]
    assert "edgeroute" in told[-2]


def test_an_empty_or_overlong_prompt(served: Api) -> None:
    error = served.refused(COMPLETIONS, {"prompt": "word " * 3000})
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = served.refused(COMPLETIONS, {"prompt": [7] * 300})
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    served.refused(COMPLETIONS, {"prompt": []})
    served.refused(COMPLETIONS, {"prompt": [[]]})


def test_one_prompt_of_several_that_is_bad_fails_all(served: Api) -> None:
    for streaming in (False, True):
        body = {"prompt": ["hello", "word " * 3000], "stream": streaming, "max_tokens": 200}
        assert served.refused(COMPLETIONS, body)["code"] == "context_length_exceeded"
    served.last_job()
    assert served.complete(max_tokens=2)["usage"]["completion_tokens"] == 2
