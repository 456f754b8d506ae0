"""Steps files: what is written is read, and nothing else is."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import steps_file
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_learned import FEATURES, LearnedGlimpse
from edgeroute.skippers.step_price import PassCost, Workload
from edgeroute.steps_file import (
    MAX_BYTES,
    Point,
    StepsFile,
    StepsFileError,
    find_steps_file,
    place_steps_file,
    steps_paths,
)

SMALL, LARGE = "5" * 64, "a" * 64
N = len(FEATURES)
LEARNED = LearnedGlimpse(
    weights=np.linspace(-1, 1, N), bias=-1.5, mean=np.zeros(N), scale=np.ones(N)
).to_dict()
POINT = Point(
    spec="glimpse:1.2", n=60, accuracy=0.7, low=0.57, high=0.8, large_share=0.4, seconds=3.5,
    workload=Workload(small_written=40.0, small_read=180.5, large_written=20.0, large_passes=3.0,
                      large_read=190.0),
)  # fmt: skip
FILE = StepsFile(
    small=SMALL, large=LARGE, small_accuracy=0.3, large_accuracy=0.72, target=0.95,
    points=(POINT, replace(POINT, spec="verify:-0.6:-5:48", accuracy=0.8)),
    chosen="glimpse:1.2", learned=LEARNED,
    costs={"small": PassCost(base_s=0.02, token_s=0.001),
           "large": PassCost(base_s=0.3, token_s=0.002)},
    date="2026-01-31", tasks="0" * 64,
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pair.steps.json"


@pytest.fixture
def content(path: Path) -> dict[str, Any]:
    FILE.write(path)
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return found


def read(path: Path) -> StepsFile:
    return StepsFile.read(path, SMALL, LARGE)


def test_what_is_written_is_read(path: Path) -> None:
    for file in (FILE, replace(FILE, chosen=None, learned=None, points=())):
        file.write(path)
        assert read(path) == file
    assert os.listdir(path.parent) == [path.name]  # no part of it stays behind


def test_a_point_is_found_by_its_policy() -> None:
    assert FILE.point("glimpse:1.2") is POINT and FILE.point("glimpse:1.3") is None


def test_a_remote_model_goes_by_its_name(path: Path) -> None:
    remote = replace(FILE, large="qwen3-32b")
    remote.write(path)
    assert StepsFile.read(path, SMALL, "qwen3-32b") == remote


@pytest.mark.parametrize(("small", "large"), [("6" * 64, LARGE), (SMALL, "b" * 64)])
def test_a_file_of_other_models_is_refused(path: Path, small: str, large: str) -> None:
    FILE.write(path)
    with pytest.raises(StepsFileError, match=r"made for another (small|large) model.*calibrate"):
        StepsFile.read(path, small, large)


Change = Callable[[dict[str, Any]], object]
WRONG: list[tuple[Change, str]] = [
    (lambda c: c.pop("version"), "version of steps file pair.steps.json is missing"),
    (lambda c: c.update(version=2), "has version 2, this program reads 1"),
    (lambda c: c.update(version=True), "version .* is true"),
    (lambda c: c.update(more=1), "unknown key 'more'"),
    (lambda c: c.update(small=7), "small of .* is 7; a text"),
    (lambda c: c.update(points={}), "points of .* is an object of 0; a list"),
    (lambda c: c.update(points=[1]), r"points\[0\] of .* is 1; an object"),
    (lambda c: c.update(points=c["points"] * 200), "a list of 400; a list of at most 256"),
    (lambda c: c.update(points=c["points"] * 2), "two points .* of the policy 'glimpse:1.2'"),
    (lambda c: c["points"][0].update(accuracy=1.5), r"accuracy of points\[0\] .* is 1.5; a number"),
    (lambda c: c["points"][0].update(accuracy=True), "accuracy of .* is true"),
    (lambda c: c["points"][0].update(accuracy=0.1), "accuracy .* within its interval"),
    (lambda c: c["points"][0].update(low="0"), "low of .* is '0'"),
    (lambda c: c["points"][0].update(n=0), "n of .* is 0; a whole number from 1"),
    (lambda c: c["points"][0].update(n=6.5), "n of .* is 6.5"),
    (lambda c: c["points"][0].update(large_share=-0.1), "large_share of"),
    (lambda c: c["points"][0].update(seconds=10**400), "seconds of .* a number of 1329 bits"),
    (lambda c: c["points"][0].update(spec="__import__('os')"), "spec of .* a text like"),
    (lambda c: c["points"][0].update(spec="a" * 101), "spec of .* 1 to 100 characters"),
    (lambda c: c["points"][0].update(other=1), r"points\[0\] .* unknown key 'other'"),
    (lambda c: c["points"][0]["workload"].pop("large_read"), "large_read of workload of points"),
    (lambda c: c["points"][0]["workload"].update(small_read=-1), "small_read of workload .* is -1"),
    (lambda c: c["points"][0].update(workload=None), "workload of .* is missing; an object"),
    (lambda c: c.update(chosen="glimpse:9"), "chosen of .* is 'glimpse:9'; the spec of one of"),
    (lambda c: c.pop("chosen"), "has no chosen; calibrate the pair again"),
    (lambda c: c.update(target=2), "target of .* is 2"),
    (lambda c: c.update(date="yesterday"), "date of .* is 'yesterday'; a text like"),
    (lambda c: c.update(tasks="x" * 64), "tasks of .* a text like"),
    (lambda c: c["costs"].pop("large"), "has no large; calibrate"),
    (lambda c: c["costs"].update(medium={}), "unknown key 'medium'"),
    (lambda c: c["costs"]["small"].update(base_s="fast"), "base_s of small of costs .* is 'fast'"),
    (lambda c: c.update(learned=[]), "learned of .* is a list of 0; an object"),
    (lambda c: c["learned"].update(bias=None), "bias of learned .* is missing; a finite number"),
    (lambda c: c["learned"].update(weights=[[1.0]]), "weights of learned .* a list of 1; a finite"),
    (lambda c: c["learned"].update(weights=[0.0] * 65537), "a list of at most 65536"),
    (lambda c: c["learned"].update(weights=[10**400]), "weights of learned"),
    (lambda c: c["learned"].update({"../x": 1}), "keys missing or too many: ../x"),
    (lambda c: c["learned"].update(scale=[0.0] * N), "has 0.0 in scale"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_value_is_refused_by_its_name(
    path: Path, content: dict[str, Any], change: Change, words: str
) -> None:
    path.write_text(json.dumps(content))
    assert read(path) == FILE  # before the change
    wrong = copy.deepcopy(content)
    change(wrong)
    path.write_text(json.dumps(wrong))
    with pytest.raises(StepsFileError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "must hold one JSON object, not a list of 0"),
        (b"\xff\xfe", "not JSON"),
        (b'{"target": NaN}', "NaN"),
        (b'{"target": 1, "target": 1}', "the key .target. twice"),
        (b"[" * 100_000, "too deeply"),
        (b" " * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
        (b'{"version": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_such_json_is_refused(path: Path, raw: bytes, words: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(StepsFileError, match=words):
        read(path)


def test_a_file_that_is_not_there_or_a_folder_is_refused(path: Path) -> None:
    with pytest.raises(StepsFileError, match="cannot be read"):
        read(path)
    path.mkdir()
    with pytest.raises(StepsFileError, match="cannot be read"):
        read(path)


def test_what_could_not_be_read_again_is_not_written(path: Path) -> None:
    FILE.write(path)
    before = path.read_bytes()
    bad = [
        replace(FILE, target=float("nan")),
        replace(FILE, points=(replace(POINT, accuracy=2.0),)),
        replace(FILE, chosen="glimpse:7"),
        replace(FILE, learned={**LEARNED, "bias": float("inf")}),
    ]
    for file in bad:
        with pytest.raises(StepsFileError):
            file.write(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILE.write(path)
    before = path.read_bytes()

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="cannot be written: No space left"):
        replace(FILE, target=0.5).write(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# places


def test_it_is_found_beside_the_large_model_and_then_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_file.platformdirs, "user_data_path", lambda app: tmp_path / "mine")
    (tmp_path / "models").mkdir()
    large, small = tmp_path / "models" / "big.gguf", tmp_path / "little.gguf"
    beside, mine = steps_paths(large, small)
    assert beside == tmp_path / "models" / "big.little.steps.json"
    assert mine.parent == tmp_path / "mine" / "steps" and mine.name.startswith("big.little.")
    assert find_steps_file(large, small) is None
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert find_steps_file(large, small) == mine
    beside.touch()
    assert find_steps_file(large, small) == beside
    assert find_steps_file(large, small, str(mine)) == mine
    other = steps_paths(tmp_path / "elsewhere" / "big.gguf", small)[1]
    assert other.parent == mine.parent and other != mine  # of another file of the same name


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no steps file .*x.json; `edgeroute calibrate"):
        find_steps_file(tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "x.json")


@pytest.mark.parametrize("name", ["q/qwen3:32b", "../../etc/passwd", "", "..", "\x00", "a" * 500])
def test_a_remote_models_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    beside, mine = steps_paths(name, tmp_path / "little.gguf")
    assert beside.parent == tmp_path and mine.parent.name == "steps"
    assert len(beside.name) < 128 and "\x00" not in beside.name
    beside.touch()


@pytest.mark.skipif(os.name != "posix", reason="permissions of a folder")
def test_a_folder_that_cannot_be_written_sends_it_to_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_file.platformdirs, "user_data_path", lambda app: tmp_path / "mine")
    large, small = tmp_path / "big.gguf", tmp_path / "little.gguf"
    assert place_steps_file(large, small) == steps_paths(large, small)[0]
    monkeypatch.setattr(os, "access", lambda *_: False)  # which root always may
    place = place_steps_file(large, small)
    assert place == steps_paths(large, small)[1] and place.parent.is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(steps_file.platformdirs, "user_data_path", lambda app: tmp_path / "file")
    with pytest.raises(UsageError, match=r"neither .* can be written; name a file by --out"):
        place_steps_file(large, small)
