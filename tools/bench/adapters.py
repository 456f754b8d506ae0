"""LoRA adapters: what they cost, alone and mixed, and how fast they change, against llama.cpp.

Costs are ratios of two runs in one process, one after the other, so that where its pages lie
falls on both; every pair has a new process. The adapters are random, over all linear layers.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

from edgeroute.engine import Settings
from edgeroute.models.adapter_file import base_shapes
from edgeroute.models.registry import describe
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.bench import adapters_report, pairs
from edgeroute.tools.bench.adapters_engines import (
    Adapted,
    Routed,
    Switched,
    TheirAdapted,
    read_file_s,
)
from edgeroute.tools.bench.adapters_report import Found, Pairs, Switches
from edgeroute.tools.bench.limit import drop_page_cache
from edgeroute.tools.bench.peer import PeerParams
from edgeroute.tools.bench.report import BenchParams, Report
from edgeroute.tools.bench.text import shifted
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf

PARTS: Final = ("decode", "mixed", "prefill", "switch", "routing")
N_SPARE: Final = 2  # adapters more than there are slots, so that the next one is never there
N_CONTEXT, N_SWITCH, N_ROUTED = 64, 16, 64  # tokens of a prompt
N_WARM: Final = 8
SWITCH_RUNS: Final = 3  # each is short, so there are more of them
DELTA: Final = 0.02
"""Small changes: answers are as long with an adapter as without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersParams:
    """What this benchmark is told beyond BenchParams.

    Attributes:
        parts: some of PARTS.
        rank: of the adapters.
        n_mixed: sequences that decode together, and adapters in memory.
        n_prompt: tokens of the prompt in the part `prefill`.
        n_named: adapters to route among.
        n_routed: prompts to route.
        max_cost: share of the decoding speed that an adapter may cost.
        peer: whether llama.cpp runs too.
    """

    parts: tuple[str, ...] = PARTS
    rank: int = 8
    n_mixed: int = 8
    n_prompt: int = 512
    n_named: int = 1000
    n_routed: int = 200
    max_cost: float = 0.25
    peer: bool = True

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise UsageError(f"parts are {', '.join(PARTS)}, not {', '.join(unknown) or 'none'}")
        if self.n_mixed < 2 or self.n_prompt < 2 or self.n_named < self.n_mixed + N_SPARE:
            raise UsageError(f"too few sequences, tokens or adapters: {self}")


@dataclass(slots=True)
class _Bench:
    """The files of one benchmark, and what its parts found."""

    params: BenchParams
    wanted: AdaptersParams
    progress: pairs.Progress
    files: list[Path]
    tokens: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Adapters as our engine knows them."""
        return [file.stem for file in self.files]

    def ours(self, n_ctx: int, n_seq: int = 1) -> Worker:
        """Start a Runtime with room for `n_mixed` adapters."""
        cells = round_cells(n_ctx)
        return Worker(Adapted, self.params.path, self._settings(cells, n_seq))

    def routed(self) -> Worker:
        """Start a router."""
        settings = self._settings(round_cells(N_ROUTED), 1)
        return Worker(Routed, self.params.path, settings, self.wanted.n_named)

    def theirs(self, n_ctx: int) -> Worker:
        """Start llama.cpp with two of the adapters loaded."""
        peer = PeerParams(n_ctx=round_cells(n_ctx), threads=self.params.threads)
        return Worker(TheirAdapted, self.params.path, peer, self.files[:2])

    def _settings(self, cells: int, n_seq: int) -> Settings:
        found: dict[str, Any] = {
            "threads": self.params.threads, "n_ctx": cells, "n_kv": cells * n_seq,
            "max_batch": n_seq, "adapters": [str(file) for file in self.files],
            "adapter_slots": self.wanted.n_mixed, "adapter_state": "off",
        }  # fmt: skip
        return cast(Settings, found)

    def prompt(self, n_tokens: int) -> list[int]:
        """Return the fixed text's first tokens."""
        if len(self.tokens) < n_tokens:
            with self.ours(N_CONTEXT) as worker:
                self.tokens = worker.call("text", n_tokens)
        return self.tokens[:n_tokens]

    # pairs: without and with, or one and many, in one process each

    def decode(self) -> dict[str, Pairs]:
        """Decode without and with an adapter."""
        prompt, n_tokens = self.prompt(N_CONTEXT), self.params.tokens
        n_ctx = N_CONTEXT + n_tokens

        def ours(worker: Worker, adapted: bool, n: int = n_tokens) -> float:
            return float(worker.call("decode", prompt, n, self.names[0] if adapted else None))

        def theirs(worker: Worker, adapted: bool, n: int = n_tokens) -> float:
            worker.call("use", 0 if adapted else None)
            return float(worker.call("decode", prompt, n)[0])

        runs = {"edgeroute": (lambda: self.ours(n_ctx), ours, lambda w, a: ours(w, a, N_WARM))}
        if self.wanted.peer:
            runs["llama.cpp"] = (
                lambda: self.theirs(n_ctx), theirs, lambda w, a: theirs(w, a, N_WARM)
            )  # fmt: skip
        return self._pairs("decode", runs)

    def prefill(self) -> dict[str, Pairs]:
        """Compute a prompt without and with an adapter."""
        prompt = self.prompt(self.wanted.n_prompt)
        n_ctx, short = len(prompt) + 1, prompt[: max(1, len(prompt) // 8)]

        def ours(worker: Worker, adapted: bool, some: list[int] = prompt) -> float:
            return float(worker.call("prefill", some, self.names[0] if adapted else None))

        def theirs(worker: Worker, adapted: bool, some: list[int] = prompt) -> float:
            worker.call("use", 0 if adapted else None)
            return float(worker.call("prefill", some))

        runs = {"edgeroute": (lambda: self.ours(n_ctx), ours, lambda w, a: ours(w, a, short))}
        if self.wanted.peer:
            runs["llama.cpp"] = (
                lambda: self.theirs(n_ctx), theirs, lambda w, a: theirs(w, a, short)
            )  # fmt: skip
        return self._pairs("prefill", runs)

    def mixed(self) -> dict[str, Pairs]:
        """Decode sequences together: with one adapter for all, then with one each."""
        n, n_tokens = self.wanted.n_mixed, self.params.tokens
        prompts = shifted(self.prompt(N_CONTEXT + 7 * n), n, N_CONTEXT)

        def ours(worker: Worker, mixed: bool) -> float:
            used = self.names[:n] if mixed else self.names[:1] * n
            return float(worker.call("together", prompts, n_tokens, used))

        def warm(worker: Worker, _mixed: bool) -> None:
            worker.call("decode", prompts[0], N_WARM, self.names[0])

        return self._pairs("mixed decode", {"edgeroute": (
            lambda: self.ours(N_CONTEXT + n_tokens, n), ours, warm
        )})  # fmt: skip

    def _pairs(self, what: str, runs: "Mapping[str, _Run]") -> dict[str, Pairs]:
        self.progress(f"{what}: ratios of pairs")
        values: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}

        def runner(name: str) -> pairs.Runner:
            start, measure, warm = runs[name]

            def run() -> float:
                turned = len(values[name][0]) % 2 == 1
                with start() as worker:
                    for adapted in (False, True):
                        warm(worker, adapted)
                    pair = {adapted: measure(worker, adapted) for adapted in (turned, not turned)}
                values[name][0].append(pair[False])
                values[name][1].append(pair[True])
                return pair[True] / pair[False]

            return run

        plan = self.params.plan
        found = pairs.alternate({name: runner(name) for name in runs}, plan, self.progress)
        return {
            name: Pairs(ratio=found[name], base=_counted(values[name][0], found[name]),
                        changed=_counted(values[name][1], found[name]))
            for name in runs
        }  # fmt: skip

    # switches

    def switch(self) -> Switches:
        """Change adapters before a prompt: in memory, from disk, and not at all."""
        prompt = self.prompt(N_SWITCH)
        seen: dict[str, list[Switched]] = {}
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(self.ours(2 * N_SWITCH))
            runners = self._our_switches(ours, prompt, seen)
            if self.wanted.peer:
                theirs = stack.enter_context(self.theirs(2 * N_SWITCH))
                runners |= self._their_switches(theirs, prompt, seen)
            self.progress(f"switching before {N_SWITCH} tokens: seconds to the first token")
            plan = replace(self.params.plan, reps=SWITCH_RUNS * self.params.reps)
            ttft = pairs.alternate(runners, plan, self.progress)
        n_bytes = statistics.median(file.stat().st_size for file in self.files)
        waits = {name: _counted([each.wait_s for each in found], ttft[name])
                 for name, found in seen.items()}  # fmt: skip
        return Switches(n_bytes=int(n_bytes), ttft=ttft, waits=waits, disk=ttft["disk"],
                        cache=drop_page_cache(self.files[0]).note)  # fmt: skip

    def _our_switches(
        self, worker: Worker, prompt: list[int], seen: dict[str, list[Switched]]
    ) -> dict[str, pairs.Runner]:
        def ask(name: str, choose: Callable[[], str | None], hit: bool) -> pairs.Runner:
            def run() -> float:
                found = worker.call("switch", prompt, choose(), hit)
                seen.setdefault(name, []).append(found)
                return float(found.ttft_s)

            return run

        last: list[str] = []  # adapters in memory, the one used last at the end

        def touch(name: str) -> str:
            if name in last:
                last.remove(name)
            last.append(name)
            del last[: -self.wanted.n_mixed]
            return name

        def absent() -> str:
            name = next(each for each in self.names if each not in last)
            drop_page_cache(self.files[self.names.index(name)])
            return touch(name)

        def read() -> float:
            file = self.files[len(seen.get("edgeroute: from disk", ())) % len(self.files)]
            drop_page_cache(file)
            return read_file_s(file)

        for name in self.names[: self.wanted.n_mixed]:
            worker.call("switch", prompt, touch(name), False)
        return {
            "edgeroute: in memory": ask("edgeroute: in memory", lambda: touch(last[-2]), True),
            "edgeroute: from disk": ask("edgeroute: from disk", absent, False),
            "edgeroute: no change": ask("edgeroute: no change", lambda: last[-1], True),
            "disk": read,
        }

    def _their_switches(
        self, worker: Worker, prompt: list[int], seen: dict[str, list[Switched]]
    ) -> dict[str, pairs.Runner]:
        used = [0]

        def ask(name: str, method: str, *args: object) -> float:
            found = worker.call(method, *args)
            seen.setdefault(name, []).append(found)
            return float(found.ttft_s)

        def swap() -> float:
            used[0] = 1 - used[0]
            return ask("llama.cpp: in memory", "switch", prompt, used[0])

        def same() -> float:
            worker.call("switch", prompt, used[0])
            return ask("llama.cpp: no change", "switch", prompt, used[0])

        def load() -> float:
            drop_page_cache(self.files[2])
            return ask("llama.cpp: from disk", "load_and_switch", prompt, self.files[2])

        return {
            "llama.cpp: in memory": swap,
            "llama.cpp: from disk": load,
            "llama.cpp: no change": same,
        }

    def route(self) -> list[float]:
        """Seconds per choice."""
        self.progress(f"routing {self.wanted.n_routed} prompts among {self.wanted.n_named}")
        with self.routed() as worker:
            found: list[float] = worker.call("choose", N_ROUTED, self.wanted.n_routed)
        return found


_Measure = Callable[[Worker, bool], float]
_Run = tuple[Callable[[], Worker], _Measure, Callable[[Worker, bool], object]]


def run(params: BenchParams, progress: pairs.Progress, wanted: AdaptersParams) -> Report:
    """Make adapters for the model and measure the parts asked for.

    Raises:
        UsageError: the model has no linear layers to adapt, or ends at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        progress(f"making {wanted.n_mixed + N_SPARE} adapters of rank {wanted.rank}")
        files = make_adapters(params.path, Path(folder), wanted)
        bench = _Bench(params, wanted, progress, files)
        parts = set(wanted.parts)
        found = Found(
            params=params, rank=wanted.rank, n_mixed=wanted.n_mixed, n_prompt=wanted.n_prompt,
            n_named=wanted.n_named, max_cost=wanted.max_cost,
            decode=bench.decode() if "decode" in parts else {},
            mixed=bench.mixed() if "mixed" in parts else {},
            prefill=bench.prefill() if "prefill" in parts else {},
            switches=bench.switch() if "switch" in parts else None,
            routing=bench.route() if "routing" in parts else [],
        )  # fmt: skip
    return adapters_report.make_report(found)


def make_adapters(model: Path, folder: Path, wanted: AdaptersParams) -> list[Path]:
    """Write random GGUF adapters, which both engines read, and return their paths."""
    with GGUFFile.open(model) as file:
        base = base_shapes(describe(file))
    files = [folder / f"adapter-{i}.gguf" for i in range(wanted.n_mixed + N_SPARE)]
    for i, file_ in enumerate(files):
        spec = AdapterSpec(rank=wanted.rank, seed=i, delta=DELTA, kind="F16")
        make_gguf(file_, base, spec)
    return files


def _counted(values: list[float], beside: pairs.Series) -> pairs.Series:
    """Make a series of values that were kept beside the measured ones, warm-ups left out."""
    return pairs.Series(values=tuple(values[-len(beside.values) :]), others=beside.others)
