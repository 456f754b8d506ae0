"""Embeddings, the list of models with adapters, and feedback."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from edgeroute import Runtime
from edgeroute.runtime.errors import CapacityError, ClosedError, NeverFitsError
from edgeroute.runtime.ledger import Ledger
from edgeroute.server.errors import as_api_error
from edgeroute.server.origins import MAX_REMEMBERED, Origins
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.server.api_lab import CHAT, HELLO, Api, api, held, wait_until

EMBEDDINGS, FEEDBACK = "/v1/embeddings", "/v1/feedback"


@pytest.fixture(scope="module")
def library(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for i, name in enumerate(("poems", "code")):
        make_adapter(folder / f"{name}.gguf", tiny_path, rank=8, alpha=10.0, delta=0.6, seed=i)
    return folder


@pytest.fixture(scope="module")
def served(tiny_path: Path, library: Path) -> Iterator[Api]:
    with (
        Runtime(tiny_path, n_ctx=256, n_kv=2048, threads=1, adapters=str(library),
                adapter_state="off") as runtime,
        api(runtime) as found,
    ):  # fmt: skip
        yield found


def embed(served: Api, **body: Any) -> dict[str, Any]:
    answer = served.post(EMBEDDINGS, body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_embeddings(served: Api) -> None:
    texts = ["hello there", "good day"]
    told = embed(served, input=texts, model="base")
    assert (told["object"], told["model"]) == ("list", "base")
    assert [entry["index"] for entry in told["data"]] == [0, 1]
    assert all(entry["object"] == "embedding" for entry in told["data"])
    direct = served.runtime.embed(texts)
    found = np.array([entry["embedding"] for entry in told["data"]], np.float32)
    np.testing.assert_array_equal(found, direct.vectors)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    n_tokens = sum(direct.n_tokens)
    assert told["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    job = served.last_job()
    assert (job.endpoint, job.status, job.n_prompt) == ("embeddings", 200, n_tokens)


def test_embeddings_in_base64(served: Api) -> None:
    plain = embed(served, input="hello there")["data"][0]["embedding"]
    packed = embed(served, input="hello there", encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"),
                                  np.array(plain, np.float32))  # fmt: skip


def test_embeddings_of_token_ids(served: Api) -> None:
    ids = served.runtime.encode("hello there")
    by_text = embed(served, input="hello there")["data"][0]["embedding"]
    assert embed(served, input=ids)["data"][0]["embedding"] == by_text
    assert embed(served, input=[ids, ids])["data"][1]["embedding"] == by_text


def test_an_adapter_changes_embeddings(served: Api) -> None:
    plain = embed(served, input="hello there")["data"][0]["embedding"]
    told = embed(served, input="hello there", model="base:poems")
    assert told["model"] == "base:poems"
    assert told["data"][0]["embedding"] != plain


@pytest.mark.parametrize(("fields", "param"), [
    ({"input": []}, "input"), ({"input": ""}, "input"), ({"input": ["a", ""]}, "input"),
    ({"input": ["a", 1]}, "input"), ({"input": [[]]}, "input"), ({"input": [-1]}, "input"),
    ({"input": [99999]}, "input"), ({"input": {"a": 1}}, "input"),
    ({"input": ["a"] * 2049}, "input"), ({"input": "word " * 2000}, "input"),
    ({"input": "a", "dimensions": 8}, "dimensions"), ({"input": "a", "dimensions": 0},
                                                     "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"), ({}, "input"),
    ({"input": "a", "model": 1}, "model"), ({"input": "a", "x": 1}, "x"),
])  # fmt: skip
def test_embeddings_that_cannot_be(served: Api, fields: dict[str, Any], param: str) -> None:
    assert (served.refused(EMBEDDINGS, fields)["param"] or "").startswith(param)


def test_the_length_that_vectors_have_may_be_asked_for(served: Api) -> None:
    n_embd = len(embed(served, input="a")["data"][0]["embedding"])
    assert len(embed(served, input="a", dimensions=n_embd)["data"][0]["embedding"]) == n_embd


def test_embeddings_by_what_is_not_there(served: Api) -> None:
    for name in ("nope", "base:prose"):
        assert served.refused(EMBEDDINGS, {"input": "a", "model": name}, 404)["param"] == "model"
    # Another adapter for every text would make vectors that cannot be compared.
    served.refused(EMBEDDINGS, {"input": "a", "model": "base:auto"}, 400)


def test_a_client_leaves_while_his_texts_are_embedded(served: Api) -> None:
    before = len(served.watcher.over)
    with held(served.runtime), pytest.raises(httpx2.ReadTimeout):
        served.client.post(EMBEDDINGS, json={"input": ["hello"] * 99}, timeout=0.2)
    wait_until(lambda: len(served.watcher.over) > before)
    assert served.watcher.over[-1].status == 499
    wait_until(served.rests)


def test_embeddings_take_no_longer_than_allowed(tiny_path: Path) -> None:
    with Runtime(tiny_path, n_ctx=256, threads=1) as runtime, api(runtime, timeout_s=1e-9) as found:
        error = found.refused(EMBEDDINGS, {"input": "hello"}, 504)
        assert error["type"] == "timeout_error"


def test_the_list_of_models(served: Api) -> None:
    told = served.client.get("/v1/models").json()
    assert told["object"] == "list"
    names = [entry["id"] for entry in told["data"]]
    assert names == ["base", "base:auto", "base:code", "base:poems"]
    for entry in told["data"]:
        assert entry["object"] == "model"
        assert isinstance(entry["created"], int)
        assert entry["owned_by"] == "edgeroute"
        assert served.client.get(f"/v1/models/{entry['id']}").json() == entry
    for unknown in ("nope", "base:prose", "base:", "base/x", "%00", "..%2f..%2fetc"):
        answer = served.client.get(f"/v1/models/{unknown}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert served.client.delete("/v1/models/base").status_code == 405


def test_adapters_by_name_and_by_field(served: Api) -> None:
    ask: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    texts = {name: served.chat(model=name, **ask) for name in ("base", "base:poems", "base:code")}
    assert len({told["choices"][0]["message"]["content"] for told in texts.values()}) > 1
    assert texts["base:poems"]["model"] == "base:poems"
    assert texts["base:poems"]["edgeroute"]["adapter"] == "poems"
    named = served.chat(edgeroute={"adapter": "poems"}, **ask)
    assert named["choices"] == texts["base:poems"]["choices"]
    mixed = served.chat(edgeroute={"adapter": {"poems": 0.5, "code": 0.5}}, **ask)
    assert mixed["edgeroute"]["adapter"] in ("poems:0.5+code:0.5", "code:0.5+poems:0.5")
    error = served.refused(CHAT, HELLO | {"model": "base:prose"}, 404)
    assert "code, poems" in error["message"]
    twice = {"model": "base:poems", "edgeroute": {"adapter": "code"}}
    assert served.refused(CHAT, HELLO | twice)["param"] == "edgeroute.adapter"


def test_feedback_teaches_the_model_that_answered(served: Api) -> None:
    before = served.runtime.stats()["adapters"]
    told = served.chat(model="base:auto", max_tokens=3)
    answer = served.post(FEEDBACK, {"id": told["edgeroute"]["id"], "reward": 1})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"object": "feedback", "id": told["edgeroute"]["id"], "model": "base",
                             "reward": 1.0}  # fmt: skip
    assert served.runtime.stats()["adapters"] != before
    again = served.refused(FEEDBACK, {"id": told["edgeroute"]["id"], "reward": 1})
    assert "once" in again["message"]


def test_feedback_for_a_streamed_answer(served: Api) -> None:
    body = HELLO | {"model": "base:auto", "max_tokens": 3, "stream": True}
    last = served.post(CHAT, body).text.split("data: ")[-2]  # before [DONE]
    found = json.loads(last)["edgeroute"]["id"]
    assert served.post(FEEDBACK, {"id": found, "reward": 0}).status_code == 200


def test_feedback_that_nothing_learns_from(served: Api) -> None:
    error = served.refused(FEEDBACK, {"id": "gen-unknown", "reward": 1}, 404)
    assert (error["param"], error["code"]) == ("id", "answer_not_found")
    plain = served.chat(max_tokens=2)["edgeroute"]["id"]
    served.refused(FEEDBACK, {"id": plain, "reward": 1}, 400)
    for reward in (-0.1, 1.1, "1", None, True):
        assert served.refused(FEEDBACK, {"id": plain, "reward": reward})["param"] == "reward"


def test_only_the_last_answers_are_remembered() -> None:
    origins = Origins()
    for i in range(MAX_REMEMBERED + 5):
        origins.remember(f"gen-{i}", "base")
    assert origins.find("gen-4") is None
    assert origins.find("gen-5") == origins.find(f"gen-{MAX_REMEMBERED + 4}") == "base"


def test_feedback_after_the_engine_has_gone(tiny_path: Path) -> None:
    with Runtime(tiny_path, n_ctx=256, threads=1) as runtime, api(runtime) as found:
        answer = found.complete(max_tokens=2)["edgeroute"]["id"]
        runtime.abandon(ClosedError("given up"))
        found.refused(FEEDBACK, {"id": answer, "reward": 1}, 503)
        found.refused(EMBEDDINGS, {"input": "a"}, 503)
        assert found.models.n_broken == 1


def test_who_leaves_before_his_request_was_made_leaves_nothing_behind(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar is memory of a C library: it must be freed also where nobody ever used it."""
    made, make = [], tiny._asking.request

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        begun, go = asyncio.Event(), asyncio.Event()

        def slow(*given: Any, **named: Any) -> Any:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(60)
            made.append(make(*given, **named))
            return made[0]

        monkeypatch.setattr(tiny._asking, "request", slow)
        chunks = tiny.astream("hello", grammar='root ::= "yes"')
        task = asyncio.ensure_future(anext(chunks))
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go.set()
        while not made or made[0].sampler._grammar is not None:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_what_never_fits_is_the_requests_fault_and_what_may_fit_later_is_not() -> None:
    with pytest.raises(NeverFitsError) as refused:
        Ledger(1000).reserve({"hidden states": 1001})
    never, later = as_api_error(refused.value), as_api_error(CapacityError("no memory just now"))
    assert (never.status, never.code, never.retry_after_s) == (400, "does_not_fit", None)
    assert (later.status, later.code) == (503, "does_not_fit") and later.retry_after_s
