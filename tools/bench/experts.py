"""Experts paged under the kernel's memory limit, against llama.cpp's mmap under the same.

Every run is a process of its own in a fresh control group, with the file dropped from the page
cache before. Beside the speeds stand the ceilings of this disk and this arithmetic, and what
every eviction policy, and Belady's, would have hit on the same trace.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

from edgeroute.engine import Settings
from edgeroute.runtime import machine
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.tools.bench import experts_report, pairs
from edgeroute.tools.bench.experts_ceiling import geometry, replayed
from edgeroute.tools.bench.experts_engines import Life, LifePlan, Mapped, Paged, Store
from edgeroute.tools.bench.experts_python import python_us_per_layer
from edgeroute.tools.bench.experts_report import Found
from edgeroute.tools.bench.limit import CacheState, MemoryLimit, drop_page_cache
from edgeroute.tools.bench.peer import PeerParams
from edgeroute.tools.bench.report import BenchParams, Report
from edgeroute.tools.bench.text import text_tokens
from edgeroute.tools.bench.workers import Worker

BUDGET_RATIO: Final = 0.92
"""Share of the limit that is the default budget; the rest is Python's, ggml's and the kernel's."""
RESIDENT_RATIO: Final = 1.4
"""Free memory over the file's size from which on the all-resident run is made too."""
STORE_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsParams:
    """What this benchmark is told beyond BenchParams.

    Attributes:
        limit: the kernel's limit: bytes, text such as `2GiB`, or a share of the file (`40%`).
        memory: edgeroute's own budget in the same forms of bytes; None is 0.92 of the limit.
        n_prompt: tokens of each of the two prompts.
        peer: whether llama.cpp runs too.
        target: least ratio of decoding speeds.
        settings: further settings of the Runtime, such as a policy's name.
    """

    limit: str | int
    memory: str | int | None = None
    n_prompt: int = 512
    n_warm: int = 16
    max_s: float = 20.0
    peer: bool = True
    target: float = 15.0
    settings: Mapping[str, object] = field(default_factory=dict)

    def limit_bytes(self, file_bytes: int) -> int:
        """The limit for a file of this size.

        Raises:
            UsageError: it cannot be read, or is no share of a file.
        """
        text = str(self.limit).strip()
        if not text.endswith("%"):
            return parse_bytes(self.limit)
        share = text[:-1].strip()
        if not share.replace(".", "", 1).isdigit() or not 0 < float(share) <= 100:
            raise UsageError(f"a limit of {text!r} is no share of a file; write it like 40%")
        return int(float(share) / 100 * file_bytes)

    def budget_bytes(self, limit_bytes: int) -> int:
        """What the Runtime is allowed under a limit."""
        return int(BUDGET_RATIO * limit_bytes) if self.memory is None else parse_bytes(self.memory)


class Bench:
    """The runs of one benchmark, and what they left beside the number that is alternated."""

    pager: type[Paged] = Paged
    store: type[Store] = Store

    def __init__(self, params: BenchParams, wanted: ExpertsParams) -> None:
        self.params, self.wanted = params, wanted
        self.limit_bytes = wanted.limit_bytes(params.path.stat().st_size)
        self.budget_bytes = wanted.budget_bytes(self.limit_bytes)
        tokens = _tokens(params.path, 2 * wanted.n_prompt)
        self.plan = LifePlan(
            prompts=(tuple(tokens[: wanted.n_prompt]), tuple(tokens[wanted.n_prompt :])),
            n_warm=wanted.n_warm, n_tokens=params.tokens, n_after=params.tokens // 2,
            max_s=wanted.max_s,
        )  # fmt: skip
        self.lives: dict[str, list[Life]] = {}
        self.peaks: dict[str, list[int]] = {}
        self.store_bytes_s: list[float] = []
        self.cache = CacheState(how="kept", cached_ratio=None)
        self.store_mode = ""

    def settings(self, **more: object) -> Settings:
        """Settings of a Runtime for this plan."""
        found: dict[str, Any] = {"threads": self.params.threads, "n_ctx": self.plan.n_ctx,
                                 "max_batch": 1}  # fmt: skip
        return cast(Settings, found | dict(self.wanted.settings) | more)

    def runners(self) -> dict[str, pairs.Runner]:
        """What is alternated: both engines, ours with all in memory if it fits, and the disk."""
        path, budget = self.params.path, self.budget_bytes
        found = {"edgeroute": self._limited("edgeroute", self.pager, self.settings(memory=budget))}
        if self.wanted.peer:
            peer = PeerParams(n_ctx=self.plan.n_ctx, threads=self.params.threads, repack=False)
            if n_ubatch := self.settings().get("n_ubatch"):
                peer = replace(peer, n_ubatch=n_ubatch)
            found["llama.cpp"] = self._limited("llama.cpp", Mapped, peer)
        if machine.memory().available_bytes > RESIDENT_RATIO * path.stat().st_size:
            found["resident"] = self._resident
        return found | {"disk": self._disk}

    def trace(self, path: Path) -> Life:
        """Live once more, recording what each token chose."""
        self._limited("trace", Paged, self.settings(memory=self.budget_bytes, trace=str(path)))()
        return self.lives["trace"][-1]

    def _limited(self, name: str, engine: Callable[..., Any], settings: object) -> pairs.Runner:
        def run() -> float:
            self.cache = drop_page_cache(self.params.path)
            with MemoryLimit(self.limit_bytes) as limit:
                factory = limit.factory(engine, self.params.path, settings)
                with limit.explaining(name), Worker(*factory) as worker:
                    life = worker.call("live", self.plan)
                peak = limit.peak_bytes
            if peak is not None:
                self.peaks.setdefault(name, []).append(peak)
            return self._keep(name, life)

        return run

    def _resident(self) -> float:
        with Worker(self.pager, self.params.path, self.settings()) as worker:
            return self._keep("resident", worker.call("live", self.plan))

    def _keep(self, name: str, life: Life) -> float:
        self.lives.setdefault(name, []).append(life)
        return life.decode.tok_s

    def _disk(self) -> float:
        drop_page_cache(self.params.path)
        seed = len(self.store_bytes_s)  # other places each time: the disk has a cache of its own
        with (
            MemoryLimit(self.limit_bytes) as limit,
            Worker(*limit.factory(self.store, self.params.path)) as worker,
        ):
            self.store_mode = worker.call("mode")
            self.store_bytes_s.append(worker.call("bytes_s", STORE_S, seed))
        return self.store_bytes_s[-1]


def run(params: BenchParams, progress: pairs.Progress, wanted: ExpertsParams) -> Report:
    """Measure decoding, prefill and first token under a limit, and set them beside ceilings.

    Raises:
        UsageError: no control group can be made here, or the limit cannot be read.
        EdgerouteError: a run failed; where the kernel killed it, the message says so.
    """
    shape = geometry(params.path)
    bench = Bench(replace(params, warmup=0), wanted)
    progress(f"limit {format_bytes(bench.limit_bytes)}, budget {format_bytes(bench.budget_bytes)}")
    measured = pairs.alternate(bench.runners(), bench.params.plan, progress)
    found = Found(
        params=bench.params, limit_bytes=bench.limit_bytes, budget_bytes=bench.budget_bytes,
        target=wanted.target, geometry=shape, decode=measured, lives=bench.lives,
        store_bytes_s=statistics.median(bench.store_bytes_s), peaks=bench.peaks,
        notes=(bench.cache.note, f"store read in mode {bench.store_mode!r}"),
    )  # fmt: skip
    if shape.expert_bytes and bench.lives["edgeroute"][-1].pager:
        progress("what Python costs when all hit, on a model of next to no arithmetic")
        found = replace(found, python_us_per_layer=round(python_us_per_layer(), 2))
        found = _with_replay(bench, found, progress)
    return experts_report.make_report(found)


def _with_replay(bench: Bench, found: Found, progress: pairs.Progress) -> Found:
    progress("a run with a trace, and its replay through every policy")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.trace"
        life = bench.trace(path)
        n_slots = life.pager["n_slots"]
        if not isinstance(n_slots, int):
            raise EdgerouteError(f"the pager says it has {n_slots!r} slots")
        return replace(found, replayed=replayed(path, n_slots), traced=life)


def _tokens(path: Path, n_tokens: int) -> Sequence[int]:
    """Tokenise the fixed text with the file's vocabulary alone."""
    with GGUFFile.open(path) as file, Tokenizer.open(file) as tokenizer:
        return text_tokens(
            lambda text: tokenizer.encode(text, add_special=True, parse_special=False), n_tokens
        )
