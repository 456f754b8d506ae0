"""Missing experts done without: what it costs in quality, and what it saves, in the same runs.

A model whose experts are paged reads held-out text, the beginning of a window as a prompt and the
rest token by token, under one setting after another in alternating runs. The same places are
scored with all experts computed, which is the reference: paging alone changes no bit. Each run
opens the model anew, and one window goes before that counts for nothing.
"""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.offload import expert_stats
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.offload.sidecar import COPIES, sidecar_path
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import ComputeError, UsageError
from edgeroute.runtime.sampler import log_softmax
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.limit import drop_page_cache
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, spread
from edgeroute.tools.perplexity import held_out_texts, windows

Logs = npt.NDArray[np.float32]
"""Logarithms of probabilities, (n_tokens, n_vocab)."""


class Setting(NamedTuple):
    """`drop_misses`, `prefer_resident` and `degrade_misses` of a run."""

    drop: float = 0.0
    prefer: float = 0.0
    degrade: float = 0.0

    @property
    def name(self) -> str:
        """As it is shown."""
        parts = [f"{name} {value:g}" for name, value in self._asdict().items() if value]
        return ", ".join(parts) or OFF


OFF: Final = "off"
COPIED: Final = (Setting(degrade=0.4), Setting(degrade=1.0), Setting(0.1, 0.0, 0.4))
"""What is tried too where there are copies. The last is HOBBIT's."""
TARGET_TIME: Final = 1.0
"""Seconds per token over those with all experts computed, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissesParams:
    """What is tried, and on how much text.

    Attributes:
        memory: the budget, bytes or text; all experts must not fit it.
        settings: what is tried beside `off`.
        n_windows: windows of prose, and as many of code, to judge on.
        n_window: tokens of a window; of those `n_prompt` are read at once.
    """

    memory: str
    settings: tuple[Setting, ...]
    n_windows: int = 3
    n_window: int = 192
    n_prompt: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """One window's decoded tokens.

    Attributes:
        n_tokens: as many.
        seconds: they took.
        moved_bytes: read from the disk, copies included.
        hit_ratio: of the experts asked for in full, those found in memory.
        dropped, replaced, degraded: experts done without, taken for others, or for their copies.
    """

    n_tokens: int
    seconds: float
    moved_bytes: int
    hit_ratio: float
    dropped: int
    replaced: int
    degraded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One window's tokens against the reference: means over them."""

    nats: float
    nats_reference: float
    kl_nats: float
    top1_ratio: float


def score(reference: Logs, found: Logs, window: Sequence[int], first: int) -> Score:
    """Score what was predicted from token `first` of a window on.

    Args:
        reference: logarithms of probabilities with all experts, (n_tokens, n_vocab).
        found: the same under a setting.
        window: token ids.
        first: the first token that was decoded; each row predicts the token behind.
    """
    ids = np.array(window[first + 1 :], np.int64)
    rows = np.arange(len(ids))
    kl = np.einsum("ij,ij->i", np.exp(reference, dtype=np.float64), reference - found)
    same = reference.argmax(axis=1) == found.argmax(axis=1)
    return Score(nats=float(-found[rows, ids].mean()), kl_nats=float(kl.mean()),
                 nats_reference=float(-reference[rows, ids].mean()),
                 top1_ratio=float(same.mean()))  # fmt: skip


class Reader:
    """A paged model that reads windows. Lifetime: close it."""

    def __init__(self, params: BenchParams, wanted: MissesParams, setting: Setting) -> None:
        n_ctx = round_cells(wanted.n_window)
        run = RunParams(
            memory=wanted.memory, threads=params.threads, n_ctx=n_ctx, n_ubatch=64, levers="asked",
            prefetch="off", overlap="off", policy="lfru", drop_misses=setting.drop,
            prefer_resident=setting.prefer, degrade_misses=setting.degrade,
        )  # fmt: skip
        with contextlib.ExitStack() as own:
            self._loaded = own.enter_context(contextlib.closing(LoadedModel(params.path, run)))
            if self._loaded.experts is None:
                raise UsageError(f"all of {params.name} fits {wanted.memory}; lower --memory, so "
                                 "that experts are paged")  # fmt: skip
            self._store = self._loaded.experts
            self._loaded.device.set_threads(params.threads)
            self._own = own.pop_all()

    @property
    def resident_ratio(self) -> float:
        """Slots over experts."""
        pools = self._store.pools
        return sum(pool.table.n_slots for pool in pools) / sum(pool.plan.n_pages for pool in pools)

    def read(self, window: Sequence[int], n_prompt: int) -> tuple[Passed, Logs]:
        """Compute a prompt, then token by token; the last one predicts nothing and is left out."""
        forward, kv = self._loaded.forward, self._loaded.kv
        region = kv.allocate(len(window))
        if region is None:
            raise ComputeError("the KV cache has no room for a window")
        rows = np.empty(
            (len(window) - 1 - n_prompt, self._loaded.model.hparams.n_vocab), np.float32
        )
        seconds = 0.0
        _run(forward, Piece(window[:n_prompt], 0, region))
        before, copied, done = self._store.spent(), self._copied_bytes(), self._done()
        for at in range(n_prompt, len(window) - 1):
            began = time.perf_counter()
            logits = _run(forward, Piece(window[at : at + 1], at, region))
            seconds += time.perf_counter() - began
            rows[at - n_prompt] = log_softmax(logits[0].astype(np.float64))
        spent = self._store.spent().since(before)
        dropped, replaced, degraded = (b - a for a, b in zip(done, self._done(), strict=True))
        kv.release(region)
        return Passed(
            n_tokens=len(rows), seconds=seconds, hit_ratio=spent.hit_ratio, dropped=dropped,
            moved_bytes=spent.demand_bytes + spent.prefetch_bytes + self._copied_bytes() - copied,
            replaced=replaced, degraded=degraded,
        ), rows  # fmt: skip

    def _copied_bytes(self) -> int:
        copies = self._store.copies if isinstance(self._store, ExpertStore) else None
        return 0 if copies is None else expert_stats.spent(copies.pools).demand_bytes

    def _done(self) -> tuple[int, int, int]:
        levers = self._loaded.misses
        return (0, 0, 0) if levers is None else (levers.dropped, levers.replaced, levers.degraded)

    def close(self) -> None:
        """Free everything."""
        self._own.close()


def _run(forward: Forward, piece: Piece) -> Logs:
    logits = forward.run([piece], borrow=True)
    if logits is None:
        raise ComputeError("the computation was stopped")
    return logits


class _Bench:
    """The runs of one benchmark."""

    def __init__(self, params: BenchParams, wanted: MissesParams, progress: pairs.Progress) -> None:
        self._params, self._wanted, self._progress = params, wanted, progress
        prose, code = (windows(params.path, texts, wanted.n_window) for texts in held_out_texts())
        self._windows = [
            each for group in (prose, code)
            for each in [w for w in group if len(w) == wanted.n_window][: wanted.n_windows]
        ]  # fmt: skip
        if not self._windows:
            raise UsageError(f"no held-out text has windows of {wanted.n_window} tokens")
        self.settings = {each.name: each for each in (Setting(), *wanted.settings)}
        self.passed: dict[str, list[Passed]] = {name: [] for name in self.settings}
        self.scores: dict[str, list[Score]] = {name: [] for name in self.settings}
        self._reference: list[Logs] = []
        self.resident_ratio = 0.0
        self.note = ""

    def refer(self) -> None:
        """Compute the reference, with all experts."""
        with contextlib.closing(self._open(OFF)) as reader:
            self.resident_ratio = reader.resident_ratio
            self._reference = [self._read(reader, window)[1] for window in self._windows]

    def runners(self) -> dict[str, pairs.Runner]:
        """One per setting."""
        return {name: functools.partial(self._run, name) for name in self.settings}

    def _open(self, name: str) -> Reader:
        self.note = drop_page_cache(self._params.path).note
        return Reader(self._params, self._wanted, self.settings[name])

    def _read(self, reader: Reader, window: Sequence[int]) -> tuple[Passed, Logs]:
        return reader.read(window, self._wanted.n_prompt)

    def _run(self, name: str) -> float:
        first, seconds = self._wanted.n_prompt, []
        with contextlib.closing(self._open(name)) as reader:
            self._read(reader, self._windows[-1])
            for window, reference in zip(self._windows, self._reference, strict=True):
                passed, logs = self._read(reader, window)
                self.passed[name].append(passed)
                self.scores[name].append(score(reference, logs, window, first))
                seconds.append(passed.seconds / passed.n_tokens)
        point = self.point(name)
        self._progress(f"{name}: KL {point.kl_nats:.4f}, perplexity {point.ppl:.2f}, "
                       f"{format_bytes(point.moved_bytes)} and {point.seconds:.4f} s per token, "
                       f"{point.hit_ratio:.1%} hits, {point.top1_ratio:.1%} same top, "
                       f"{point.dropped:.2f} dropped, {point.replaced:.2f} replaced, "
                       f"{point.degraded:.2f} from copies")  # fmt: skip
        return statistics.median(seconds)

    def point(self, name: str) -> "Point":
        """Sum up what was measured of a setting so far."""
        return Point.of(name, self.passed[name], self.scores[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting: quality over windows and runs, and what a token cost.

    Attributes:
        kl_nats, kl_error: mean over windows, and its standard error.
        ppl, ppl_ratio: perplexity, and over that with all experts.
        top1_ratio: share of tokens with the same likeliest next token.
        hit_ratio: of the experts asked for, those in memory.
        moved_bytes, dropped, replaced, degraded, seconds: per token.
    """

    setting: str
    kl_nats: float
    kl_error: float
    ppl: float
    ppl_ratio: float
    top1_ratio: float
    hit_ratio: float
    moved_bytes: float
    dropped: float
    replaced: float
    degraded: float
    seconds: float

    @classmethod
    def of(cls, name: str, passed: Sequence[Passed], scores: Sequence[Score]) -> "Point":
        """Average over windows of equal length."""
        kl = [each.kl_nats for each in scores]
        nats = statistics.fmean(each.nats for each in scores)
        less = nats - statistics.fmean(each.nats_reference for each in scores)
        n = sum(each.n_tokens for each in passed)
        return cls(
            setting=name, kl_nats=statistics.fmean(kl), ppl=math.exp(nats),
            kl_error=statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else math.inf,
            ppl_ratio=math.exp(less),
            top1_ratio=statistics.fmean(each.top1_ratio for each in scores),
            hit_ratio=statistics.fmean(each.hit_ratio for each in passed),
            moved_bytes=sum(each.moved_bytes for each in passed) / n,
            dropped=sum(each.dropped for each in passed) / n,
            replaced=sum(each.replaced for each in passed) / n,
            degraded=sum(each.degraded for each in passed) / n,
            seconds=statistics.median(each.seconds / each.n_tokens for each in passed),
        )  # fmt: skip


def with_copies(path: Path, settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return settings, and those that take copies if there are some beside the model."""
    return (*settings, *(COPIED if sidecar_path(path, COPIES).exists() else ()))


def run(params: BenchParams, progress: pairs.Progress, wanted: MissesParams) -> Report:
    """Measure quality and cost of every setting.

    Raises:
        UsageError: the model has no experts, or all of them fit the budget.
        CapacityError: too little fits it.
    """
    budget = parse_bytes(wanted.memory)
    bench = _Bench(params, wanted, progress)
    progress("scoring with all experts")
    bench.refer()
    params = replace(params, warmup=0)
    measured = pairs.alternate(bench.runners(), params.plan, progress)
    points = [bench.point(name) for name in bench.settings]
    full = points[0]
    rows = tuple(_row(point, full, spread(measured[point.setting], 4)) for point in points)
    notes = (
        f"budget {format_bytes(budget)}, {bench.resident_ratio:.0%} of the experts in memory; "
        f"prefetch and overlap off, policy lfru; {bench.note}",
        "hits are those of the experts asked for in full: what is dropped is not asked for; "
        "what copies take of the budget is missing for experts",
    )
    return Report(
        bench="misses", params=params, rows=rows, notes=notes,
        columns=("setting", "KL, nats", "perplexity", "over full", "same top", "hits",
                 "read per token", "bytes/full", "dropped", "replaced", "copies", "s per token",
                 "time/full"),
        results=[asdict(point) | {"series": measured[point.setting].to_dict()} for point in points],
        criteria=tuple(
            Criterion(what=f"{point.setting}: time per token over that with all experts",
                      value=point.seconds / full.seconds, limit=TARGET_TIME, at_most=True)
            for point in points[1:]
        ),
    )  # fmt: skip


def _row(point: Point, full: Point, shown: str) -> tuple[str, ...]:
    return (
        point.setting, f"{point.kl_nats:.4f} ± {point.kl_error:.4f}", f"{point.ppl:.2f}",
        f"{point.ppl_ratio:.3f}", f"{point.top1_ratio:.1%}", f"{point.hit_ratio:.1%}",
        format_bytes(point.moved_bytes), f"{point.moved_bytes / max(full.moved_bytes, 1):.2f}",
        f"{point.dropped:.2f}", f"{point.replaced:.2f}", f"{point.degraded:.2f}", shown,
        f"{point.seconds / full.seconds:.2f}",
    )  # fmt: skip
