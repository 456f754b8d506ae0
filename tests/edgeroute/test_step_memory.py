"""What step policies learned survives a restart, and no file is taken at its word."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime, step_memory
from edgeroute.runtime.errors import StepsFileError, UsageError
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_targets import Learning, TargetAccuracy, TargetShare
from edgeroute.skippers.steps import Glance, StepPart
from edgeroute.step_memory import (
    MAX_BYTES,
    MAX_POLICIES,
    Marks,
    StepMemory,
    decode,
    encode,
    memory_path,
)
from edgeroute.tools import synth

MARKS = Marks(small="5" * 64, large="a" * 64)
PROMPT = "One two three, and so on until the end of the world. "


def taught() -> list[Learning]:
    """Policies that have seen some answers."""
    found = [parse_steps(spec) for spec in ("target:0.3", "pace:0.05", "accuracy:0.8")]
    for seed, policy in enumerate(found):
        run = policy.begin(seed)
        for i in range(20):
            who = run.choose(Glance(index=i, position=8 * i, entropy=0.37 * i % 4,
                                    top_entropy=0.3, margin=0.5))  # fmt: skip
            run.note(StepPart(index=i, model=who, n_tokens=8 + i, seconds=0.7, n_refused=0,
                              read_small=1, read_large=1))  # fmt: skip
        if isinstance(policy, TargetAccuracy):
            assert policy.feedback(seed, 0.75)
    return found  # type: ignore[return-value]


def test_what_is_written_is_read_to_the_last_bit() -> None:
    policies = taught()
    found = decode(encode(policies, MARKS), MARKS)
    assert [each.to_dict() for each in found] == [each.to_dict() for each in policies]
    assert decode(encode([], MARKS), MARKS) == []
    many = [TargetShare(i / 1000) for i in range(MAX_POLICIES + 9)]
    assert [each.spec for each in decode(encode(many, MARKS), MARKS)] == [
        each.spec for each in many[9:]
    ], "the last asked for"


def test_damage_anywhere_is_found() -> None:
    content = encode(taught(), MARKS)
    for end in range(0, len(content), 41):
        with pytest.raises(StepsFileError):
            decode(content[:end], MARKS)
    for at in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[at] ^= 0x11
        with pytest.raises(StepsFileError):
            decode(bytes(damaged), MARKS)
    for other in (MARKS._replace(small="0" * 64), MARKS._replace(large="remote")):
        with pytest.raises(StepsFileError, match="other models"):
            decode(content, other)


def forged(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file whose checksum fits what was changed in it."""
    content = json.loads(encode(taught(), MARKS))
    change(content)
    content.pop("sha256", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def put(*path: Any, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        at: Any = content
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("version", value=2), put("version", value=True), put("more", value=1),
        put("policies", value={}), put("policies", value=[[]]), put("policies", value=[{}]),
        put("policies", value=[{"spec": "target:0.3"}]), put("policies", value=None),
        put("policies", 0, "spec", value="target:2"), put("policies", 0, "spec", value="small"),
        put("policies", 0, "spec", value="random:0.5"), put("policies", 0, "spec", value=7),
        put("policies", 0, "spec", value="pace:0.05"), put("policies", 0, "spec", value="x" * 9999),
        put("policies", 0, "level", value=2.0), put("policies", 0, "level", value="0.5"),
        put("policies", 0, "level", value=None), put("policies", 0, "length", value=0.0),
        put("policies", 0, "length", value=1e300), put("policies", 0, "entropies", value=[]),
        put("policies", 0, "entropies", value=[0.5] * 257), put("policies", 0, "more", value=1),
        put("policies", 0, "entropies", 0, value=-1.0), put("policies", 2, "good", value=[1.0]),
        put("policies", 0, "entropies", 0, value=True), put("policies", 2, "bad", 0, value=-0.1),
        put("policies", 2, "bad", 0, value=[[]]), put("policies", value=[{}] * 65),
        lambda content: content.update(policies=2 * content["policies"]),
        lambda content: content["policies"][0].pop("level"),
    ],
)  # fmt: skip
def test_forged_files_are_refused_with_a_sentence(change: Callable[[dict[str, Any]], None]) -> None:
    assert decode(forged(lambda content: None), MARKS), "the forger can make a good file"
    with pytest.raises(StepsFileError, match="state of the step policies"):
        decode(forged(change), MARKS)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 100_000, b'{"a":NaN}']
)
def test_what_is_no_file_of_ours_is_refused(raw: bytes) -> None:
    with pytest.raises(StepsFileError, match="state of the step policies"):
        decode(raw, MARKS)


def test_a_bad_file_is_set_aside_and_learning_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for raw in (b"rubbish", b" " * (MAX_BYTES + 1), encode(taught(), MARKS)[:-9]):
        path.write_bytes(raw)
        memory = StepMemory(path, lambda: MARKS)
        assert memory.recall() == [] and not path.exists()
        assert (tmp_path / "state.json.refused").read_bytes() == raw
        assert "refused" in memory.stats()
        memory.save(taught())
        assert len(StepMemory(path, lambda: MARKS).recall()) == 3
    with pytest.raises(UsageError, match="not a file"):
        StepMemory(tmp_path, lambda: MARKS).recall()
    nowhere = StepMemory(None, lambda: MARKS)
    assert nowhere.recall() == []
    nowhere.save(taught())
    assert sorted(os.listdir(tmp_path)) == ["state.json", "state.json.refused"]


def test_a_crash_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    memory = StepMemory(path, lambda: MARKS)
    memory.save(taught())
    old = path.read_bytes()

    def fail(*_args: object) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(step_memory.os, name, fail)
            with pytest.raises(OSError, match="no space"):
                memory.save([TargetShare(0.9)])
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == [path.name]


def test_pairs_have_files_of_their_own(tmp_path: Path) -> None:
    large, small = tmp_path / "large.gguf", tmp_path / "small.gguf"
    places = {
        memory_path(large, small, None), memory_path(small, large, None),
        memory_path("http://host/v1#big", small, None), memory_path(large, large, None),
    }  # fmt: skip
    assert len(places) == 4 and None not in places
    assert memory_path(large, small, "off") is None
    assert memory_path(large, small, str(tmp_path / "x")) == tmp_path / "x"


# in a Runtime


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    llama = synth.ARCHITECTURES["llama"]
    for name, n_layer in (("large", 2), ("small", 1)):
        synth.write(replace(llama, n_layer=n_layer), folder / f"{name}.gguf")
    return folder / "large.gguf", folder / "small.gguf"


def open_pair(pair: tuple[Path, Path], **settings: Any) -> Runtime:
    runtime = Runtime(pair[0], small=pair[1], n_ctx=256, threads=1, speculate="off", **settings)
    routing = runtime._scheduler.steps
    assert routing is not None
    routing.new_bounds = lambda: StepBounds(min_tokens=2, max_tokens=7)
    return runtime


def known(runtime: Runtime) -> dict[str, dict[str, object]]:
    """What the policies of a Runtime have learned, by their names."""
    routing = runtime._scheduler.steps
    assert routing is not None
    return {spec: policy.to_dict() for spec, policy in routing.choice._policies.items()
            if hasattr(policy, "to_dict")}  # fmt: skip


def told(runtime: Runtime) -> dict[str, Any]:
    steps: Any = runtime.stats()["steps"]
    found: dict[str, Any] = steps["learned"]
    return found


def teach(runtime: Runtime) -> None:
    for spec in ("target:0.4", "pace:0.01", "accuracy:0.8", "glimpse:1"):
        found = runtime.generate(PROMPT, max_tokens=24, steps=spec, seed=3)
        if spec.startswith("accuracy"):
            runtime.feedback(found.id, 1.0)


def test_a_restart_goes_on_where_the_policies_were(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = tmp_path / "state" / "pair.json"
    with open_pair(pair, steps_state=state) as runtime:
        teach(runtime)
        before = known(runtime)
        assert told(runtime) == {"path": str(state), "recalled": 0}
        assert not state.exists(), "written at the end"
    assert set(before) == {"target:0.4", "pace:0.01", "accuracy:0.8"}
    content = state.read_bytes()
    with open_pair(pair, steps_state=state) as runtime:
        assert known(runtime) == before and told(runtime)["recalled"] == 3
        runtime.generate(PROMPT, max_tokens=8, steps="small")
    assert state.read_bytes() == content, "nothing was learned, nothing is written"
    with open_pair(pair, steps_state=state) as runtime:
        runtime.generate(PROMPT, max_tokens=24, steps="target:0.40", seed=3)
        after = known(runtime)
        assert after["target:0.4"] != before["target:0.4"], "however it is written"
        assert after["pace:0.01"] == before["pace:0.01"]


def test_off_keeps_nothing_and_the_default_is_the_user_s(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with open_pair(pair, steps_state="off") as runtime:
        teach(runtime)
        assert told(runtime) == {"path": None, "recalled": 0}
    assert os.listdir(tmp_path) == []
    with open_pair(pair) as runtime:
        teach(runtime)
        path = Path(told(runtime)["path"])
    assert path.is_relative_to(tmp_path) and path.is_file()


def test_a_damaged_or_foreign_state_begins_anew_and_says_so(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    state = tmp_path / "pair.json"
    with open_pair(pair, steps_state=state) as runtime:
        teach(runtime)
    content = state.read_bytes()
    for raw, words in ((content[:-40], "JSON"), (encode(taught(), MARKS), "other models")):
        state.write_bytes(raw)
        with open_pair(pair, steps_state=state) as runtime:
            assert words in told(runtime)["refused"] and known(runtime) == {}
            found = runtime.generate(PROMPT, max_tokens=8, steps="target:0.4")
            assert found.stats.n_generated
        assert state.with_name("pair.json.refused").read_bytes() == raw


def test_a_disk_that_takes_nothing_ends_no_answer(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "file" / "pair.json"
    state.parent.write_text("no folder")
    with open_pair(pair, steps_state=state) as runtime:
        routing = runtime._scheduler.steps
        assert routing is not None
        monkeypatch.setattr(routing.choice, "_n_until_save", 2)
        for _ in range(2):
            assert runtime.generate(PROMPT, max_tokens=8, steps="target:0.4").stats.n_generated
        assert "failed" in told(runtime)
        state.parent.unlink()
    assert len(json.loads(state.read_bytes())["policies"]) == 1, "tried again at the end"
