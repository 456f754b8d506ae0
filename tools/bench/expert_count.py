"""Fewer experts per token: what it costs in quality, and what it saves where experts are paged.

Quality: four rules at equal counts, each against the full model on held-out text. Time: under
the kernel's memory limit, seconds and bytes per token for several rules in alternating runs,
each a process of its own in a fresh control group; a random model will do for that.
"""

import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.runtime.depth import all_run
from edgeroute.runtime.errors import ComputeError, EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.units import format_bytes
from edgeroute.skippers.experts import ALL, LayerRule, check_rule, with_rules
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.experts import STORE_S, ExpertsParams
from edgeroute.tools.bench.experts_engines import Store
from edgeroute.tools.bench.limit import MemoryLimit, drop_page_cache
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain, spread
from edgeroute.tools.bench.text import text_tokens
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.expert_count import CountParams, Point, judge, uniform_at

TARGET_DOMINANCE: Final = 1.0
"""Divergence of uniform over that of MoDES, at every count."""
TARGET_SAVING: Final = 1.0
"""Seconds saved over what the store would take to read the bytes saved."""
N_PROMPT: Final = 32


# quality


def run(params: BenchParams, progress: pairs.Progress, wanted: CountParams) -> Report:
    """Calibrate the rules and judge them on held-out text.

    Raises:
        UsageError: the model has no experts, or does not fit the memory.
    """
    calibration, points = judge(params.path, wanted, progress, params.threads)
    n_used = calibration.routes[0].shape[1]
    return Report(
        bench="expert-count", params=params, timed=False,
        columns=("rule", "experts wanted", "computed", "KL, nats", "perplexity", "over full",
                 "same top token"),
        rows=tuple(_row(point) for point in points),
        results=[{"layers": list(calibration.layers), "kl_without_layer": list(calibration.kl)},
                 *(asdict(point) for point in points)],
        criteria=tuple(_dominance(points, n_used)), notes=tuple(_paired(points, n_used)),
    )  # fmt: skip


def _row(point: Point) -> tuple[str, ...]:
    return (
        point.scheme, f"{point.n_wanted:g}", f"{point.n_experts:.2f}",
        f"{point.kl_nats:.4f} ± {point.kl_error:.4f}", f"{point.ppl:.2f}",
        f"{point.ppl_ratio:.3f}", f"{point.top1_ratio:.1%}",
    )  # fmt: skip


def _dominance(points: Sequence[Point], n_used: int) -> Iterator[Criterion]:
    for point in points:
        if point.scheme == "modes":
            uniform = float(uniform_at(points, point.n_experts, n_used).mean())
            yield Criterion(
                what=f"KL of uniform over that of MoDES, {point.n_experts:.2f} experts a token",
                value=uniform / max(point.kl_nats, 1e-12), limit=TARGET_DOMINANCE,
            )  # fmt: skip


def _paired(points: Sequence[Point], n_used: int) -> Iterator[str]:
    """Compare window by window: what text is hard is hard for all."""
    for point in points:
        if point.scheme == "uniform":
            continue
        less = uniform_at(points, point.n_experts, n_used) - np.array(point.kl_windows)
        error = less.std(ddof=1) / math.sqrt(len(less)) if len(less) > 1 else math.inf
        yield (f"{point.scheme} with {point.n_experts:.2f} experts: KL below that of uniform with "
               f"as many, by window: {less.mean():+.4f} ± {error:.4f}")  # fmt: skip


# time


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeParams:
    """What is timed: `rules` by name, all layers alike; the first is what others save against."""

    under: ExpertsParams
    rules: tuple[tuple[str, LayerRule], ...]
    n_warm: int = 48
    n_tokens: int = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Decoded tokens of one process.

    Attributes:
        n_tokens: as many.
        seconds: in all.
        moved_bytes: read by the pager.
        n_experts: computed per token and layer.
        hit_ratio: of the leases, those found resident.
    """

    n_tokens: int
    seconds: float
    moved_bytes: float
    n_experts: float
    hit_ratio: float


def rules_of(counts: Sequence[int], masses: Sequence[float]) -> tuple[tuple[str, LayerRule], ...]:
    """Name the rules to be timed, all experts first.

    Raises:
        UsageError: a number that the rule cannot have.
    """
    found = [("all", ALL)]
    found += [(f"count {n}", LayerRule("count", n)) for n in sorted(set(counts), reverse=True)]
    found += [(f"mass {p:g}", LayerRule("mass", p)) for p in sorted(set(masses), reverse=True)]
    for _, rule in found:
        check_rule(*rule)
    return tuple(found)


class Counted:
    """A model whose experts are paged, decoding under one rule."""

    def __init__(self, path: Path, memory: int, threads: int, n_ctx: int) -> None:
        params = RunParams(memory=memory, threads=threads, n_ctx=n_ctx, n_ubatch=64)
        self._loaded = LoadedModel(path, params)
        if self._loaded.experts is None:
            self._loaded.close()
            raise UsageError(f"all of {path.name} fits {format_bytes(memory)}; lower --memory, or "
                             "--limit, so that experts are paged")  # fmt: skip
        self._loaded.device.set_threads(threads)
        self._layers = [layer.il for pool in self._loaded.experts.pools
                        for layer in pool.plan.layers]  # fmt: skip

    def decode(self, prompt: Sequence[int], rule: LayerRule, n_warm: int, n_tokens: int) -> Tokens:
        """Compute a prompt and decode greedily, `n_tokens` counted after `n_warm`."""
        loaded, layers = self._loaded, self._layers
        steps = all_run(range(loaded.model.hparams.n_layer))
        spans = loaded.forward.spans(with_rules(steps, layers, [rule] * len(layers)))
        region = loaded.kv.allocate(len(prompt) + n_warm + n_tokens)
        if region is None:
            raise ComputeError("the KV cache has no room for this benchmark")
        tokens, pos = list(prompt), 0
        began, before = 0.0, self._counts()
        for i in range(1 + n_warm + n_tokens):
            if i == 1 + n_warm:
                began, before = time.perf_counter(), self._counts()
            logits = loaded.forward.run([Piece(tokens, pos, region)], spans, borrow=True)
            if logits is None:
                raise ComputeError("the computation was stopped")
            pos += len(tokens)
            tokens = [int(np.argmax(logits[0]))]
        seconds, after = time.perf_counter() - began, self._counts()
        moved, leases, misses = (b - a for a, b in zip(before, after, strict=True))
        loaded.kv.release(region)
        return Tokens(n_tokens=n_tokens, seconds=seconds, moved_bytes=moved,
                      n_experts=leases / n_tokens / len(layers),
                      hit_ratio=1 - misses / leases)  # fmt: skip

    def close(self) -> None:
        """Free everything."""
        self._loaded.close()

    def _counts(self) -> tuple[float, float, float]:
        """Bytes moved, leases and misses of decoding so far."""
        assert self._loaded.experts is not None
        found = [pool.table.decode.snapshot().total for pool in self._loaded.experts.pools]
        leases = sum(each.hits + each.late + each.misses for each in found)
        moved = sum(each.demand_bytes + each.prefetch_bytes for each in found)
        return moved, leases, sum(each.misses for each in found)


class _Timed:
    """The runs of one benchmark."""

    def __init__(self, params: BenchParams, wanted: TimeParams) -> None:
        self._params, self._wanted = params, wanted
        self.limit_bytes = wanted.under.limit_bytes(params.path.stat().st_size)
        self.budget_bytes = wanted.under.budget_bytes(self.limit_bytes)
        self._prompt = _prompt(params.path)
        self.found: dict[str, list[Tokens]] = {name: [] for name, _ in wanted.rules}
        self.store_bytes_s: list[float] = []
        self.note = ""

    def runners(self) -> dict[str, pairs.Runner]:
        """One per rule, and the disk."""
        found: dict[str, pairs.Runner] = {
            name: functools.partial(self._run, name, rule) for name, rule in self._wanted.rules
        }
        return found | {"disk": self._disk}

    def _run(self, name: str, rule: LayerRule) -> float:
        wanted, params = self._wanted, self._params
        self.note = drop_page_cache(params.path).note
        n_ctx = N_PROMPT + 1 + wanted.n_warm + wanted.n_tokens
        with MemoryLimit(self.limit_bytes) as limit:
            factory = limit.factory(Counted, params.path, self.budget_bytes, params.threads, n_ctx)
            with Worker(*factory) as worker:
                found = worker.call("decode", self._prompt, rule, wanted.n_warm, wanted.n_tokens)
        self.found[name].append(found)
        return float(found.seconds / found.n_tokens)

    def _disk(self) -> float:
        drop_page_cache(self._params.path)
        seed = len(self.store_bytes_s)
        with (
            MemoryLimit(self.limit_bytes) as limit,
            Worker(*limit.factory(Store, self._params.path)) as worker,
        ):
            self.store_bytes_s.append(worker.call("bytes_s", STORE_S, seed))
        return self.store_bytes_s[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """Medians of one rule's runs, per token."""

    seconds: float
    moved_bytes: float
    n_experts: float
    hit_ratio: float

    @classmethod
    def of(cls, runs: Sequence[Tokens]) -> "_Cost":
        return cls(
            seconds=statistics.median(run.seconds / run.n_tokens for run in runs),
            moved_bytes=statistics.median(run.moved_bytes / run.n_tokens for run in runs),
            n_experts=statistics.median(run.n_experts for run in runs),
            hit_ratio=statistics.median(run.hit_ratio for run in runs),
        )


def run_timed(params: BenchParams, progress: pairs.Progress, wanted: TimeParams) -> Report:
    """Measure seconds and bytes per token for several rules under a memory limit.

    Raises:
        UsageError: no control group can be made here, the limit cannot be read, or all experts
            fit it.
        EdgerouteError: a run failed.
    """
    timed = _Timed(params, wanted)
    progress(f"limit {format_bytes(timed.limit_bytes)}, budget {format_bytes(timed.budget_bytes)}")
    measured = pairs.alternate(timed.runners(), replace(params, warmup=0).plan, progress)
    store = statistics.median(timed.store_bytes_s)
    costs = {name: _Cost.of(runs) for name, runs in timed.found.items()}
    full = costs[wanted.rules[0][0]]
    if not full.moved_bytes:
        raise EdgerouteError("nothing was read while all experts ran; lower --limit")
    rows, criteria, results = [], [], []
    for name, cost in costs.items():
        saved = full.moved_bytes - cost.moved_bytes
        rows.append((
            name, f"{cost.n_experts:.2f}", format_bytes(cost.moved_bytes), f"{cost.hit_ratio:.1%}",
            spread(measured[name], 4), f"{cost.moved_bytes / full.moved_bytes:.2f}",
            f"{cost.seconds / full.seconds:.2f}",
        ))  # fmt: skip
        results.append({"rule": name, **asdict(cost), "series": measured[name].to_dict()})
        if cost is not full and saved > 0:
            criteria.append(Criterion(
                what=f"{name}: seconds saved over reading the bytes saved at the store's speed",
                value=(full.seconds - cost.seconds) * store / saved, limit=TARGET_SAVING,
            ))  # fmt: skip
    notes = (
        f"limit {format_bytes(timed.limit_bytes)} by the kernel, budget "
        f"{format_bytes(timed.budget_bytes)}; store {format_bytes(store)}/s; {timed.note}",
        "bytes and time are also printed as shares of those with all experts; attention, head and "
        "resident experts take time that no byte saved gives back",
    )
    results.append({"limit_bytes": timed.limit_bytes, "budget_bytes": timed.budget_bytes,
                    "store_bytes_s": plain(store)})  # fmt: skip
    return Report(
        bench="expert-count under a limit", params=params,
        columns=("rule", "experts", "read per token", "hits", "s per token", "bytes/all",
                 "time/all"),
        rows=tuple(rows), results=results, criteria=tuple(criteria), notes=notes,
    )  # fmt: skip


def _prompt(path: Path) -> tuple[int, ...]:
    with GGUFFile.open(path) as file, Tokenizer.open(file) as tokenizer:
        return tuple(text_tokens(
            lambda text: tokenizer.encode(text, add_special=True, parse_special=False), N_PROMPT
        ))  # fmt: skip
