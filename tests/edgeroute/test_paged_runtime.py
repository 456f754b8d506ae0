"""A Runtime whose budget forces paging answers like one that has everything resident."""

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from edgeroute import Runtime, paging
from edgeroute.offload.replay import replay, steps_of
from edgeroute.offload.trace import TraceWriter, read_trace
from edgeroute.runtime import errors
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth

SPEC = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=6, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=32, n_expert_used=3,
)  # fmt: skip
"""36 MiB of experts in pages of 192 KiB."""
SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_kv": 2048, "n_ubatch": 64, "threads": 1,
                            "max_batch": 3}  # fmt: skip
PROMPTS = [[10 + 7 * i + 3 * j * (i + 1) % 300 for j in range(5 + 20 * i)] for i in range(8)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runtime") / "model.gguf"
    synth.write(SPEC, found)
    return found


@pytest.fixture(scope="module")
def resident(path: Path) -> Iterator[Runtime]:
    with Runtime(path, **SETTINGS) as runtime:
        assert "experts" not in runtime.stats()
        yield runtime


@pytest.fixture(autouse=True)
def _slim_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory, which is larger than any model here, counts as nothing."""
    if "real_process" not in request.fixturenames:
        process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
        monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))


@pytest.fixture
def real_process() -> None:
    """Ask for this where the process itself is counted."""


def smallest_budget(path: Path, **settings: Any) -> int:
    """What the refusal of a hopeless budget names."""
    with pytest.raises(errors.CapacityError) as refusal:
        Runtime(path, **{**SETTINGS, "memory": MIB, **settings})
    named = re.search(r"at least (\d+\.\d+) GiB", str(refusal.value))
    assert named is not None, refusal.value
    return int(float(named[1]) * 2**30)


def open_paged(path: Path, *, spare: int = 8 * MIB, **settings: Any) -> Runtime:
    """Open with the smallest budget and room for a fifth of the experts."""
    budget = smallest_budget(path, **settings) + spare
    runtime = Runtime(path, **{**SETTINGS, "memory": budget, **settings})
    assert runtime._loaded.experts is not None
    runtime._loaded.experts._next_reading = math.inf  # nobody else's memory takes slots away
    return runtime


def wait_idle(runtime: Runtime) -> dict[str, Any]:
    """Wait until the engine has let go of everything; return its statistics."""
    for _ in range(1000):
        stats = runtime.stats()
        if not stats["running"] and not stats["waiting"]:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"the engine never became idle: {stats}")


def check_balanced(runtime: Runtime) -> dict[str, Any]:
    """Idle, nothing is pinned, every cell and byte is accounted for, within the budget."""
    stats = wait_idle(runtime)
    assert stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]
    assert stats["memory_bytes"] == sum(stats["memory"].values()) <= stats["budget_bytes"]
    store = runtime._loaded.experts
    assert store is not None
    for pool in store.pools:
        pool.table.check()
        assert pool.table.n_pinned == 0
    assert stats["experts"]["slots_bytes"] <= stats["memory"]["expert slots"]
    return stats


def answers(runtime: Runtime, n: int = 8, **options: Any) -> list[tuple[int, ...]]:
    return [runtime.generate(prompt_ids=ids, max_tokens=12, prefix="off", **options).token_ids
            for ids in PROMPTS[:n]]  # fmt: skip


def test_answers_are_those_of_the_resident_model(path: Path, resident: Runtime) -> None:
    with open_paged(path) as paged:
        assert answers(paged) == answers(resident)
        warm = {"temperature": 1.2, "seed": 5, "logprobs": 3}
        for ids in PROMPTS[:3]:
            ours = paged.generate(prompt_ids=ids, max_tokens=20, **warm)
            theirs = resident.generate(prompt_ids=ids, max_tokens=20, **warm)
            assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)
        stats = check_balanced(paged)
        assert stats["experts"]["decode"]["misses"] and stats["experts"]["prefill"]["misses"]
        assert stats["experts"]["decode"]["evictions"]


@pytest.mark.parametrize(
    "settings",
    [{"policy": "lru", "prefetch": "gate", "levers": "asked"},
     {"policy": "static", "prefetch": "eam", "levers": "asked"},
     {"prefetch": "frequency", "io_threads": 4, "levers": "asked"},
     {"prefetch": "off", "io_threads": 1}],
    ids=str,
)  # fmt: skip
def test_eight_requests_at_once(path: Path, resident: Runtime, settings: dict[str, Any]) -> None:
    """They wait, prefill, and decode by three; with prefixes kept from one to the next."""
    expected = answers(resident)
    with open_paged(path, **settings) as paged:
        streams = [paged.stream(prompt_ids=ids, max_tokens=12) for ids in PROMPTS]
        ends = [list(stream)[-1].generation for stream in streams]
        found = [end.token_ids for end in ends if end is not None]
        assert found == expected
        stats = check_balanced(paged)
        assert stats["mean_batch"] > 1
        assert stats["experts"]["policy"] == settings.get("policy", stats["experts"]["policy"])
        if settings.get("prefetch", "off") == "off":
            return
        decode = stats["experts"]["decode"]
        assert decode["prefetch_issued"] > 0
        assert decode["prefetch_bytes"] == decode["prefetch_issued"] * 3 * 4 * 128 * 128


def test_statistics_and_trace_agree(path: Path, tmp_path: Path) -> None:
    """A replay of what was recorded counts, bit for bit, what the live run counted."""
    trace_path = tmp_path / "routes.trace"
    settings = {"policy": "lfru", "prefetch": "off", "trace": str(trace_path), "max_batch": 1}
    with open_paged(path, **settings) as paged:
        for ids in PROMPTS[0], PROMPTS[1][:16], PROMPTS[2][:12]:  # few: held all at once
            paged.generate(prompt_ids=ids, max_tokens=24, prefix="off")
        stats = check_balanced(paged)["experts"]
    trace = read_trace(trace_path)
    assert not trace.truncated and trace.meta.layers == tuple(range(SPEC.n_layer))
    assert sum(not step.prefill for step in trace.steps) == 3 * 23
    result = replay(trace, stats["policy"], stats["n_slots"])
    for kind, snapshot in (("decode", result.decode), ("prefill", result.prefill)):
        live, again = stats[kind], snapshot.total.to_dict()
        del live["stall_s"], again["stall_s"]
        assert live == again
        requests = sum(
            len(set(pages))
            for prefill, wanted in steps_of(trace)
            for pages in wanted
            if prefill == (kind == "prefill")
        )
        assert live["hits"] + live["late"] + live["misses"] == requests > 0
        assert live["demand_bytes"] == live["misses"] * trace.meta.page_bytes
    assert stats["decode"]["hits"] and stats["decode"]["misses"]
    assert stats["n_slots"] * trace.meta.page_bytes == stats["slots_bytes"]


def test_a_long_prompt_is_in_the_trace_too(path: Path, tmp_path: Path) -> None:
    trace_path = tmp_path / "routes.trace"
    with open_paged(path, trace=str(trace_path)) as paged:
        paged.generate(prompt_ids=PROMPTS[7], max_tokens=2)
    steps = read_trace(trace_path).steps
    sizes = [step.sizes[0] // SPEC.n_expert_used for step in steps if step.prefill]
    assert sizes == [64, 64, len(PROMPTS[7]) - 128]
    # The last layer of a batch that wants no logits chooses nothing.
    assert [len(step.layers) for step in steps] == [5, 5, 6, 6]


def test_a_budget_too_small_is_refused_and_the_one_it_names_works(
    path: Path, resident: Runtime
) -> None:
    budget = smallest_budget(path)
    with Runtime(path, **SETTINGS, memory=budget) as paged:
        assert answers(paged, 3) == answers(resident, 3)
        stats = check_balanced(paged)
        assert stats["experts"]["n_slots"] < stats["experts"]["n_pages"]
    step = math.ceil(2**30 / 100)  # what the message rounds to
    with pytest.raises(errors.CapacityError, match="at least"):
        Runtime(path, **SETTINGS, memory=budget - step)


def test_every_budget_from_the_smallest_on_works(path: Path, resident: Runtime) -> None:
    """The plan holds what is really taken, whatever is left for slots."""
    budget = smallest_budget(path)
    expected = answers(resident, 1)
    for spare in (0, 300_000, 9 * MIB, 19 * MIB, 39 * MIB):
        with Runtime(path, **SETTINGS, memory=budget + spare) as runtime:
            assert answers(runtime, 1) == expected
            stats = wait_idle(runtime)
            assert stats["memory_bytes"] <= stats["budget_bytes"]
            assert ("experts" in stats) == (runtime._loaded.experts is not None)


def test_memory_for_everything_takes_the_plain_path(path: Path) -> None:
    with Runtime(path, **SETTINGS, memory="1GiB") as runtime:
        assert runtime._loaded.experts is None and "experts" not in runtime.stats()


def test_a_predictor_that_is_named_proves_itself_first(path: Path) -> None:
    """Only `asked` has it on from the first token; 16 tokens are before any trial."""
    for levers, on in (("proven", False), ("asked", True)):
        with open_paged(path, prefetch="gate", levers=levers) as paged:
            paged.generate(prompt_ids=PROMPTS[3], max_tokens=12)
            stats = check_balanced(paged)
        assert bool(stats["experts"]["decode"]["prefetch_issued"]) == on, levers


def test_cancelled_at_every_phase_everything_balances(path: Path, resident: Runtime) -> None:
    expected = answers(resident, 4)
    with open_paged(path, prefetch="gate", levers="asked") as paged:
        for i in range(24):
            stream = paged.stream(prompt_ids=PROMPTS[i % 8] * 2, max_tokens=60)
            if i % 3 == 0:
                for _ in range(1 + i % 4):
                    next(stream, None)
            elif i % 3 == 1:
                time.sleep(0.002 * i)
            stream.close()
            if i % 5 == 0:
                check_balanced(paged)
        timed = paged.generate(prompt_ids=PROMPTS[7] * 2, max_tokens=100, timeout_s=0.02)
        assert timed.finish_reason == "timeout"
        check_balanced(paged)
        assert answers(paged, 4) == expected
        check_balanced(paged)


def test_closing_ends_what_runs(path: Path) -> None:
    for n_taken in (0, 1, 3):
        paged = open_paged(path, prefetch="gate", levers="asked")
        stream = paged.stream(prompt_ids=PROMPTS[7] * 2, max_tokens=200)
        for _ in range(n_taken):
            next(stream)
        paged.close()
        with pytest.raises(errors.ClosedError):
            list(stream)


def test_a_disk_error_fails_its_request_only(
    path: Path, resident: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_paged(path) as paged:
        assert answers(paged, 2) == answers(resident, 2)
        disk = paged._loaded.experts._transfer._files[0]  # type: ignore[union-attr]

        def broken(*_: object) -> int:
            raise OSError(5, "Input/output error")

        for ids in (PROMPTS[0], PROMPTS[7]):
            with monkeypatch.context() as patched:
                patched.setattr(type(disk), "read_at", broken)
                with pytest.raises(errors.ModelFileError, match="Input/output error"):
                    for shift in range(20):  # until one needs what is not there
                        moved = [1 + (token + shift) % 300 for token in ids]
                        paged.generate(prompt_ids=moved, max_tokens=30, prefix="off")
            check_balanced(paged)
        assert answers(paged, 4) == answers(resident, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"policy": "best"}, "policy .*lfru.*'best'"),
     ({"prefetch": "oracle"}, "prefetch .*gate.*'oracle'"),
     ({"trace": "no/such/folder/x.trace"}, r"trace .*no/such/folder"),
     ({"io_threads": 65}, "io_threads")],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_met_are_refused(
    path: Path, settings: dict[str, Any], words: str
) -> None:
    budget = smallest_budget(path) + 8 * MIB
    n_threads = threading.active_count()
    with pytest.raises(errors.UsageError, match=words):
        Runtime(path, **SETTINGS, memory=budget, **settings)
    assert threading.active_count() <= n_threads  # no I/O thread stays


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_trace_that_cannot_be_begun_is_a_clear_error(path: Path) -> None:
    with pytest.raises(errors.UsageError, match="No space left"):
        open_paged(path, trace="/dev/full")


def test_a_trace_whose_disk_fills_up_fails_requests_not_the_engine(
    path: Path, tmp_path: Path, resident: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with open_paged(path, trace=str(tmp_path / "routes.trace")) as paged:
        assert answers(paged, 1) == answers(resident, 1)
        with monkeypatch.context() as patched:
            patched.setattr(TraceWriter, "append", full)
            with pytest.raises(errors.UsageError, match=r"trace.*No space left"):
                answers(paged, 1)
        check_balanced(paged)
        assert answers(paged, 2) == answers(resident, 2)


_CLI = """
import pathlib, sys
from edgeroute.cli import cli
try:
    cli(sys.argv[1:])
finally:
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        peak = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak[0].split()[1]) * 1024, file=sys.stderr)
"""


def _generate(path: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", _CLI, "generate", "Once upon a time", "--raw", "--json",
               "-m", str(path), "-n", "12", "-t", "1", "--n-ctx", "512", *options]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.usefixtures("real_process")
def test_the_command_line_keeps_to_its_memory(tmp_path: Path) -> None:
    """A process of its own, whose interpreter and libraries count; its peak is the system's."""
    path = tmp_path / "large.gguf"
    synth.write(replace(SPEC, n_embd=256, n_ff_exp=256), path)
    refused = _generate(path, "--memory", "64MiB")
    assert refused.returncode != 0
    named = re.search(r"at least (\d+\.\d+) GiB", refused.stderr)
    assert named is not None, refused.stderr
    budget = int(float(named[1]) * 2**30) + 16 * MIB
    assert budget < path.stat().st_size
    paged, resident = _generate(path, "--memory", str(budget)), _generate(path)
    assert paged.returncode == resident.returncode == 0, paged.stderr
    ours, theirs = json.loads(paged.stdout), json.loads(resident.stdout)
    assert ours["token_ids"] == theirs["token_ids"]
    assert ours["stats"]["budget_bytes"] == budget
    assert ours["stats"]["memory_bytes"] <= budget
    path.unlink()
    if Path("/proc/self/status").exists():
        peak, larger = (int(each.stderr.split()[-1]) for each in (paged, resident))
        assert peak <= budget + 40 * MIB
        assert larger > peak + 24 * MIB


def test_this_process_grows_by_no_more_than_the_budget(path: Path) -> None:
    me = psutil.Process()
    budget = smallest_budget(path) + 4 * MIB
    before = me.memory_info().rss
    with Runtime(path, **SETTINGS, memory=budget) as paged:
        answers(paged)
        assert me.memory_info().rss - before <= budget + 16 * MIB
