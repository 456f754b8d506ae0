"""The look at JSON before it is parsed: depth and number of values, however it is cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.server.errors import ApiError
from edgeroute.server.json_scan import BLOCK_BYTES, JsonScan

texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('[]{},"\\:a\n é', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=30,
)


def depth_of(value: object) -> int:
    if isinstance(value, list):
        return 1 + max((depth_of(each) for each in value), default=0)
    if isinstance(value, dict):
        return 1 + max((depth_of(each) for each in value.values()), default=0)
    return 0


def scanned(text: bytes, size: int, **limits: int) -> JsonScan:
    scan = JsonScan(**({"max_depth": 1 << 20} | limits))
    for start in range(0, len(text), size):
        scan.feed(text[start : start + size])
    return scan


@settings(max_examples=200, deadline=None)
@given(value=texts, size=st.integers(1, 40), ascii_only=st.booleans())
def test_it_finds_the_depth_that_the_parser_finds(
    value: object, size: int, ascii_only: bool
) -> None:
    """Brackets in strings do not count, wherever the text was cut."""
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth = depth_of(value)
    assert scanned(text, size, max_depth=depth).depth == 0
    if depth:
        with pytest.raises(ApiError) as caught:
            scanned(text, size, max_depth=depth - 1)
        assert caught.value.status == 400


@settings(max_examples=100, deadline=None)
@given(text=st.text('"\\[]{},a').map(str.encode), size=st.integers(1, 9))
def test_where_a_text_is_cut_changes_nothing(text: bytes, size: int) -> None:
    """Also for what is no JSON."""
    whole, cut = scanned(text, len(text) or 1), scanned(text, size)
    assert (whole.depth, whole.n_values) == (cut.depth, cut.n_values)


def test_100_000_levels_are_refused_at_the_first_too_deep() -> None:
    """L#27434: the parser recursed until its stack ended."""
    for opening in (b"[", b'{"a":', b'[{"b":'):
        with pytest.raises(ApiError, match="nests"):
            scanned(opening * 100_000, BLOCK_BYTES, max_depth=64)


def test_values_are_counted_and_limited() -> None:
    assert scanned(b'[1,2,{"a,b":3}]', 4).n_values == 5
    with pytest.raises(ApiError, match="values"):
        scanned(b"[" + b"[]," * 1000 + b"[]]", 100, max_values=500)


def test_a_long_string_is_one_value() -> None:
    text = json.dumps({"content": '[{"\\,' * 50_000}).encode()
    scan = scanned(text, BLOCK_BYTES, max_depth=1)
    assert (scan.depth, scan.n_values) == (0, 2)
