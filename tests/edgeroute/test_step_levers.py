"""Answers in steps beside the other levers: streamed layers, adapters, depth plans, budgets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.stats import Generation
from edgeroute.tools import synth
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.edgeroute.layered_lab import plain_machine

PARAMS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "speculate": "off"}
PROMPT = "One two three, and so on until the end of the world. "
SPECS = ["large", "small", "random:0.5", "verify:-5.5:-6.2:12:1"]
N_LAYER, N_TOKENS = 6, 32


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of tiny models stream."""
    plain_machine(monkeypatch)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("levers") / "large.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=N_LAYER, weight_type="Q8_0"), found)
    return found


@pytest.fixture(scope="module")
def small(large: Path) -> Path:
    found = large.with_name("small.gguf")
    spec = replace(synth.ARCHITECTURES["qwen2"], n_layer=2, pre="smollm", weight_type="Q8_0")
    synth.write(spec, found)
    return found


def open_pair(large: Path, small: Path, **settings: Any) -> Runtime:
    runtime = Runtime(large, small=small, **(PARAMS | settings))
    routing = runtime._scheduler.steps
    assert routing is not None
    routing.new_bounds = lambda: StepBounds(min_tokens=2, max_tokens=7)
    return runtime


def answers(runtime: Runtime, **options: Any) -> list[Generation]:
    return [
        runtime.generate(PROMPT, max_tokens=N_TOKENS, steps=spec, seed=1, prefix="off", **options)
        for spec in SPECS
    ]


def test_a_streamed_large_model_writes_the_same(large: Path, small: Path) -> None:
    with open_pair(large, small) as runtime:
        budget = runtime.stats()["memory_bytes"]
        expected = answers(runtime)
    assert isinstance(budget, int)
    memory = budget - large.stat().st_size // 3
    with open_pair(large, small, memory=memory) as runtime:
        assert runtime._loaded.layers is not None, "the budget holds all of it"
        found = answers(runtime)
        entries: Any = runtime.stats()["memory"]
        assert sum(entries.values()) <= memory
        assert any(owner.startswith("small model") for owner in entries)
    for whole, streamed in zip(expected, found, strict=True):
        assert streamed.token_ids == whole.token_ids
        assert streamed.stats.layers is not None
    moved = [answer.stats.layers["bytes"] for answer in found if answer.stats.layers]
    assert moved[1] < moved[0] / 10, "at most what had been begun for the answer before"
    assert 0 < moved[3] < moved[0], "a check reads the large model once for many tokens"


def test_a_budget_below_the_small_model_is_refused_with_numbers(large: Path, small: Path) -> None:
    with pytest.raises(CapacityError, match="budget of"):
        open_pair(large, small, memory=small.stat().st_size // 2)


def test_an_adapter_of_the_large_model_writes_its_steps(
    large: Path, small: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a.gguf", large, rank=8, alpha=64)
    with Runtime(large, **PARAMS, adapters=[adapter]) as alone:
        expected = alone.generate(PROMPT, max_tokens=N_TOKENS, adapter="a")
    with open_pair(large, small, adapters=[adapter]) as runtime:
        plain, adapted = answers(runtime), answers(runtime, adapter="a")
        again = answers(runtime, adapter="a")
    assert adapted[0].token_ids == expected.token_ids != plain[0].token_ids
    assert adapted[1].token_ids == plain[1].token_ids, "the small model has no such adapter"
    assert [each.token_ids for each in adapted] == [each.token_ids for each in again]
    assert {each.adapter for each in adapted} == {"a"}


def test_an_adapter_of_the_small_model_writes_its_steps_beside_streamed_layers(
    large: Path, small: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a.gguf", small, rank=8, alpha=64)
    settings: dict[str, Any] = {"small_adapters": [adapter], "adapter_slots": 1}
    with open_pair(large, small, **settings) as runtime:
        need: Any = runtime.stats()["memory_bytes"]
        plain, expected = answers(runtime), answers(runtime, small_adapter="a")
    assert expected[0].token_ids == plain[0].token_ids, "the large model has no such adapter"
    assert expected[1].token_ids != plain[1].token_ids
    memory = need - large.stat().st_size // 3
    with open_pair(large, small, memory=memory, **settings) as runtime:
        assert runtime._loaded.layers is not None, "the budget holds all of it"
        found = answers(runtime, small_adapter="a")
        entries: Any = runtime.stats()["memory"]
        assert sum(entries.values()) <= memory
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_a_depth_plan_holds_for_the_large_model_s_steps(large: Path, small: Path) -> None:
    run, skip = LayerDepth(), LayerDepth(attn="skip", ffn="skip")
    layers = tuple(skip if il in (2, 3) else run for il in range(N_LAYER))
    plan = DepthPlan(name="short", layers=layers, compute=0.7)
    with GGUFFile.open(large) as file:
        model = fingerprint(file)
    content = DepthContent(model=model, data="00" * 32, plans=(plan,), tensors={})
    write_depth_file(large.with_suffix(".depth"), content)
    with Runtime(large, **PARAMS, depth="short") as alone:
        expected = alone.generate(PROMPT, max_tokens=N_TOKENS)
    with open_pair(large, small, depth="short") as runtime:
        found = answers(runtime)
        full = runtime.generate(PROMPT, max_tokens=N_TOKENS, steps="large", depth="full")
    assert found[0].token_ids == expected.token_ids != full.token_ids
    assert found[0].stats.depth is not None and full.stats.depth is None
