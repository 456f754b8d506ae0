"""Streaming text: whole characters, no heads of stop strings, any chunking."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.text_stream import MAX_STOP_CHARS, MAX_STOPS, TextStream


def run(chunks: list[bytes], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(lambda i: chunks[i], stop)
    parts = [stream.push(i) for i in range(len(chunks))]
    return [*parts, stream.flush()], stream


def first_stop(text: str, stop: list[str]) -> str:
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


FEW_LETTERS = st.text(alphabet="ab<é€😀", max_size=40)
STOPS = st.lists(st.text(alphabet="ab<é€😀", min_size=1, max_size=6), max_size=4)


@settings(deadline=None)
@given(text=FEW_LETTERS, places=st.lists(st.integers(0, 200), max_size=20), stop=STOPS)
def test_pushes_and_flush_give_the_text_up_to_the_first_stop(
    text: str, places: list[int], stop: list[str]
) -> None:
    parts, stream = run(cut(text.encode(), places), stop)
    assert "".join(parts) == first_stop(text, stop)
    assert stream.stopped == any(s in text for s in stop)


@settings(deadline=None)
@given(data=st.binary(max_size=40), places=st.lists(st.integers(0, 200), max_size=20))
def test_any_bytes_decode_as_they_do_at_once(data: bytes, places: list[int]) -> None:
    parts, _ = run(cut(data, places), [])
    assert "".join(parts) == data.decode(errors="replace")


@settings(deadline=None)
@given(text=FEW_LETTERS, places=st.lists(st.integers(0, 200), max_size=20), stop=STOPS)
def test_nothing_is_shown_that_could_become_part_of_a_stop(
    text: str, places: list[int], stop: list[str]
) -> None:
    chunks = cut(text.encode(), places)
    stream = TextStream(lambda i: chunks[i], stop)
    shown = ""
    for i in range(len(chunks)):
        shown += stream.push(i)
        received = b"".join(chunks[: i + 1]).decode(errors="ignore")
        heads = [s[:n] for s in stop for n in range(1, len(s)) if received.endswith(s[:n])]
        if not stream.stopped:
            assert all(len(shown) <= len(received) - len(head) for head in heads)


def test_a_character_is_released_whole() -> None:
    data = "😀".encode()
    parts, _ = run([data[:1], data[1:3], data[3:]], [])
    assert parts == ["", "", "😀", ""]


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    parts, _ = run(["é".encode()[:1]], [])
    assert parts == ["", "�"]


def test_a_stop_across_three_tokens_leaks_nothing() -> None:
    parts, stream = run([b"Hi <|", b"im_", b"end|> x"], ["<|im_end|>"])
    assert parts == ["Hi ", "", "", ""]
    assert stream.stopped and stream.stop_text == "<|im_end|>"


def test_an_earlier_longer_stop_beats_a_later_complete_one() -> None:
    parts, _ = run([b"xab", b"c"], ["b", "abc"])
    assert "".join(parts) == "x"
    parts, _ = run([b"xab", b"d"], ["b", "abc"])
    assert "".join(parts) == "xa"
    parts, _ = run([b"xab"], ["b", "abc"])
    assert "".join(parts) == "xa"


def test_nothing_comes_after_the_stop() -> None:
    parts, _ = run([b"a\n\nb", b"c"], ["\n\n"])
    assert parts == ["a", "", ""]


@pytest.mark.parametrize(
    "stop",
    ["text", [""], ["x" * (MAX_STOP_CHARS + 1)], ["x"] * (MAX_STOPS + 1), [7], [None]],
    ids=["a text", "empty", "too long", "too many", "a number", "None"],
)
def test_unusable_stops_are_refused(stop: list[str]) -> None:
    with pytest.raises(UsageError):
        TextStream(lambda i: b"", stop)
