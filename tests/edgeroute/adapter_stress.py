"""Many threads over a library far larger than its slots: every answer is the right adapter's.

By hand: `python tests/edgeroute/adapter_stress.py --adapters 1000 --requests 10000`.
"""

import argparse
import gc
import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from edgeroute import Runtime
from edgeroute.models.adapter_file import BaseShapes, base_shapes
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf

SPEC = replace(
    synth.ARCHITECTURES["llama"], weight_type="Q5_1", n_layer=2, n_embd=64, n_ff=64, n_head=2,
    n_head_kv=1, n_embd_head=32,
)  # fmt: skip
"""Q5_1 is multiplied row by row: an answer's bits do not depend on who shares its pass."""
TARGETS = ("attn_q", "attn_v", "ffn_down")
SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_kv": 2560, "n_ubatch": 64, "threads": 1,
                            "adapter_state": "off", "memory": 256 * MIB}  # fmt: skip
SHARED = [7 + 3 * i for i in range(24)]
PROMPTS = [[*SHARED, 11, 12, 13], [*SHARED, 200], SHARED[:20]]
N_VERSIONS = 2

Answer = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StressParams:
    """How much; a tenth of the adapters is replaced and removed meanwhile."""

    n_adapters: int = 100
    n_requests: int = 600
    n_threads: int = 16
    n_slots: int = 8
    seed: int = 1
    n_tokens: int = 6


def write_library(folder: Path, params: StressParams) -> Path:
    """Write a model, and every adapter in each of its versions; return the model's path."""
    path = folder / "model.gguf"
    synth.write(SPEC, path)
    with GGUFFile.open(path) as file:
        base: BaseShapes = base_shapes(describe(file))
    for version, i in itertools.product(range(N_VERSIONS), range(params.n_adapters)):
        if version and not _is_mutable(i):
            continue
        where = folder / f"v{version}"
        where.mkdir(exist_ok=True)
        rank, alpha = (8, 12.0) if i % 5 else (11, 20.0)  # some take two slots
        seed = 10_000 * params.seed + N_VERSIONS * i + version
        spec = AdapterSpec(rank=rank, alpha=alpha, targets=TARGETS, delta=0.8, seed=seed,
                           kind="F16")  # fmt: skip
        make_gguf(where / f"a{i}.gguf", base, spec)
    return path


def _is_mutable(i: int) -> bool:
    return i % 10 == 0


def ask(runtime: Runtime, prompt: int, adapter: Any, params: StressParams, mode: Any) -> Answer:
    """Answer greedily."""
    answer = runtime.generate(prompt_ids=PROMPTS[prompt], max_tokens=params.n_tokens, prefix=mode,
                              temperature=0.0, adapter=adapter)  # fmt: skip
    return answer.token_ids


class Stress:
    """One run. Versions of an adapter are noted before they are put in, per name in order."""

    def __init__(self, folder: Path, params: StressParams) -> None:
        self.params, self.folder = params, folder
        self.model = write_library(folder, params)
        self.names = [f"a{i}" for i in range(params.n_adapters)]
        self.mutable = [f"a{i}" for i in range(params.n_adapters) if _is_mutable(i)]
        self.history: dict[str, list[int | None]] = {name: [0] for name in self.names}
        self.locks = {name: threading.Lock() for name in self.mutable}
        self.cold: dict[tuple[str | None, int, int], Answer] = {}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.most_bytes = 0
        self.done = threading.Event()

    def learn(self) -> None:
        """Ask each adapter alone, from the beginning, for its answers.

        In slots of the same rank: cut into other blocks, an adapter is rounded otherwise.
        """
        with Runtime(self.model, **SETTINGS, adapters=self.folder / "v0") as alone:
            for version in range(N_VERSIONS):
                for name in self.mutable if version else [None, *self.names]:
                    if version:
                        alone.add_adapter(self.folder / f"v{version}" / f"{name}.gguf")
                    for prompt in range(len(PROMPTS)):
                        found = ask(alone, prompt, name, self.params, "off")
                        self.cold[name, version, prompt] = found

    def run(self) -> dict[str, Any]:
        """Do all requests; return what was counted."""
        self.learn()
        params, process = self.params, psutil.Process()
        with Runtime(self.model, **SETTINGS, adapters=self.folder / "v0",
                     adapter_slots=params.n_slots) as runtime:  # fmt: skip
            began = time.perf_counter()
            watcher = threading.Thread(target=self._watch, args=(runtime,))
            each = -(-params.n_requests // params.n_threads)
            workers = [threading.Thread(target=self._work, args=(runtime, i, each))
                       for i in range(params.n_threads)]  # fmt: skip
            for thread in [watcher, *workers]:
                thread.start()
            halfway_rss = 0
            for i, thread in enumerate(workers):
                thread.join()
                halfway_rss = halfway_rss or (process.memory_info().rss if i == 0 else 0)
            self.done.set()
            watcher.join()
            wall_s = time.perf_counter() - began
            figures = self._left_behind(runtime)
        gc.collect()
        return figures | dict(self.counts) | {
            "adapters": params.n_adapters, "threads": params.n_threads, "seed": params.seed,
            "wall_s": round(wall_s, 3), "requests_per_s": round(params.n_requests / wall_s, 1),
            "most_bytes": self.most_bytes, "failures": self.failures[:10],
            "distinct_answers": len(set(self.cold.values())), "answers": len(self.cold),
            "rss_growth_bytes": process.memory_info().rss - halfway_rss,
        }  # fmt: skip

    def _work(self, runtime: Runtime, i: int, n: int) -> None:
        rng = random.Random(f"{self.params.seed}-{i}")
        for _ in range(n):
            try:
                if rng.random() < 0.05:
                    self._mutate(runtime, rng)
                self._request(runtime, rng)
            except BaseException as error:  # told by the test, which is another thread
                self.failures.append(f"{type(error).__name__}: {error}")
                return

    def _mutate(self, runtime: Runtime, rng: random.Random) -> None:
        name = rng.choice(self.mutable)
        with self.locks[name]:
            past = self.history[name]
            if past[-1] is not None and rng.random() < 0.4:
                past.append(None)
                runtime.remove_adapter(name)
                self.counts["removed"] += 1
                return
            version = rng.randrange(N_VERSIONS)
            past.append(version)
            assert runtime.add_adapter(self.folder / f"v{version}" / f"{name}.gguf") == name
            self.counts["added"] += 1

    def _request(self, runtime: Runtime, rng: random.Random) -> None:
        popular = rng.random() < 0.5
        name = rng.choice(self.names[:12] if popular else self.names)
        prompt, mode = rng.randrange(len(PROMPTS)), rng.choice(["exact", "exact", "off"])
        if rng.random() < 0.1:
            self.counts["base"] += 1
            self._check(None, prompt, {0}, ask(runtime, prompt, None, self.params, mode))
            return
        first = max(0, len(self.history[name]) - 2)  # the last may be on its way in
        try:
            found = ask(runtime, prompt, name, self.params, mode)
        except UsageError:
            if None not in self.history[name][first:]:
                raise
            self.counts["gone"] += 1
            return
        versions = {v for v in self.history[name][first:] if v is not None}
        self._check(name, prompt, versions, found)

    def _check(self, name: str | None, prompt: int, versions: set[int], found: Answer) -> None:
        self.counts["answered"] += 1
        if found not in {self.cold[name, version, prompt] for version in versions}:
            self.counts["wrong"] += 1
            self.failures.append(f"{name}, prompt {prompt}: {found}")

    def _watch(self, runtime: Runtime) -> None:
        try:
            while not self.done.wait(0.002):
                stats: dict[str, Any] = runtime.stats()
                self.most_bytes = max(self.most_bytes, stats["memory_bytes"])
                adapters = stats["adapters"]
                assert 0 <= adapters["free_slots"] <= adapters["slots"]
        except BaseException as error:
            self.failures.append(f"statistics: {type(error).__name__}: {error}")

    def _left_behind(self, runtime: Runtime) -> dict[str, Any]:
        """Count what is held when nobody asks for anything."""
        while (stats := runtime.stats())["running"] or stats["waiting"]:
            time.sleep(0.005)
        figures: Any = stats
        loaded = runtime._loaded
        assert loaded.adapters is not None
        store = loaded.adapters.store
        placed = [slot for page in store._placed for slot in page.slots]
        return {
            "budget_bytes": figures["budget_bytes"],
            "memory_bytes": figures["memory_bytes"],
            "lost_cells": figures["kv_cells"] - figures["kv_free_cells"] - figures["kv_kept_cells"],
            "lost_slots": len({*range(1, store.slots.n_slots + 1)} ^ {*placed, *store._free}),
            "doubled_slots": len(placed) + len(store._free) - store.slots.n_slots,
            "pins": sum(page.n_pins for page in [*store._placed, *store._pages.values()]),
            "slots": figures["adapters"]["slots"],
            "hit_ratio": figures["adapters"]["hit_ratio"],
            "loads": figures["adapters"]["loads"],
            "evictions": figures["adapters"]["evictions"],
            "mean_batch": figures["mean_batch"],
            "finished": figures["finished"],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run once and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("adapters", 1000), ("requests", 10000), ("threads", 16), ("slots", 8),
                        ("seed", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    params = StressParams(n_adapters=given.adapters, n_requests=given.requests, seed=given.seed,
                          n_threads=given.threads, n_slots=given.slots)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(Stress(Path(folder), params).run()))


if __name__ == "__main__":
    main()
