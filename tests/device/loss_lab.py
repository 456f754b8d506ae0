"""A device behind a link that breaks when a test says so: this machine's processor, far away."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edgeroute import Chunk, Runtime, recovery
from edgeroute.request import Request
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import DeviceLostError

FAR = "rpc:far.test:50052"
WHY = "the test cut it"
SETTINGS: dict[str, Any] = {
    "n_ctx": 512, "n_kv": 2048, "n_ubatch": 64, "threads": 1, "memory": "512MiB",
    "repack_experts": False,
}  # fmt: skip
LONG: dict[str, Any] = {"max_tokens": 60, "logit_bias": {0: -100, 2: -100}}
WAIT_S = 20.0


class Link:
    """What a Device needs of a link to another machine."""

    def __init__(self, name: str) -> None:
        self.address = self.endpoint = name.removeprefix("rpc:")
        self.lost: str | None = None
        self.closed = False

    def check(self) -> None:
        if self.lost is not None:
            raise DeviceLostError(f"device rpc:{self.address} is gone: {self.lost}")

    def close(self) -> None:
        self.closed = True


class Far:
    """All devices of other machines while a test runs. `down` is why none can be opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.links: list[Link] = []
        self.down: str | None = None
        self.n_tries = 0
        self.when: Callable[[], bool] = lambda: False
        """Asked before each computation there whether the link breaks now."""
        compute = Device.compute

        def watched(device: Device, graph: int) -> bool:
            if isinstance(device.link, Link) and device.link.lost is None and self.when():
                device.link.lost = WHY
            return compute(device, graph)

        patch.setattr(Device, "compute", watched)
        patch.setattr(Device, "_open_rpc", classmethod(lambda cls, name: self._open(name)))
        patch.setattr(recovery, "RECONNECT_S", 0.0)
        patch.setattr(recovery, "POLL_S", 0.01)

    def _open(self, name: str) -> Device:
        self.n_tries += 1
        if self.down is not None:
            raise DeviceLostError(f"device {name} does not answer: {self.down}")
        link = Link(name)
        self.links.append(link)
        info = replace(Device.open("cpu").info, name=name, host_pointers=False)
        return Device(info, link)  # type: ignore[arg-type]

    def cut(self, *, down: bool = False) -> None:
        """Break the link that is in use now."""
        self.down = "refused" if down else None
        self.links[-1].lost = WHY

    def cut_after(self, n: int, *, down: bool = False) -> None:
        """Break it at the n-th computation from now on, once."""
        left = [n]

        def now() -> bool:
            left[0] -= 1
            if left[0] == 0 and down:
                self.down = "refused"
            return left[0] == 0

        self.when = now


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Far:
    return Far(monkeypatch)


class Restarts(dict[tuple[int, ...], list[int]]):
    """By prompt: how many tokens each of its requests had answered when it was begun again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        restart = Request.restart

        def noted(request: Request) -> None:
            self.setdefault(tuple(request.prompt_ids), []).append(len(request.token_ids))
            restart(request)

        patch.setattr(Request, "restart", noted)

    def answer(self, plain: Runtime, prompt: list[int], **options: Any) -> tuple[int, ...]:
        """What a prompt's only request must answer, by a Runtime where nothing is lost.

        What was answered before a loss is read again as a prompt is, which has other last bits
        than tokens that come one by one.
        """
        options = LONG | options
        found: tuple[int, ...] = ()
        for n in [*self.get(tuple(prompt), []), options["max_tokens"]]:
            left = options | {"max_tokens": options["max_tokens"] - len(found)}
            more = plain.generate(prompt_ids=[*prompt, *found], prefix="off", **left).token_ids
            found += more[: n - len(found)]
        return found


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> Restarts:
    return Restarts(monkeypatch)


@pytest.fixture
def nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model cannot be opened on this machine's processor."""
    monkeypatch.setattr(recovery, "HOST", "no-such-device")


def until(found: Callable[[], object]) -> None:
    """Wait for something that is bound to come."""
    end = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def outcome(stream: Any) -> Any:
    """What a stream ends with: its generation, or its error."""
    try:
        last: Chunk = list(stream)[-1]
    except BaseException as error:
        return error
    return last.generation


def all_at_once(runtime: Runtime, n: int) -> None:
    """Hold the engine until `n` requests are queued: none is done before the last has come."""
    held, come = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        come.wait(WAIT_S)

    in_background(lambda: runtime._engine.order(hold))
    assert held.wait(WAIT_S)
    in_background(lambda: (until(lambda: runtime._engine.n_queued >= n), come.set()))


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """Run something in a thread; the list gets its result or its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found
