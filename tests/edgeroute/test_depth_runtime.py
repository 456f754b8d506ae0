"""A Runtime under a depth plan: answers, statistics, batches, paging, adapters, and its guard."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edgeroute import Runtime
from edgeroute.config import RunParams
from edgeroute.depth import Depth
from edgeroute.depth_guard import DepthGuard
from edgeroute.depth_routing import MODEL, load_router, route_prefill, stamp_of
from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import fingerprint
from edgeroute.models.forward import Piece
from edgeroute.models.standins import tensor_name
from edgeroute.runtime.errors import DepthFileError, EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.skippers.depth_router import LIMITS
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.standin_records import StandInTensor
from edgeroute.tools.synth import make

N_LAYER, N_EMBD = 6, 256
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_kv": 2048, "threads": 1}
RUN, SKIP = LayerDepth(), LayerDepth(attn="skip", ffn="skip")
NEAR, FAR = LayerDepth(attn="approximate"), LayerDepth(ffn="repeat", attn="repeat")


def plan(name: str, changes: dict[int, LayerDepth], **measured: float) -> DepthPlan:
    layers = tuple(changes.get(il, RUN) for il in range(N_LAYER))
    return DepthPlan(name=name, layers=layers, compute=1 - len(changes) / 20, **measured)


PLANS = (
    plan("half", {1: SKIP, 2: NEAR, 4: FAR}, speed=1.2, kl=30.0, kl_error=0.1),
    plan("liar", {2: SKIP, 3: SKIP}, speed=1.5, kl=0.0, kl_error=0.0),
    plan("slow", {3: SKIP}, speed=0.9, kl=0.01, kl_error=0.0),
    plan("bare", {}),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("depth") / "llama.gguf"
    make("llama", where, n_layer=N_LAYER)
    write(where, PLANS)
    return where


def write(model: Path, plans: tuple[DepthPlan, ...], *, standins: bool = True) -> Path:
    rng = np.random.default_rng(1)
    shapes = {"norm": (N_EMBD,), "a": (16, N_EMBD), "b": (N_EMBD, 16)}
    tensors = {
        tensor_name("half", 2, "attn", name): StandInTensor(
            rows=rng.normal(0, 0.3, ne).astype(np.float32), kind=GGMLQuantizationType.F32
        )
        for name, ne in shapes.items()
    }
    where = model.with_suffix(".depth")
    with GGUFFile.open(model) as file:
        content = DepthContent(
            model=fingerprint(file), data="0" * 64, plans=plans,
            tensors=tensors if standins else {},
        )  # fmt: skip
    write_depth_file(where, content)
    return where


def answer(runtime: Runtime, seed: int = 0, **options: Any) -> tuple[int, ...]:
    ids = [int(t) for t in np.random.default_rng(seed).integers(3, 300, 40)]
    return runtime.generate(prompt_ids=ids, max_tokens=12, **options).token_ids


def test_a_plan_with_everything_run_is_the_full_model(path: Path) -> None:
    with Runtime(path, **SETTINGS) as full, Runtime(path, depth="bare", **SETTINGS) as bare:
        assert answer(bare) == answer(full)
        assert "depth" not in full.stats()


def test_answers_are_those_of_the_plan_computed_by_hand(path: Path) -> None:
    with Runtime(path, depth="half", **SETTINGS) as runtime:
        ids = [int(t) for t in np.random.default_rng(3).integers(3, 300, 40)]
        found = runtime.generate(prompt_ids=ids, max_tokens=12)
        depth: Any = found.stats.to_dict()["depth"]
        assert depth["plan"] == "half" and depth["layers_total"] == N_LAYER
        assert depth["layers_run"] == N_LAYER - 2  # one is skipped, one has half a layer
        whole = answer(runtime, 3, depth="full")
        again = runtime.generate(prompt_ids=ids, max_tokens=12)
        assert again.token_ids == found.token_ids
        stats: Any = runtime.stats()
        assert stats["depth"]["on"] and stats["memory"]["stand-ins"] > 0
    loaded = LoadedModel(path, RunParams(depth="half", **SETTINGS))
    try:
        loaded.device.set_threads(1)
        assert loaded.depth is not None
        region = loaded.kv.allocate(64)
        assert region is not None
        by_hand = list(ids)
        for _ in range(12):
            start = 0 if len(by_hand) == 40 else len(by_hand) - 1
            piece = Piece(tokens=by_hand[start:], pos=start, region=region)
            logits = loaded.forward.run([piece], loaded.depth.spans)
            assert logits is not None
            by_hand.append(int(logits[0].argmax()))
        assert tuple(by_hand[40:]) == found.token_ids
    finally:
        loaded.close()
    assert whole != found.token_ids


def test_full_and_planned_answers_share_batches_but_no_keys(path: Path) -> None:
    with Runtime(path, **SETTINGS) as full:
        expected_full = [answer(full, seed) for seed in range(4)]
    with Runtime(path, depth="half", max_batch=8, **SETTINGS) as runtime:
        expected = [answer(runtime, seed) for seed in range(4)]
        mixed: list[tuple[int, ...]] = []
        streams = []
        for seed in range(8):
            ids = [int(t) for t in np.random.default_rng(seed // 2).integers(3, 300, 40)]
            depth = "full" if seed % 2 else None
            streams.append(runtime.stream(prompt_ids=ids, max_tokens=12, depth=depth))
        for stream in streams:
            end = list(stream)[-1].generation
            assert end is not None
            mixed.append(end.token_ids)
        assert mixed[0::2] == expected and mixed[1::2] == expected_full


def test_auto_takes_the_fastest_within_the_limit(path: Path) -> None:
    with Runtime(path, depth="auto", **SETTINGS) as runtime:
        stats: Any = runtime.stats()
        assert stats["depth"]["plan"] == "liar"
    with Runtime(path, depth="auto", depth_max_kl=50.0, **SETTINGS) as runtime:
        stats = runtime.stats()
        assert stats["depth"]["plan"] == "liar"  # faster than the other, which now fits too


def test_auto_without_a_plan_runs_the_full_model_and_says_why(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "llama.gguf"
    other.write_bytes(path.read_bytes())
    with Runtime(path, **SETTINGS) as full, Runtime(other, depth="auto", **SETTINGS) as runtime:
        stats: Any = runtime.stats()
        assert not stats["depth"]["on"] and "calibrate" in stats["depth"]["reason"]
        assert answer(runtime) == answer(full)
    write(other, (PLANS[2],))
    with Runtime(other, depth="auto", **SETTINGS) as runtime:
        stats = runtime.stats()
        assert "none is faster" in stats["depth"]["reason"]


def test_a_plan_that_breaks_its_promise_is_disabled(path: Path) -> None:
    """It promises no divergence and skips two layers: pauses show that, and answers change."""
    with Runtime(path, **SETTINGS) as full:
        expected = answer(full, 77)
    with Runtime(path, depth="liar", **SETTINGS) as runtime:
        guarded = runtime._loaded.depth
        assert guarded is not None and guarded.guard is not None
        before = answer(runtime, 77)
        guarded.guard.params = dataclasses.replace(guarded.guard.params, rate=1.0, min_samples=8)
        # Each answer interrupts the check of the one before; some are checked all the same.
        for seed in range(400):
            answer(runtime, seed)
            if not guarded.on:
                break
        stats: Any = runtime.stats()
        assert not stats["depth"]["on"] and stats["depth"]["guard"]["verdict"] == "disable"
        assert stats["depth"]["guard"]["kl_nats"] > stats["depth"]["guard"]["promise_nats"]
        assert answer(runtime, 77) == expected != before
        last: Any = runtime.generate(prompt_ids=[5, 6], max_tokens=2).stats.to_dict()
        assert "depth" not in last


def test_the_guard_is_heard_while_there_is_never_a_pause(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell is free and no pause is left alone: checks that are overdue are made all the same."""
    monkeypatch.setattr("edgeroute.scheduler.Scheduler.use_the_pause", lambda *_: None)
    monkeypatch.setattr("edgeroute.depth_guard.EARLY_S", 1e9)
    with Runtime(path, depth="liar", **SETTINGS) as runtime:
        guarded = runtime._loaded.depth
        assert isinstance(guarded, Depth) and guarded.guard is not None
        guarded.guard.params = dataclasses.replace(guarded.guard.params, rate=1.0, min_samples=8)
        for seed in range(200):
            answer(runtime, seed)
            if not guarded.on:
                break
        assert not guarded.on and seed >= 64


def test_a_plan_that_skips_layer_0_leaves_during_one_long_answer(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pause, no second answer: by the clock, within a minute of a token a second."""
    model = tmp_path / "llama.gguf"
    model.write_bytes(path.read_bytes())
    write(model, (plan("headless", {0: SKIP}, speed=1.1, kl=0.001, kl_error=0.0),), standins=False)
    made = DepthGuard.__init__
    ticks = itertools.count()  # a second per round of the scheduler, which is a token

    def clocked(self: DepthGuard, *given: Any) -> None:
        made(self, *given, clock=lambda: float(next(ticks)))

    monkeypatch.setattr(DepthGuard, "__init__", clocked)
    with Runtime(model, depth="headless", **SETTINGS) as runtime:
        guarded = runtime._loaded.depth
        assert isinstance(guarded, Depth) and guarded.guard is not None and guarded.on
        with runtime.stream(prompt_ids=[5, 6, 7], max_tokens=180, prefix="off") as stream:
            for n_tokens, _ in enumerate(stream):  # noqa: B007
                if not guarded.on:
                    break
        assert not guarded.on and n_tokens <= 120
        levers: Any = runtime.stats()["levers"]
        assert not levers["depth"]["on"] and "nats" in levers["depth"]["switched_off"]


def test_a_plan_that_keeps_its_promise_stays_on_under_the_clock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeroute.scheduler.Scheduler.use_the_pause", lambda *_: None)
    monkeypatch.setattr("edgeroute.depth_guard.EARLY_S", 0.0)
    monkeypatch.setattr("edgeroute.depth_guard.LATE_S", 0.0)
    monkeypatch.setattr("edgeroute.depth_guard.EARLY_SHARE", 1.0)
    monkeypatch.setattr("edgeroute.depth_guard.LATE_SHARE", 1.0)
    with Runtime(path, depth="half", **SETTINGS) as runtime:
        for seed in range(40):
            answer(runtime, seed)
        guarded = runtime._loaded.depth
        assert isinstance(guarded, Depth) and guarded.guard is not None
        assert guarded.on and guarded.guard.estimate.n_samples > 32


def test_the_guards_divergence_is_that_of_the_two_models(path: Path) -> None:
    """What it enters equals the divergence between two separate computations."""
    from edgeroute.depth_guard import kl_nats

    loaded = LoadedModel(path, RunParams(depth="half", **SETTINGS))
    try:
        loaded.device.set_threads(1)
        depth = loaded.depth
        assert isinstance(depth, Depth) and depth.guard is not None
        depth.guard.params = dataclasses.replace(depth.guard.params, rate=1.0)
        seen: list[float] = []
        depth.guard.observe = lambda kl: seen.append(kl) or "keep"  # type: ignore[method-assign, func-returns-value]
        ids = [int(t) for t in np.random.default_rng(3).integers(3, 300, 50)]
        guard = DepthGuard(depth, loaded.forward, PrefixCache(loaded.kv, 64), 64)
        guard.note(ids, 45)
        guard.check()
        region = loaded.kv.allocate(64)
        assert region is not None and len(seen) == 5
        rows = [
            loaded.forward.run([Piece(tokens=ids[:49], pos=0, region=region, n_out=5)], spans)
            for spans in (None, depth.spans)
        ]
        full, mine = rows
        assert full is not None and mine is not None
        expected = [kl_nats(a, b) for a, b in zip(full, mine, strict=True)]
        assert seen == pytest.approx(expected) and min(seen) > 1e-4
    finally:
        loaded.close()


def routers(path: Path, seed: int) -> Path:
    """Routers of random weights: they skip, run and repeat, and differ between prompts."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {LIMITS: np.array([1, 1, 3, 2], np.int32)}
    for il in range(1, N_LAYER - 1):
        for name, shape in (("w1", (8, N_EMBD)), ("b1", (8,)), ("w2", (3, 8)), ("b2", (3,))):
            arrays[f"router/blk.{il}.{name}"] = rng.normal(0, 3.0, shape).astype(np.float32)
    with GGUFFile.open(path) as file:
        arrays[MODEL] = stamp_of(fingerprint(file) if seed else "ab" * 32)
    where = path.with_name("llama.router.npz")
    with where.open("wb") as file:
        np.savez(file, **arrays)
    return where


def test_routed_answers_keep_what_was_decided_at_the_prompt(path: Path) -> None:
    """Token by token what the frozen steps give by hand, also side by side with others."""
    router = routers(path, 5)
    settings = SETTINGS | {"n_ubatch": 64}
    prompts = [
        [int(t) for t in np.random.default_rng(seed).integers(3, 300, 90)] for seed in range(6)
    ]
    expected, decided = [], set()
    loaded = LoadedModel(path, RunParams(depth="routed", **settings))
    try:
        loaded.device.set_threads(1)
        rows = load_router(router, N_LAYER, N_EMBD)
        region = loaded.kv.allocate(128)
        assert region is not None
        for ids in prompts:
            first = Piece(tokens=ids[:64], pos=0, region=region, n_out=0)
            routed = route_prefill(loaded.forward, first, rows)
            assert routed is not None
            decided.add(routed.steps)
            text = list(ids)
            for _ in range(12):
                start = 64 if len(text) == 90 else len(text) - 1
                piece = Piece(tokens=text[start:], pos=start, region=region)
                logits = loaded.forward.run([piece], loaded.forward.spans(routed.steps))
                assert logits is not None
                text.append(int(logits[0].argmax()))
            expected.append(tuple(text[90:]))
    finally:
        loaded.close()
    assert len(decided) > 1
    with Runtime(path, depth="routed", **settings) as runtime:
        alone = [runtime.generate(prompt_ids=p, max_tokens=12) for p in prompts]
        assert [found.token_ids for found in alone] == expected
        costs: list[Any] = [found.stats.to_dict()["depth"] for found in alone]
        assert {cost["plan"] for cost in costs} == {"routed"}
        assert any(cost["layers_run"] != N_LAYER for cost in costs)
        streams = [runtime.stream(prompt_ids=p, max_tokens=12) for p in prompts]
        ends = [list(stream)[-1].generation for stream in streams]
        assert [end.token_ids for end in ends if end is not None] == expected
        stats: Any = runtime.stats()
        assert stats["depth"]["routed"] == 12 and 0 < stats["depth"]["layers_run"] <= N_LAYER + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": "none-such"}, "has no plan 'none-such'; it has half, liar, slow, bare"),
        ({"depth": "half", "depth_file": "/nowhere.depth"}, "cannot open"),
        ({"depth": ""}, "depth must be full, auto"),
        ({"depth_max_kl": -1.0}, "depth_max_kl must be"),
    ],
)
def test_what_cannot_be_is_refused(path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgerouteError, match=message):
        Runtime(path, **SETTINGS, **settings)


def test_plans_for_another_model_or_without_stand_ins_are_refused(
    path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    make("llama", other, n_layer=N_LAYER, seed=9)
    with pytest.raises(DepthFileError, match="another model"):
        Runtime(other, depth="half", depth_file=path.with_suffix(".depth"), **SETTINGS)
    with pytest.raises(DepthFileError, match="no depth file"):
        Runtime(other, depth="half", **SETTINGS)
    write(other, PLANS, standins=False)
    with pytest.raises(DepthFileError, match="no stand-in"):
        Runtime(other, depth="half", **SETTINGS)
    experts = LayerDepth(expert_rule="count", expert_value=1)
    write(other, (plan("moe", {1: experts}),), standins=False)
    with pytest.raises(DepthFileError, match="rule for experts"):
        Runtime(other, depth="moe", **SETTINGS)


def test_a_plan_that_prunes_prompts_shortens_them_and_reuses_nothing(path: Path) -> None:
    """Its keys depend on the tokens behind them: no other prompt may begin with them."""
    keeps = {il: LayerDepth(keep=30) for il in range(2, N_LAYER)}
    write(path, (*PLANS, plan("short", keeps)))
    ids = [int(t) for t in np.random.default_rng(6).integers(3, 300, 200)]
    try:
        with Runtime(path, depth="short", **SETTINGS) as runtime:
            first = runtime.generate(prompt_ids=ids, max_tokens=8)
            again = runtime.generate(prompt_ids=ids, max_tokens=8)
            whole = runtime.generate(prompt_ids=ids, max_tokens=8, depth="full")
            assert first.token_ids == again.token_ids != whole.token_ids
            assert first.stats.n_cached == again.stats.n_cached == whole.stats.n_cached == 0
    finally:
        write(path, PLANS)


def test_routers_of_another_model_are_refused(path: Path) -> None:
    routers(path, 0)
    with pytest.raises(DepthFileError, match="another model"):
        Runtime(path, depth="routed", **SETTINGS)


def test_requests_may_ask_for_the_full_model_only(path: Path) -> None:
    with Runtime(path, depth="half", **SETTINGS) as runtime:
        assert answer(runtime, depth="half") == answer(runtime)
        with pytest.raises(UsageError, match="open one with depth='slow'"):
            answer(runtime, depth="slow")
