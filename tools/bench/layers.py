"""Dense layers streamed under the kernel's memory limit, against llama.cpp's mmap under the same.

As `experts`: each run is a process of its own in a fresh control group, with the file dropped
from the page cache before. What may be read and computed at best stands beside it.
"""

import random
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from edgeroute.offload.disk_speed import ROUNDS, timed_reads
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.units import MIB, format_bytes
from edgeroute.tools.bench import layers_report, pairs
from edgeroute.tools.bench.experts import STORE_S, Bench, ExpertsParams
from edgeroute.tools.bench.experts_ceiling import geometry
from edgeroute.tools.bench.experts_engines import COUNTERS, Paged, Store
from edgeroute.tools.bench.experts_report import Found
from edgeroute.tools.bench.report import BenchParams, Report

BUDGET_RATIO: Final = 0.98
"""Share of the limit that is the default budget. Higher than for experts: layers that stay are
pages of the file, which the kernel can take, and nobody is killed for them."""
N_UBATCH: Final = 128
"""In both engines: what a prompt's activations take is missing for layers."""
IN_ORDER: Final = ((MIB, 2), (MIB, 4), (4 * MIB, 2))
"""(bytes of a read, reads at once) of a layer's bytes in their order: quicker than at random."""


class Streamed(Paged):
    """A Runtime that streams layers; its counters in the form of a pager's."""

    def _experts(self) -> Mapping[str, object]:
        layers = self._runtime.stats().get("layers")
        if not isinstance(layers, Mapping):
            return {}
        counted = dict.fromkeys(COUNTERS, 0) | {
            "demand_bytes": layers["bytes"], "stall_s": layers["stall_s"],
        }  # fmt: skip
        return {**layers, "decode": counted}


class OrderedStore(Store):
    """The disk at its best: reads at random, as for experts, or one behind the other."""

    def bytes_s(self, seconds: float, seed: int) -> float:
        """Measure several read lengths, depths and orders, bytes per second."""
        rng = random.Random(seed)
        found: dict[tuple[int, int], list[float]] = {shape: [] for shape in IN_ORDER}
        for _ in range(ROUNDS):  # the best of single readings would be luck
            for shape in IN_ORDER:
                n_places = self._disk.size_bytes // shape[0]
                first = rng.randrange(n_places)
                offsets = ((first + i) % n_places * shape[0] for i in range(n_places))
                each_s = seconds / 2 / len(IN_ORDER) / ROUNDS
                found[shape].append(timed_reads(self._disk, offsets, shape, each_s).bytes_s)
        ordered = max(statistics.median(speeds) for speeds in found.values())
        return max(ordered, super().bytes_s(seconds / 2, seed))


class _Bench(Bench):
    pager, store = Streamed, OrderedStore


def run(params: BenchParams, progress: pairs.Progress, wanted: ExpertsParams) -> Report:
    """Measure decoding, prefill and first token under a limit, and set them beside ceilings.

    Raises:
        UsageError: the model has experts or all of it fits, no control group can be made here,
            or the limit cannot be read.
        EdgerouteError: a run failed; where the kernel killed it, the message says so.
    """
    shape = geometry(params.path)
    if shape.expert_bytes:
        raise UsageError(f"{params.name} has experts, which are paged by themselves; use "
                         "`edgeroute bench experts`")  # fmt: skip
    limit_bytes = wanted.limit_bytes(params.path.stat().st_size)
    bench = _Bench(replace(params, warmup=0), replace(
        wanted, memory=wanted.memory or int(BUDGET_RATIO * limit_bytes),
        # All in memory is computed with the same kernels as what is streamed.
        settings={"repack_experts": False, "n_ubatch": N_UBATCH} | dict(wanted.settings),
    ))  # fmt: skip
    progress(f"limit {format_bytes(bench.limit_bytes)}, budget {format_bytes(bench.budget_bytes)}")
    measured = pairs.alternate(bench.runners(), bench.params.plan, progress)
    if not bench.lives["edgeroute"][-1].pager:
        raise EdgerouteError(f"all of {params.name} fits {format_bytes(bench.budget_bytes)}; "
                             "lower --memory, or --limit, so that layers stream")  # fmt: skip
    return layers_report.make_report(Found(
        params=bench.params, limit_bytes=bench.limit_bytes, budget_bytes=bench.budget_bytes,
        target=wanted.target, geometry=shape, decode=measured, lives=bench.lives,
        store_bytes_s=statistics.median(bench.store_bytes_s), peaks=bench.peaks,
        notes=(bench.cache.note, f"store read in mode {bench.store_mode!r}, "
               f"{STORE_S:g} s each time, the best of random and ordered reads"),
    ))  # fmt: skip
