"""Strict JSON: what is refused, by which error, and how values are shown in messages."""

import pytest

from edgeroute.runtime.errors import AdapterFileError, EdgerouteError, StepsFileError
from edgeroute.runtime.untrusted_json import parse_json, parse_object, show


@pytest.mark.parametrize("refused", [AdapterFileError, StepsFileError])
@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
        ('{"a": NaN}', "contains NaN"),
        ("[-Infinity]", "contains -Infinity"),
        ("[" * 100_000, "too deeply"),
        (b"\xff\xfe", "is not JSON"),
        ("[1,]", "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_what_is_not_plain_json_is_refused_by_name(
    raw: str | bytes, says: str, refused: type[EdgerouteError]
) -> None:
    with pytest.raises(refused) as caught:
        parse_json(raw, "the note", refused)
    assert type(caught.value) is refused
    assert str(caught.value).startswith("the note ") and says in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_long_key_is_cut() -> None:
    key = "k" * 10_000
    with pytest.raises(StepsFileError) as caught:
        parse_json(f'{{"{key}": 1, "{key}": 2}}', "it", StepsFileError)
    assert len(str(caught.value)) < 150


def test_text_and_bytes_are_the_same() -> None:
    for raw in ('{"a": [1, 2.5, null, true, "ä"]}', '{"a": [1, 2.5, null, true, "ä"]}'.encode()):
        assert parse_json(raw, "it", StepsFileError) == {"a": [1, 2.5, None, True, "ä"]}


@pytest.mark.parametrize(
    ("raw", "says"), [("[1, 2]", "a list of 2"), ("null", "missing"), ("7", "7")]
)
def test_what_is_no_object_is_shown(raw: str, says: str) -> None:
    assert parse_object("{}", "it", StepsFileError) == {}
    with pytest.raises(StepsFileError, match=f"it is {says}, but a JSON object is wanted"):
        parse_object(raw, "it", StepsFileError)


def test_values_are_shown_short() -> None:
    shown = {"a": {"b": 1}, "c": [1, 2, 3], "d": None, "e": True, "f": 1 << 70, "g": 0.5}
    assert [show(value) for value in shown.values()] == [
        "an object of 1", "a list of 3", "missing", "true", "a number of 71 bits", "0.5",
    ]  # fmt: skip
    assert show("it's") == '"it\'s"' and len(show("x" * 1000)) <= 80
