"""Step ends are a matter of the text: no way of cutting it into tokens moves or hides one."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.skippers.step_bounds import MAX_TOKENS, MIN_TOKENS, StepBounds

ENDLESS = 1 << 30


def ends(
    pieces: Iterable[str | bytes], min_tokens: int = 1, max_tokens: int = ENDLESS
) -> list[int]:
    """Return after which tokens, counted from 0, a step ends."""
    bounds = StepBounds(min_tokens=min_tokens, max_tokens=max_tokens)
    found = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    return [i for i, piece in enumerate(found) if bounds.push(piece)]


def steps(text: str) -> list[str]:
    """Return the steps of a text that is read byte by byte; the rest comes last."""
    data = text.encode()
    places = [0, *(i + 1 for i in ends(bytes([byte]) for byte in data)), len(data)]
    return [data[a:b].decode() for a, b in pairwise(places)]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut before each of these bytes."""
    inside = sorted({place for place in places if 0 < place < len(data)})
    return [data[a:b] for a, b in zip([0, *inside], [*inside, len(data)], strict=True)]


@pytest.mark.parametrize(
    "pieces",
    [
        ["a", ".\n\n"],
        ["a", "\n\n"],
        ["a.", "\n", "\n"],
        ["a", "\n \n"],
        ["a\n", " ", "\t\n"],
        ["a", "\r\n\r\n"],
        ["a\r", "\n", "\r", "\n"],
        ["\n", "\n\n", "a", "\n\n"],
        ["a", " }\n\n"],
        ["a", "\n\nb"],
    ],
)
def test_a_blank_line_ends_a_step_however_it_is_cut(pieces: list[str]) -> None:
    assert ends([*pieces, "c", "d"]) == [len(pieces) - 1]


def test_line_breaks_alone_end_nothing() -> None:
    assert ends(["a", "\n", "b", "\r\n", "c", "\r", "\r", "d"]) == []


def test_empty_steps_never_end() -> None:
    assert ends(["\n\n"] * 9) == []
    assert ends(["a", "\n\n", "\n", "\n\n", " ", "\u3000\n\n", "b\n\n"]) == [1, 6]
    assert ends(["\n"] * 9, max_tokens=4) == []


def test_code_fences_keep_blank_lines() -> None:
    code = "Look:\n```py\na\n\n~~~\n\nb\n```\nDone.\n\nEnd"
    assert steps(code) == [code[:-3], "End"]
    wide = "~~~~\n\n~~~\n\n~~~~\n\nEnd"
    assert steps(wide) == [wide[:-3], "End"]
    assert steps("Use ```x``` so.\n\nEnd") == ["Use ```x``` so.\n\n", "End"]
    assert steps("```x``` so.\n\nEnd") == ["```x``` so.\n\n", "End"]
    assert steps("``x\n\nEnd") == ["``x\n\n", "End"]
    assert steps("```py\n\n```py\n\n```\r\n\nEnd")[-1] == "End"


def test_code_in_a_list_keeps_its_lines() -> None:
    text = "1. Run\n\n   ```\n   a\n\n   b\n   ```\n\n- ```\n\n  c\n  ```\nEnd"
    assert steps(text) == [
        "1. Run\n", "\n   ```\n   a\n\n   b\n   ```\n\n", "- ```\n\n  c\n  ```\n", "End",
    ]  # fmt: skip


def test_lines_of_a_list_are_steps_once_it_begins_one() -> None:
    assert steps("1. a\n2) b\n- c\n* d\n\ne") == ["1. a\n", "2) b\n", "- c\n", "* d\n", "\ne"]
    assert steps("First:\n1. a\n2. b\n\nc") == ["First:\n1. a\n2. b\n\n", "c"]
    assert steps("\n  1. a\nb\nc\n\nd") == ["\n  1. a\n", "b\nc\n\n", "d"]
    for no_list in ("3.5 a", "-a", "**a**", "1.a", "1234567890. a"):
        assert steps(f"{no_list}\nb") == [f"{no_list}\nb"]


def test_short_steps_go_on() -> None:
    short = ["Hi", ".\n\n"]
    assert ends([*short, *["a"] * (MIN_TOKENS - 3), "\n\n"], MIN_TOKENS) == [MIN_TOKENS - 1]
    assert ends([*short, *["a"] * (MIN_TOKENS - 4), "\n\n"], MIN_TOKENS) == []
    items = ["1. a\n"] * 20
    assert ends(items, MIN_TOKENS) == [7, 15]
    assert ends(["So", ":\n\n", *items], MIN_TOKENS) == [7, 15]


def test_a_short_step_with_its_end_behind_it_is_not_empty() -> None:
    assert ends([*["a"] * 6, "\n\n", "\n", "\n", "b", "\n\n"], MIN_TOKENS) == [10]


def test_long_steps_end_where_characters_are_whole() -> None:
    assert ends(["a"] * 1030, MIN_TOKENS, MAX_TOKENS) == [511, 1023]
    euro = "€".encode()
    assert ends(["a", "b", euro[:1], euro[1:2], euro[2:], "c"], 1, 3) == [4]
    assert ends(["a", "b", "c", "\n\n", "d\n\n"], 1, 3) == [2, 4]  # "\n\n" alone is no step


def test_no_step_ends_within_a_character() -> None:
    euro = "€".encode()
    assert ends([b"a\n\n" + euro[:2], euro[2:], "b"]) == [1]
    bounds = StepBounds()
    assert bounds.whole
    bounds.push(euro[:1])
    assert not bounds.whole
    bounds.push(euro[1:])
    assert bounds.whole


def test_it_tells_of_the_step_in_progress() -> None:
    bounds = StepBounds(min_tokens=1)
    assert (bounds.n_tokens, bounds.blank) == (0, True)
    bounds.push(b"\n")
    assert (bounds.n_tokens, bounds.blank) == (1, True)
    bounds.push(b"")
    bounds.push(b" a")
    assert (bounds.n_tokens, bounds.blank) == (3, False)
    assert bounds.push(b"\n\n")
    assert (bounds.n_tokens, bounds.blank) == (0, True)
    assert bounds.push(b"b\n\nc")
    assert (bounds.n_tokens, bounds.blank) == (0, False)


def test_a_copy_goes_on_by_itself() -> None:
    bounds = StepBounds(min_tokens=1)
    for piece in (b"```\n", b"a", b"\xe2"):
        bounds.push(piece)
    draft = bounds.copy()
    for piece in (b"\x82\xac\n", b"```\n\n", b"b"):
        draft.push(piece)
    assert (bounds.n_tokens, bounds.whole, draft.n_tokens, draft.whole) == (3, False, 1, True)
    assert not bounds.push(b"\x82\xac\n\n")
    assert draft.push(b"\n\n")


PIECES = st.sampled_from([
    "\n", "\n\n", " ", "\r\n", "\t", "a", ". ", "1. ", "- ", "* ", "23) ", "```", "~~~", "`",
    "```py", "€", "😀", "\u3000", "Answer: 7", "\ufeff",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=40).map("".join).map(str.encode)
BYTES = st.lists(st.sampled_from([b"\n", b" ", b"a", b"\xe2", b"\x82", b"\xac", b"\xf0", b"\xff",
                                  b"\xed\xa0", b"```\n"]), max_size=40).map(b"".join)  # fmt: skip


@given(st.one_of(TEXTS, BYTES), st.lists(st.integers(0, 120), max_size=30))
def test_cutting_moves_no_end(data: bytes, places: list[int]) -> None:
    """An end is told after the first token that completes it and leaves whole characters."""
    single = {i + 1 for i in ends(bytes([byte]) for byte in data)}
    pieces, bounds = cut(data, places), StepBounds(min_tokens=1, max_tokens=ENDLESS)
    begin, due = 0, False
    for piece in pieces:
        ended = bounds.push(piece)
        due |= any(begin < place <= begin + len(piece) for place in single)
        assert ended == (due and bounds.whole)
        due &= not ended
        begin += len(piece)


@given(st.lists(st.sampled_from(["a", " ", "\n", "\t", "\r\n", "."]), max_size=60).map("".join))
def test_ends_are_blank_lines_after_something(text: str) -> None:
    """Where there are neither lists nor code, an expression finds the same steps."""
    found = [match.end() for match in re.finditer(r"\s*\S.*?\n[^\S\n]*\n", text, re.DOTALL)]
    assert [i + 1 for i in ends(text)] == found


@given(
    st.one_of(TEXTS, BYTES), st.lists(st.integers(0, 120), max_size=60),
    st.integers(1, 6), st.integers(6, 9),
)  # fmt: skip
def test_lengths_hold(data: bytes, places: list[int], least: int, most: int) -> None:
    """Every step is long enough, holds something, and goes past the limit only for characters."""
    bounds, tokens, before = StepBounds(min_tokens=least, max_tokens=most), list[bytes](), b""
    for piece in cut(data, places):
        tokens.append(piece)
        if bounds.push(piece):
            assert len(tokens) >= least and bounds.whole
            assert (before + b"".join(tokens)).decode(errors="replace").strip()
            before, tokens = tokens[-1], []
        assert bounds.n_tokens == len(tokens)
        assert len(tokens) < most or not bounds.whole or bounds.blank
