"""The eviction policy follows what the model does, when there is time, and changes no answer."""

from collections.abc import Iterator
from typing import Any

import pytest

from edgeroute.offload import expert_store, expert_tier, policy_choice
from edgeroute.offload.trace import TraceMeta, TraceRecorder
from tests.edgeroute import paged_lab as lab_module

STEPS = [*lab_module.PREFILL, *lab_module.SINGLE * 5]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    path = tmp_path_factory.mktemp("policy") / "model.gguf"
    lab_module.synth.write(lab_module.SMALL, path)
    made = lab_module.Lab(path)
    yield made
    made.close()


def record(store: expert_store.ExpertStore, lab: object) -> None:
    layers = tuple(sorted(layer.il for pool in store.pools for layer in pool.plan.layers))
    meta = TraceMeta(model="lab", n_layer=4, n_expert=12, n_expert_used=3, page_bytes=1,
                     layers=layers)  # fmt: skip
    store.recorder = TraceRecorder(meta)


@pytest.mark.parametrize("better", [*policy_choice.CANDIDATES, None])
def test_a_better_policy_takes_over_and_answers_stay(
    better: str | None, lab: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_tier, "FIRST_CHOICE", 8)
    monkeypatch.setattr(policy_choice, "better_policy", lambda *given: better)
    monkeypatch.setattr(policy_choice, "STEP_LAYERS", 16)
    monkeypatch.setattr(policy_choice, "MIN_STEPS", 4)
    with lab.paged(slots=6) as paged:  # type: ignore[attr-defined]
        record(paged.store, lab)
        before = paged.store.policy
        first = paged.run(STEPS)
        paged.store.reconsider()
        assert paged.store.policy == (better or before)
        assert lab_module.equal(first, lab.resident(STEPS))  # type: ignore[attr-defined]
        assert lab_module.equal(paged.run(STEPS), first)


def test_the_choice_is_the_replays(lab: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_tier, "FIRST_CHOICE", 8)
    monkeypatch.setattr(policy_choice, "STEP_LAYERS", 160)
    with lab.paged(slots=6) as paged:  # type: ignore[attr-defined]
        record(paged.store, lab)
        paged.run(STEPS)
        table = paged.store.pools[0].table
        trace = policy_choice.latest(paged.store.recorder.trace())
        assert trace is not None and not any(step.prefill for step in trace.steps)
        wanted = policy_choice.better_policy(trace, table.n_slots, table.policy.name, range(4))
        before = table.policy.name
        paged.store.reconsider()
        assert table.policy.name == (wanted or before)
        paged.check()


def test_a_few_steps_must_say_more(lab: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short trace changes a policy for a plain gain only, a long one for a small one."""
    asked: list[float] = []

    def better(trace: object, n_slots: int, name: str, layers: object, min_gain: float) -> None:
        asked.append(min_gain)

    monkeypatch.setattr(policy_choice, "better_policy", better)
    with lab.paged(slots=6) as paged:  # type: ignore[attr-defined]
        record(paged.store, lab)
        assert not paged.store.cannot_wait
        run_until(paged, expert_tier.FIRST_CHOICE)
        assert paged.store.cannot_wait
        paged.store.reconsider()
        assert not paged.store.cannot_wait
        run_until(paged, 4 * expert_tier.FIRST_CHOICE)
        assert not paged.store.cannot_wait, "an answer does not wait for a long replay"
        monkeypatch.setattr(policy_choice, "STEP_LAYERS", 160)
        paged.store.reconsider()
    assert asked == [policy_choice.EARLY_GAIN, policy_choice.MIN_GAIN]


def run_until(paged: Any, n_steps: int) -> None:
    """Compute single tokens until so many are counted."""
    while paged.store._n_steps < n_steps:
        paged.run(lab_module.SINGLE[:1])


def test_a_named_policy_stays(lab: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_tier, "FIRST_CHOICE", 1)
    monkeypatch.setattr(policy_choice, "better_policy", lambda *given: "lfu")
    with lab.paged(slots=6, policy="lru") as paged:  # type: ignore[attr-defined]
        record(paged.store, lab)
        paged.run(STEPS)
        paged.store.reconsider()
        assert paged.store.policy == "lru"
