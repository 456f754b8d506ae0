"""What the processor computes for a device has the bits of what the device computes."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.base import MoeModel
from edgeroute.models.host_experts import HostExperts, HostWeights
from edgeroute.models.paged import PagedForward
from edgeroute.models.registry import describe
from edgeroute.offload.device_tier import DeviceTier, TierParams
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.expert_pool import ExpertLayer, plan_pools
from edgeroute.offload.expert_store import ExpertParams, ExpertStore
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.device import Device
from edgeroute.runtime.experts import Held, Leased
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import rpc_server
from tests.edgeroute import paged_lab as lab

MOE = [name for name, spec in synth.ARCHITECTURES.items() if spec.n_expert]
STEPS = [[("a", 20, 1)], *[[("a", 1, 1)]] * 4, [("b", 9, 0)], [("c", 5, 1)],
         *[[("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]] * 2]  # fmt: skip
"""A prompt in turns and one inline, single tokens, and three sequences at once."""

pytestmark = pytest.mark.skipif(
    ggml().ggml_backend_reg_by_name(b"RPC") is None, reason="this ggml is built without RPC"
)


class AllAway:
    """A pager that names all experts of the other groups of a prompt away, as a tier might."""

    def __init__(self, tier: DeviceTier) -> None:
        self._tier = tier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    def __getitem__(self, name: str) -> Any:
        return self._tier[name]

    def in_turn(self, il: int, counts: dict[int, int], most: int) -> Iterator[Held | None]:
        experts = sorted(counts)
        for i in range(0, len(experts), 2):
            group = experts[i : i + 2]
            leased = self._tier.below.lease(il, group)
            assert leased is not None
            yield Held(group, leased.slots, away=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """Slots per layer of both tiers, who computes misses, and whether prompts are all away."""

    n_device: int
    n_dram: int
    host: Any = "on"
    prompts_away: bool = False


class Tiered:
    """A model on a device, its experts in two tiers, and a processor that may compute them."""

    def __init__(self, path: Path, device: Device, how: How, own: contextlib.ExitStack) -> None:
        file = own.enter_context(GGUFFile.open(path))
        cpu = own.enter_context(Device.open("cpu"))
        cpu.set_threads(1)
        model = describe(file)
        assert isinstance(model, MoeModel) and model.hparams.moe is not None
        moe = model.hparams.moe
        layers = [ExpertLayer(il, tuple(file.tensors[n] for n in model.expert_tensors(il)))
                  for il in range(model.hparams.n_layer) if model.is_moe(il)]  # fmt: skip
        pools = plan_pools(layers, moe.n_expert)
        paged = {name for il in range(model.hparams.n_layer) for name in model.expert_tensors(il)}
        specs = [spec for spec in model.specs() if spec.name not in paged]
        base = ResidentWeights(file, device, specs)
        own.callback(base.close)
        base.load()
        transfer = Transfer([DiskFile.open(path)], 2, 1 << 16, 1 << 22)
        each = sum(len(pool.layers) * pool.slot_bytes for pool in pools)
        self.store = ExpertStore(base, cpu, pools, transfer, ExpertParams(
            slots_bytes=how.n_dram * each, n_expert_used=moe.n_expert_used, policy="lru",
            prefetch="none", overlap=False))  # fmt: skip
        own.callback(self.store.close)
        self.store._next_reading = math.inf
        self.tier = DeviceTier(base, device, self.store, TierParams(
            slots_bytes=how.n_device * each, n_expert_used=moe.n_expert_used, policy="lru",
            host_experts=how.host))  # fmt: skip
        own.callback(self.tier.close)
        kv = KvCache(device, kv_shape(model.hparams, RunParams()), lab.N_CELLS)
        own.callback(kv.close)
        pager: Any = AllAway(self.tier) if how.prompts_away else self.tier
        self.forward = PagedForward(model, device, pager, kv, lab.N_TOKENS)
        own.callback(self.forward.close)
        self.host = HostExperts(model, cpu, HostWeights(model, file, cpu, self.store), kv)
        own.callback(self.host.close)
        self.host.told = self.tier.gate.computed
        self.forward.host = self.host
        self.forward.reserve(64, 256)
        self.host.reserve(8)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with rpc_server() as server, Device.open(server.name) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


def answers(path: Path, device: Device, steps: Sequence[Any], **how: Any) -> tuple[Any, Tiered]:
    """Compute steps in tiers; both tiers must be at peace afterwards."""
    with contextlib.ExitStack() as own:
        tiered = Tiered(path, device, How(**how), own)
        found = lab.play(tiered.forward, steps)
        for pool in (*tiered.tier.pools, *tiered.store.pools):
            pool.table.check()
            assert pool.table.n_pinned == 0
        return found, tiered


@pytest.mark.parametrize("arch", MOE)
def test_equal_bits_in_every_family(arch: str, device: Device, folder: Path) -> None:
    path = folder / f"{arch}.gguf"
    synth.make(arch, path)
    n = synth.ARCHITECTURES[arch].n_expert
    used = synth.ARCHITECTURES[arch].n_expert_used
    here, none = answers(path, device, STEPS, n_device=n, n_dram=n, host="off")
    there, tiered = answers(path, device, STEPS, n_device=used, n_dram=n)
    assert lab.equal(there, here)
    assert tiered.host.n_pairs >= tiered.host.n_experts > 0 == none.host.n_experts
    assert tiered.tier.gate.report().n_computed == tiered.host.n_experts


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    synth.write(lab.SMALL, folder / "small.gguf")
    return folder / "small.gguf"


def test_prompts_whose_experts_are_away(device: Device, small: Path) -> None:
    """Groups of a prompt may be away too; their rows lie in many runs."""
    steps = [[("a", 100, 3)], [("b", 40, 0)], [("a", 1, 1), ("b", 1, 1)]]
    here, _ = answers(small, device, steps, n_device=12, n_dram=12, host="off")
    there, tiered = answers(small, device, steps, n_device=4, n_dram=6, prompts_away=True)
    assert lab.equal(there, here)
    assert tiered.host.n_pairs >= 3 * 3 * 140  # the last layer computes outputs only


def test_experts_beside_those_left_out(device: Device, small: Path) -> None:
    """A rule that leaves experts out, and a processor that computes some of the others."""
    with contextlib.ExitStack() as own:
        rule = {"expert_rule": "weight", "expert_value": 0.3}
        found = []
        for how in (How(n_device=12, n_dram=12, host="off"), How(n_device=3, n_dram=12)):
            forward = Tiered(small, device, how, own).forward
            (span,) = forward.whole
            thinned = span._replace(steps=tuple(step._replace(**rule) for step in span.steps))
            forward._parts = forward._cut([thinned])
            found.append(lab.play(forward, STEPS))
        assert lab.equal(*found)
        assert forward.host is not None and forward.host.n_pairs


def test_many_runs_of_rows_go_in_one_block(device: Device, small: Path) -> None:
    with contextlib.ExitStack() as own:
        forward = Tiered(small, device, How(n_device=12, n_dram=12), own).forward
        outs = np.random.default_rng(3).standard_normal((9, 64), np.float32)
        for rows in ([0, 1, 2, 5, 6, 7, 8, 9, 10], [0, 2, 4, 6, 8, 10, 12, 14, 16]):
            forward._carry.write_rows(np.arange(9), np.zeros_like(outs))
            assert forward._write_rows(np.array(rows, np.intp), outs)
            assert np.array_equal(read_rows(forward, 17)[rows], outs)


def read_rows(forward: PagedForward, n: int) -> Any:
    from edgeroute.runtime.tensor import get_bytes

    found = np.empty((n, 64), np.float32)
    get_bytes(forward._carry._all["outs"], found)
    return found


def test_a_stop_while_the_processor_computes(device: Device, small: Path) -> None:
    """The pass ends without an answer, and the next one has the right bits."""
    with contextlib.ExitStack() as own:
        tiered = Tiered(small, device, How(n_device=3, n_dram=12), own)
        before = lab.play(tiered.forward, STEPS)
        compute, calls = tiered.host.compute, [0]

        def stopped(*args: Any) -> Any:
            calls[0] += 1
            return None if calls[0] == 3 else compute(*args)

        tiered.host.compute = stopped  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="stopped"):
            lab.play(tiered.forward, STEPS)
        tiered.host.compute = compute  # type: ignore[method-assign]
        assert lab.equal(lab.play(tiered.forward, STEPS), before)


def test_a_pager_that_names_none_away_needs_no_processor(device: Device, small: Path) -> None:
    with contextlib.ExitStack() as own:
        forward = Tiered(small, device, How(n_device=3, n_dram=12, host="off"), own).forward
        forward.host = None
        assert len(lab.play(forward, STEPS)) == len(STEPS)
    assert Leased([], ()).away == () and not Held([], []).away
