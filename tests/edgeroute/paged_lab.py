"""A synthetic mixture of experts, once resident and any number of times paged, side by side."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.base import MoeModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.paged import PagedForward
from edgeroute.models.registry import describe
from edgeroute.offload import expert_tier
from edgeroute.offload.counters import LayerCount, total
from edgeroute.offload.disk import Disk, DiskFile
from edgeroute.offload.expert_pool import ExpertLayer, PoolPlan, plan_pools
from edgeroute.offload.expert_store import ExpertParams, ExpertStore
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.cells import Region
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools import synth
from edgeroute.tools.synth_tensors import tensors

_check_cliff = functools.cache(expert_tier.check_cliff)  # a simulation of 0.2 s

N_CELLS, N_TOKENS = 1280, 256
SMALL = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_vocab=384, n_embd=64, n_ff=64, n_ff_exp=32,
    n_head=2, n_head_kv=1, n_embd_head=32, n_expert=12, n_expert_used=3,
)  # fmt: skip
"""Pages of a few KiB: a test reads thousands of them."""

Logits = npt.NDArray[np.float32]
Answers = list[Logits]
Step = list[tuple[str, int, int]]
"""What one pass computes: (sequence, new tokens, how many of the last get logits)."""

PREFILL: list[Step] = [[("a", 150, 150)]]
SHORT: list[Step] = [[("a", 3, 0)], [("a", 16, 2)], [("a", 17, 1)]]
SINGLE: list[Step] = [[("a", 1, 1)]] * 8
TOGETHER: list[Step] = [
    [("b", 20, 1)], [("c", 7, 0)], [("d", 33, 1)],
    *[[("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("d", 1, 1)]] * 3,
    [("a", 1, 1), ("c", 1, 1)], [("b", 2, 1), ("d", 1, 1)],
]  # fmt: skip
EVERYTHING = [*PREFILL, *SHORT, *SINGLE, *TOGETHER]
LESS = [*PREFILL, *SHORT[:1], *SINGLE[:3], *TOGETHER[:5]]


def play(forward: Forward, steps: Sequence[Step], *, seed: int = 1, **run: Any) -> Answers:
    """Run passes over new sequences and return each one's logits; None where it was stopped."""
    rng = np.random.default_rng(seed)
    regions: dict[str, Region] = {}
    n_past: dict[str, int] = {}
    found: Answers = []
    try:
        for step in steps:
            pieces = []
            for name, n_tokens, n_out in step:
                if name not in regions:
                    region = forward.kv.allocate(256)
                    assert region is not None
                    regions[name], n_past[name] = region, 0
                tokens = rng.integers(4, 380, n_tokens).tolist()
                pieces.append(Piece(tokens, n_past[name], regions[name], n_out))
                n_past[name] += n_tokens
            logits = forward.run(pieces, **run)
            assert logits is not None, "stopped"
            found.append(logits.copy())
    finally:
        for region in regions.values():
            forward.kv.release(region)
    return found


def equal(ours: Answers, theirs: Answers) -> bool:
    """Whether two runs have the same bits, none of which is of a NaN."""
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) and bool(np.isfinite(a).all())
        for a, b in zip(ours, theirs, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedParams:
    """How a lab's model is paged. `slots` are slots per layer, None the fewest legal."""

    slots: int | None = None
    policy: str = "auto"
    prefetch: str = "none"
    forced: bool = False
    overlap: bool = True
    io_threads: int = 2
    direct: bool = True
    read_bytes: int = 1 << 16
    staging_bytes: int = 1 << 22
    wrap: Callable[[Disk], Disk] = lambda disk: disk


class Paged:
    """A paged model and all that it stands on but the lab's."""

    def __init__(self, lab: "Lab", params: PagedParams, own: contextlib.ExitStack) -> None:
        self.model, self.n_used = lab.model, lab.n_used
        paged = {name for il in range(lab.n_layer) for name in lab.model.expert_tensors(il)}
        specs = [spec for spec in lab.model.specs() if spec.name not in paged]
        base = ResidentWeights(lab.file, lab.device, specs)
        own.callback(base.close)
        base.load()
        disk = DiskFile.open(lab.file.path, direct=params.direct)
        self.disk: Any = params.wrap(disk)
        self.transfer = Transfer(
            [self.disk], params.io_threads, params.read_bytes, params.staging_bytes
        )
        own.callback(self.transfer.close)
        how = ExpertParams(
            slots_bytes=lab.slots_bytes(params.slots), n_expert_used=self.n_used,
            policy=params.policy, prefetch=params.prefetch, forced=params.forced,
            overlap=params.overlap,
        )  # fmt: skip
        with mock.patch.object(expert_tier, "check_cliff", _check_cliff):
            self.store = ExpertStore(base, lab.device, lab.pools, self.transfer, how)
        own.callback(self.store.close)
        self.store._next_reading = math.inf  # what else runs here must not take slots away
        self.kv = KvCache(lab.device, kv_shape(lab.model.hparams, RunParams()), N_CELLS)
        own.callback(self.kv.close)
        self.forward = PagedForward(lab.model, lab.device, self.store, self.kv, N_TOKENS)
        own.callback(self.forward.close)
        self.forward.reserve(N_TOKENS, 512)

    def run(self, steps: Sequence[Step]) -> Answers:
        found = play(self.forward, steps)
        self.check()
        return found

    def check(self) -> None:
        """Nothing is held once a pass has ended; prefetches may still be coming."""
        for pool in self.store.pools:
            pool.table.check()
            assert pool.table.n_pinned == 0
        assert not self.store._loads
        assert self.kv.n_free_cells == self.kv.n_cells

    def settle(self) -> None:
        """Wait for prefetches under way; then nothing is coming, and nothing is lost."""
        for ticket in list(self.store._ahead.coming.values()):
            with ticket.finished:
                pass
        self.store.begin(prefill=True)
        self.store.end()
        assert not self.store._ahead.coming
        self.check()
        assert all(pool.table.n_loading == 0 for pool in self.store.pools)

    def counts(self) -> LayerCount:
        """What all pools counted so far, decode and prefill together."""
        kinds = [kind for pool in self.store.pools
                 for kind in (pool.table.decode, pool.table.prefill)]  # fmt: skip
        return total(kind.snapshot().total for kind in kinds)


class Lab:
    """One file, opened resident and, by `paged`, paged."""

    def __init__(self, path: Path, *, n_threads: int = 1, device: str = "cpu") -> None:
        with contextlib.ExitStack() as own:
            self.file = own.enter_context(GGUFFile.open(path))
            self.device = own.enter_context(Device.open(device))
            self.device.set_threads(n_threads)
            model = describe(self.file)
            assert isinstance(model, MoeModel) and model.hparams.moe is not None
            self.model, self.n_layer = model, model.hparams.n_layer
            self.n_used = model.hparams.moe.n_expert_used
            self.pools: list[PoolPlan] = plan_pools(self._layers(), model.hparams.moe.n_expert)
            # Paged experts have the file's layout; equal bits need equal kernels.
            weights = ResidentWeights(self.file, self.device, model.specs(), repack_experts=False)
            own.callback(weights.close)
            weights.load()
            self.kv = KvCache(self.device, kv_shape(model.hparams, RunParams()), N_CELLS)
            own.callback(self.kv.close)
            self.forward = Forward(model, self.device, weights, self.kv)
            own.callback(self.forward.close)
            self._own = own.pop_all()
        self._known: dict[str, Answers] = {}

    def _layers(self) -> list[ExpertLayer]:
        return [
            ExpertLayer(il, tuple(self.file.tensors[n] for n in self.model.expert_tensors(il)))
            for il in range(self.n_layer)
            if self.model.is_moe(il)
        ]

    def slots_bytes(self, per_layer: int | None) -> int:
        """Bytes that give every pool so many slots per layer; None: the fewest in all."""
        if per_layer is None:
            return self.n_used * sum(pool.slot_bytes for pool in self.pools)
        return sum(per_layer * len(pool.layers) * pool.slot_bytes for pool in self.pools)

    def resident(self, steps: Sequence[Step]) -> Answers:
        """Compute steps with everything resident, once."""
        key = repr(steps)
        if key not in self._known:
            self._known[key] = play(self.forward, steps)
        return self._known[key]

    @contextlib.contextmanager
    def paged(self, **params: Any) -> Iterator[Paged]:
        """Open it paged; see PagedParams."""
        with contextlib.ExitStack() as own:
            yield Paged(self, PagedParams(**params), own)

    def close(self) -> None:
        self._own.close()


def write_mixed(
    spec: synth.SynthSpec, types: Sequence[str], path: Path, patch: pytest.MonkeyPatch
) -> None:
    """Write a model whose layers' experts take turns in their types."""

    def mixed(spec: synth.SynthSpec) -> Iterator[tuple[Any, ...]]:
        typed = [dict((t[0], t) for t in tensors(replace(spec, expert_type=k))) for k in types]
        for name, data, kind in tensors(spec):
            expert = "_exps." in name
            yield typed[int(name.split(".")[1]) % len(types)][name] if expert else (
                name, data, kind
            )  # fmt: skip

    with patch.context() as patched:
        patched.setattr(synth, "tensors", mixed)
        synth.write(spec, path)


def write_aligned(spec: synth.SynthSpec, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Write a model whose tensors begin at disk sectors."""

    class Aligned(GGUFWriter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_custom_alignment(4096)

    with patch.context() as patched:
        patched.setattr(synth, "GGUFWriter", Aligned)
        synth.write(spec, path)
