"""What a model with experts takes of a device and of DRAM, and a whole Runtime on both."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edgeroute
from edgeroute.config import RunParams
from edgeroute.models.registry import describe
from edgeroute.offload.device_tier import DeviceTier
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.paging import MoeSource, moe_source
from edgeroute.paging_device import DRAM, SHARED, SLOTS, Half, TierPlan, plan_tiers, tiers_of
from edgeroute.runtime.device import DeviceInfo
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device import fake_backend as fake
from tests.edgeroute import paged_lab as lab

MANY = replace(lab.SMALL, n_expert=96, n_layer=3)
"""Experts of 7 MB, beside which all else is small."""
PROMPT = "the quick brown fox jumps over the lazy dog and runs away from all of them again"
SETTINGS: dict[str, Any] = {"n_ctx": 256, "threads": 1, "n_ubatch": 64, "repack_experts": False}
MIB = 1 << 20
INFO = DeviceInfo(
    name="gpu0", description="", kind="gpu", memory_free_bytes=0, memory_total_bytes=0,
    host_pointers=False, pointer=0, asynchronous=False, events=False, pinned=False, unified=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = tmp_path_factory.mktemp("plan") / "many.gguf"
    synth.write(MANY, found)
    yield found
    found.unlink()


@pytest.fixture(scope="module")
def expected(path: Path) -> tuple[int, ...]:
    with edgeroute.Runtime(path, **SETTINGS) as runtime:
        return ask(runtime)


def ask(runtime: edgeroute.Runtime) -> tuple[int, ...]:
    return runtime.generate(PROMPT, max_tokens=16, temperature=0).token_ids


@contextlib.contextmanager
def source_of(path: Path, info: DeviceInfo, **params: Any) -> Iterator[MoeSource]:
    with GGUFFile.open(path) as file:
        stand_in: Any = SimpleNamespace(info=info)
        settings = RunParams(**SETTINGS | params)
        source = moe_source(file, stand_in, describe(file), settings)
        yield replace(source, program_bytes=20 * MIB)


def half(budget: int, **fixed: int) -> Half:
    return Half(fixed=fixed, budget_bytes=budget, name="some memory", setting="some_setting")


def plan_of(source: MoeSource, host: int, device: int) -> TierPlan:
    return plan_tiers(source, half(host, sessions=MIB), half(device, weights=MIB))


def test_budgets_are_divided_and_never_exceeded(path: Path) -> None:
    with source_of(path, INFO, host_experts="off") as source:
        for device in (5 * MIB, 6 * MIB, 8 * MIB, 30 * MIB):
            for host in (32 * MIB, 34 * MIB, 90 * MIB):
                plan = plan_of(source, host, device)
                assert sum(plan.host.values()) <= host
                assert sum(plan.device.values()) <= device
                most = sum(pool.all_bytes for pool in plan.pools)
                assert plan.slots_bytes <= most and plan.dram_bytes <= most
                assert plan.device[SLOTS] > plan.slots_bytes  # what aligns the first
                assert plan.host[DRAM] == plan.dram_bytes
        assert plan.slots_bytes == plan.dram_bytes == most
        assert plan.upload_bytes == 0
    queued = replace(INFO, asynchronous=True, events=True)
    with source_of(path, queued) as source:
        plan = plan_of(source, 90 * MIB, 8 * MIB)
        assert plan.upload_bytes and plan.host["upload staging"] == plan.upload_bytes
        assert plan.host["experts computed here"]


@pytest.mark.parametrize("short", ["host", "device"])
def test_too_little_of_either_memory_is_refused_with_numbers(short: str, path: Path) -> None:
    with source_of(path, INFO) as source:
        budgets = {"host": 90 * MIB, "device": 30 * MIB}
        with pytest.raises(CapacityError, match=r"experts of one token, .* some_setting") as error:
            plan_of(source, **(budgets | {short: 2 * MIB}))
        smallest = error.value.smallest_bytes
        assert smallest is not None
        plan = plan_of(source, **(budgets | {short: smallest}))
        least = source.moe.n_expert_used * sum(pool.slot_bytes for pool in plan.pools)
        assert least in (plan.slots_bytes, plan.dram_bytes)
        with pytest.raises(CapacityError):
            plan_of(source, **(budgets | {short: smallest - 1}))


def test_memory_of_the_machine_is_not_a_tier_of_its_own(path: Path) -> None:
    assert tiers_of(INFO) == "cached"
    shared = replace(INFO, unified=True)
    assert tiers_of(shared) == "staged"
    assert tiers_of(replace(shared, host_pointers=True)) == "in place"
    with source_of(path, shared, host_experts="off") as source:
        plan = plan_of(source, 36 * MIB, 90 * MIB)
        least = source.moe.n_expert_used * sum(pool.slot_bytes for pool in plan.pools)
        assert plan.dram_bytes == 4 * least < plan.slots_bytes
        assert sum(plan.host.values()) <= 36 * MIB  # what the device has included
        assert plan.host[SHARED] == sum(plan.device.values())
        with pytest.raises(CapacityError, match="some_setting") as error:
            plan_of(source, 2 * MIB, 90 * MIB)
        assert error.value.smallest_bytes is not None
        plan = plan_of(source, error.value.smallest_bytes, 90 * MIB)
        assert plan.slots_bytes == plan.dram_bytes == least


def test_a_whole_runtime_over_three_tiers(
    path: Path, expected: tuple[int, ...], rpc: RpcServer
) -> None:
    with pytest.raises(CapacityError, match="device_memory to at least") as refused:
        edgeroute.Runtime(path, device=rpc.name, device_memory="1MiB", **SETTINGS)
    assert refused.value.smallest_bytes is not None
    budget = refused.value.smallest_bytes + 27 * 24576  # 30 experts in all
    for host_experts in ("off", "on"):
        with edgeroute.Runtime(path, device=rpc.name, device_memory=budget,
                               host_experts=host_experts, **SETTINGS) as runtime:  # fmt: skip
            assert ask(runtime) == expected
            loaded = runtime._loaded
            assert isinstance(loaded.experts, DeviceTier)
            stats = runtime.stats()
            experts: Any = stats["experts"]
            assert experts["device"]["n_slots"] == 30
            below = experts["decode"]
            found = below["hits"] + below["late"] + below["misses"]
            assert experts["device"]["decode"]["misses"] == found > 0
            away = sum(experts["device"][kind]["away"] for kind in ("decode", "prefill"))
            assert (away > 0) == (host_experts == "on")
            accounts: Any = stats["devices"]
            mine = accounts[rpc.name]
            assert mine["used_bytes"] <= mine["budget_bytes"] == budget
            assert mine["entries"][SLOTS] == experts["device"]["slots_bytes"]
            where: Any = runtime.residency()
            assert where["experts"]["device"]["n_slots"] == experts["device"]["n_slots"]
            assert where["experts"]["n_slots"] == experts["n_slots"]


@pytest.mark.parametrize("host_pointers", [True, False])
def test_a_device_in_the_machines_own_memory(
    host_pointers: bool, path: Path, expected: tuple[int, ...]
) -> None:
    """Slots in its own buffers where the host can write those, else through few DRAM slots."""
    with fake.fake_device(fake.Fake(kind="igpu", host_pointers=host_pointers)):
        settings = SETTINGS | {"device_memory": "6MiB"}
        with edgeroute.Runtime(path, device="fake0", **settings) as runtime:
            assert ask(runtime) == expected
            experts = runtime._loaded.experts
            entries: Any = runtime.stats()["memory"]
            assert entries["compute buffer"] and sum(entries.values()) > 0
            if host_pointers:
                assert isinstance(experts, ExpertStore)
            else:
                assert isinstance(experts, DeviceTier)
                assert experts.below.pools[0].table.n_slots == 4 * MANY.n_expert_used


def test_queued_copies_arrive_before_they_are_computed_with(
    path: Path, expected: tuple[int, ...]
) -> None:
    """A device that does everything as late as it may."""
    with fake.fake_device(fake.Fake()) as device:
        settings = SETTINGS | {"device_memory": "6MiB", "host_experts": "off"}
        with edgeroute.Runtime(path, device="fake0", **settings) as runtime:
            assert ask(runtime) == expected
            assert isinstance(runtime._loaded.experts, DeviceTier)
            assert runtime._loaded.experts._uploader.staging_bytes
        assert device is not None
