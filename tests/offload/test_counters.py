"""Counters: sums, ratios, and what a snapshot shows."""

import json

import pytest

from edgeroute.offload.counters import LayerCount, LayerCounters, total
from edgeroute.runtime.errors import UsageError


def test_a_snapshot_is_a_copy_and_sums_its_layers() -> None:
    counters = LayerCounters(3, page_bytes=5)
    counters.hits[0] += 6
    counters.misses[2] += 2
    counters.late[2] += 1
    counters.stalled(2, 0.25)
    counters.stalled(0, 0.5)
    before = counters.snapshot()
    counters.hits[0] += 100
    assert before.total == LayerCount(hits=6, misses=2, late=1, stall_s=0.75)
    assert before.total.requests == 9 and before.total.hit_ratio == 6 / 9
    assert before.layers[1] == LayerCount() and before.page_bytes == 5
    assert total([before.total, before.total]).hits == 12


def test_ratios_of_nothing_are_zero() -> None:
    assert LayerCount().hit_ratio == 0.0
    assert LayerCount().prefetch_useful_ratio == 0.0
    assert LayerCount(prefetch_issued=4, prefetch_useful=1).prefetch_useful_ratio == 0.25


def test_what_is_reported_is_json_and_skips_idle_layers() -> None:
    counters = LayerCounters(2, page_bytes=5)
    counters.misses[1] += 1
    shown = json.loads(json.dumps(counters.snapshot().to_dict()))
    assert shown["misses"] == 1 and list(shown["layers"]) == ["1"]
    assert shown["layers"]["1"]["hit_ratio"] == 0.0


@pytest.mark.parametrize(("n_layer", "page_bytes"), [(0, 1), (-1, 1), (1, -1), (1 << 20, 0)])
def test_impossible_sizes_are_refused(n_layer: int, page_bytes: int) -> None:
    with pytest.raises(UsageError):
        LayerCounters(n_layer, page_bytes)
