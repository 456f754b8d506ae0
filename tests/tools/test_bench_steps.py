"""The bench of answers in steps: a tiny pair in memory, and one behind an endpoint."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.tools import synth
from edgeroute.tools.bench import steps
from edgeroute.tools.bench.report import BenchParams, Report


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench-steps")
    large, small = folder / "large.gguf", folder / "small.gguf"
    llama = synth.ARCHITECTURES["llama"]
    synth.write(replace(llama, n_layer=2), large)
    synth.write(replace(llama, n_layer=1), small)
    return large, small


def measure(pair: tuple[Path, Path], **wanted: object) -> Report:
    large, small = pair
    given = steps.StepsParams(small=small, n_questions=2, settings={"n_ctx": 2048}, **wanted)  # type: ignore[arg-type]
    return steps.run(BenchParams(path=large, name="tiny", reps=1, threads=1), print, given)


def test_a_pair_that_leaves_all_to_one_model_writes_what_that_does(pair: tuple[Path, Path]) -> None:
    report = measure(pair, policies=("glimpse:0", "glimpse:inf", "verify:-9:-12"))
    equal = {each.what: each for each in report.criteria if "equal" in each.what}
    assert len(equal) == 2 and all(each.met for each in equal.values())
    found = {str(each["policy"]): each for each in report.results}
    assert found["glimpse:0"]["large_share"] == found["large alone"]["large_share"] == 1
    assert found["glimpse:inf"]["large_share"] == found["glimpse:inf"]["read_large"] == 0
    read, written = found["verify:-9:-12"]["read_large"], found["verify:-9:-12"]["n_tokens"]
    assert isinstance(read, int) and isinstance(written, int) and read > 0 < written
    large = found["large alone"]
    assert (large["time_ratio"], large["time_95"]) == (1, (1, 1)) == (large["right_ratio"], (1, 1))


def test_ratios_have_intervals_over_questions() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.uniform(1, 3, 200)
    value, (low, high) = steps._over(theirs * 0.5, theirs)
    assert value == low == high == 0.5
    value, (low, high) = steps._over(rng.permutation(theirs) * 0.5, theirs)
    assert value == pytest.approx(0.5) and 0.45 < low < 0.48 < 0.52 < high < 0.56
    assert steps._over(np.ones(3), np.zeros(3)) == (1.0, (1.0, 1.0))


def test_a_large_model_behind_an_endpoint(pair: tuple[Path, Path]) -> None:
    report = measure(pair, policies=("random:0.5",), latency_s=0.01)
    found = {str(each["policy"]): each for each in report.results}
    remote = found["large alone"]["steps"]
    assert isinstance(remote, dict) and remote["remote"]["n_calls"] > 0
    assert remote["remote"]["n_failures"] == 0
    assert found["large alone"]["large_share"] == 1


def test_what_contradicts_itself_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no policy"):
        measure(pair, policies=())
    with pytest.raises(UsageError, match="glimpse"):
        measure(pair, policies=("glimpze:1",))
    with pytest.raises(UsageError, match="--limit"):
        measure(pair, policies=("glimpse:1",), limit="1GiB", latency_s=0.1)
