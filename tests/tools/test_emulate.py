"""Emulation: what is imitated, what is computed, and a paged model on a slow drive."""

import contextlib
import mmap
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeroute import paging
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.throttle import Throttle
from edgeroute.runtime.errors import UsageError
from edgeroute.tools import synth
from edgeroute.tools.bench.limit import MemoryLimit
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.forecast import emulate as module
from edgeroute.tools.forecast import read_limit
from edgeroute.tools.forecast.devices import load_devices
from edgeroute.tools.forecast.emulate import (
    EmulatedRuntime,
    EmulateParams,
    emulate,
    plan_emulation,
)
from edgeroute.tools.forecast.read_limit import ReadLimit
from edgeroute.tools.forecast.records import Speeds, StoragePoint

GB = 10**9
GIB = 1 << 30
PI = load_devices()["rpi5-8gb-sd"]
FAST = (StoragePoint(read_bytes=1 << 20, depth=2, bytes_s=3 * GB),)


def how(plan: module.EmulationPlan) -> dict[str, str]:
    return {name: each.how for name, each in plan.resources.items()}


def test_a_smaller_device_is_imitated() -> None:
    plan = plan_emulation(PI, memory_bytes=32 * GIB, cores=8, storage=FAST)
    assert plan.limit_bytes == PI.memory_bytes - PI.system_bytes
    assert plan.points is not None and plan.points[-1].bytes_s == pytest.approx(90e6)
    assert plan.threads == 4
    assert how(plan) == {"memory": "emulated", "storage": "emulated", "cores": "emulated",
                         "speed": "computed"}  # fmt: skip


def test_what_this_machine_has_not_is_said() -> None:
    slow = (StoragePoint(read_bytes=1 << 20, depth=2, bytes_s=50e6),)
    plan = plan_emulation(PI, memory_bytes=4 * GIB, cores=2, storage=slow)
    assert (plan.limit_bytes, plan.points, plan.threads) == (None, None, 2)
    assert how(plan) == dict.fromkeys(("memory", "storage", "cores"), "not possible") | {
        "speed": "computed"
    }
    assert "47.7 MiB/s" in plan.resources["storage"].note


def test_a_gpu_is_computed() -> None:
    plan = plan_emulation(load_devices()["orin-nano-8gb"], memory_bytes=32 * GIB, cores=8,
                          storage=())  # fmt: skip
    assert how(plan)["cores"] == "computed" and how(plan)["storage"] == "emulated"


MOE = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=48, n_expert_used=3,
)  # fmt: skip
"""36 MiB of experts in pages of 192 KiB; a token uses 12 of 192."""


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulate") / "moe.gguf"
    synth.write(MOE, path)
    return path


class Here:
    """In place of a worker: the engine in this process."""

    def __init__(self, factory: type[EmulatedRuntime], *args: object) -> None:
        self._engine = factory(*args)  # type: ignore[arg-type]

    def call(self, method: str, *args: object) -> object:
        return getattr(self._engine, method)(*args)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()


def speeds(name: str, bytes_s: float) -> Speeds:
    return Speeds(
        name=name, memory_bytes=GIB, available_bytes=GIB, weight_bytes_s={"F32": bytes_s},
        prefill_flops_s={}, kv_bytes_s=bytes_s, graph_s=0.0, layer_s=0.0, paged_layer_s=0.0,
        storage=FAST, threads=1,
    )  # fmt: skip


def test_a_model_runs_as_on_the_device(moe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters and the arithmetic behind them; how long it took is nobody's promise."""
    monkeypatch.setattr(module, "Worker", Here)
    # No control group in the tests: the limit becomes the Runtime's budget.
    monkeypatch.setattr(module, "MemoryLimit", _refuse)
    monkeypatch.setattr(module, "ReadLimit", _refuse)
    # The test runner's own memory, which is larger than the model, counts as nothing.
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    through: list[int] = []
    due = Throttle.due

    def counting(throttle: Throttle, began: float, n_bytes: int) -> float:
        through.append(n_bytes)
        return due(throttle, began, n_bytes)

    monkeypatch.setattr(Throttle, "due", counting)
    drive = StoragePoint(read_bytes=1 << 20, depth=1, bytes_s=3e9)
    device = replace(PI, memory_bytes=20 << 20, system_bytes=0, storage=(drive,))
    params = EmulateParams(n_tokens=6, n_ctx=256, settings={"threads": 1})
    found = emulate(moe_path, device, params, here=speeds("here", 8e9), there=speeds("pi", 2e9))
    assert found.resources["memory"].how == "not possible"
    assert "no control group" in found.resources["memory"].note
    assert found.resources["storage"].how == "emulated"
    assert "not slowed: no control group" in found.resources["storage"].note
    assert found.n_tokens == 5 and found.hit_ratio is not None and 0 < found.hit_ratio < 1
    assert found.read_bytes_token > 0 and found.stall_s_token > 0
    assert sum(through) >= 5 * found.read_bytes_token
    assert found.computed_tok_s is not None and found.computed_tok_s < found.decode_tok_s
    compute_s = 1 / found.decode_tok_s - found.stall_s_token
    expected = 1 / (found.stall_s_token + 4 * compute_s)
    assert found.computed_tok_s == pytest.approx(expected)
    assert found.to_dict()["resources"]["speed"]["how"] == "computed"


def _refuse(*limit: object) -> None:
    raise UsageError("no control group can be made here")


class Reader:
    """Reads a file past the page cache, inside a worker."""

    def __init__(self, path: str) -> None:
        self._path = path

    def groups(self) -> str:
        """Name the control groups that it is in."""
        return Path("/proc/self/cgroup").read_text()

    def read(self) -> int:
        """Read it all; return how many bytes that was."""
        with DiskFile.open(Path(self._path)) as disk:
            buffer = memoryview(mmap.mmap(-1, disk.size_bytes))
            return disk.read_at(0, buffer)

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(bytes(8 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def test_the_kernel_holds_reads_to_a_rate_and_nothing_is_left(big: Path) -> None:
    try:
        limit = ReadLimit(big, 32 << 20)
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    with limit:
        with Worker(*limit.factory(Reader, str(big))) as worker:
            assert f"/{limit.folder.name}\n" in worker.call("groups")
            assert worker.call("read") == 8 << 20
        throttle = (limit.folder / "blkio.throttle.read_bps_device").read_text().split()
        counted = (limit.folder / "blkio.throttle.io_service_bytes").read_text()
        assert throttle[1] == str(32 << 20)
        assert int(re.search(r"Read (\d+)", counted)[1]) >= 8 << 20  # type: ignore[index]
    assert not limit.folder.exists()
    limit.close()


def test_memory_and_reads_are_limited_at_once(big: Path) -> None:
    try:
        reads, memory = ReadLimit(big, 32 << 20), MemoryLimit(256 << 20)
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    with reads, memory, Worker(*memory.factory(*reads.factory(Reader, str(big)))) as worker:
        groups = worker.call("groups")
        assert reads.folder.name in groups and memory.folder.name in groups


def test_what_is_on_no_disk_is_not_limited() -> None:
    with pytest.raises(UsageError, match="on no disk"):
        ReadLimit(Path("/proc/self/status"), 1e6)
    with pytest.raises(UsageError, match="on no disk"):
        ReadLimit(Path("/no/such/file"), 1e6)


def test_without_groups_the_plan_says_so(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_limit.limits, "own_groups", lambda controller: iter([(True, big)]))
    with pytest.raises(UsageError, match="none of version 1"):
        ReadLimit(big, 1e6)
    plan = plan_emulation(PI, memory_bytes=32 * GIB, cores=8, storage=FAST)
    with contextlib.ExitStack() as own:
        limit, told = module._limit_reads(own, plan, big)
    assert limit is None and "none of version 1" in told.resources["storage"].note
    monkeypatch.setattr(module, "ReadLimit", lambda *given: contextlib.nullcontext(given))
    with contextlib.ExitStack() as own:
        limit, told = module._limit_reads(own, plan, big)
    assert limit == (big, pytest.approx(99e6))
    assert "the kernel (blkio) holds all reads" in told.resources["storage"].note
