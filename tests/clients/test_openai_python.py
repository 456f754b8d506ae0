"""OpenAI's own Python client, unmodified: `pip install openai && pytest -m clients -k python`."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # warnings of others' code

ASK: list[Any] = [{"role": "user", "content": "Name three rivers."}]
COUNT: list[Any] = [{"role": "user", "content": "Count from 1 to 1000 in words."}]
WEATHER: dict[str, Any] = {"type": "function", "function": {
    "name": "get_weather", "description": "Look up the weather of a city.",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["C", "F"]},
    }, "required": ["city", "unit"], "additionalProperties": False},
}}  # fmt: skip
TIME: dict[str, Any] = {"type": "function", "function": {
    "name": "get_time", "description": "Look up the time.",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}}  # fmt: skip
SCHEMA: dict[str, Any] = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0,
                                                           "maximum": 120},
}, "required": ["name", "age"], "additionalProperties": False}  # fmt: skip


@pytest.fixture
def client(url: str, key: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=100) as client:
        yield client


def chat(client: Any, **more: Any) -> Any:
    given = {"model": "base", "messages": ASK, "max_tokens": 12, "temperature": 0.0, "seed": 1}
    return client.chat.completions.create(**(given | more))


# answers


def test_models(client: Any) -> None:
    assert [each.id for each in client.models.list()] == ["base"]
    assert client.models.retrieve("base").object == "model"


def test_chat(client: Any) -> None:
    found = chat(client)
    assert found.object == "chat.completion" and found.id.startswith("chatcmpl")
    assert found.choices[0].message.role == "assistant" and found.choices[0].message.content
    assert found.choices[0].finish_reason in ("stop", "length")
    usage = found.usage
    assert usage.prompt_tokens > 3 and 1 <= usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert chat(client).choices[0].message.content == found.choices[0].message.content


def test_max_completion_tokens_is_understood(client: Any) -> None:
    found = chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=5, messages=COUNT)
    assert found.usage.completion_tokens == 5 and found.choices[0].finish_reason == "length"


def test_a_stream_says_what_the_whole_says(client: Any) -> None:
    whole = chat(client).choices[0]
    chunks = list(chat(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks][-1] == whole.finish_reason
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks)


def test_a_stream_with_usage_tells_it_last_without_choices(client: Any) -> None:
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == chat(client).usage
    assert all(c.usage is None for c in chunks)


def test_the_stream_helper(client: Any) -> None:
    """It refuses an answer that was cut off by its length, so this one ends by a stop text."""
    given: dict[str, Any] = {"model": "base", "messages": ASK, "temperature": 0.0, "stop": [" "]}
    with client.chat.completions.stream(**given) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == chat(client, stop=[" "]).choices[0].message.content


def test_stop_texts_are_left_out(client: Any) -> None:
    whole = chat(client, max_tokens=40).choices[0].message.content
    word = whole.split()[3]
    found = chat(client, max_tokens=40, stop=[word, "zzzz"]).choices[0]
    assert found.finish_reason == "stop"
    assert found.message.content == whole[: whole.index(word)]


def test_several_answers(client: Any) -> None:
    found = chat(client, n=3, temperature=1.5, seed=5)
    assert [each.index for each in found.choices] == [0, 1, 2]
    assert len({each.message.content for each in found.choices}) > 1
    texts = ["", ""]
    for chunk in chat(client, n=2, stream=True, temperature=1.5, seed=5):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [each.message.content for each in found.choices[:2]]


def test_logprobs(client: Any) -> None:
    found = chat(client, logprobs=True, top_logprobs=3).choices[0]
    told = found.logprobs.content
    assert "".join(each.token for each in told) == found.message.content
    for each in told:
        assert each.logprob <= 0 and len(each.top_logprobs) == 3
        assert max(top.logprob for top in each.top_logprobs) == pytest.approx(each.logprob)
        assert bytes(each.bytes).decode(errors="replace") == each.token
    parts = [c.choices[0].logprobs for c in chat(client, logprobs=True, stream=True)]
    assert [x.token for p in parts if p for x in p.content] == [x.token for x in told]


def test_completions(client: Any) -> None:
    given: Any = {"model": "base", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**given, logprobs=2)
    assert found.object == "text_completion" and found.choices[0].text
    assert "".join(found.choices[0].logprobs.tokens) == found.choices[0].text
    told = "".join(c.choices[0].text for c in client.completions.create(**given, stream=True))
    assert told == found.choices[0].text
    both = client.completions.create(**{**given, "prompt": ["Once upon a time", "def f("]})
    assert [each.index for each in both.choices] == [0, 1]
    echo = client.completions.create(**given, echo=True)
    assert echo.choices[0].text == "Once upon a time" + told


def test_embeddings(client: Any) -> None:
    texts = ["a river in spring", "a river in winter", "def f(x): return x"]
    found = client.embeddings.create(model="base", input=texts, encoding_format="float")
    vectors = [each.embedding for each in found.data]
    assert [each.index for each in found.data] == [0, 1, 2] and found.usage.prompt_tokens > 6

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert all(dot(v, v) == pytest.approx(1, abs=1e-3) for v in vectors)
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2])
    again = client.embeddings.create(model="base", input=texts[0])  # the client asks for base64
    assert again.data[0].embedding == pytest.approx(vectors[0], abs=1e-3)
    raw = client.embeddings.with_raw_response.create(
        model="base", input=texts[0], encoding_format="base64"
    )
    coded = json.loads(raw.text)["data"][0]["embedding"]
    assert len(base64.b64decode(coded)) == 4 * len(vectors[0])


# constraints


def test_json_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA,
                                                   "strict": True}}  # fmt: skip
    ask = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
    found = chat(client, messages=ask, max_tokens=80, response_format=form).choices[0]
    person = json.loads(found.message.content)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120


def test_json_object(client: Any) -> None:
    ask = [{"role": "user", "content": "Give the JSON object with the key a and the value 1."}]
    found = chat(client, messages=ask, max_tokens=200, response_format={"type": "json_object"})
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(found.choices[0].message.content), dict)
    else:
        assert found.choices[0].message.content.lstrip().startswith("{")


def test_parse_gives_objects(client: Any) -> None:
    class Person(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        name: str = pydantic.Field(max_length=20)
        age: int

    found = client.chat.completions.parse(
        model="base", messages=[{"role": "user", "content": "Bob is 42. Who?"}],
        response_format=Person, max_tokens=100, temperature=0.0,
    )  # fmt: skip
    assert isinstance(found.choices[0].message.parsed, Person)


@pytest.mark.parametrize("choice", [
    "required", {"type": "function", "function": {"name": "get_weather"}},
])  # fmt: skip
def test_a_tool_that_must_be_called(client: Any, choice: Any) -> None:
    ask = [{"role": "user", "content": "What is the weather in Paris in C?"}]
    found = chat(client, messages=ask, tools=[WEATHER], tool_choice=choice, max_tokens=100)
    call = found.choices[0].message.tool_calls[0]
    assert found.choices[0].finish_reason in ("tool_calls", "stop")
    assert call.type == "function" and call.id and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("C", "F")
    assert found.choices[0].message.content is None


def test_streamed_tool_calls_are_those_of_the_whole(client: Any) -> None:
    ask = [{"role": "user", "content": "What is the weather in Paris in C?"}]
    given = {"messages": ask, "tools": [WEATHER, TIME], "tool_choice": "required",
             "max_tokens": 120}  # fmt: skip
    whole = chat(client, **given).choices[0]
    calls: dict[int, dict[str, str]] = {}
    finish = None
    for chunk in chat(client, stream=True, **given):
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for part in choice.delta.tool_calls or ():
            call = calls.setdefault(part.index, {"name": "", "arguments": "", "id": ""})
            call["id"] = part.id or call["id"]
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
    assert finish == whole.finish_reason == "tool_calls" and all(c["id"] for c in calls.values())
    assert [(c["name"], c["arguments"]) for c in calls.values()] == [
        (c.function.name, c.function.arguments) for c in whole.message.tool_calls
    ]


def test_auto_calls_or_tells_and_takes_the_tools_answer(client: Any) -> None:
    ask: list[Any] = [{"role": "user", "content": "Call get_weather for Paris, unit C."}]
    found = chat(client, messages=ask, tools=[WEATHER], tool_choice="auto", max_tokens=120)
    message = found.choices[0].message
    if not message.tool_calls:
        assert message.content and found.choices[0].finish_reason in ("stop", "length")
        pytest.skip("this model told instead of calling; its answer was well formed")
    assert found.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls[0].function.name == "get_weather"
    json.loads(message.tool_calls[0].function.arguments)
    told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 C, rain"}
    after = chat(client, messages=[*ask, message, told], tools=[WEATHER], max_tokens=40)
    assert after.choices[0].message.content or after.choices[0].message.tool_calls


def test_no_tool_is_called_where_none_may_be(client: Any) -> None:
    found = chat(client, tools=[WEATHER], tool_choice="none")
    assert found.choices[0].message.tool_calls is None and found.choices[0].message.content


# errors


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert caught.value.code == "model_not_found" and "gpt-4" in caught.value.message


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -1.0), ("temperature", "hot"), ("max_tokens", 0), ("n", 0), ("top_p", 2.0),
    ("messages", []), ("messages", "hi"), ("stop", ["a"] * 99), ("logit_bias", {"a": 1}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema":
                                                                {"type": "nothing"}}}),
    ("tools", [{"type": "function", "function": {"name": "no name!"}}]),
    ("tool_choice", {"type": "function", "function": {"name": "missing"}}),
])  # fmt: skip
def test_bad_fields_are_bad_requests(client: Any, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **{field: value})
    assert caught.value.type == "invalid_request_error" and caught.value.message
    assert (caught.value.param or "").split(".")[0].split("[")[0] == field


def test_a_prompt_longer_than_the_context_says_so(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert "2048" in caught.value.message


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            chat(client)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_too_many_at_once_is_a_rate_limit(client: Any) -> None:
    streams = []
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(40):
                streams.append(chat(client, stream=True, max_tokens=1500, messages=COUNT))
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        for stream in streams:
            stream.close()
    assert streams, "the first had to be taken"
    patient = client.with_options(max_retries=8)
    assert chat(patient).choices[0].message.content, "after the others left there is room"


def test_unknown_fields_are_taken_or_told(client: Any) -> None:
    assert chat(client, extra_body={"edgeroute": {"stats": True}}).model_extra["edgeroute"]
    assert chat(client, user="me", metadata={"a": "b"}, store=False).choices


# leaving


def test_closing_a_stream_frees_its_place(client: Any) -> None:
    for _ in range(10):  # more than fit at once: each must be gone before long
        deadline = time.monotonic() + 60
        while True:
            try:
                stream = chat(client, stream=True, max_tokens=1500, messages=COUNT)
                break
            except openai.RateLimitError:
                assert time.monotonic() < deadline, "a closed stream kept its place"
                time.sleep(0.05)
        next(iter(stream))
        stream.close()


def test_a_timeout_of_the_client_frees_its_place(client: Any) -> None:
    hasty = client.with_options(timeout=0.3)
    for _ in range(8):
        with pytest.raises((openai.APITimeoutError, openai.RateLimitError)):
            chat(hasty, max_tokens=1500, messages=COUNT)
    assert chat(client.with_options(max_retries=8)).choices[0].message.content


def test_the_asynchronous_client(url: str, key: str) -> None:
    async def everything() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
            answers = await asyncio.gather(*(chat(client) for _ in range(3)))
            text = ""
            async for chunk in await chat(client, stream=True):
                text += chunk.choices[0].delta.content or ""
            stream = await chat(client, stream=True, max_tokens=1500, messages=COUNT)
            async for _ in stream:
                break
            await stream.close()
            asked = asyncio.create_task(chat(client, max_tokens=1500, messages=COUNT))
            await asyncio.sleep(0.3)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            return [each.choices[0].message.content for each in answers], text

    answers, text = asyncio.run(everything())
    assert answers == [text] * 3
