"""What a token and a layer cost whatever is in them: the engine on models without arithmetic."""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.config import RunParams
from edgeroute.engine import Runtime
from edgeroute.loaded import kv_shape
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.paged import PagedForward
from edgeroute.models.registry import describe
from edgeroute.offload.expert_pool import plan_pools
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.paging import PagedPlan, moe_source, open_store
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.units import MIB
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.forecast.tiny_model import TinyShape, write_tiny

FEW_LAYERS, MANY_LAYERS = 2, 26
N_TOKENS, N_CELLS, ROUNDS = 32, 256, 3
N_STEPS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedCosts:
    """Seconds per token, per dense layer, per layer with resident and with paged experts."""

    token_s: float
    layer_s: float
    expert_layer_s: float
    paged_layer_s: float


def measure_fixed(threads: int) -> FixedCosts:
    """Run tiny models through the engine, with few and with many layers.

    In processes of their own: where several threads of one have computed, libgomp's threads no
    longer wait for work the way they do in an engine.

    Raises:
        EdgerouteError: the engine failed.
        OSError: no room for a temporary file.
    """
    with tempfile.TemporaryDirectory(prefix="edgeroute-forecast-") as name:
        with Worker(Engines, Path(name), threads) as worker:
            few = worker.call("seconds", TinyShape(n_layer=FEW_LAYERS))
            many = worker.call("seconds", TinyShape(n_layer=MANY_LAYERS))
        layer_s = max(0.0, many - few) / (MANY_LAYERS - FEW_LAYERS)
        with Worker(Passes, Path(name), threads) as worker:
            dense = worker.call("seconds", TinyShape(n_layer=MANY_LAYERS), False)
            shape = TinyShape(n_layer=MANY_LAYERS, experts=True)
            resident = worker.call("seconds", shape, False)
            paged = worker.call("seconds", shape, True)
    return FixedCosts(
        token_s=max(0.0, few - FEW_LAYERS * layer_s), layer_s=layer_s,
        expert_layer_s=layer_s + max(0.0, resident - dense) / MANY_LAYERS,
        paged_layer_s=layer_s + max(0.0, paged - dense) / MANY_LAYERS,
    )  # fmt: skip


class _Bench:
    """What lives in a worker: a folder for tiny models, and threads to compute with."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads

    def close(self) -> None:
        """Nothing is left open between calls."""


class Engines(_Bench):
    """Runs whole engines."""

    def seconds(self, shape: TinyShape) -> float:
        """Seconds of a token."""
        return _engine_s(self.folder, shape, self.threads)


class Passes(_Bench):
    """Runs passes over models without an engine around them."""

    def seconds(self, shape: TinyShape, paged: bool) -> float:
        """Seconds of a pass for one token."""
        return _pass_s(self.folder, shape, self.threads, paged=paged)


def _engine_s(folder: Path, shape: TinyShape, threads: int) -> float:
    """Seconds per token of greedy decoding by a Runtime."""
    path = folder / "engine.gguf"
    write_tiny(shape, path)
    found = []
    with Runtime(path, threads=threads, n_ctx=N_CELLS) as runtime:
        for _ in range(1 + ROUNDS):
            stats = runtime.generate(prompt_ids=[5], max_tokens=N_TOKENS, temperature=0.0,
                                     prefix="off").stats  # fmt: skip
            found.append(stats.decode_s / max(1, stats.n_generated - 1))
    return statistics.median(found[1:])


def _pass_s(folder: Path, shape: TinyShape, threads: int, *, paged: bool) -> float:
    """Median seconds of one pass for one token, without the engine around it."""
    path = folder / "pass.gguf"
    write_tiny(shape, path)
    with contextlib.ExitStack() as own:
        file = own.enter_context(GGUFFile.open(path))
        device = own.enter_context(Device.open("cpu"))
        device.set_threads(threads)
        forward: Forward = (
            open_paged(own, file, device, N_CELLS)[0] if paged else _resident(own, file, device)
        )
        region = forward.kv.allocate(N_CELLS)
        assert region is not None
        found = []
        for pos in range(N_STEPS):
            began = time.perf_counter()
            forward.run([Piece([5], pos, region)], borrow=True)
            found.append(time.perf_counter() - began)
        forward.kv.release(region)
    return statistics.median(found[N_STEPS // 4 :])


def _resident(own: contextlib.ExitStack, file: GGUFFile, device: Device) -> Forward:
    """Open a file with all of it in memory; `own` closes everything."""
    model = describe(file)
    weights = ResidentWeights(file, device, model.specs())
    own.callback(weights.close)
    weights.load()
    kv = KvCache(device, kv_shape(model.hparams, RunParams()), N_CELLS)
    own.callback(kv.close)
    forward = Forward(model, device, weights, kv)
    own.callback(forward.close)
    forward.reserve(1, N_CELLS)
    return forward


def open_paged(
    own: contextlib.ExitStack, file: GGUFFile, device: Device, n_cells: int
) -> tuple[PagedForward, ExpertStore]:
    """Open a file with slots for all its experts; `own` closes everything."""
    source = moe_source(file, device, describe(file), RunParams())
    base = source.other_weights()
    own.callback(base.close)
    base.load()
    pools = tuple(plan_pools(source.layers(), source.moe.n_expert))
    store = open_store(own, source, base, PagedPlan(
        pools=pools, fixed={}, staging_bytes=8 * MIB,
        slots_bytes=sum(pool.all_bytes for pool in pools),
    ))  # fmt: skip
    kv = KvCache(device, kv_shape(source.model.hparams, RunParams()), n_cells)
    own.callback(kv.close)
    forward = PagedForward(source.model, device, store, kv, 1)
    own.callback(forward.close)
    forward.reserve(1, n_cells)
    return forward, store
