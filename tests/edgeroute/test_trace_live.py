"""A live run recorded to a file: a replay of that file counts what the run counted."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeroute import Runtime, paging
from edgeroute.offload import expert_store, expert_tier, paging_log, policy_choice
from edgeroute.offload.eviction import Lru
from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.replay_live import replay_live
from edgeroute.offload.trace import (
    Counted,
    Trace,
    TraceMeta,
    TraceReader,
    TraceRecorder,
    TraceWriter,
    read_trace,
    sequences,
)
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.units import MIB
from tests.edgeroute import paged_lab as lab_module


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("live") / "model.gguf"
    lab_module.synth.write(lab_module.SMALL, path)
    made = lab_module.Lab(path)
    yield made
    made.close()


def new_meta(page_bytes: int) -> TraceMeta:
    return TraceMeta(
        model="lab", n_layer=4, n_expert=12, n_expert_used=3, page_bytes=page_bytes,
        layers=(0, 1, 2, 3),
    )  # fmt: skip


class Recorded:
    """A paged model that records to a file, as a Runtime's does."""

    def __init__(self, paged: Any, path: Path) -> None:
        self.paged, self.store = paged, paged.store
        meta = new_meta(self.store.pools[0].plan.page_bytes)
        self.writer = TraceWriter(path, meta)
        self.store.recorder = TraceRecorder(meta, writer=self.writer)
        self.store.begin_log()

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *exc: object) -> None:
        self.store.end_log()
        self.writer.close()


@pytest.mark.parametrize(
    ("policy", "slots"),
    [("lru", None), ("lru", 12), ("lfru", 5), ("hobbit", None), ("static", 5), ("random", 7)],
)
def test_a_replay_of_the_file_counts_what_the_run_counted(
    policy: str, slots: int | None, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts in groups, short ones, one sequence and several: all of it."""
    monkeypatch.setattr(expert_store, "GROUP_BYTES", 3 * lab.pools[0].page_bytes)
    monkeypatch.setattr(paging_log, "COUNT_EVERY", 7)
    with lab.paged(slots=slots, policy=policy) as paged:
        with Recorded(paged, tmp_path / "t"):
            paged.run(lab_module.EVERYTHING)
        live = paged.store.stats()
    found = replay_live(tmp_path / "t")
    trace = read_trace(tmp_path / "t")
    assert (found.equal, found.reason) == (True, "")
    assert found.n_steps == len(trace.steps) == len(trace.paging) == len(lab_module.EVERYTHING)
    assert found.n_counted == len(trace.counted) == 1 + len(trace.steps) // 7
    for kind, counted in (("decode", found.decode), ("prefill", found.prefill)):
        told = dict(live[kind])
        assert {**counted.to_dict(), "stall_s": 0} == {**told, "stall_s": 0}
    assert replay_live(trace) == found
    assert any(record.turns for record in trace.paging)
    assert all(0 < record.seconds < 60 for record in trace.paging)
    assert trace.paging[0].stall_s > 0 and trace.paging[0].misses > 0
    (pools,) = trace.pools
    assert pools.begins and pools.pools[0].policy == policy
    assert pools.pools[0].n_slots == paged.store.pools[0].table.n_slots


def test_other_slots_and_another_policy_are_replayed_too(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_choice, "better_policy", lambda *given: "lfu")
    monkeypatch.setattr(expert_tier, "latest", lambda trace: trace)
    with lab.paged(slots=8) as paged, Recorded(paged, tmp_path / "t") as live:
        paged.run(lab_module.LESS)
        live.store._next_choice = 0
        live.store.reconsider()
        paged.run(lab_module.SINGLE)
        live.store.resize(lab.slots_bytes(4))
        paged.run(lab_module.SINGLE * 2)
        live.store.resize(lab.slots_bytes(7))
        paged.run(lab_module.LESS)
        live.store.resize(lab.slots_bytes(5))
    trace = read_trace(tmp_path / "t")
    found = replay_live(trace)
    assert (found.equal, found.reason) == (True, "")
    assert [record.begins for record in trace.pools] == [True, False, False, False, False]
    assert [record.pools[0].policy for record in trace.pools][:2] == ["lfru", "lfu"]
    assert [record.pools[0].n_slots for record in trace.pools] == [32, 32, 16, 28, 20]


def test_two_runs_in_one_file_and_one_that_died(lab: Any, tmp_path: Path) -> None:
    path = tmp_path / "t"
    for seed in range(2):
        with lab.paged(slots=6, policy="lru") as paged, Recorded(paged, path):
            paged.run(lab_module.LESS if seed else lab_module.SINGLE)
    whole = replay_live(path)
    assert whole.equal and whole.n_counted == 2
    with TraceReader(path) as reader:
        ends = [reader.end for _ in reader]
    data = path.read_bytes()
    path.write_bytes(data[:-1])  # its last counters are lost
    assert replay_live(path).n_counted == 1
    path.write_bytes(data[: ends[-2] - 1])  # and what its last step cost
    assert replay_live(path).n_steps == whole.n_steps - 1
    with lab.paged(slots=6, policy="lru") as paged, Recorded(paged, path):
        paged.run(lab_module.SINGLE)
    again = replay_live(path)
    assert again.equal and again.n_steps == whole.n_steps + 7 and again.n_counted == 2


def test_what_cannot_be_compared_is_said(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lab.paged(slots=4, prefetch="frequency", forced=True, policy="lru") as paged:
        with Recorded(paged, tmp_path / "ahead"):
            paged.run(lab_module.SINGLE * 3)
            paged.settle()
        assert paged.counts().prefetch_issued
    found = replay_live(tmp_path / "ahead")
    assert found.equal is None and "record with prefetch=off" in found.reason

    with lab.paged(slots=6, policy="lru") as paged, Recorded(paged, tmp_path / "stopped"):
        paged.run(lab_module.SINGLE)
        for n_groups in (6, 1):  # the second time all are there, and no read is stopped
            paged.store.begin(prefill=True)
            paged.store.chose(0, [0, 1, 2, 3, 4, 5], None)
            groups = paged.store.in_turn(0, dict.fromkeys(range(6), 1), 1)
            assert [next(groups) is None for _ in range(n_groups)] == [False] * n_groups
            assert n_groups == 1 or next(groups, None) is None
            groups.close()
            paged.store.end()
        paged.run(lab_module.SINGLE)
    found = replay_live(tmp_path / "stopped")
    assert found.equal is None and "stopped in step 9" in found.reason and found.n_steps == 9

    monkeypatch.setitem(POLICIES, "mine", Lru)
    with lab.paged(slots=4, policy="mine") as paged:
        assert paged.store.policy == "mine"
        for pool in paged.store.pools:
            pool.table.policy.name = "mine"
        with Recorded(paged, tmp_path / "mine"):
            paged.run(lab_module.SINGLE)
    assert replay_live(tmp_path / "mine").equal
    monkeypatch.delitem(POLICIES, "mine")
    found = replay_live(tmp_path / "mine")
    assert found.equal is None and "no eviction policy is called 'mine'" in found.reason


def test_a_number_that_is_off_by_one_is_found(lab: Any, tmp_path: Path) -> None:
    with lab.paged(slots=5, policy="lru") as paged, Recorded(paged, tmp_path / "t"):
        paged.run(lab_module.LESS)
    trace = read_trace(tmp_path / "t")
    wrong = list(trace.paging)
    wrong[3] = replace(wrong[3], hits=wrong[3].hits + 1)
    found = replay_live(replace(trace, paging=tuple(wrong)))
    assert found.equal is False and "in step 3 the run counted" in found.reason
    assert found.n_steps == 3
    (counted,) = trace.counted
    decode, prefill = counted.pools[0]
    layers = list(prefill.layers)
    layers[2] = replace(layers[2], evictions=layers[2].evictions + 1)
    other = Counted(step=counted.step, pools=((decode, replace(prefill, layers=tuple(layers))),))
    found = replay_live(replace(trace, live=(*trace.pools, other)))
    assert found.equal is False and "prefill of layer 2" in found.reason
    lfu = replace(trace.pools[0], pools=(replace(trace.pools[0].pools[0], policy="mru"),))
    assert replay_live(replace(trace, live=(lfu, counted))).equal is False
    for bare in (
        replace(trace, live=()),
        replace(trace, paging=()),
        Trace(meta=trace.meta, steps=()),
    ):
        found = replay_live(bare)
        assert found.equal is None and found.reason


def test_without_a_file_nothing_is_logged(lab: Any) -> None:
    with lab.paged(slots=6) as paged:
        paged.store.recorder = TraceRecorder(new_meta(1))
        paged.run(lab_module.SINGLE)
        assert paged.store._log is None
        assert len(paged.store.recorder.trace().steps) == 8
        with pytest.raises(UsageError, match="trace=FILE"):
            paged.store.mark("code")


# a Runtime

LARGE = replace(
    lab_module.SMALL, n_layer=5, n_embd=128, n_ff_exp=128, n_embd_head=64, n_expert=32,
)  # fmt: skip
"""30 MiB of experts, beside which what paging itself takes is worth it."""

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_kv": 1024, "n_ubatch": 64, "threads": 1,
                            "max_batch": 1, "prefetch": "off"}  # fmt: skip


def test_marks_of_a_runtime_cut_its_trace(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    path, domains = tmp_path / "t", ["code", "", "prose"]
    model = tmp_path / "model.gguf"
    lab_module.synth.write(LARGE, model)
    budget = _smallest(model) + 4 * MIB
    with Runtime(model, **SETTINGS, memory=budget, trace=str(path)) as runtime:
        store = runtime._loaded.experts
        assert store is not None
        store._next_reading = math.inf
        for number, domain in enumerate(domains):
            runtime.mark_trace(domain)
            prompt = [5 + 3 * i for i in range(9 + 40 * number)]
            runtime.generate(prompt_ids=prompt, max_tokens=6, prefix="off")
        with pytest.raises(UsageError, match="the limit is 256"):
            runtime.mark_trace("x" * 300)
    trace = read_trace(path)
    found = list(sequences(trace))
    assert [label for label, _ in found] == domains
    assert [sum(not step.prefill for step in part.steps) for _, part in found] == [5, 5, 5]
    assert all([record.step for record in part.paging] == list(range(len(part.steps)))
               for _, part in found)  # fmt: skip
    assert replay_live(path).equal and len(trace.counted) == 1
    with (
        Runtime(model, **SETTINGS, memory=budget) as runtime,
        pytest.raises(UsageError, match="trace=FILE"),
    ):
        runtime.mark_trace("code")


def test_a_resident_model_records_no_trace(lab: Any) -> None:
    with (
        Runtime(lab.file.path, **SETTINGS) as runtime,
        pytest.raises(UsageError, match="nothing is paged"),
    ):
        runtime.mark_trace("code")


def _smallest(path: Path) -> int:
    """The budget that a refusal names."""
    with pytest.raises(CapacityError) as refusal:
        Runtime(path, **SETTINGS, memory=MIB)
    named = re.search(r"at least (\d+\.\d+) GiB", str(refusal.value))
    assert named is not None
    return int(float(named[1]) * 2**30)
