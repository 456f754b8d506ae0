"""Fleets of tiny models, and what tests of them share."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from edgeroute import Runtime, pool_shelf
from edgeroute.config import RunParams
from edgeroute.runtime.device import Device
from edgeroute.server.fleet import Fleet
from edgeroute.server.records import ServerParams
from edgeroute.shelf_plan import ShelfModel, plan_model
from edgeroute.tools.synth import make

NAMES = ("red", "green", "blue")
GIB = 1 << 30
PROMPT = "Tell me about the sea."
T = TypeVar("T")


def make_files(folder: Path) -> dict[str, Path]:
    """Three tiny models that answer differently."""
    found = {name: folder / f"{name}.gguf" for name in NAMES}
    for seed, path in enumerate(found.values()):
        make("llama", path, seed=seed + 1)
    return found


def shelf_model(name: str, path: Path, memory: int | None = None, **settings: Any) -> ShelfModel:
    """A model of so many bytes and no more: cells for one request, unless told otherwise."""
    plain = {"threads": 1, "n_ctx": 256, "n_kv": 256, "n_ubatch": 64}
    if "n_ctx" in settings:
        plain["n_kv"] = settings["n_ctx"]
    params = RunParams(**plain | settings)
    return ShelfModel(name=name, path=path, memory=memory, params=params)


def bytes_of(model: ShelfModel) -> int:
    return plan_model(model, GIB, "test").n_bytes


def make_fleet(models: list[ShelfModel], memory: int = GIB, **params: Any) -> Fleet:
    return Fleet(ServerParams(memory=memory, **params), models)


def go(work: Coroutine[Any, Any, T], fleet: Fleet | None = None) -> T:
    """Run a test's coroutine, bounded; the fleet is closed after it."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await work

    try:
        return asyncio.run(bounded())
    finally:
        if fleet is not None:
            assert fleet.close(20.0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never happened")


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def state(fleet: Fleet, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        each for each in fleet.snapshot()["models"] if each["name"] == name
    )
    return found


def states(fleet: Fleet) -> dict[str, str]:
    return {each["name"]: each["state"] for each in fleet.snapshot()["models"]}


async def ask(fleet: Fleet, name: str, n: int = 4, wait_s: float = 30.0) -> str:
    async with fleet.use(name, deadline=soon(wait_s)) as use:
        answer = await use.runtime.agenerate(PROMPT, max_tokens=n)
        return answer.text


class SlowOpening:
    """Makes the opening of models wait for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.n_begun = 0
        real = Runtime

        def slow(path: Path, **settings: Any) -> Runtime:
            self.n_begun += 1
            assert self.go.wait(30)
            return real(path, **settings)

        monkeypatch.setattr(pool_shelf, "Runtime", slow)


class HungDevice:
    """Makes a device compute for ever once `hangs` is set, whatever it is asked; until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs, self.go = threading.Event(), threading.Event()
        self.n_hung = 0
        real = Device.compute

        def compute(device: Device, graph: int) -> bool:
            if self.hangs.is_set() and not self.go.is_set():
                self.n_hung += 1
                assert self.go.wait(60)
            return real(device, graph)

        monkeypatch.setattr(Device, "compute", compute)


class HungDisk:
    """Makes the opening of one model wait for `go`, as if its disk were stuck, while `hangs`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.hangs, self.go = threading.Event(), threading.Event()
        self.hangs.set()
        self.n_begun = 0
        real = Runtime

        def opened(path: Path, **settings: Any) -> Runtime:
            if path.stem == name and self.hangs.is_set():
                self.n_begun += 1
                assert self.go.wait(60)
            return real(path, **settings)

        monkeypatch.setattr(pool_shelf, "Runtime", opened)
