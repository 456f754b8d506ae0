"""litellm, unmodified, as a proxy or an agent uses it: `pip install litellm`, `-m clients`."""

import asyncio
import json
import os
from typing import Any

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network at import
litellm = pytest.importorskip("litellm")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # warnings of others' code

ASK = [{"role": "user", "content": "Name three rivers."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"where": {"enum": ["here", "there"]}}, "required": ["where"],
}}}  # fmt: skip


@pytest.fixture
def given(url: str, key: str) -> dict[str, Any]:
    return {"model": "openai/base", "api_base": url, "api_key": key, "max_retries": 0}


def test_completion_and_stream_say_the_same(given: dict[str, Any]) -> None:
    ask = given | {"messages": ASK, "max_tokens": 12, "temperature": 0.0}
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 12
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_tools(given: dict[str, Any]) -> None:
    found = litellm.completion(**given, messages=ASK, tools=[TOOL], tool_choice="required",
                               max_tokens=60)  # fmt: skip
    call = found.choices[0].message.tool_calls[0]
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["where"] in ("here", "there")


def test_embedding(given: dict[str, Any]) -> None:
    found = litellm.embedding(**given, input=["a river", "a lake"])
    assert len(found.data) == 2 and len(found.data[0]["embedding"]) > 8


def test_asynchronous(given: dict[str, Any]) -> None:
    async def text() -> str:
        stream = await litellm.acompletion(**given, messages=ASK, max_tokens=6, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(text())


def test_errors_have_their_classes(given: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**given | {"model": "openai/none"}, messages=ASK)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**given, messages=ASK, temperature=-1)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**given | {"api_key": "wrong"}, messages=ASK)
