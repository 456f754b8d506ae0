"""Any value in any field: an answer or a 400, never an error of the server's, and nothing stays."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeroute.server.bodies import ChatBody, CompletionBody, EmbeddingBody, Extension, FeedbackBody
from tests.server.api_lab import CHAT, COMPLETIONS, HELLO
from tests.server.whole_lab import Whole, whole

EMBEDDINGS, FEEDBACK = "/v1/embeddings", "/v1/feedback"
KINDS: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    CHAT: (ChatBody, HELLO | {"max_tokens": 1}),
    COMPLETIONS: (CompletionBody, {"prompt": "a", "max_tokens": 1}),
    EMBEDDINGS: (EmbeddingBody, {"input": "a"}),
    FEEDBACK: (FeedbackBody, {"id": "no-such-answer", "reward": 0.5}),
}


def _fields(kind: type[msgspec.Struct], word: str) -> list[str]:
    """Names of fields whose type has a number, or of all."""
    found = []
    for field in msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"].items():
        if word in json.dumps(field[1]):
            found.append(field[0])
    return found


NUMBERS = [
    (path, name) for path, (kind, _) in KINDS.items()
    for name in sorted({*_fields(kind, '"integer"'), *_fields(kind, '"number"')})
] + [
    (path, f"edgeroute.{name}") for path in (CHAT, COMPLETIONS)
    for name in sorted({*_fields(Extension, '"integer"'), *_fields(Extension, '"number"')})
]  # fmt: skip
EVERY = [
    (path, name) for path, (kind, _) in KINDS.items() for name in _fields(kind, "")
] + [(CHAT, f"edgeroute.{name}") for name in _fields(Extension, "")]  # fmt: skip

numbers = (
    st.integers()
    | st.sampled_from([-1, 0, 1, 2, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64, 10**40])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.5, 1e-320, 1e308, -0.0])
    | st.booleans()
    | st.none()
    | st.text(max_size=5)
    | st.sampled_from(["1", "-1", "NaN", "1e999", [], [1], {}, {"a": 1}])
)
anything = st.recursive(
    numbers | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
EXACT = ["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "01", "0x1", "1_000", "+1", "1.",
         "9" * 5000, "1" + "0" * 400, "-" + "9" * 400, "1e99999999999", "1.0", "-0", "5e-324",
         '"\\ud800"', "tru", ""]  # fmt: skip
"""Spellings that `json.dumps` does not write."""


@pytest.fixture(scope="module")
def served(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tiny_path, tmp_path_factory.mktemp("sessions")) as found:
        yield found


@pytest.fixture(autouse=True)
def _healthy_after(served: Whole) -> Iterator[None]:
    yield
    served.check()


def with_field(path: str, name: str, value: object) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return KINDS[path][1] | {outer: {inner: value} if inner else value}


def check_answer(answer: httpx2.Response) -> None:
    """It is an answer, or a refusal that a client can read."""
    assert answer.status_code in (200, 400, 404, 504), answer.text
    if answer.status_code == 504:  # whoever asks for no time gets none
        assert "edgeroute" in answer.request.content.decode()
    if answer.status_code >= 400:
        told = answer.json()["error"]
        assert told.keys() == {"message", "type", "param", "code"}
        assert len(told["message"]) < 2000
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(("path", "name"), NUMBERS)
def test_any_number_in_a_numeric_field(served: Whole, path: str, name: str) -> None:
    """CVE-2026-21869: a negative count was taken at its word."""

    @settings(max_examples=8, deadline=None, derandomize=True,
              suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
    @given(value=numbers)
    def ask(value: object) -> None:
        check_answer(served.post(path, with_field(path, name, value)))

    ask()


@pytest.mark.parametrize("path", KINDS)
def test_any_spelling_of_a_number(served: Whole, path: str) -> None:
    for name in [each for where, each in NUMBERS if where == path]:
        body = json.dumps(with_field(path, name, "@"))
        for text in EXACT:
            check_answer(served.send(path, body.replace('"@"', text).encode()))


def test_numbers_out_of_their_bounds_are_refused(served: Whole) -> None:
    wrong = {
        "max_tokens": [-1, -(2**63), 1.5, "1", True, 2**31, 2**64], "n": [0, -1, 17, 2**40],
        "temperature": [-0.1, 2.1, "1"], "top_p": [-0.1, 1.1], "seed": [2**63, -(2**63) - 1, 0.5],
        "presence_penalty": [-2.1, 2.1], "edgeroute.top_k": [-1, 2**31, 2.5],
        "edgeroute.min_p": [-1, 2], "edgeroute.repeat_penalty": [0, -1, 1e9],
        "edgeroute.timeout_s": [0, -1, 1e9],
    }  # fmt: skip
    for path in (CHAT, COMPLETIONS):
        for name, values in wrong.items():
            for value in values:
                answer = served.post(path, with_field(path, name, value))
                assert answer.status_code == 400, (path, name, value)
                assert answer.json()["error"]["param"].startswith(name.partition(".")[0])


@pytest.mark.parametrize("path", KINDS)
def test_anything_in_any_field(served: Whole, path: str) -> None:
    names = [each for where, each in EVERY if where == path]

    @settings(max_examples=60, deadline=None, derandomize=True,
              suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
    @given(name=st.sampled_from(names), value=anything)
    def ask(name: str, value: object) -> None:
        check_answer(served.post(path, with_field(path, name, value)))

    ask()


def test_fields_that_there_are_not_are_refused(served: Whole) -> None:
    """Other servers' fields, whose bounds nobody checks here, among them."""
    for field in (
        "n_discard", "n_keep", "id_slot", "n_predict", "n_probs", "cache_prompt", "keep_alive",
        "num_ctx", "lora", "__proto__", "", "Messages", "m\u0430x_tokens",
    ):  # fmt: skip
        for value in (-1, 1, None):
            answer = served.post(CHAT, HELLO | {field: value})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == field


NO_REQUESTS = [b"", b"null", b"[]", b"1", b'"x"', b"{", b'{"messages":', b"{}",
               b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{'a':1}", b"{} {}", b"{}x",
               b'{"messages":[],}', b"\x00" * 100,
               b'{"prompt": "a", "prompt": 1}', b'{"model": "\xff"}', b'{"\xff": 1}',
               b'{"user": "\xed\xa0\x80"}', b'{"metadata": {"a": "\xc3\x28"}}']  # fmt: skip


@pytest.mark.parametrize("path", KINDS)
def test_what_is_no_request_is_refused(served: Whole, path: str) -> None:
    for raw in NO_REQUESTS:
        answer = served.send(path, raw)
        assert answer.status_code == 400, (path, raw)
        assert answer.json()["error"]["message"]


def test_of_two_fields_of_one_name_the_last_counts(served: Whole) -> None:
    """And is checked: two readers cannot see two requests in one body."""
    raw = b'{"prompt": "a", "max_tokens": 1, "max_tokens": -1}'
    assert served.send(COMPLETIONS, raw).status_code == 400


TEXTS = [
    "\x00", "a\x00b", "\x1b[2J", "\u202e", "\uffff", "\U0010ffff", "e" + "\u0301" * 500,
    "\ufdfd" * 50, "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 20, "<|im_end|>", "<s>[INST]",
    "{{ 7*7 }}{% for x in range(10**9) %}", "${jndi:x}", "'; DROP TABLE x; --", "\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_strange_texts_are_texts(served: Whole, text: str) -> None:
    """Nulls, signs that steer a terminal, code of templates: tokens like any other, or a 400."""
    message = [{"role": "user", "content": text}]
    for body in (
        {"messages": message, "max_tokens": 1},
        {"messages": message, "max_tokens": 1, "stop": [text]},
        {"messages": message, "max_tokens": 1, "user": text, "metadata": {text[:60]: text}},
        {"messages": message, "model": text}, HELLO | {"edgeroute": {"session": text}},
        HELLO | {"edgeroute": {"adapter": text}}, HELLO | {"edgeroute": {"grammar": text}},
        HELLO | {"tools": [{"type": "function", "function": {"name": text}}]},
    ):  # fmt: skip
        check_answer(served.post(CHAT, body))
    check_answer(served.post(EMBEDDINGS, {"input": text}))
    check_answer(served.post(COMPLETIONS, {"prompt": text, "max_tokens": 1, "echo": True}))


@pytest.mark.parametrize("spelling", [r"\ud800", r"\udc00\ud800", r"a\ud83dz", r"\ud800\ud800"])
def test_half_characters_are_refused_or_replaced(served: Whole, spelling: str) -> None:
    """A lone surrogate cannot be encoded: it must not reach the tokenizer as it is."""
    for name in ("prompt", "user", "stop", "model"):
        raw = json.dumps({"prompt": "a", "max_tokens": 1} | {name: "@"}).replace("@", spelling)
        check_answer(served.send(COMPLETIONS, raw.encode()))


def test_long_texts_are_refused_by_the_context(served: Whole) -> None:
    for body in (
        {"prompt": "word " * 50_000}, {"prompt": [1] * 10_000}, {"prompt": ["a"] * 65},
        {"prompt": "a", "stop": ["x" * 1025]}, {"prompt": "a", "stop": ["x"] * 65},
        {"prompt": [-1]}, {"prompt": [2**31 - 1]}, {"prompt": [10**6]}, {"prompt": [[]]},
        {"prompt": []}, {"prompt": [1, "a"]}, {"prompt": [[1], "a"]}, {"prompt": [True]},
    ):  # fmt: skip
        assert served.post(COMPLETIONS, body).status_code == 400, str(body)[:80]
    assert served.post(EMBEDDINGS, {"input": ["a"] * 2049}).status_code == 400
    assert served.post(CHAT, {"messages": HELLO["messages"] * 2049}).status_code == 400
    assert served.post(CHAT, {"messages": []}).status_code == 400
