"""Paged experts give the bits of resident ones: whatever the budget, policy and layout."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.offload import expert_store
from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.overlap_gate import OverlapGate, OverlapParams
from edgeroute.offload.prefetch import PREDICTORS
from edgeroute.runtime import slots as slots_module
from edgeroute.tools import synth
from tests.edgeroute import paged_lab as lab
from tests.edgeroute.paged_lab import EVERYTHING, LESS, SMALL, equal

MOE = [name for name, spec in synth.ARCHITECTURES.items() if spec.n_expert]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models are; 200 MB that need not stay."""
    made = tmp_path_factory.mktemp("paged")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def open_lab() -> Iterator[Open]:
    """Open labs that are closed after the test."""
    opened: list[Any] = []

    def open_one(path: Path, **params: Any) -> Any:
        opened.append(lab.Lab(path, **params))
        return opened[-1]

    yield open_one
    for each in reversed(opened):
        each.close()


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Any]:
    synth.write(SMALL, folder / "small.gguf")
    opened = lab.Lab(folder / "small.gguf")
    yield opened
    opened.close()


@pytest.mark.parametrize("arch", MOE)
def test_every_architecture(arch: str, folder: Path, open_lab: Open) -> None:
    """With the fewest slots that are legal, and with half of all."""
    path = folder / f"{arch}.gguf"
    synth.make(arch, path)
    opened = open_lab(path)
    for slots, steps in ((None, LESS), (opened.pools[0].n_expert // 2, EVERYTHING)):
        with opened.paged(slots=slots, prefetch="gate", forced=True) as paged:
            assert equal(paged.run(steps), opened.resident(steps)), slots
            assert paged.counts().misses and paged.counts().evictions
            paged.settle()


@pytest.mark.parametrize("slots", [None, 2, 5, 12])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_at_every_budget(policy: str, slots: int | None, small: Any) -> None:
    with small.paged(policy=policy, slots=slots) as paged:
        assert equal(paged.run(LESS), small.resident(LESS))
        counts = paged.counts()
        assert paged.store.policy == policy
        assert counts.hits + counts.misses > 200
        whole = slots == SMALL.n_expert
        assert (counts.evictions == 0) == whole
        if whole:
            assert counts.misses <= SMALL.n_layer * SMALL.n_expert
        assert counts.demand_bytes == counts.misses * small.pools[0].page_bytes
        assert paged.transfer.stats.demand_bytes == counts.demand_bytes
        assert counts.prefetch_issued == counts.late == 0


@pytest.mark.parametrize("slots", [None, 1, 2, 5])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_forced_on(predictor: str, slots: int | None, small: Any) -> None:
    with small.paged(prefetch=predictor, slots=slots, forced=True) as paged:
        assert equal(paged.run(EVERYTHING), small.resident(EVERYTHING))
        paged.settle()
        counts = paged.counts()
        if predictor == "none":
            assert counts.prefetch_issued == 0
        elif slots == 5:
            assert counts.prefetch_issued and counts.prefetch_useful
        moved = paged.transfer.stats
        pages = counts.demand_bytes + counts.prefetch_bytes
        assert moved.demand_bytes + moved.prefetch_bytes <= pages


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("io_threads", [1, 2, 4])
def test_every_number_of_io_threads(io_threads: int, direct: bool, small: Any) -> None:
    """Through staging memory, and read straight into slots where the disk asks no alignment."""
    for slots, read_bytes in ((2, 1 << 16), (5, 8192)):
        with small.paged(io_threads=io_threads, direct=direct, slots=slots,
                         read_bytes=read_bytes, prefetch="gate", forced=True) as paged:  # fmt: skip
            assert equal(paged.run(EVERYTHING), small.resident(EVERYTHING))
            paged.settle()


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_K", "MXFP4"])
def test_every_type(
    kind: str, folder: Path, open_lab: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside other weights that ggml's CPU repacks for some types, and beside plain ones."""
    path = folder / f"{kind}.gguf"
    spec = replace(SMALL, n_layer=2, weight_type=kind)
    if kind == "Q4_K":
        spec = replace(spec, n_embd=256, n_ff=256, n_ff_exp=256, n_embd_head=128, n_head_kv=2)
    synth.write(spec, path)
    answers = []
    for repack in (True, False):
        opened = open_lab(path)
        if not repack:
            monkeypatch.setattr(type(opened.device), "_find_extra_buffer_types", lambda *_: ())
            opened = open_lab(path)
            assert not opened.device.extra_buffer_types
        expected = opened.resident(LESS)
        for slots in (None, 4):
            with opened.paged(slots=slots, prefetch="gate", forced=True) as paged:
                assert equal(paged.run(LESS), expected), (repack, slots)
        answers.append(expected)
    scale = np.abs(answers[1][0]).max()
    assert np.allclose(answers[0][0], answers[1][0], atol=0.2 * scale)  # another kernel's sums


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_a_pool_of_one_slot(kind: str, folder: Path, open_lab: Open) -> None:
    """ggml counts such a slot tensor as a matrix."""
    path = folder / f"one-{kind}.gguf"
    synth.write(replace(SMALL, n_layer=2, n_expert_used=1, weight_type=kind), path)
    opened = open_lab(path)
    with opened.paged() as paged:
        assert [pool.table.n_slots for pool in paged.store.pools] == [1]
        assert equal(paged.run(EVERYTHING), opened.resident(EVERYTHING))


def test_layers_of_several_types_are_several_pools(
    folder: Path, open_lab: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "mixed.gguf"
    lab.write_mixed(replace(SMALL, n_layer=5), ("Q4_0", "F32", "Q8_0"), path, monkeypatch)
    opened = open_lab(path)
    layers = [[layer.il for layer in pool.layers] for pool in opened.pools]
    assert layers == [[0, 3], [1, 4], [2]]
    for slots, predictor in ((None, "gate"), (2, "eam"), (5, "gate"), (12, "none")):
        with opened.paged(slots=slots, prefetch=predictor, forced=True) as paged:
            assert equal(paged.run(EVERYTHING), opened.resident(EVERYTHING))
            paged.settle()


def test_pages_that_lie_at_sectors(
    folder: Path, open_lab: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "aligned.gguf"
    lab.write_aligned(SMALL, path, monkeypatch)
    opened = open_lab(path)
    assert all(info.offset % 4096 == 0 for info in opened.file.tensors.values())
    for direct in (True, False):
        with opened.paged(slots=3, direct=direct, prefetch="gate", forced=True) as paged:
            assert equal(paged.run(EVERYTHING), opened.resident(EVERYTHING))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_parts_that_lie_off_the_sectors_are_read_in_place(
    kind: str, folder: Path, open_lab: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's tensors lie elsewhere in the file, and so do its experts in their slots."""
    path = folder / f"lead-{kind}.gguf"
    # The norms of one head, 128 bytes, move each layer's tensors on.
    synth.write(replace(SMALL, n_layer=3, n_ff_exp=256, n_embd=256, weight_type=kind), path)
    opened = open_lab(path)
    monkeypatch.setattr(slots_module, "IN_PLACE_MIN_BYTES", 1)
    layers = opened.pools[0].layers
    leads = {info.offset % 4096 for layer in layers for info in layer.infos}
    assert len(leads) > 2 and any(lead % 512 for lead in leads)
    with opened.paged(slots=4, prefetch="gate", forced=True) as paged:
        assert opened.pools[0].slot_bytes > opened.pools[0].page_bytes
        assert equal(paged.run(EVERYTHING), opened.resident(EVERYTHING))
        paged.settle()
        assert paged.counts().misses and paged.counts().evictions
        in_place = paged.disk.alignment <= 4096 or not opened.device.info.host_pointers
        assert (paged.transfer.staging_bytes == 0) == in_place
        paged.store.resize(opened.slots_bytes(2))
        assert equal(paged.run(LESS), opened.resident(LESS))


@pytest.mark.parametrize("arch", MOE)
def test_resident_experts_are_computed_while_others_arrive(
    arch: str, folder: Path, open_lab: Open
) -> None:
    """The same bits with it and without, on a disk that leaves the time to."""
    path = folder / f"overlap-{arch}.gguf"
    synth.make(arch, path)
    opened = open_lab(path)
    expected = opened.resident(EVERYTHING)
    for slots in (opened.pools[0].n_expert // 2, opened.pools[0].n_expert - 1):
        for overlap in (True, False):
            with opened.paged(slots=slots, overlap=overlap) as paged:
                assert equal(paged.run(EVERYTHING), expected), (slots, overlap)
                stats = paged.store.stats()
                assert stats["overlap"] == ("on" if overlap else "forbidden")
                assert (paged.store.overlapped_s > 0) == overlap
                assert stats["overlap_s"] == round(paged.store.overlapped_s, 6)


def test_overlap_goes_through_its_trials_without_changing_a_bit(small: Any) -> None:
    with small.paged(slots=6) as paged:
        paged.store.overlap = OverlapGate(OverlapParams(warmup=2, trial=6, wait=3, max_wait=6))
        for _ in range(3):
            assert equal(paged.run(EVERYTHING), small.resident(EVERYTHING))
        assert paged.store.overlap.n_trials > 2


@pytest.mark.parametrize("n_threads", [1, 2])
def test_compute_threads(n_threads: int, small: Any, open_lab: Open) -> None:
    opened = open_lab(small.file.path, n_threads=n_threads)
    with opened.paged(slots=3) as paged:
        answers = paged.run(EVERYTHING)
    assert equal(answers, opened.resident(EVERYTHING))
    assert equal(answers, small.resident(EVERYTHING))


def test_slots_given_back_and_taken_again(small: Any) -> None:
    """Memory may shrink and grow between passes, and no bit changes."""
    with small.paged(slots=8, prefetch="gate", forced=True) as paged:
        for slots in (8, 2, None, 6, 1, 12):
            paged.store.resize(small.slots_bytes(slots))
            assert equal(paged.run(LESS), small.resident(LESS)), slots
            fewest = max(SMALL.n_expert_used, min(slots or 0, 8) * SMALL.n_layer)
            assert paged.store.pools[0].table.n_slots <= fewest + SMALL.n_expert
        paged.settle()


def test_decode_after_a_prompt_finds_its_experts_still_there(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt goes through few slots; what decoding lives on stays resident."""
    monkeypatch.setattr(expert_store, "GROUP_BYTES", 2 * small.pools[0].page_bytes)
    with small.paged(slots=10, policy="lru") as paged:
        region = paged.kv.allocate(256)
        other = paged.kv.allocate(256)

        def decode(pos: int) -> int:
            before = sum(sum(pool.table.decode.misses) for pool in paged.store.pools)
            paged.forward.run([lab.Piece([7], pos, region, 1)])
            return sum(sum(pool.table.decode.misses) for pool in paged.store.pools) - before

        assert decode(0) > 0
        paged.forward.run([lab.Piece(list(range(4, 154)), 0, other, 1)])
        repeated = np.array([decode(0) for _ in range(2)])
        assert not repeated.any()
