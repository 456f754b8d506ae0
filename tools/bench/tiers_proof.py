"""A proof, not a benchmark: disk -> DRAM -> device gives the bits of a resident model, for long.

A small mixture of experts with random weights writes tokens twice: with everything resident on
the processor, and on a device of another process with slots for a tenth of the experts, fed by
slots in DRAM for a quarter. After every token the logits must be the same bits, each tier within
its budget and the counters of both must tell the same story, layer by layer.

    python -m edgeroute.tools.bench.tiers_proof [--tokens 2000] [--policy NAME]
"""

import contextlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.embedder import Embedder
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.paged import PagedForward
from edgeroute.models.registry import describe
from edgeroute.offload.device_tier import DeviceTier
from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.expert_pool import plan_pools
from edgeroute.offload.tier_counts import sum_counts
from edgeroute.paging import MoeSource, moe_source, staging_bytes
from edgeroute.paging_device import TierPlan, open_tiers
from edgeroute.runtime.cells import Region
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import rpc_server

MODEL: Final = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_vocab=384, n_embd=64, n_ff=64, n_ff_exp=32,
    n_head=2, n_head_kv=1, n_embd_head=32, n_expert=32, n_expert_used=4,
)  # fmt: skip
"""128 experts of 24 KiB: what counts here are decisions, not bytes."""
N_PROMPT: Final = 96
"""More than are held at once: the first pass goes through groups."""
DRAM_RATIO, DEVICE_RATIO = 0.25, 0.1
Logits = npt.NDArray[np.float32]


class _Run:
    """A sequence that is written token by token."""

    def __init__(self, forward: Forward, region: Region) -> None:
        self._forward, self._region = forward, region
        self.n_past = 0

    def step(self, tokens: list[int]) -> Logits:
        logits = self._forward.run([Piece(tokens, self.n_past, self._region, 1)])
        assert logits is not None
        self.n_past += len(tokens)
        found: Logits = logits[0].copy()
        return found


def prove(path: Path, device: Device, policy: str, n_tokens: int) -> dict[str, Any]:
    """Write `n_tokens` under a policy; returns what both tiers counted.

    Raises:
        UsageError: logits differ, a budget was exceeded or counters do not reconcile; says where.
        EdgerouteError: the model does not run.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as own:
        file = own.enter_context(GGUFFile.open(path))
        cpu = own.enter_context(Device.open("cpu"))
        cpu.set_threads(1)
        cpu.extra_buffer_types = ()  # a device of another process repacks nothing
        params = RunParams(n_ctx=N_PROMPT + n_tokens, n_ubatch=128, policy=policy, threads=1,
                           prefetch="off", levers="asked", host_experts="off")  # fmt: skip
        resident = _resident(own, file, cpu, params)
        source = moe_source(file, device, describe(file), params)
        tier, tiered, plan = _tiered(own, source, cpu)
        rng = np.random.default_rng(1)
        tokens = rng.integers(4, MODEL.n_vocab, N_PROMPT).tolist()
        for n in range(n_tokens + 1):
            expected, found = resident.step(tokens), tiered.step(tokens)
            if not np.array_equal(expected, found) or not np.isfinite(found).all():
                raise UsageError(f"{policy}: other logits for token {n}")
            _check(tier, plan, f"{policy}, token {n}")
            tokens = [int(np.argmax(expected + rng.gumbel(size=expected.size)))]
        return _result(tier, policy, n_tokens) | {"seconds": round(time.perf_counter() - began, 1)}


def _resident(own: contextlib.ExitStack, file: GGUFFile, cpu: Device, params: RunParams) -> _Run:
    model = describe(file)
    weights = ResidentWeights(file, cpu, model.specs(), repack_experts=False)
    own.callback(weights.close)
    weights.load()
    return _begin(own, Forward(model, cpu, weights, _pool(own, cpu, file, params)))


def _tiered(
    own: contextlib.ExitStack, source: MoeSource, cpu: Device
) -> tuple[DeviceTier, _Run, TierPlan]:
    pools = tuple(plan_pools(source.layers(), source.moe.n_expert))
    most = sum(pool.all_bytes for pool in pools)
    plan = TierPlan(pools=pools, host={}, device={}, dram_bytes=int(DRAM_RATIO * most),
                    slots_bytes=int(DEVICE_RATIO * most), staging_bytes=staging_bytes(pools),
                    upload_bytes=0)  # fmt: skip
    specs = source.other_specs()
    base = ResidentWeights(source.file, source.device, [s for s in specs if s.use != "get_rows"])
    rows = ResidentWeights(source.file, cpu, [s for s in specs if s.use == "get_rows"])
    for weights in (base, rows):
        own.callback(weights.close)
        weights.load()
    tier = open_tiers(own, source, cpu, base, plan)
    kv = _pool(own, source.device, source.file, source.params)
    forward = PagedForward(source.model, source.device, tier, kv, source.params.n_ubatch)
    forward.embedder = Embedder(source.model, cpu, rows, kv)
    own.callback(forward.embedder.close)
    return tier, _begin(own, forward), plan


def _pool(own: contextlib.ExitStack, device: Device, file: GGUFFile, params: RunParams) -> KvCache:
    kv = KvCache(device, kv_shape(describe(file).hparams, params), params.n_ctx)
    own.callback(kv.close)
    return kv


def _begin(own: contextlib.ExitStack, forward: Forward) -> _Run:
    own.callback(forward.close)
    region = forward.kv.allocate(forward.kv.n_cells)
    assert region is not None
    return _Run(forward, region)


def _check(tier: DeviceTier, plan: TierPlan, where: str) -> None:
    """Compare budgets and counters with what must hold after every token.

    Raises:
        UsageError: one of them does not.
    """
    for name, pools in tier.tiers.items():
        budget = plan.slots_bytes if name == "device" else plan.dram_bytes
        used = sum(pool.table.n_slots * pool.slots.slot_bytes for pool in pools)
        n_held = sum(pool.table.n_slots - pool.table.n_free for pool in pools)
        if used > budget or n_held > sum(pool.slots.n_slots for pool in pools):
            raise UsageError(f"{where}: {name} slots of {used} B, over {budget} B")
        if any(pool.table.n_pinned for pool in pools):
            raise UsageError(f"{where}: {name} slots are still held")
    for prefill in (False, True):
        for il, count in tier.layers(prefill=prefill).items():
            if not count.reconciles or count.uploaded + count.away != count.misses:
                raise UsageError(f"{where}: layer {il} counted {count}")


def _result(tier: DeviceTier, policy: str, n_tokens: int) -> dict[str, Any]:
    found = {"policy": policy, "tokens": n_tokens, "equal_bits": True, "reconciles": True}
    for name, pools in tier.tiers.items():
        found[f"{name}_slots"] = sum(pool.table.n_slots for pool in pools)
    for name in ("decode", "prefill"):
        found[name] = sum_counts(tier.layers(prefill=name == "prefill").values()).to_dict()
    return found


@click.command()
@click.option("--tokens", default=2000, show_default=True, type=click.IntRange(1, 100_000),
              help="Tokens to write under each policy.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, type=click.Choice(list(POLICIES)),
              help="An eviction policy; may repeat. All of them if not given.")  # fmt: skip
def main(tokens: int, policies: tuple[str, ...]) -> None:
    """Prove three tiers right, and print a line of counters for every policy."""
    with tempfile.TemporaryDirectory() as folder, rpc_server() as server:
        path = Path(folder) / "model.gguf"
        synth.write(MODEL, path)
        for policy in policies or tuple(POLICIES):
            try:
                with Device.open(server.name) as device:
                    click.echo(json.dumps(prove(path, device, policy, tokens)))
            except EdgerouteError as error:
                raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
