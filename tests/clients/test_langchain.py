"""LangChain's OpenAI classes, unmodified: `pip install langchain-openai && pytest -m clients`."""

import asyncio
from typing import Any

import pytest

langchain = pytest.importorskip("langchain_openai")
pydantic = pytest.importorskip("pydantic")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # warnings of others' code


class Person(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    """A person."""

    name: str = pydantic.Field(max_length=20)
    age: int


class Look(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    """Look somewhere."""

    where: str = pydantic.Field(max_length=20)


@pytest.fixture
def chat(url: str, key: str) -> Any:
    return langchain.ChatOpenAI(model="base", base_url=url, api_key=key, temperature=0.0,
                                max_tokens=60, max_retries=0)  # fmt: skip


def test_invoke_and_stream_say_the_same(chat: Any) -> None:
    whole = chat.invoke("Name three rivers.")
    assert whole.content and whole.usage_metadata["output_tokens"] <= 60
    assert "".join(chunk.content for chunk in chat.stream("Name three rivers.")) == whole.content


def test_asynchronous(chat: Any) -> None:
    async def text() -> str:
        return "".join([str(c.content) async for c in chat.astream("Name three rivers.")])

    assert asyncio.run(text()) == chat.invoke("Name three rivers.").content


def test_bound_tools(chat: Any) -> None:
    found = chat.bind_tools([Look], tool_choice="any").invoke("Look at the river.")
    assert found.tool_calls[0]["name"] == "Look" and "where" in found.tool_calls[0]["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Any, method: str) -> None:
    found = chat.with_structured_output(Person, method=method).invoke("Bob is 42 years old.")
    assert isinstance(found, Person)


def test_embeddings(url: str, key: str) -> None:
    """The class sends token ids of OpenAI's vocabulary unless told not to: servers of others'
    models need `check_embedding_ctx_length=False`, as its documentation says."""
    found = langchain.OpenAIEmbeddings(model="base", base_url=url, api_key=key,
                                       check_embedding_ctx_length=False)  # fmt: skip
    vectors = found.embed_documents(["a river", "a lake"])
    assert len(vectors) == 2 and len(vectors[0]) == len(found.embed_query("a river")) > 8
