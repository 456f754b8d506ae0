"""What snapshots tell of a model and of requests: figures and configured names only."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edgeroute import Runtime, paging
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.units import MIB
from edgeroute.server.live_figures import figures, residency
from edgeroute.server.live_jobs import N_RECENT, Jobs
from edgeroute.server.records import Job
from edgeroute.skippers.steps import StepPart
from edgeroute.stats import Generation, GenerationStats
from edgeroute.tools import synth

SECRET = "the user's secret"
MOE = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=32, n_expert_used=3,
)  # fmt: skip


@pytest.fixture
def paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A mixture of experts with room for a part of them; this process counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    path = tmp_path / "moe.gguf"
    synth.write(MOE, path)
    settings: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64, "threads": 1}
    with pytest.raises(CapacityError) as refusal:
        Runtime(path, memory=MIB, **settings)
    assert refusal.value.smallest_bytes is not None
    return Runtime(path, memory=refusal.value.smallest_bytes + 4 * MIB, **settings)


def test_a_paged_model_tells_its_experts(paged: Runtime) -> None:
    with paged as runtime:
        before = figures(runtime.stats())
        assert before["experts"]["hit_ratio"] is None
        for step in range(2):
            runtime.generate(prompt_ids=list(range(10 + step, 60)), max_tokens=8)
        now = figures(runtime.stats(), before)
        experts, stats = now["experts"], runtime.stats()["experts"]
        assert isinstance(stats, dict)
        for name in ("hits", "misses", "demand_bytes"):
            assert experts[name] == stats["decode"][name] + stats["prefill"][name] > 0
        asked = experts["hits"] + experts["late"] + experts["misses"]
        assert experts["hit_ratio"] == round(experts["hits"] / asked, 4) == experts["hit_ratio_now"]
        assert figures(runtime.stats(), now)["experts"]["hit_ratio_now"] is None  # nothing since
        anew = {"hits": 0, "misses": stats["decode"]["misses"] + 10_000}
        opened_anew = figures(
            runtime.stats() | {"experts": stats | {"decode": stats["decode"] | anew}}, now
        )
        assert opened_anew["experts"]["hit_ratio_now"] is None
        assert sum(now["memory"]["owners"].values()) == now["memory"]["used_bytes"]
        told = residency(runtime)
        assert told is not None and told["experts"]["n_expert"] == MOE.n_expert
        layers = told["experts"]["layers"]
        assert [il for il, _ in layers] == list(range(MOE.n_layer))
        n_resident = sum(int(bits, 16).bit_count() for _, bits in layers)
        assert 0 < n_resident <= experts["n_slots"] < experts["n_pages"] == 4 * 32
        json.loads(msgspec.json.encode([now, told]))


def test_a_model_that_fits_has_no_levers(tiny: Runtime) -> None:
    now = figures(tiny.stats())
    assert [now[name] for name in ("experts", "layers", "adapters", "depth", "steps")] == [None] * 5
    assert residency(tiny) is None
    assert now["kv"] == {"cells": 2048, "free": 2048, "kept": 0, "reused": 0}
    assert str(tiny.path) not in json.dumps(now)


def test_groups_that_are_there_are_picked() -> None:
    stats: dict[str, Any] = dict.fromkeys((
        "arch", "budget_bytes", "memory_bytes", "memory", "kv_cells", "kv_free_cells",
        "kv_kept_cells", "reused_cells", "running", "waiting", "finished", "decode_steps",
        "mean_batch", "threads", "threads_max",
    ), 1)  # fmt: skip
    names = ("known", "slots", "free_slots", "hits", "misses", "hit_ratio", "loads", "evictions",
             "loaded_bytes", "load_s")  # fmt: skip
    stats["adapters"] = dict.fromkeys(names, 2) | {"resident": ["a", "b"], "auto": {"big": SECRET}}
    stats["depth"] = {"plan": "fast", "on": True, "layers_run": 20.5, "layers_total": 24, "kl": 0.1}
    stats["steps"] = {"policy": "glimpse:1", "on": True, "read": {"small": 3}, "remote": SECRET}
    stats["layers"] = {"resident": 20, "streamed": 5, "bytes": 9, "stall_s": 0.5}
    now = figures(stats)
    assert now["adapters"]["resident"] == ["a", "b"] and now["adapters"]["n_resident"] == 2
    assert now["depth"]["layers_run"] == 20.5 and now["steps"]["read"] == {"small": 3}
    assert now["layers"] == stats["layers"] and SECRET not in json.dumps(now)


def make_jobs() -> Jobs:
    return Jobs(SimpleNamespace(names=["base"]))  # type: ignore[arg-type]


def answer(**stats: Any) -> Generation:
    given = GenerationStats(
        n_prompt=10, n_cached=4, n_generated=9, queue_s=0.0, prefill_s=0.1, ttft_s=0.2,
        decode_s=2.0, memory_bytes=1, threads=1, **stats,
    )  # fmt: skip
    return Generation(id="g", text=SECRET, token_ids=(1,), finish_reason="stop", stats=given,
                      adapter="legal" if given.adapters else None)  # fmt: skip


def test_a_request_ends_as_a_row_of_figures() -> None:
    jobs = make_jobs()
    job = Job(id=SECRET, endpoint="chat", model="base", adapter=SECRET, created=100.0)
    jobs.began(job)
    assert jobs.n_running == 1
    assert [row["status"] for row in jobs.rows()] == [None]
    job.first_token, job.last_token = 100.25, 102.25
    job.n_prompt, job.n_generated = 10, 9
    jobs.token(job, 9, 0.1)
    job.generations.append(answer(
        experts={"hits": 3, "hit_ratio": 0.75}, depth={"layers_run": 20, "layers_total": 24},
        adapters={"used": {"legal": 1.0}},
        steps=(StepPart(index=0, model="small", n_tokens=5),
               StepPart(index=1, model="large", n_tokens=4)),
    ))  # fmt: skip
    job.ended, job.status, job.error = 102.5, 200, SECRET
    jobs.ended(job)
    assert jobs.rows() == [{
        "n": 1, "endpoint": "chat", "model": "base", "adapter": "legal", "status": 200,
        "streaming": False, "seconds": 2.5, "ttft_s": 0.25, "n_prompt": 10, "n_cached": 4,
        "n_generated": 9, "tok_s": 4.0, "hit_ratio": 0.75, "steps": {"small": 5, "large": 4},
        "layers": [20, 24],
    }]  # fmt: skip
    totals = {"tokens": 9, "answers": {"legal": 1}, "tokens_by": {"small": 5, "large": 4}}
    assert jobs.totals("base") == totals
    assert jobs.n_running == 0


def test_nothing_a_client_wrote_is_told_or_kept() -> None:
    jobs = make_jobs()
    job = Job(id=SECRET, endpoint="chat", model=SECRET, adapter=SECRET, error=SECRET, created=1.0)
    jobs.began(job)
    assert SECRET not in json.dumps(jobs.rows())
    job.generations.append(answer())
    job.ended, job.status = 2.0, 404
    jobs.ended(job)
    assert SECRET not in json.dumps(jobs.rows())
    assert jobs.rows()[0]["model"] == "?"
    assert SECRET not in repr(vars(jobs))


def test_rows_are_bounded_and_those_under_way_come_first() -> None:
    jobs = make_jobs()
    early = Job(id="0", endpoint="chat", model="base")
    jobs.began(early)
    for i in range(3 * N_RECENT):
        job = Job(id=str(i), endpoint="completions", model="base", ended=1.0, status=200)
        jobs.began(job)
        jobs.ended(job)
    rows = jobs.rows()
    assert len(rows) == len(jobs._recent) == N_RECENT
    assert [row["n"] for row in rows[:3]] == [1, 3 * N_RECENT + 1, 3 * N_RECENT]
    assert len(msgspec.json.encode(rows)) < 20_000


def test_adapters_are_counted_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeroute.server.live_jobs.MAX_NAMES", 2)
    jobs = make_jobs()
    for name in ("a", "b", "a", "c", "d"):
        job = Job(id=name, endpoint="chat", model="base", ended=1.0, status=200)
        job.generations.append(answer(adapters={"used": {name: 1.0}}))
        jobs.ended(job)
    assert jobs.totals("base")["answers"] == {"a": 2, "b": 1, "others": 2}
