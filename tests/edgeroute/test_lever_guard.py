"""Levers that lose are switched off while running, good ones stay, and answers are the same."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeroute import Runtime, paging
from edgeroute.lever_guard import switched_off
from edgeroute.offload import expert_store, prefetch
from edgeroute.offload.prefetch import Guess, NoPredictor
from edgeroute.offload.prefetch_gate import WATCHED, PrefetchGate, StepCost
from edgeroute.runtime.errors import CapacityError
from edgeroute.skippers.speculate import WATCH_FROM, Speculator
from tests.edgeroute import paged_lab as lab_module

N_LAYER, N_EXPERT, N_USED = 4, 32, 3
MINUTE_STEPS = 60
"""Steps of a minute on the slowest machine that is of use: a token a second."""


class Oracle(NoPredictor):
    """Knows that every layer of these routes chooses the same experts."""

    name = "oracle"

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        return [Guess((layer + 1) * N_EXPERT + e, 1.0) for e in ids] if layer + 1 < N_LAYER else ()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("levers") / "model.gguf"
    lab_module.synth.write(replace(lab_module.SMALL, n_expert=N_EXPERT), path)
    made = lab_module.Lab(path)
    yield made
    made.close()


def drive(paged: Any, n_steps: int) -> list[bool]:
    """Ask for experts in a cycle that no cache of this size holds; whether prefetch was on.

    A step costs what its reads do: on a slow disk nothing else counts. Half the time of one
    that is made ahead hides behind computing. It has arrived before the next layer asks, so that
    every figure is the same each time.
    """
    store = paged.store
    ahead = store._ahead
    tables = [pool.table for pool in store.pools]
    ahead.clock = lambda: sum(
        sum(table.decode.misses) + 0.5 * sum(table.decode.prefetch_issued) for table in tables
    )
    shown = []
    for step in range(n_steps):
        store.begin(prefill=False)
        shown.append(ahead._on)
        for il in range(N_LAYER):
            ids = [(N_USED * step + k) % N_EXPERT for k in range(N_USED)]
            store.chose(il, ids, None)
            assert store.lease(il, ids) is not None
            for ticket in list(ahead.coming.values()):
                with ticket.finished:
                    pass
        store.end()
    return shown


def watched(
    lab: Any, monkeypatch: pytest.MonkeyPatch, predictor: str, mode: bool = True
) -> Any:  # fmt: skip
    """Open the lab's model with a predictor that begins on; `mode` is whether it may lose."""
    monkeypatch.setitem(prefetch.PREDICTORS, "oracle", Oracle)
    make = expert_store.ExpertParams
    monkeypatch.setattr(lab_module, "ExpertParams", lambda **how: make(**how, begins_on=mode))
    return lab.paged(slots=6, policy="lru", prefetch=predictor, forced=not mode, overlap=False)


def test_prefetch_by_chance_is_switched_off(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(lab, monkeypatch, "random") as paged:
        shown = drive(paged, MINUTE_STEPS)
        report = paged.store.prefetch_report()
    assert shown[0] and not any(shown[40:])
    assert report.state == "off" and report.off_at_step is not None
    assert report.off_at_step < MINUTE_STEPS and report.off_because


def test_good_prefetch_stays(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(lab, monkeypatch, "oracle") as paged:
        shown = drive(paged, 2 * MINUTE_STEPS)
        report = paged.store.prefetch_report()
    assert report.state == "on" and report.off_at_step is None
    assert report.n_trials == report.n_wins == 1 and all(shown[40:])
    assert report.stall_on_s is not None and report.stall_off_s is not None
    assert report.stall_on_s < 0.8 * report.stall_off_s


def test_what_is_not_watched_stays_whatever_it_costs(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(lab, monkeypatch, "random", mode=False) as paged:
        assert all(drive(paged, MINUTE_STEPS))


def play_gate(gate: PrefetchGate, n_steps: int, on_s: float) -> str:
    shown = ""
    for _ in range(n_steps):
        on = gate.begin_step()
        moved = 100 if on else 0
        cost = StepCost(stall_s=on_s if on else 1.0, prefetched_bytes=moved, useful_bytes=moved)
        gate.end_step(cost)
        shown += "+" if on else "."
    return shown


@pytest.mark.parametrize(
    ("on_s", "stays"), [(0.8, True), (1.0, True), (1.015, True), (1.03, False), (2.0, False)]
)
def test_what_was_on_leaves_only_when_it_loses(on_s: float, stays: bool) -> None:
    """Hysteresis: neither gains nor small losses within the noise move it."""
    gate = PrefetchGate(WATCHED, begin_on=True)
    shown = play_gate(gate, MINUTE_STEPS, on_s)
    trial = "+" * 16 + "....++++" * (3 if stays else 2)  # a sure loss needs no third pair
    assert shown.startswith(trial)
    assert shown[len(trial) :] == ("+" if stays else ".") * (MINUTE_STEPS - len(trial))
    assert (gate.report().off_because == "") == stays


def test_watching_what_is_good_costs_little() -> None:
    shown = play_gate(PrefetchGate(WATCHED, begin_on=True), 20_000, 0.5)
    assert shown.count(".") * 0.5 < 0.01 * len(shown)


def play_drafts(speculator: Speculator, n_passes: int, accepted: int) -> list[int]:
    """Passes that cost a second for each of their tokens; lengths of the drafts."""
    lengths = []
    for _ in range(n_passes):
        source, n = speculator.choose({"lookup": 4})
        lengths.append(n)
        speculator.observe_pass(n + 1, 1.0 + n, 1.0 + n)
        if source is not None:
            speculator.observe_draft(source, [i < accepted for i in range(n)], (0.01, 1.0 + n))
    return lengths


def test_drafts_that_are_refused_are_left_and_said_so() -> None:
    watched = Speculator(4, forced=True, watched=True)
    lengths = play_drafts(watched, MINUTE_STEPS, accepted=0)
    assert all(lengths[:WATCH_FROM]) and not any(lengths[-16:])
    assert not watched.on and "lookup" in watched.left_because
    assert 0 < watched.left_at_pass <= MINUTE_STEPS
    assert all(play_drafts(Speculator(4, forced=True), MINUTE_STEPS, accepted=0))


def test_drafts_that_pay_stay() -> None:
    speculator = Speculator(4, forced=True, watched=True)
    for _ in range(4 * MINUTE_STEPS):
        source, n = speculator.choose({"lookup": 4})
        speculator.observe_pass(n + 1, 1.0 + 0.1 * n, 0.1)
        if source is not None:
            speculator.observe_draft(source, [True] * n, (0.01, 1.0 + 0.1 * n))
    assert speculator.on and not speculator.left_because


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("moe") / "model.gguf"
    spec = lab_module.synth.ARCHITECTURES["qwen3moe"]
    sizes = {"n_layer": 4, "n_embd": 128, "n_ff": 128, "n_ff_exp": 128, "n_head": 2,
             "n_head_kv": 1, "n_embd_head": 64, "n_expert": 24, "n_expert_used": 3}  # fmt: skip
    lab_module.synth.write(replace(spec, **sizes), path)
    return path


def test_lossless_levers_change_no_answer(moe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))  # not the test runner's
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    common: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1}
    with pytest.raises(CapacityError) as refused:
        Runtime(moe_path, memory=1 << 20, **common)
    assert refused.value.smallest_bytes is not None
    common["memory"] = refused.value.smallest_bytes + (4 << 20)
    found = {}
    for mode in ("proven", "asked", "off"):
        with Runtime(moe_path, levers=mode, prefetch="random", overlap="on", **common) as runtime:
            prompts = [[5 + n, 6, 7 * n + 1] for n in range(3)]
            found[mode] = [
                runtime.generate(prompt_ids=ids, max_tokens=24).token_ids for ids in prompts
            ]
            stats: Any = runtime.stats()
        levers, read_ahead = stats["levers"], stats["experts"]["decode"]["prefetch_bytes"]
        assert levers["mode"] == mode and (read_ahead > 0) == (mode != "off")
        if mode != "proven":  # where its own clock decides
            assert levers["overlap"]["on"] == (mode == "asked")
        assert levers["policy"]["on"] == (mode != "off")
    assert found["proven"] == found["asked"] == found["off"]


def test_stats_say_which_levers_are_on_and_why(tiny_path: Path) -> None:
    with Runtime(tiny_path, threads=1, n_ctx=256) as runtime:
        levers: Any = runtime.stats()["levers"]
    assert levers["speculation"]["on"] is False and "float" in levers["speculation"]["why"]
    assert levers["threads"] == {"on": False, "setting": 1, "threads": 1, "why": "asked for"}
    assert "prefetch" not in levers and switched_off(levers) == []
    lost = {"mode": "proven", "prefetch": {"on": False, "switched_off": "it was slow"}}
    assert switched_off(lost) == ["prefetch was switched off: it was slow"]
