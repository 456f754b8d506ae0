"""A server whose dashboard has something to show: a paged mixture of experts, and adapters.

    python -m tests.server.dashboard_demo FOLDER [--pair LARGE.gguf SMALL.gguf]

Synthetic models are written into FOLDER. Prints its address; ends with its standard input.
"""

import argparse
import contextlib
import itertools
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from edgeroute import Runtime
from edgeroute.models.adapter_file import base_shapes
from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.models.pull import resolve
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.host_memory import keep_heap_small
from edgeroute.runtime.units import MIB
from edgeroute.server import api, dashboard, live
from edgeroute.server.errors import ApiError
from edgeroute.server.guard import guards
from edgeroute.server.records import ModelFacts, ServerParams, Services
from edgeroute.tools import synth
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf
from tests.server import lab

MOE = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=24, n_embd=128, n_ff=128, n_ff_exp=64, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=64, n_expert_used=4,
)  # fmt: skip
SPARE = 40 * MIB
"""Of experts' slots beyond the fewest: about a quarter of all."""
N_WARM = 60
"""Requests until caches are full, and memory stays as it is."""
WORDS = "sky blue robot arm grip path torque sensor door cup light why how when write a of the"


class Several:
    """The `Models` protocol over Runtimes that are always open."""

    def __init__(self, runtimes: Mapping[str, Runtime]) -> None:
        self._runtimes = dict(runtimes)
        self._n_busy = dict.fromkeys(runtimes, 0)

    @property
    def names(self) -> Sequence[str]:
        return list(self._runtimes)

    def facts(self, name: str) -> ModelFacts:
        runtime = self._get(name)
        return ModelFacts(name=name, state="open", created=1_700_000_000,
                          n_ctx=runtime.params.n_ctx, n_bytes=self._bytes(name),
                          adapters=tuple(runtime.adapters))  # fmt: skip

    @contextlib.asynccontextmanager
    async def use(self, name: str, *, deadline: float) -> AsyncIterator[Any]:
        self._n_busy[name] += 1
        try:
            yield _Use(name, self._get(name))
        finally:
            self._n_busy[name] -= 1

    async def load(self, name: str) -> None:
        self._get(name)

    async def unload(self, name: str) -> None:
        raise ApiError(409, "this one stays")

    def peek(self, name: str) -> Runtime | None:
        return self._runtimes.get(name)

    def snapshot(self) -> Mapping[str, Any]:
        models = [{"name": name, "state": "open", "n_bytes": self._bytes(name),
                   "n_busy": self._n_busy[name]} for name in self.names]  # fmt: skip
        return {"budget_bytes": 4 << 30, "used_bytes": sum(map(self._bytes, self.names)),
                "models": models}  # fmt: skip

    def _bytes(self, name: str) -> int:
        return int(self._runtimes[name].stats()["memory_bytes"])  # type: ignore[call-overload]

    def _get(self, name: str) -> Runtime:
        if name not in self._runtimes:
            raise ApiError(404, f"there is no model {name!r:.80}", code="model_not_found")
        return self._runtimes[name]


class _Use:
    def __init__(self, name: str, runtime: Runtime) -> None:
        self.name, self.runtime = name, runtime

    def broke(self) -> None:
        raise AssertionError("an engine stopped")


def open_moe(folder: Path) -> Runtime:
    """Open a mixture of experts in less memory than it takes."""
    path = folder / "moe.gguf"
    if not path.exists():
        synth.write(MOE, path)
    settings: dict[str, Any] = {"n_ctx": 1024, "threads": 1, "n_ubatch": 64}
    try:
        Runtime(path, memory=MIB, **settings).close()
    except CapacityError as error:
        assert error.smallest_bytes is not None
        return Runtime(path, memory=error.smallest_bytes + SPARE, **settings)
    raise AssertionError("a model of many MiB fits one")


def open_default(folder: Path) -> Runtime:
    """Open the default model with adapters that change next to nothing."""
    path = resolve(DEFAULT_MODEL)
    adapters = []
    with GGUFFile.open(path) as file:
        shapes = base_shapes(describe(file))
    for seed, name in enumerate(("legal", "medical", "robotics", "poetry", "support")):
        adapters.append(folder / f"{name}.gguf")
        if not adapters[-1].exists():
            make_gguf(adapters[-1], shapes, AdapterSpec(seed=seed + 1, delta=1e-3))
    return Runtime(path, n_ctx=2048, n_kv=4096, threads=1, adapters=adapters, adapter_slots=2,
                   adapter_state="off")  # fmt: skip


def work(base: str, models: Sequence[str], pause_s: float, over: threading.Event) -> None:
    """Ask for short answers: N_WARM at once, after each other, then now and then."""
    rng = random.Random(7)
    with httpx2.Client(base_url=base, timeout=120) as client:
        for i in itertools.count():
            if over.wait(pause_s * rng.random() * 2 if i >= N_WARM else 0):
                return
            body: dict[str, Any] = {
                "model": rng.choice(models), "max_tokens": rng.randint(8, 60),
                "prompt": " ".join(rng.choices(WORDS.split(), k=rng.randint(4, 60))),
            }  # fmt: skip
            client.post("/v1/completions", json=body)


@contextlib.contextmanager
def demo(folder: Path, *, pair: Sequence[str] = (), pause_s: float = 1.0) -> Iterator[str]:
    """Serve until the block ends; gives the address."""
    with contextlib.ExitStack() as own:
        opened = {"moe": own.enter_context(open_moe(folder))}
        opened["smollm2"] = own.enter_context(open_default(folder))
        asked = ["moe", "moe", "moe", "smollm2:auto", "smollm2:legal", "smollm2:poetry"]
        if pair:
            opened["pair"] = own.enter_context(
                Runtime(pair[0], small=pair[1], steps="glimpse:1.0", n_ctx=1024, threads=1)
            )
        params = ServerParams(api_keys=())
        models = Several(opened)
        watch = live.Live(models)
        services = Services(params=params, models=models, observers=(watch,))
        routes = [*api.routes(services), *live.routes(services), *dashboard.routes(services)]
        base = own.enter_context(lab.serving(services, routes, guards(params)))
        over = threading.Event()
        worker = threading.Thread(target=work, args=(base, asked, pause_s, over))
        worker.start()
        try:
            yield base
        finally:
            over.set()
            worker.join(150)


def main() -> None:
    keep_heap_small()  # as `edgeroute serve` does
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pair", nargs=2, default=())
    parser.add_argument("--pause", type=float, default=1.0)
    given = parser.parse_args()
    with demo(given.folder, pair=given.pair, pause_s=given.pause) as base:
        print(base, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
