"""What was calibrated is used while it pays, by what passes cost now."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import StepsFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.step_price import PassCost, Workload
from edgeroute.step_choice import StepChoice
from edgeroute.step_memory import Marks, StepMemory
from edgeroute.steps_file import Point, StepsFile, place_steps_file
from edgeroute.tools import synth

SPEC = "verify:-0.5:-4"
ALONE = Workload(large_written=60, large_passes=1, large_read=200)
ROUTED = Workload(small_written=70, small_read=200, large_written=6, large_passes=5, large_read=260)
RESIDENT = {"small": PassCost(token_s=0.03), "large": PassCost(token_s=0.045)}
STREAMED = {"small": PassCost(token_s=0.03), "large": PassCost(base_s=0.6, token_s=0.02)}


def calibrated(small: str, large: str, costs: dict[Any, PassCost], chosen: str | None) -> StepsFile:
    def point(spec: str, workload: Workload) -> Point:
        return Point(spec=spec, n=60, accuracy=0.8, low=0.7, high=0.9, large_share=0.1,
                     seconds=3.0, workload=workload)  # fmt: skip

    return StepsFile(
        small=small, large=large, points=(point("large", ALONE), point(SPEC, ROUTED)),
        small_accuracy=0.3, large_accuracy=0.8, chosen=chosen, target=0.95, learned=None,
        costs=costs, date="2026-11-22", tasks="ab" * 32,
    )  # fmt: skip


def choice(costs: dict[Any, PassCost], file: StepsFile | None, default: str = "auto") -> StepChoice:
    nowhere = StepMemory(None, lambda: Marks("a", "b"))
    return StepChoice(default=default, file=file, costs=costs, memory=nowhere)


@pytest.mark.parametrize(("costs", "on"), [(RESIDENT, False), (STREAMED, True)])
def test_auto_follows_what_passes_cost_now(costs: dict[Any, PassCost], on: bool) -> None:
    """Whatever they cost when the pair was calibrated."""
    then = STREAMED if costs is RESIDENT else RESIDENT
    found = choice(costs, calibrated("a", "b", then, SPEC))
    policy = found.policy("auto")
    assert (policy is not None) == on
    assert policy is None or policy.spec == SPEC
    assert found.stats()["on"] is on
    assert on or "longer than the large model alone" in str(found.stats()["why"])


def test_until_passes_are_measured_those_of_the_calibration_count() -> None:
    unknown = {"small": PassCost(), "large": PassCost()}
    assert choice(unknown, calibrated("a", "b", STREAMED, SPEC)).policy(None) is not None
    assert choice(unknown, calibrated("a", "b", RESIDENT, SPEC)).policy(None) is None


def test_auto_is_off_where_nothing_reached_the_target() -> None:
    found = choice(STREAMED, calibrated("a", "b", STREAMED, None))
    assert found.policy(None) is None and "no policy reached 0.95" in str(found.stats()["why"])
    assert choice(STREAMED, None).policy("auto") is None
    assert choice(STREAMED, None, "off").policy(None) is None
    asked = choice(STREAMED, None).policy("glimpse:1")
    assert asked is not None and asked.spec == "glimpse:1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("choice")
    llama = synth.ARCHITECTURES["llama"]
    for name, n_layer in (("large", 2), ("small", 1)):
        synth.write(dataclasses.replace(llama, n_layer=n_layer), folder / f"{name}.gguf")
    return folder / "large.gguf", folder / "small.gguf"


def test_a_runtime_finds_what_was_calibrated_for_its_pair(pair: tuple[Path, Path]) -> None:
    large, small = pair
    marks = []
    for path in (small, large):
        with GGUFFile.open(path) as file:
            marks.append(fingerprint(file))
    settings: dict[str, Any] = {"n_ctx": 256, "threads": 1}
    calibrated(marks[0], marks[1], STREAMED, SPEC).write(place_steps_file(large, small))
    with Runtime(large, small=small, **settings) as runtime:
        stats: Any = runtime.stats()["steps"]
        assert (stats["on"], stats["policy"]) == (True, SPEC)
        found = runtime.generate("One two", max_tokens=8)
        assert found.stats.steps
        with pytest.raises(UsageError, match="weights"):
            runtime.generate("One two", steps="learned:0.3")
    with pytest.raises(StepsFileError, match="another"):
        Runtime(small, small=large, steps_file=place_steps_file(large, small), **settings)
    place_steps_file(large, small).write_text("{}")
    with pytest.raises(StepsFileError, match="version"):
        Runtime(large, small=small, **settings)
