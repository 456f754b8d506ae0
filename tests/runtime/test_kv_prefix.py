"""The KV pool and the prefix cache: no cell is lost, owned twice, or reused wrongly."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime.cells import Region, round_cells
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sequence import (
    CLASS_GROUPED,
    CLASS_SINGLE,
    CLASS_TILED,
    Sequence,
    chunk_classes,
    exact_reuse,
    prefill_classes,
)

SHAPE = KvShape(n_layer=1, n_embd_k_gqa=32, n_embd_v_gqa=32, n_embd_head=32)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with Device.open() as opened:
        yield opened


@pytest.fixture
def kv(device: Device) -> Iterator[KvCache]:
    pool = KvCache(device, SHAPE, 2048)
    yield pool
    pool.close()


def check(kv: KvCache, owned: list[Region]) -> None:
    """Free and owned regions tile the pool exactly."""
    regions = sorted([*owned, *kv._free], key=lambda region: region.start)
    at = 0
    for region in regions:
        assert region.start == at and region.n_cells > 0 and region.n_cells % 256 == 0
        at += region.n_cells
    assert at == kv.n_cells


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n_steps=st.integers(1, 120))
def test_regions_always_tile_the_pool(device: Device, seed: int, n_steps: int) -> None:
    kv = KvCache(device, SHAPE, 4096)
    rng, owned = random.Random(seed), list[Region]()
    for _ in range(n_steps):
        move = rng.choice("aaarsg")
        if move == "a" or not owned:
            region = kv.allocate(rng.randint(1, 1500))
            if region is not None:
                owned.append(region)
        elif move == "r":
            kv.release(owned.pop(rng.randrange(len(owned))))
        elif move == "s":
            kv.shrink(rng.choice(owned), rng.randint(1, 600))
        else:
            region = rng.choice(owned)
            want = region.n_cells + rng.randint(1, 600)
            grown = kv.grow(region, want)
            assert not grown or region.n_cells >= want
        check(kv, owned)
        largest = max((gap.n_cells for gap in kv._free), default=0)
        assert kv.would_fit(largest + 1, []) is False
        assert kv.would_fit(kv.n_cells, owned) is True
    kv.close()


def test_bytes_are_the_planned_ones(kv: KvCache) -> None:
    assert kv.n_bytes == kv.n_cells * SHAPE.bytes_per_cell
    with pytest.raises(UsageError, match="f64"):
        KvShape(n_layer=1, n_embd_k_gqa=1, n_embd_v_gqa=1, n_embd_head=1, kv_type="f64")
    with pytest.raises(UsageError, match="multiple of 32"):
        KvShape(n_layer=1, n_embd_k_gqa=40, n_embd_v_gqa=40, n_embd_head=40, kv_type="q8_0")


def test_cells_are_clear_once_they_are_given_away(device: Device) -> None:
    """Masked cells meet a weight of zero, which makes no zero of what is no number."""
    shape = KvShape(n_layer=2, n_embd_k_gqa=64, n_embd_v_gqa=32, n_embd_head=32)
    kv = KvCache(device, shape, 1024)
    for tensor in (*kv.k, *kv.v):
        ggml().ggml_backend_tensor_memset(tensor, 0xFF, 0, ggml().ggml_nbytes(tensor))

    def cells(first: int, n: int) -> set[int]:
        found = np.empty(n * shape.bytes_per_cell, np.uint8)
        kv.read_cells(first, n, found)
        return set(found.tolist())

    region = kv.allocate(200)
    assert region is not None and cells(0, 256) == {0} and cells(256, 768) == {0xFF}
    kv.write_cells(0, 256, np.full(256 * shape.bytes_per_cell, 7, np.uint8))
    assert kv.grow(region, 700) and cells(256, 512) == {0} and cells(768, 256) == {0xFF}
    kv.release(region)
    assert kv.take_all().n_cells == 1024 and cells(768, 256) == {0} and cells(0, 256) == {7}
    with pytest.raises(ValueError, match="owner"):
        kv.take_all()
    kv.close()


def filled(kv: KvCache, prefix: PrefixCache, tokens: list[int], n_cells: int) -> Sequence:
    sequence = prefix.open(tokens, n_cells)
    assert sequence is not None
    sequence.classes += prefill_classes(len(tokens), 512, sequence.n_past).tobytes()
    sequence.n_past = len(tokens)
    return sequence


def test_kept_cells_give_way_least_recently_used_first(kv: KvCache) -> None:
    prefix = PrefixCache(kv, 512)
    texts = [[i] * 256 for i in range(8)]
    for text in texts:
        prefix.keep(filled(kv, prefix, text, 256))
    assert kv.n_free_cells == 0
    again = prefix.open(texts[0], 256)  # the oldest becomes the newest
    assert again is not None and again.n_past > 0
    prefix.keep(again)
    other = prefix.open([99] * 256, 256)
    assert other is not None and other.n_past == 0
    gone = prefix.open(texts[1], 256, "all")  # [1] made room, not [0]
    assert gone is not None and gone.n_past == 0
    stayed = prefix.open(texts[0][:200], 256, "all")
    assert stayed is not None and stayed.n_past == 192
    starts = [each.region.start for each in (other, gone, stayed)]
    starts += [each.region.start for each in prefix._kept]
    assert len(set(starts)) == len(starts) == 8


def test_a_request_that_fits_the_pool_always_gets_it_in_the_end(kv: KvCache) -> None:
    """Even when only its own matching prefix is in the way."""
    prefix = PrefixCache(kv, 512)
    middle = filled(kv, prefix, [7] * 700, 1024)
    blocker = kv.allocate(256)
    assert blocker is not None
    prefix.keep(middle)
    kv.release(blocker)
    whole = prefix.open([7] * 700 + [8] * 1300, 2048)
    assert whole is not None


def test_nothing_is_dropped_when_dropping_would_not_help(kv: KvCache) -> None:
    prefix = PrefixCache(kv, 512)
    running = kv.allocate(1024)
    prefix.keep(filled(kv, prefix, [1] * 300, 300))
    assert prefix.open([2] * 1200, 1500) is None
    assert prefix.n_kept_cells == 512
    assert running is not None


def test_classes_follow_the_kernels() -> None:
    assert chunk_classes(1).tolist() == [CLASS_SINGLE]
    assert set(chunk_classes(63)[:60].tolist()) == {CLASS_GROUPED}
    assert set(chunk_classes(63)[60:].tolist()) == {0}
    assert set(chunk_classes(64).tolist()) == {CLASS_TILED | CLASS_GROUPED}
    assert chunk_classes(66)[-1] == CLASS_TILED


@settings(max_examples=300, deadline=None)
@given(
    n_old=st.integers(1, 400),
    n_new=st.integers(2, 400),
    n_common=st.integers(0, 400),
    n_ubatch=st.sampled_from([64, 128, 256]),
)
def test_exact_reuse_leaves_a_fresh_runs_classes(
    n_old: int, n_new: int, n_common: int, n_ubatch: int
) -> None:
    n_common = min(n_common, n_old, n_new)
    old = prefill_classes(n_old, n_ubatch)
    n = exact_reuse(n_common, old, n_new, n_ubatch)
    assert 0 <= n < n_new and n <= n_common
    fresh = prefill_classes(n_new, n_ubatch)
    mixed = np.concatenate([old[:n], prefill_classes(n_new, n_ubatch, n)])
    assert np.array_equal(mixed, fresh)


def test_round_cells() -> None:
    assert [round_cells(n) for n in (0, 1, 256, 257)] == [256, 256, 256, 512]


def test_running_sequences_share_what_was_computed_of_one_prompt(kv: KvCache) -> None:
    prefix = PrefixCache(kv, 512)
    first = filled(kv, prefix, [5] * 300 + [1] * 20, 512)
    alike = prefix.open([5] * 300 + [2] * 40, 512)
    other = prefix.open([5] * 300 + [2] * 40, 512, adapter="a")
    assert alike is not None and other is not None and alike.n_past == other.n_past == 0
    assert prefix.share(other, [first, other], "exact") == 0  # another adapter's cells
    assert prefix.share(alike, [first, alike], "off") == 0
    assert prefix.share(alike, [first, alike], "exact") == alike.n_past > 200
    assert bytes(alike.classes) == bytes(first.classes[: alike.n_past])
    assert prefix.share(alike, [first], "exact") == 0  # nothing more to take
