"""adapter="auto": what is chosen, learned, kept over a restart, and refused."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeroute
from edgeroute.adapter_routing import MAX_PROMPT_TOKENS, POLICIES, state_path
from edgeroute.models.adapter_file import base_shapes
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf

NAMES = ("a", "b", "c")
PROMPTS = ("one two three", "SELECT a FROM b;")


@pytest.fixture(scope="module")
def library(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    with GGUFFile.open(tiny_path) as file:
        base = base_shapes(describe(file))
    for seed, name in enumerate(NAMES):
        make_gguf(folder / f"{name}.gguf", base, AdapterSpec(seed=seed, kind="F16"))
    return folder


@pytest.fixture
def settings(library: Path, tmp_path: Path) -> dict[str, Any]:
    return {"n_ctx": 512, "n_kv": 2048, "threads": 1, "adapters": library,
            "adapter_state": str(tmp_path / "router.polar")}  # fmt: skip


@pytest.fixture
def runtime(tiny_path: Path, settings: dict[str, Any]) -> Iterator[edgeroute.Runtime]:
    with edgeroute.Runtime(tiny_path, **settings) as opened:
        yield opened


def plays(runtime: edgeroute.Runtime) -> dict[str, float]:
    found: Any = runtime.stats()["adapters"]
    return {name: each["n_plays"] for name, each in found["auto"]["adapters"].items()}


def teach(runtime: edgeroute.Runtime, best: dict[str, str], n: int) -> list[str | None]:
    """Ask both prompts in turn and reward the adapter that is best for each."""
    chosen: list[str | None] = []
    for i in range(n):
        prompt = PROMPTS[i % 2]
        found = runtime.generate(prompt, max_tokens=1, adapter="auto")
        runtime.feedback(found.id, float(found.adapter == best[prompt]))
        chosen.append(found.adapter)
    return chosen


def test_feedback_teaches_which_adapter_serves_which_prompt(runtime: edgeroute.Runtime) -> None:
    best = dict(zip(PROMPTS, ("a", "b"), strict=True))
    chosen = teach(runtime, best, 120)
    late = [name == best[PROMPTS[i % 2]] for i, name in enumerate(chosen)][-40:]
    assert sum(late) > 30, chosen


def test_an_answer_says_why_its_adapter_was_chosen(runtime: edgeroute.Runtime) -> None:
    found = runtime.generate(PROMPTS[0], max_tokens=2, adapter="auto")
    stats: Any = found.stats.to_dict()["adapters"]
    assert set(stats["used"]) == ({found.adapter} if found.adapter else set())
    assert {"score", "predicted_reward", "uncertainty", "paging_cost", "forced"} <= set(
        stats["auto"]
    )


def test_what_was_learned_survives_a_restart(
    tiny_path: Path, settings: dict[str, Any], library: Path
) -> None:
    with edgeroute.Runtime(tiny_path, **settings) as first:
        teach(first, dict(zip(PROMPTS, ("a", "b"), strict=True)), 20)
        before = plays(first)
    assert sum(before.values()) > 0
    with edgeroute.Runtime(tiny_path, **settings) as again:
        assert plays(again) == before
    fewer = [library / "a.gguf", library / "c.gguf"]
    with edgeroute.Runtime(tiny_path, **(settings | {"adapters": fewer})) as smaller:
        assert plays(smaller) == {name: before[name] for name in ("a", "c")}


def test_a_damaged_state_is_set_aside_and_nothing_is_lost(
    tiny_path: Path, settings: dict[str, Any]
) -> None:
    path = Path(settings["adapter_state"])
    path.write_bytes(b"not a router's state")
    with edgeroute.Runtime(tiny_path, **settings) as runtime:
        assert sum(plays(runtime).values()) == 0
    assert path.with_name(path.name + ".refused").read_bytes() == b"not a router's state"


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_answer_and_mix_what_is_resident(policy: str, runtime: edgeroute.Runtime) -> None:
    for name in NAMES:
        runtime.generate(PROMPTS[0], max_tokens=1, adapter=name)
    for _ in range(12):
        found = runtime.generate(PROMPTS[0], max_tokens=1, adapter=policy)
        used: Any = found.stats.to_dict()["adapters"]
        assert set(used["used"]) <= set(NAMES)
        assert policy != "auto" or len(used["used"]) <= 1
        assert sum(used["used"].values()) <= 1 + 1e-9
        runtime.feedback(found.id, 0.5)


def test_feedback_is_taken_once_and_in_range(runtime: edgeroute.Runtime) -> None:
    found = runtime.generate(PROMPTS[0], max_tokens=1, adapter="auto")
    for reward in (1.5, float("nan"), True):
        with pytest.raises(UsageError):
            runtime.feedback(found.id, reward)
    runtime.feedback(found.id, 1.0)
    with pytest.raises(UsageError, match="once"):
        runtime.feedback(found.id, 1.0)
    plain = runtime.generate(PROMPTS[0], max_tokens=1, adapter="a")
    with pytest.raises(UsageError, match="no answer"):
        runtime.feedback(plain.id, 1.0)


def test_a_scorer_gives_the_feedback(runtime: edgeroute.Runtime) -> None:
    seen: list[str] = []

    def score(generation: edgeroute.Generation) -> float:
        seen.append(generation.id)
        return 1.0

    first = runtime.generate(PROMPTS[0], max_tokens=1, adapter="auto", score=score)
    again = asyncio.run(runtime.agenerate(PROMPTS[0], max_tokens=1, adapter="auto", score=score))
    assert seen == [first.id, again.id]
    stats: Any = runtime.stats()["adapters"]
    assert stats["auto"]["n_learned"] == 2
    for adapter in (None, "a", {"a": 1.0}):
        with pytest.raises(UsageError, match="score"):
            runtime.generate("x", adapter=adapter, score=score)
    with pytest.raises(UsageError, match="score"):
        runtime.stream("x", adapter="auto", score=score)


def test_adapters_come_and_go_while_auto_learns(runtime: edgeroute.Runtime, library: Path) -> None:
    teach(runtime, dict(zip(PROMPTS, ("a", "b"), strict=True)), 10)
    late = runtime.generate(PROMPTS[0], max_tokens=1, adapter="auto")
    runtime.remove_adapter("a")
    runtime.feedback(late.id, 1.0)  # of an adapter that is gone: taken, and nothing learned
    assert set(plays(runtime)) == {"b", "c"}
    assert runtime.add_adapter(library / "a.gguf") == "a"
    assert plays(runtime)["a"] == 0
    teach(runtime, dict(zip(PROMPTS, ("a", "b"), strict=True)), 10)


def test_a_long_prompt_and_one_token_are_chosen_for(runtime: edgeroute.Runtime) -> None:
    for n in (1, MAX_PROMPT_TOKENS - 20):
        found = runtime.generate(prompt_ids=[7] * n, max_tokens=1, adapter="auto")
        assert found.stats.n_prompt == n


def test_without_adapters_auto_names_the_remedy(tiny: edgeroute.Runtime) -> None:
    with pytest.raises(UsageError, match="adapters=FOLDER"):
        tiny.generate("x", adapter="auto")
    with pytest.raises(UsageError, match="adapters=FOLDER"):
        tiny.feedback("gen-x", 1.0)


def test_where_state_is_kept(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    assert state_path(model, "off") is None
    assert state_path(model, "x/y") == Path("x/y")
    mine, other = state_path(model, None), state_path(tmp_path / "n" / "m.gguf", None)
    assert mine is not None and mine != other and mine.name.startswith("m-")
