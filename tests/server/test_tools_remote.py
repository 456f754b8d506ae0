"""Tools, and schemas of answers, where a remote model may write the hard steps of an answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from tests.edgeroute.remote_server import RemoteServer
from tests.server import tools_lab as lab
from tests.server.api_lab import CHAT, HELLO, Api, api, events

CALLED = {"choices": ["required", {"type": "function", "function": {"name": "add"}}]}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for each in (name, name.upper()):
            monkeypatch.delenv(each, raising=False)


@pytest.fixture
def remote() -> Iterator[RemoteServer]:
    with RemoteServer(lambda body: ['{"a": ', "1"]) as found:
        yield found


@pytest.fixture
def served(tiny_path: Path, remote: RemoteServer) -> Iterator[Api]:
    with (
        Runtime(tiny_path, n_ctx=1024, n_kv=4096, threads=1, remote=remote.remote) as runtime,
        api(runtime) as found,
    ):
        yield found


@pytest.mark.parametrize("choice", CALLED["choices"])
def test_the_model_here_writes_calls_alone(served: Api, remote: RemoteServer, choice: Any) -> None:
    """The remote one would be told neither of the tools nor of the syntax."""
    fields = {"tools": lab.TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "seed": 1}
    (told,) = served.chat(**fields)["choices"]
    assert told["finish_reason"] == "tool_calls"
    (call,) = told["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert lab.is_valid(call["function"]["name"], arguments)
    streamed = events(served.post(CHAT, HELLO | fields | {"stream": True}).text)
    parts = [part for each in streamed for choice in each.get("choices", ())
             for part in choice["delta"].get("tool_calls", ())]  # fmt: skip
    text = "".join(part["function"].get("arguments", "") for part in parts)
    assert json.loads(text) == arguments
    assert remote.seen == []


def test_results_of_calls_are_not_sent_away(served: Api, remote: RemoteServer) -> None:
    served.chat(
        messages=[
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": None, "tool_calls": [lab.said("add", {"a": 1})]},
            {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        ],
        max_tokens=4,
    )
    assert remote.seen == []


def test_who_asks_for_the_remote_model_beside_tools_is_told_why_not(served: Api) -> None:
    error = served.refused(CHAT, HELLO | {"tools": lab.TOOLS, "edgeroute": {"steps": "large"}})
    assert error["param"] == "edgeroute.steps" and "leave edgeroute.steps out" in error["message"]
    served.chat(tools=lab.TOOLS, edgeroute={"steps": "off"}, max_tokens=2)


def test_an_end_of_the_remote_model_that_a_schema_excludes_is_none(
    served: Api, remote: RemoteServer
) -> None:
    """What it wrote is kept, and the model here ends it."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    (told,) = served.chat(response_format=form, edgeroute={"steps": "large"}, max_tokens=60)[
        "choices"
    ]
    assert told["finish_reason"] == "stop" and len(remote.seen) >= 1
    assert json.loads(told["message"]["content"])["a"] == 1
