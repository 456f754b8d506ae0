"""`edgeroute plan LARGE --small SMALL`: what it says of both, and that the engine agrees."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeroute import Runtime, paging_layers
from edgeroute.cli import cli
from edgeroute.commands import plan_forecast
from edgeroute.commands.plan_pair import pass_cost
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB
from edgeroute.skippers.step_price import PassCost, Workload
from edgeroute.steps_file import Point, StepsFile, place_steps_file
from edgeroute.tools import synth
from edgeroute.tools.forecast import plan as planning
from edgeroute.tools.forecast.records import Forecast, Range
from tests.edgeroute.speeds_lab import SPEEDS

CONTEXT = ("--n-ctx", "256")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and nothing counts but the models."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging_layers, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(plan_forecast, "calibrate", lambda *_: SPEEDS)
    monkeypatch.setattr(planning, "PROGRAM_BYTES", 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A large model of forty layers of 2.5 MiB, a small one, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("plan")
    llama = synth.ARCHITECTURES["llama"]
    specs = {
        "large": replace(llama, n_layer=40), "small": replace(llama, n_layer=4),
        "other": replace(llama, n_layer=4, vocab="spm", n_vocab=512),
    }  # fmt: skip
    for name, spec in specs.items():
        synth.write(spec, folder / f"{name}.gguf")
    return {name: folder / f"{name}.gguf" for name in specs}


def run(pair: dict[str, Path], *more: str, small: str = "small") -> Result:
    words = ["plan", str(pair["large"]), "--small", str(pair[small]), *CONTEXT, *more]
    return CliRunner().invoke(cli, words)


def plan(pair: dict[str, Path], *more: str, code: int = 0, small: str = "small") -> dict[str, Any]:
    result = run(pair, *more, "--json", small=small)
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def alone(path: Path, *more: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["plan", str(path), *CONTEXT, *more, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_pair_that_fits_is_told_by_part_of_both(pair: dict[str, Path]) -> None:
    found = plan(pair, "--memory", "1GiB")
    assert (found["verdict"], found["pages"], found["fits"]) == ("FITS", None, True)
    assert found["budget_bytes"] == 1 << 30
    small = {name: n for name, n in found["parts"].items() if name.startswith("small model, ")}
    assert sum(small.values()) == found["pair"]["small_bytes"] == found["small"]["total_bytes"]
    assert sum(found["parts"].values()) == found["total_bytes"] == found["resident_bytes"]
    assert found["pair"]["shared_vocabulary"] is True
    with Runtime(pair["large"], small=pair["small"], n_ctx=256, memory="1GiB") as runtime:
        loaded: Any = runtime.stats()["memory"]
    assert loaded.keys() == found["parts"].keys()
    for part, n_bytes in loaded.items():
        assert found["parts"][part] >= n_bytes, part
        if "compute" not in part:  # which is planned from above
            assert found["parts"][part] == n_bytes, part


def test_the_large_model_streams_in_what_is_left(pair: dict[str, Path]) -> None:
    whole = plan(pair, "--memory", "1GiB")["total_bytes"]
    budget = whole - 30 * MIB
    found = plan(pair, "--memory", str(budget))
    assert (found["verdict"], found["pages"]) == ("PAGES", "layers")
    assert found["total_bytes"] <= budget
    left = found["pair"]["large_budget_bytes"]
    assert left == budget - found["pair"]["small_bytes"]
    by_itself = alone(pair["large"], "--memory", str(left))
    assert found["layers"]["n_streamed"] >= by_itself["layers"]["n_streamed"] > 0
    with Runtime(pair["large"], small=pair["small"], n_ctx=256, memory=budget, threads=1) as one:
        layers: Any = one.stats()["layers"]
    assert 0 < layers["streamed"] <= found["layers"]["n_streamed"]


def test_a_refusal_names_the_smallest_budget_of_both(pair: dict[str, Path]) -> None:
    refused = plan(pair, "--memory", "20MiB", code=4)
    least = refused["smallest_budget_bytes"]
    assert refused["verdict"] == "REFUSED" and not refused["fits"]
    assert least == refused["pair"]["small_bytes"] + alone(
        pair["large"], "--memory", "1MiB", code=4
    )["smallest_budget_bytes"] + _more_logits(pair)
    assert plan(pair, "--memory", str(least))["verdict"] == "PAGES"
    assert plan(pair, "--memory", str(least - 1), code=4)["verdict"] == "REFUSED"
    with Runtime(pair["large"], small=pair["small"], n_ctx=256, memory=least) as runtime:
        assert runtime.generate("Hi", max_tokens=2, steps="random:0.5").stats.n_generated
    with pytest.raises(CapacityError):
        Runtime(pair["large"], small=pair["small"], n_ctx=256, memory="20MiB")
    text = run(pair, "--memory", "20MiB")
    assert (
        text.exit_code == 4 and "--memory" in text.stdout and "too little for both" in text.stdout
    )


def _more_logits(pair: dict[str, Path]) -> int:
    """What checks of drafts take in the large model's compute buffer."""
    both = plan(pair, "--memory", "1GiB")["parts"]["compute buffer"]
    one = alone(pair["large"], "--memory", "1GiB")["parts"]["compute buffer"]
    return int(both - one)


def test_the_longest_context_holds_for_both(pair: dict[str, Path]) -> None:
    budget = str(plan(pair, "--memory", "20MiB", code=4)["smallest_budget_bytes"] + 20 * MIB)
    longest = plan(pair, "--memory", budget)["largest_n_ctx"]
    assert longest % 256 == 0
    assert plan(pair, "--memory", budget, "--n-ctx", str(longest))["fits"]
    over = plan(pair, "--memory", budget, "--n-ctx", str(longest + 1), code=4)
    assert over["largest_n_ctx"] == longest


def test_two_vocabularies_are_a_pair_only_for_steps(pair: dict[str, Path]) -> None:
    found = plan(pair, "--memory", "1GiB", small="other")
    assert found["pair"]["shared_vocabulary"] is False
    drafts = run(pair, "--steps", "off", small="other")
    assert drafts.exit_code == 2 and "cannot draft" in drafts.stderr
    policy = run(pair, "--steps", "glimpse:1.2", "--memory", "1GiB", small="other")
    assert policy.exit_code == 0 and "encoded anew" in policy.stdout
    both = run(pair, "--on", "cpu")
    assert both.exit_code == 2 and "--on" in both.stderr


def test_drafts_and_checks_are_forecast(pair: dict[str, Path]) -> None:
    whole = plan(pair, "--memory", "1GiB")
    paged = plan(pair, "--memory", str(whole["total_bytes"] - 60 * MIB))
    for found in (whole, paged):
        forecast = found["pair"]["forecast"]
        large, small = found["forecast"], found["small"]["forecast"]
        n = forecast["draft_tokens"]
        assert forecast["alone_s"] == pytest.approx(n / large["decode_tok_s"]["likely"])
        assert forecast["draft_s"] == pytest.approx(n / small["decode_tok_s"]["likely"])
        assert 1 / large["decode_tok_s"]["likely"] <= forecast["check_s"] <= forecast["alone_s"]
        spent = forecast["draft_s"] + forecast["check_s"]
        assert forecast["best_tok_s"] == pytest.approx(n / spent)
        assert forecast["calibrated"] is None
    resident, streamed = whole["pair"]["forecast"], paged["pair"]["forecast"]
    assert streamed["alone_s"] / streamed["check_s"] > resident["alone_s"] / resident["check_s"]
    text = run(pair, "--memory", "1GiB").stdout
    for words in ("one for both", "steps at best", "edgeroute calibrate --steps", "small model, "):
        assert words in text
    assert plan(pair, "--memory", "20MiB", code=4)["pair"]["forecast"] is None


def test_a_calibrated_policy_is_priced(pair: dict[str, Path], tmp_path: Path) -> None:
    marks = {}
    for name in ("small", "large"):
        with GGUFFile.open(pair[name]) as file:
            marks[name] = fingerprint(file)

    def point(spec: str, workload: Workload) -> Point:
        return Point(spec=spec, n=60, accuracy=0.8, low=0.7, high=0.9, large_share=0.1,
                     seconds=3.0, workload=workload)  # fmt: skip

    cost = PassCost(base_s=0.1, token_s=0.1)
    alone_load = Workload(large_written=60, large_passes=1, large_read=200)
    points = point("large", alone_load), point("agree:0:48", replace(alone_load, large_written=6))
    StepsFile(
        small=marks["small"], large=marks["large"], points=points, small_accuracy=0.3,
        large_accuracy=0.85, chosen="agree:0:48", target=0.9, learned=None,
        costs={"small": cost, "large": cost}, date="2026-11-23", tasks="ab" * 32,
    ).write(place_steps_file(pair["large"], pair["small"]))  # fmt: skip
    try:
        found = plan(pair, "--memory", "1GiB")["pair"]["forecast"]["calibrated"]
        assert (found["policy"], found["large_accuracy"]) == ("agree:0:48", 0.85)
        assert found["gain"] > 1
        assert "agree:0:48: " in run(pair, "--memory", "1GiB").stdout
        assert (
            plan(pair, "--memory", "1GiB", "--steps", "off")["pair"]["forecast"]["calibrated"]
            is None
        )
    finally:
        place_steps_file(pair["large"], pair["small"]).unlink()


@pytest.mark.parametrize(
    ("decode", "prefill", "n_prompt", "n_ubatch", "base_s", "token_s"),
    [
        (10.0, 10.0, 512, 512, 0.0, 0.1),  # a pass over k tokens costs k passes
        (10.0, 5120.0, 512, 512, 0.1, 0.0),  # it costs one
        (10.0, 1e9, 512, 512, 0.1, 0.0),  # quicker than one token: noise
        (10.0, 1.0, 512, 512, 0.0, 0.1),  # dearer than one by one: noise
        (1.0, 1024 / (2 * 0.9 + 1024 * 0.1), 1024, 512, 0.9, 0.1),  # two passes
        (10.0, 99.0, 1, 512, 0.0, 0.1),  # a prompt of one token says nothing
    ],
)
def test_passes_are_priced_from_a_token_and_a_prompt(
    decode: float, prefill: float, n_prompt: int, n_ubatch: int, base_s: float, token_s: float
) -> None:
    def around(value: float) -> Range:
        return Range(low=value, likely=value, high=value)

    forecast = Forecast(
        machine="it", verdict="FITS", pages=None, budget_bytes=1, smallest_bytes=1, hit_ratio=None,
        read_bytes_token=0.0, decode_tok_s=around(decode), prefill_tok_s=around(prefill),
        ttft_s=None, joules_token=None, parts={},
    )  # fmt: skip
    cost = pass_cost(forecast, n_prompt, n_ubatch)
    assert cost is not None
    assert cost.base_s == pytest.approx(base_s, abs=1e-6)
    assert cost.token_s == pytest.approx(token_s, abs=1e-6)
    assert pass_cost(replace(forecast, decode_tok_s=None), n_prompt, n_ubatch) is None
