"""Forecasts corrected by what answers had."""

import json
from pathlib import Path

import pytest

from edgeroute.config import RunParams
from edgeroute.runtime.cache_file import replace_text
from edgeroute.tools.forecast import experience
from edgeroute.tools.forecast.experience import Seen, corrected, note, seen
from edgeroute.tools.forecast.records import Range

PARAMS = RunParams(threads=2)


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(experience, "cache_path", lambda name: tmp_path / "cache" / name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"0123")
    return path


def test_the_median_of_the_last_answers_corrects(model: Path) -> None:
    assert seen(model, PARAMS, 100.0) is None
    for had in (10, 10, 10, 60, 50, 55, 40, 52):
        note(model, PARAMS, 100.0, had)
    found = seen(model, PARAMS, 100.0)
    assert found == Seen(0.52, 5)
    assert corrected(Range(low=80, likely=100, high=120), found) == Range(
        low=pytest.approx(41.6), likely=pytest.approx(52), high=pytest.approx(62.4)
    )
    assert corrected(Range(low=80, likely=100, high=120), None).likely == 100


def test_it_is_of_this_model_these_threads_and_this_calibration(
    model: Path, tmp_path: Path
) -> None:
    note(model, PARAMS, 100.0, 50.0)
    assert seen(model, PARAMS, 130.0) == Seen(0.5, 1)
    assert seen(model, PARAMS, 160.0) is None, "measured anew"
    assert seen(model, RunParams(threads=1), 100.0) is None
    other = tmp_path / "other" / "m.gguf"
    other.parent.mkdir()
    other.write_bytes(b"01234")
    assert seen(other, PARAMS, 100.0) is None
    assert seen(model.with_name("gone.gguf"), PARAMS, 100.0) is None


def test_old_answers_and_what_is_no_speed_do_not_count(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for had in (0.0, -1.0, float("nan"), float("inf")):
        note(model, PARAMS, 100.0, had)
    assert seen(model, PARAMS, 100.0) is None
    note(model, PARAMS, 100.0, 50.0)
    now = experience.time.time()
    monkeypatch.setattr(experience.time, "time", lambda: now + experience.VALID_S + 10)
    assert seen(model, PARAMS, 100.0) is None


def test_it_stays_small(model: Path) -> None:
    for _ in range(experience._MOST_ENTRIES + 30):
        note(model, PARAMS, 100.0, 50.0)
    file = experience.cache_path("answers.json")
    assert len(json.loads(file.read_text())["entries"]) == experience._MOST_ENTRIES
    assert file.stat().st_size < experience._MOST_BYTES


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", '{"version": 9, "entries": []}', '{"version": 1, "entries": 3}',
     '{"version": 1, "entries": [1, ["a"], ["a", "b", 1, 1], ["a", 1, 0, 1], [1, 1, 1, 1]]}'],
)  # fmt: skip
def test_a_file_that_is_none_is_passed_over(model: Path, text: str) -> None:
    replace_text(experience.cache_path("answers.json"), text)
    assert seen(model, PARAMS, 100.0) is None
    note(model, PARAMS, 100.0, 50.0)
    assert seen(model, PARAMS, 100.0) == Seen(0.5, 1)
