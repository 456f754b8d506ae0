"""What lies where while an engine works, read by others meanwhile; and what a stop frees."""

import contextlib
import functools
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeroute import Runtime, paging
from edgeroute.models.forward import Forward
from edgeroute.runtime import errors
from edgeroute.runtime.device import Device
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.edgeroute.engine_lab import SETTINGS, WAIT_S, until
from tests.edgeroute.layered_lab import plain_machine


@pytest.fixture(params=["paged", "streamed"])
def partly(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runtime]:
    """A model that is not all in memory."""
    path = tmp_path / "model.gguf"
    if request.param == "paged":
        process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
        monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
        synth.write(replace(
            synth.ARCHITECTURES["qwen3moe"], n_layer=5, n_embd=128, n_ff=128, n_ff_exp=128,
            n_head=2, n_head_kv=1, n_embd_head=64, n_expert=30, n_expert_used=3,
        ), path)  # fmt: skip
        with pytest.raises(errors.CapacityError) as refusal:
            Runtime(path, **SETTINGS, memory=MIB)
        assert refusal.value.smallest_bytes is not None
        memory = refusal.value.smallest_bytes + 6 * MIB
    else:
        plain_machine(monkeypatch, MIB=1)
        synth.write(synth.ARCHITECTURES["llama"], path)
        with Runtime(path, **SETTINGS) as whole:
            memory = whole._loaded.ledger.used_bytes - 64 * 1024
    with Runtime(path, **SETTINGS, memory=memory) as runtime:
        assert (runtime._loaded.experts is None) == (request.param == "streamed")
        if runtime._loaded.experts is not None:
            runtime._loaded.experts._next_reading = math.inf  # nobody else's memory counts
        yield runtime


def test_leaving_a_prompt_frees_within_one_operation(
    partly: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long prompt no graph is computed behind the one at work when its reader leaves."""
    compute, state = Device.compute, SimpleNamespace(at=-1, n=0, stream=None)

    def counted(device: Device, graph: int) -> bool:
        state.n += 1
        if state.n == state.at:
            state.stream.close()
        return compute(device, graph)

    monkeypatch.setattr(Device, "compute", counted)
    expected = partly.generate(prompt_ids=[40] * 500, max_tokens=2, prefix="off").token_ids
    n_whole = state.n
    for at in (1, 2, 5, n_whole // 3, n_whole // 2):
        hold = threading.Event()
        wait = functools.partial(hold.wait, WAIT_S)
        holder = threading.Thread(target=partly._engine.order, args=(wait,))
        holder.start()
        state.stream = partly.stream(prompt_ids=[40] * 500, max_tokens=2, prefix="off")
        state.n, state.at = 0, at
        hold.set()
        holder.join()
        # Taken from the queue, a request is nowhere for a moment: it must have begun first.
        until(lambda: state.n >= state.at and not partly._scheduler.busy)
        until(lambda: not partly._engine.n_queued)
        assert state.n == at
        stats: dict[str, Any] = partly.stats()
        assert stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]
        assert _leased(partly) == 0
    state.at = -1
    found = partly.generate(prompt_ids=[40] * 500, max_tokens=2, prefix="off").token_ids
    assert found == expected


def _leased(runtime: Runtime) -> int:
    found: Any = runtime.residency()
    return int(found["experts"]["leased"]) if "experts" in found else 0


# what others read


def test_residency_is_what_the_stores_hold(partly: Runtime) -> None:
    partly.generate(prompt_ids=[40 + i % 90 for i in range(200)], max_tokens=8)
    found: Any = partly.residency()
    if (store := partly._loaded.experts) is not None:
        told = found["experts"]
        pages = {il * 30 + e for il, bits in told["layers"] for e in range(30)
                 if int(bits, 16) >> e & 1}  # fmt: skip
        held = set()
        for pool in store.pools:
            held |= set(pool.table.resident())
        assert pages == held and told["resident"] == len(held) > 0
        assert [il for il, _ in told["layers"]] == [0, 1, 2, 3, 4]
        assert {len(bits) for _, bits in told["layers"]} == {8}
        assert told["n_slots"] == sum(pool.table.n_slots for pool in store.pools) >= len(held)
        assert told["n_layer"] == 5 and told["n_expert"] == 30 and told["leased"] == 0
    else:
        told, layers = found["layers"], partly._loaded.layers
        assert layers is not None
        stats: Any = partly.stats()["layers"]
        assert len(told["resident"]) == stats["resident"]
        assert len(told["streamed"]) == stats["streamed"] > 0
        assert sorted(told["resident"] + told["streamed"]) == list(range(told["n_layer"] + 1))
        assert set(told["rooms"]) <= set(told["streamed"]) and told["rooms"]


def test_residency_of_adapters_and_of_a_model_that_stays(tiny_path: Path, tmp_path: Path) -> None:
    files = [make_adapter(tmp_path / f"{name}.gguf", tiny_path, seed=i)
             for i, name in enumerate("abc")]  # fmt: skip
    with Runtime(tiny_path, **SETTINGS, adapters=files, adapter_slots=2,
                 adapter_state="off") as runtime:  # fmt: skip
        runtime.generate(prompt_ids=[40] * 5, max_tokens=2, adapter="b")
        assert runtime.residency() == {"adapters": {"known": ["a", "b", "c"], "resident": ["b"]}}
        one = runtime.embed([[50] * 9], adapter="b").vectors
        base = runtime.embed([[50] * 9]).vectors
        assert abs(one - base).max() > 1e-3, "the adapter changes the vector"
        mixed = runtime.embed([[50] * 9], adapter={"b": 1.0}).vectors
        assert (mixed == one).all()
        with pytest.raises(errors.UsageError, match="compared"):
            runtime.embed([[50] * 9], adapter="auto")
        with pytest.raises(errors.UsageError, match="no adapter 'x'"):
            runtime.embed([[50] * 9], adapter="x")
    with Runtime(tiny_path, **SETTINGS) as runtime:
        assert runtime.residency() is None


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextlib.contextmanager
def readers(runtime: Runtime, n: int = 3) -> Iterator[list[BaseException]]:
    """Read everything there is to read, from several threads, all the time."""
    over, failed = threading.Event(), list[BaseException]()

    def read() -> None:
        try:
            while not over.is_set():
                runtime.stats()
                runtime.residency()
                assert runtime.pulse().idle_s >= 0
                assert runtime.stuck_bytes == 0
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(n)]
    for thread in threads:
        thread.start()
    yield failed
    over.set()
    for thread in threads:
        thread.join(WAIT_S)


@pytest.mark.usefixtures("hasty")
def test_figures_are_read_while_everything_moves(partly: Runtime) -> None:
    with readers(partly) as failed:
        for i in range(4):
            partly.generate(prompt_ids=[40 + i] * 100, max_tokens=10)
            partly.embed([[50 + i] * 20])
        partly.close()
        time.sleep(0.01)
    assert failed == []
    assert partly.stats()["running"] == 0


@pytest.mark.usefixtures("hasty")
def test_figures_of_adapters_and_drafts_are_read_meanwhile(tiny_path: Path, tmp_path: Path) -> None:
    files = [make_adapter(tmp_path / f"{name}.gguf", tiny_path, seed=i)
             for i, name in enumerate("abcd")]  # fmt: skip
    with Runtime(tiny_path, **SETTINGS, adapters=files[:2], adapter_slots=2, adapter_state="off",
                 speculate="lookup") as runtime, readers(runtime) as failed:  # fmt: skip
        for i in range(3):
            runtime.add_adapter(files[2])
            runtime.add_adapter(files[3])
            done = runtime.generate(prompt_ids=[40, 41, 42] * 9, max_tokens=9, adapter="auto")
            runtime.feedback(done.id, 0.5)
            runtime.generate(prompt_ids=[40 + i] * 9, max_tokens=9, adapter="d")
            runtime.remove_adapter("c")
            runtime.remove_adapter("d")
    assert failed == []


def test_embedding_is_not_asked_of_the_head(tiny: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("logits of a prompt that nobody continues")

    monkeypatch.setattr(Forward, "logits", never)
    assert tiny.embed([[40] * 9]).n_tokens == (9,)
