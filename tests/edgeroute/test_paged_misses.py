"""Experts done without: the answers of a model in memory that computes the same experts."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime, paging
from edgeroute.config import RunParams
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.paged import PagedForward
from edgeroute.runtime.depth import all_run
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.skippers.experts import LayerRule, with_rules
from edgeroute.skippers.misses import MissLevers
from edgeroute.tools import synth
from tests.edgeroute import paged_lab as lab
from tests.edgeroute.misses_lab import Listening, replayed
from tests.edgeroute.paged_lab import SMALL, equal, play

DECODE: list[Any] = [
    [("a", 40, 1)], [("b", 20, 1)], [("c", 9, 1)],
    *[[("a", 1, 1)]] * 6,
    *[[("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]] * 6,
]  # fmt: skip
MANY: list[Any] = [[("a", 40, 1)], *[[("a", 1, 1)] * 18] * 3]
"""More tokens, as if of so many sequences, than a layer's experts are held at once for."""

PLAIN = MissLevers()
SETTINGS = {
    "drop": {"drop_misses": 0.5},
    "all but the best": {"drop_misses": 1.0},
    "ties": {"prefer_resident": 0.5},
    "both": {"drop_misses": 0.3, "prefer_resident": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("misses") / "small.gguf"
    synth.write(replace(SMALL, n_expert_used=4), path)
    opened = lab.Lab(path)
    yield opened
    opened.close()


def with_levers(paged: Any, opened: Any, levers: MissLevers | None) -> PagedForward:
    """Open another forward over a paged lab's store, with levers."""
    paged.forward.close()
    paged.forward = PagedForward(opened.model, opened.device, paged.store, paged.kv,
                                 lab.N_TOKENS, levers)  # fmt: skip
    forward: PagedForward = paged.forward
    return forward


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [DECODE, MANY], ids=["few", "many"])
@pytest.mark.parametrize("overlap", [False, True])
def test_answers_are_those_of_the_same_experts_in_memory(
    setting: str, steps: Any, overlap: bool, small: Any
) -> None:
    with small.paged(slots=5, overlap=overlap) as paged:
        levers = MissLevers(**SETTINGS[setting])
        forward = with_levers(paged, small, levers)
        heard = Listening(forward)
        found = play(forward, steps)
        paged.check()
        assert equal(found, replayed(small, play, steps, heard.passes))
        assert not equal(found, small.resident(steps))  # it does change answers
        assert (levers.dropped > 0) == (levers.drop_misses > 0)
        assert (levers.replaced > 0) == (levers.prefer_resident > 0)
        assert steps is MANY or levers.saved.total() > 0
        forward.close()


@pytest.mark.parametrize("arch", [a for a, s in synth.ARCHITECTURES.items() if s.n_expert])
def test_every_family_weighs_what_is_left_as_it_does(
    arch: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("families") / f"{arch}.gguf"
    synth.make(arch, path)
    opened = lab.Lab(path)
    steps = DECODE[:6]
    with opened.paged() as paged:
        levers = MissLevers(drop_misses=0.4, prefer_resident=2.0)
        forward = with_levers(paged, opened, levers)
        heard = Listening(forward)
        found = play(forward, steps)
        assert equal(found, replayed(opened, play, steps, heard.passes))
        assert (levers.dropped + levers.replaced > 0) == (opened.n_used > 1)
        routing = opened.model.routing
        if routing.norm_w or routing.gating == "softmax_weight":
            for each in heard.passes:
                for _, weights in each.values():
                    wanted = routing.w_scale or 1.0
                    assert weights.sum(axis=1) == pytest.approx(wanted, rel=1e-5)
        forward.close()
    opened.close()


@pytest.mark.parametrize("steps", [DECODE, MANY], ids=["few", "many"])
@pytest.mark.parametrize("levers", [None, PLAIN, MissLevers(drop_misses=1e-12)], ids=str)
def test_off_is_bit_identical(steps: Any, levers: MissLevers | None, small: Any) -> None:
    """Without levers, with both at 0, and where no more may be lost than rounding loses."""
    with small.paged(slots=5) as paged:
        forward = with_levers(paged, small, levers)
        assert equal(play(forward, steps), small.resident(steps))
        assert levers is None or (levers.dropped, levers.replaced) == (0, 0)
        forward.close()


def test_nothing_is_done_without_where_all_is_in_memory(small: Any) -> None:
    steps = [*DECODE, *MANY]
    with small.paged(slots=12) as paged:
        levers = MissLevers(drop_misses=1.0, prefer_resident=5.0)
        paged.store.begin(prefill=False)
        for il in range(small.n_layer):
            paged.store.lease(il, range(12))
        paged.store.end()
        assert all(paged.store.here(il).all() for il in range(small.n_layer))
        forward = with_levers(paged, small, levers)
        assert equal(play(forward, steps), small.resident(steps))
        assert not levers.saved and not levers.dropped and not levers.replaced
        forward.close()


def test_prompts_compute_all_their_experts(small: Any) -> None:
    steps = [[("a", 150, 1)], [("b", 3, 1)], [("a", 17, 1)]]
    with small.paged(slots=4) as paged:
        levers = MissLevers(drop_misses=1.0, prefer_resident=5.0)
        forward = with_levers(paged, small, levers)
        assert equal(play(forward, steps), small.resident(steps))
        assert not levers.saved
        forward.close()


def test_a_token_decides_alone(small: Any) -> None:
    """Who else is in the pass does not change what a token computes."""
    found = []
    for others in ((), ("b", "c")):
        with small.paged(slots=6) as paged:
            levers = MissLevers(drop_misses=0.5, prefer_resident=0.5)
            forward = with_levers(paged, small, levers)
            heard = Listening(forward)
            prompts = [[("a", 40, 1)], [("b", 20, 1)], [("c", 9, 1)]]
            step = [(name, 1, 1) for name in ("a", *others)]
            logits = play(forward, [*prompts, step])[-1]
            il = min(heard.passes[0])
            numbers, weights = heard.passes[0][il]
            kept = weights[0] != 0
            found.append((numbers[0][kept].tolist(), weights[0][kept]))
            assert levers.saved.total() > 0 and np.isfinite(logits).all()
            forward.close()
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("rule", [LayerRule("count", 3), LayerRule("mass", 0.7)], ids=str)
def test_beside_a_plans_rule(rule: LayerRule, small: Any) -> None:
    """What a rule leaves out stays out; what it keeps may be dropped."""
    layers = range(small.n_layer)
    spans = Forward.spans(with_rules(all_run(layers), layers, [rule] * small.n_layer))
    with small.paged(slots=4) as paged:
        levers = MissLevers(drop_misses=0.4, prefer_resident=0.5)
        forward = with_levers(paged, small, levers)
        heard, run = Listening(forward), forward.run
        forward.run = lambda pieces: run(pieces, spans)  # type: ignore[method-assign]
        theirs = play(forward, DECODE)
        assert levers.dropped and (levers.replaced > 0) == (rule.rule == "count")
        most = 3 if rule.rule == "count" else 4
        for each in heard.passes:
            for numbers, weights in each.values():
                assert numbers.shape[1] <= most
                assert weights.sum(axis=1) == pytest.approx(1, rel=1e-5)
        assert all(np.isfinite(each).all() for each in theirs)
        paged.check()
        forward.close()


def test_a_stop_leaves_nothing_held(small: Any) -> None:
    with small.paged(slots=4) as paged:
        forward = with_levers(paged, small, MissLevers(drop_misses=0.5, prefer_resident=0.5))
        region = forward.kv.allocate(256)
        assert region is not None
        assert forward.run([Piece([5] * 20, 0, region)]) is not None
        small.device.watch_stop_flag(True)
        try:
            small.device.stop_flag.set()
            assert forward.run([Piece([7], 20, region)]) is None
        finally:
            small.device.stop_flag.clear()
            small.device.watch_stop_flag(False)
        assert forward.run([Piece([7], 20, region)]) is not None
        forward.kv.release(region)
        paged.check()
        forward.close()


# the settings


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("settings") / "qwen3moe.gguf"
    synth.write(replace(SMALL, n_ff_exp=128, n_embd=128, n_head_kv=1, n_embd_head=64, n_expert=32,
                        n_expert_used=4), where)  # fmt: skip
    return where


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))


ASK: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "speculate": "off",
                       "prefetch": "off"}  # fmt: skip


def least(path: Path) -> int:
    """Return the smallest budget, and room for some more experts."""
    with pytest.raises(CapacityError) as refusal:
        Runtime(path, memory=1 << 20, **ASK)
    named = re.search(r"at least (\d+\.\d+) GiB", str(refusal.value))
    assert named is not None, refusal.value
    return int(float(named[1]) * 2**30) + (4 << 20)


@pytest.mark.usefixtures("slim")
def test_a_runtime_counts_what_it_did_without(path: Path) -> None:
    prompt = list(range(5, 45))
    with Runtime(path, memory=least(path), **ASK) as plain:
        stats: Any = plain.stats()
        assert "done_without" not in stats["experts"] and "misses" not in stats["levers"]
        expected = plain.generate(prompt_ids=prompt, max_tokens=24, prefix="off")
    with Runtime(path, memory=least(path), drop_misses=0.6, prefer_resident=0.5, **ASK) as runtime:
        found = runtime.generate(prompt_ids=prompt, max_tokens=24, prefix="off")
        assert found.token_ids[0] == expected.token_ids[0]  # the prompt's own last token
        stats = runtime.stats()
        assert sum(stats["memory"].values()) <= stats["budget_bytes"]
        done, costs = stats["experts"]["done_without"], stats["experts"]["decode"]
        page_bytes = costs["demand_bytes"] // costs["misses"]
        assert done["dropped"] > 0 and done["replaced"] > 0
        assert 0 < done["saved_bytes"] == done["saved_experts"] * page_bytes
        assert stats["levers"]["misses"]["on"]
        stream = runtime.stream(prompt_ids=prompt, max_tokens=200)
        next(iter(stream))
        stream.close()
        again = runtime.generate(prompt_ids=prompt, max_tokens=2, prefix="off")
        assert again.finish_reason == "length"
    with Runtime(path, memory=least(path), drop_misses=0.6, levers="off", **ASK) as off:
        stats = off.stats()
        assert "done_without" not in stats["experts"]
        same = off.generate(prompt_ids=prompt, max_tokens=24, prefix="off")
        assert same.token_ids == expected.token_ids


def test_all_in_memory_is_said(path: Path) -> None:
    with Runtime(path, drop_misses=0.2, repack_experts=False, **ASK) as runtime:
        stats: Any = runtime.stats()
        assert any("drop_misses changes nothing" in each for each in stats["warnings"])
        assert not stats["levers"]["misses"]["on"]


def test_dense_models_and_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    synth.make("llama", tmp_path / "llama.gguf")
    with pytest.raises(UsageError, match=r"prefer_resident=0\.1 is for mixtures"):
        Runtime(tmp_path / "llama.gguf", prefer_resident=0.1)
    for name, worst in (("drop_misses", 1.5), ("prefer_resident", 21.0)):
        for value in (-0.1, worst, float("nan"), True, "much"):
            with pytest.raises(UsageError, match=f"{name} must be a number from 0 to"):
                RunParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.usefixtures("slim")
def test_cells_of_answers_serve_no_exact_prompt(path: Path, tmp_path: Path) -> None:
    """Those of the prompt, whose experts all computed, do: in memory, and from a session."""
    prompt = [5 + 7 * i % 300 for i in range(100)]
    asked = ASK | {"memory": least(path), "sessions": str(tmp_path)}
    with Runtime(path, drop_misses=0.6, **asked) as runtime:
        first = runtime.generate(prompt_ids=prompt, max_tokens=24, session="s")
        longer = [*prompt, *first.token_ids, *prompt[:20]]
        found = runtime.generate(prompt_ids=longer, max_tokens=1).stats.to_dict()
        assert 0 < found["n_cached"] <= len(prompt)
    for more, restored in (
        ({"drop_misses": 0.6}, True),
        ({"drop_misses": 0.3}, False),
        ({}, False),
    ):
        with Runtime(path, **asked, **more) as runtime:
            told = runtime.generate(prompt_ids=longer, max_tokens=1, session="s", prefix="all")
            session: Any = told.stats.to_dict()["session"]
            assert (session["restored_tokens"] > len(prompt)) == restored, session
