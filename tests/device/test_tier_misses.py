"""Experts done without over three tiers: only what neither the device nor DRAM has."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from edgeroute.models.paged import PagedForward
from edgeroute.runtime.device import Device
from edgeroute.skippers.misses import MissLevers
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device import tier_lab
from tests.edgeroute import paged_lab as lab
from tests.edgeroute.misses_lab import Listening, replayed

STEPS = [[("a", 40, 1)], [("b", 20, 1)], *[[("a", 1, 1)]] * 4, *[[("a", 1, 1), ("b", 1, 1)]] * 4]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("tiers") / "small.gguf"
    synth.write(replace(lab.SMALL, n_expert_used=4), path)
    opened = lab.Lab(path)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def device(rpc: RpcServer) -> Iterator[Device]:
    with Device.open(rpc.name) as opened:
        yield opened


def test_what_dram_has_is_here(small: Any, device: Device) -> None:
    with tier_lab.tiered(small, device, dram=0.5, slots=0.25) as tiered:
        tiered.run(STEPS)
        tier = tiered.tier
        for il in range(small.n_layer):
            pages = range(12 * il, 12 * il + 12)
            above, below = tier._pool_of[il].table, tiered.below.pool(il).table
            assert tier.here(il).tolist() == [above.has(p) or below.has(p) for p in pages]


@pytest.mark.parametrize(("dram", "drops"), [(0.4, True), (1.0, False)])
def test_answers_are_those_of_the_same_experts_in_memory(
    dram: float, drops: bool, small: Any, device: Device
) -> None:
    with tier_lab.tiered(small, device, dram=dram, slots=0.25) as tiered:
        tiered.run([[("a", 150, 1)], [("a", 90, 1)]])  # which reads what fits
        tiered.forward.close()
        levers = MissLevers(drop_misses=0.5, prefer_resident=0.5)
        tiered.forward = PagedForward(small.model, device, tiered.tier, tiered.kv, lab.N_TOKENS,
                                      levers)  # fmt: skip
        heard = Listening(tiered.forward)
        found = tiered.run(STEPS)
        assert lab.equal(found, replayed(small, lab.play, STEPS, heard.passes))
        assert (levers.dropped > 0) == (levers.replaced > 0) == (levers.saved.total() > 0) == drops
        tiered.forward.close()
