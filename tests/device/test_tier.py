"""Three tiers: disk -> DRAM -> slots of a device whose memory is not ours, the bits of resident."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.offload import expert_tier, policy_choice
from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.trace import Trace, TraceMeta, TraceRecorder
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import DeviceLostError, ModelFileError
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device import tier_lab
from tests.edgeroute import paged_lab as lab
from tests.edgeroute.paged_lab import PREFILL, SINGLE, TOGETHER
from tests.offload.faulty_disk import FaultyDisk

BRIEF = [[("a", 40, 2)], *SINGLE[:3], *TOGETHER[:4]]
FAMILIES = ("olmoe", "gpt-oss", "deepseek2")
N_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("tiers")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Any]:
    synth.write(lab.SMALL, folder / "small.gguf")
    opened = lab.Lab(folder / "small.gguf")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def device(rpc: RpcServer) -> Iterator[Device]:
    """A device of another process."""
    with Device.open(rpc.name) as opened:
        assert not opened.info.host_pointers
        yield opened


def routes(rng: random.Random, n_expert: int, n_used: int) -> list[int]:
    """Distinct experts: most tokens ask for the first ones more often."""
    found: list[int] = []
    skewed = rng.random() < 0.7
    while len(found) < n_used:
        expert = int(rng.expovariate(0.5)) if skewed else rng.randrange(n_expert)
        if expert < n_expert and expert not in found:
            found.append(expert)
    return found


def drive(tiers: Any, n_tokens: int, *, seed: int = 1) -> None:
    """Ask for experts as a pass does, prompts among the tokens; check what is held each time."""
    rng, tier = random.Random(seed), tiers.tier
    n_expert, n_used = tiers.lab.pools[0].n_expert, tiers.lab.n_used
    for token in range(n_tokens):
        prefill = token % 16 == 12
        tier.begin(prefill=prefill)
        for il in range(tiers.lab.n_layer):
            if prefill:
                counts = {expert: rng.randint(1, 9) for expert in range(n_expert)}
                seen: list[int] = []
                for held in tier.in_turn(il, counts, 20):
                    seen += held.experts
                    assert len(held.experts) == 1 or sum(counts[e] for e in held.experts) <= 20
                assert sorted(seen) == list(range(n_expert))
                continue
            experts = routes(rng, n_expert, n_used)
            tier.chose(il, experts, None)
            leased = tier.lease(il, experts)
            assert not leased.absent and not leased.away
            table = tier._pool_of[il].table
            assert leased.slots == [table.slot_of(il * n_expert + e) for e in experts]
        tier.end()
        tiers.check_budgets()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_bits_of_resident_experts(
    policy: str, small: Any, device: Device
) -> None:
    """DRAM for a quarter of the experts, a tenth on the device."""
    with tier_lab.tiered(small, device, policy=policy) as tiered:
        assert lab.equal(tiered.run(BRIEF), small.resident(BRIEF))
        assert tiered.tier.policy == policy
        assert tiered.below.pools[0].table.n_slots == small.pools[0].n_pages // 4
        assert tiered.tier.pools[0].table.n_slots == -(-small.pools[0].n_pages // 10) - 1
        assert tiered.check_bytes() == tiered.tier.pools[0].table.n_slots
        assert tiered.transfer.stats.demand_bytes == sum(
            count.disk_reads * small.pools[0].page_bytes
            for prefill in (False, True)
            for count in tiered.tier.layers(prefill=prefill).values()
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_on_the_device_has_the_bytes_of_the_file(
    policy: str, small: Any, device: Device
) -> None:
    with tier_lab.tiers(small, device, policy=policy, slots=0.25, dram=0.4) as tiers:
        for part in range(2):
            drive(tiers, N_TOKENS // 2, seed=part)
            assert tiers.check_bytes() == tiers.tier.pools[0].table.n_slots
        tiers.check()
        counts = tiers.tier.layers(prefill=False)
        for count in counts.values():
            assert count.misses == count.uploaded == count.dram_hits + count.disk_reads
            assert count.hits + count.misses == small.n_used * (N_TOKENS - 2)
            assert count.uploaded_bytes == count.uploaded * small.pools[0].page_bytes
        uploads = sum(c.uploaded_bytes for prefill in (False, True)
                      for c in tiers.tier.layers(prefill=prefill).values())  # fmt: skip
        assert tiers.tier._uploader.n_bytes == uploads


def test_dram_slots_that_are_refilled_all_the_time(small: Any, device: Device) -> None:
    """The fewest slots in DRAM: each is filled again as soon as it has been sent."""
    with tier_lab.tiers(small, device, dram=0.0, slots=0.3) as tiers:
        assert tiers.below.pools[0].table.n_slots == small.n_used
        for seed in range(10):
            drive(tiers, 2, seed=seed)
            tiers.check_bytes()
        tiers.check()


@pytest.mark.parametrize("arch", FAMILIES)
def test_other_families(arch: str, folder: Path, device: Device) -> None:
    path = folder / f"{arch}.gguf"
    synth.make(arch, path)
    opened = lab.Lab(path)
    try:
        with tier_lab.tiered(opened, device, prefetch="gate", forced=True) as tiered:
            assert lab.equal(tiered.run(BRIEF), opened.resident(BRIEF))
            tiered.settle()
    finally:
        opened.close()
        path.unlink()


@pytest.mark.parametrize(
    "params",
    [
        {"dram": 0.0, "slots": 0.0},
        {"dram": 1.0, "slots": 0.1},
        {"dram": 0.1, "slots": 0.6},
        {"dram": 0.4, "slots": 1.0},
        {"dram": 0.5, "slots": 0.25, "prefetch": "gate", "forced": True},
        {"dram": 0.3, "slots": 0.1, "prefetch": "eam", "forced": True},
    ],
    ids=str,
)
def test_any_shares(params: dict[str, Any], small: Any, device: Device) -> None:
    with tier_lab.tiered(small, device, **params) as tiered:
        assert lab.equal(tiered.run(lab.LESS), small.resident(lab.LESS))
        tiered.settle()
        decode = tiered.tier.stats()["device"]["decode"]
        if params["slots"] == 1.0:
            assert decode["evictions"] == 0 and decode["hits"] > decode["misses"]
        if params["dram"] == 1.0:
            assert decode["disk_reads"] <= small.pools[0].n_pages
        if params.get("forced"):
            spent = tiered.below.spent()
            assert spent.prefetch_issued and spent.prefetch_useful


def test_a_prompt_reads_and_sends_each_expert_once(small: Any, device: Device) -> None:
    with tier_lab.tiered(small, device, dram=0.3, slots=0.3) as tiered:
        for _ in range(3):
            before = tiered.tier.layers(prefill=True)
            tiered.run(PREFILL)
            for il, count in tiered.tier.layers(prefill=True).items():
                asked = count.hits + count.misses - before[il].hits - before[il].misses
                assert asked <= small.pools[0].n_expert
                assert count.uploaded == count.misses
                assert count.disk_reads - before[il].disk_reads <= asked


def test_nothing_is_prefetched_that_the_device_has(small: Any, device: Device) -> None:
    with tier_lab.tiered(small, device, prefetch="gate", forced=True, slots=0.6) as tiered:
        table, taken = tiered.below.pools[0].table, []
        reserve = table.reserve_prefetch

        def watched(page: int) -> int | None:
            taken.append(tiered.tier._has(page))
            found: int | None = reserve(page)
            return found

        table.reserve_prefetch = watched
        assert lab.equal(tiered.run(BRIEF), small.resident(BRIEF))
        assert taken and not any(taken)


def test_what_stays_in_dram_is_held_there(small: Any, device: Device) -> None:
    """Experts that the processor computes: their slots have the file's bytes until the next."""
    with tier_lab.tiers(small, device, host_experts="on", dram=0.5, slots=0.2) as tiers:
        rng, tier = random.Random(3), tiers.tier
        n_expert, n_away = small.pools[0].n_expert, 0
        for _ in range(20):
            tier.begin(prefill=False)
            for il in range(small.n_layer):
                experts = routes(rng, n_expert, small.n_used)
                leased = tier.lease(il, experts)
                pool = tiers.below.pool(il)
                for expert in leased.away:
                    slot = leased.slots[experts.index(expert)]
                    page = il * n_expert + expert
                    assert pool.table.slot_of(page) == slot
                    views = [bytes(pool.slots.view(slot, pool.infos(il), part))
                             for part in range(len(pool.infos(il)))]  # fmt: skip
                    assert views == tiers.bytes_of(page)
                    assert not tier._has(page)
                n_away += len(leased.away)
            tier.end()
            tiers.check()
        counts = tier.layers(prefill=False).values()
        assert n_away == sum(count.away for count in counts) > 100
        # Slots that were free were filled all the same.
        assert sum(count.uploaded for count in counts) == tier.pools[0].table.n_slots
        tiers.check_bytes()


def test_dram_parts_first_with_what_is_settled_on_the_device(small: Any, device: Device) -> None:
    with tier_lab.tiers(small, device, policy="lru", dram=0.5, slots=0.5) as tiers:
        below = tiers.below.pools[0].table

        def ask(il: int, experts: list[int]) -> None:
            tiers.tier.begin(prefill=False)
            tiers.tier.lease(il, experts)
            tiers.tier.end()

        for first in range(3, 12, 3):
            ask(0, [first, first + 1, first + 2])
        for _ in range(tier_lab.device_tier.SETTLED_HITS):
            ask(0, [9, 10, 11])
        for first in range(0, 12, 3):  # DRAM has 24 slots, 9 of them taken
            ask(1, [first, first + 1, first + 2])
        assert below.n_free == 3
        ask(2, [0, 1, 2])
        ask(2, [3, 4, 5])
        assert {3, 4, 5} <= set(below.resident())  # older than 9, 10 and 11, which went first
        assert not {9, 10, 11} & set(below.resident())
        assert {9, 10, 11} <= set(tiers.tier.pools[0].table.resident())


@pytest.mark.parametrize(
    ("where", "nth"), [("prefill", 0), ("prefill", 17), ("decode", 3), ("together", 9)]
)
def test_an_error_of_the_disk_leaves_both_tiers_usable(
    where: str, nth: int, small: Any, device: Device
) -> None:
    steps = {"prefill": PREFILL, "decode": SINGLE, "together": TOGETHER}[where]
    with tier_lab.tiered(small, device, prefetch="gate", forced=True,
                         wrap=FaultyDisk) as tiered:  # fmt: skip
        tiered.run(SINGLE[:2])
        tiered.disk.eio_at = len(tiered.disk.offsets) + nth
        with pytest.raises(ModelFileError, match="Input/output error"):
            for _ in range(4):
                tiered.run(steps)
        tiered.settle()
        tiered.disk.eio_at = None
        assert lab.equal(tiered.run(BRIEF), small.resident(BRIEF))
        tiered.check_bytes()
        tiered.settle()


@pytest.mark.parametrize("nth", [0, 20])
def test_a_stopped_prompt_leaves_both_tiers_usable(nth: int, small: Any, device: Device) -> None:
    with tier_lab.tiered(small, device, wrap=FaultyDisk) as tiered:
        read_at, n_reads = tiered.disk.read_at, 0

        def stop(offset: int, *buffers: memoryview) -> int:
            nonlocal n_reads
            n_reads += 1
            if n_reads == nth + 1:
                device.stop_flag.set()
            found: int = read_at(offset, *buffers)
            return found

        tiered.disk.read_at = stop
        assert tiered.below.stop_flag is device.stop_flag  # ends its waits for the disk, too
        region = tiered.kv.allocate(256)
        try:
            piece = lab.Piece(np.arange(4, 104).tolist(), 0, region, 1)
            assert tiered.forward.run([piece]) is None
        finally:
            device.stop_flag.clear()
            tiered.kv.release(region)
        tiered.check()
        assert lab.equal(tiered.run(BRIEF), small.resident(BRIEF))


def test_an_upload_that_fails_leaves_both_tables_right(small: Any, device: Device) -> None:
    with tier_lab.tiers(small, device, dram=0.5, slots=0.25) as tiers:
        send, n_left = tiers.tier._uploader.send, 10

        def fail(*args: Any) -> None:
            nonlocal n_left
            n_left -= 1
            if not n_left:
                raise DeviceLostError("a device that is gone")
            send(*args)

        for n_left in (1, 8, 11):
            tiers.tier._uploader.send = fail
            with pytest.raises(DeviceLostError):
                try:
                    drive(tiers, 16, seed=n_left)
                finally:
                    tiers.tier.end()
            tiers.tier._uploader.send = send
            tiers.check()
            drive(tiers, 3)
            tiers.check_bytes()


def test_statistics_tell_of_both_tiers(small: Any, device: Device) -> None:
    with tier_lab.tiered(small, device, dram=0.5, slots=0.25) as tiered:
        tiered.run(BRIEF)
        stats = tiered.tier.stats()
        above = stats["device"]
        assert above["name"] == device.info.name
        assert above["n_slots"] == 12 and stats["n_slots"] == 24 and stats["n_pages"] == 48
        for kind in ("decode", "prefill"):
            found, below = above[kind], stats[kind]
            assert found["misses"] == below["hits"] + below["late"] + below["misses"]
            assert found["disk_reads"] == below["misses"] and found["upload_s"] > 0
            for name in ("hits", "misses", "uploaded", "uploaded_bytes", "dram_hits"):
                assert found[name] == sum(layer[name] for layer in above["layers"][kind])
        spent = tiered.tier.spent()
        assert spent.hits == sum(
            count.hits + count.dram_hits
            for prefill in (False, True)
            for count in tiered.tier.layers(prefill=prefill).values()
        )


def test_each_tier_has_the_policy_that_suits_what_it_is_asked_for(
    small: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DRAM is judged by what the device missed, the device by what the layers chose."""
    monkeypatch.setattr(expert_tier, "FIRST_CHOICE", 8)
    asked = {}

    def better(trace: Trace, n_slots: int, *_: object) -> str:
        asked[n_slots] = sum(step.flat.size for step in trace.steps)
        return "lfu" if n_slots == 24 else "hobbit"

    monkeypatch.setattr(policy_choice, "better_policy", better)
    monkeypatch.setattr(policy_choice, "STEP_LAYERS", 16)
    monkeypatch.setattr(policy_choice, "MIN_STEPS", 4)
    meta = TraceMeta(model="lab", n_layer=4, n_expert=12, n_expert_used=3, page_bytes=0,
                     layers=(0, 1, 2, 3))  # fmt: skip
    with tier_lab.tiers(small, device, dram=0.5, slots=0.4) as tiers:
        tier, below = tiers.tier, tiers.below
        tier.recorder, below.recorder = TraceRecorder(meta), TraceRecorder(meta)
        drive(tiers, 16)
        assert tier.policy == "lfru"
        tier.reconsider()
        assert [pool.table.policy.name for pool in below.pools] == ["lfu"]
        assert [pool.table.policy.name for pool in tier.pools] == ["hobbit"]
        assert tier.policy == "hobbit+lfu"
        assert 0 < asked[24] < asked[tier.pools[0].table.n_slots] == 4 * 4 * 3
        drive(tiers, 8)
        tiers.check()
        tiers.check_bytes()


@pytest.mark.parametrize("n_used", [1, 4])
def test_what_is_tried_at_opening_is_in_no_book(small: Any, device: Device, n_used: int) -> None:
    """The link is measured in free slots: they stay free, nothing is counted, bytes are right."""
    with tier_lab.tiers(small, device, host_experts="auto", dram=0.5, slots=0.5) as tiers:
        tier, rng = tiers.tier, random.Random(3)
        tier._n_used = n_used
        tier.measure_link()
        tiers.check()
        known = tier.gate.report()
        assert known.upload is not None and known.upload.n == known.n_uploaded == 0
        assert known.upload.fixed_s + known.upload.each_s > 0
        assert not any(pool.table.resident() for pool in tier.pools)
        tier.gate.compute.suppose(1, 9.0)  # so that all is uploaded
        for _ in range(6):
            tier.begin(prefill=False)
            for il in range(small.n_layer):
                leased = tier.lease(il, routes(rng, small.pools[0].n_expert, small.n_used))
                assert leased is not None and not leased.away
            tier.end()
            tiers.check()
        assert tiers.check_bytes() > 0
        assert tier.gate.report().n_uploaded == sum(
            count.uploaded for count in tier.layers(prefill=False).values()
        )
