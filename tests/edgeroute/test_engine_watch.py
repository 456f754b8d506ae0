"""An engine seen from outside: signs of life, a thread that hangs, stops."""

import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Chunk, Runtime, engine_thread
from edgeroute.pulse import Pulse
from edgeroute.runtime import errors
from edgeroute.runtime.device import Device
from edgeroute.runtime.stop_flag import StopFlag
from tests.edgeroute.engine_lab import SETTINGS, WAIT_S, until

LONG: dict[str, Any] = {"max_tokens": 400, "logit_bias": {0: -100, 2: -100}}
HUNG = errors.ClosedError("the engine made no progress for 60 s")


class Hang:
    """Makes a device's computations wait, once it is on, until it is let go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on = threading.Event()
        self.entered = threading.Event()
        self.free = threading.Event()
        self.when: Callable[[], bool] = lambda: True
        compute = Device.compute

        def hang(device: Device, graph: int) -> bool:
            if self.on.is_set() and self.when():
                self.entered.set()
                assert self.free.wait(60)
            return compute(device, graph)

        patch.setattr(Device, "compute", hang)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    found = Hang(monkeypatch)
    monkeypatch.setattr(engine_thread, "ABANDONED_WAIT_S", 0.3)
    yield found
    found.free.set()


@pytest.fixture
def opened(tiny_path: Path) -> Iterator[Runtime]:
    """A Runtime whose thread must be gone, and must have freed everything, in the end."""
    runtime = Runtime(tiny_path, **SETTINGS)
    yield runtime
    runtime.close()
    assert not runtime._engine._thread.is_alive()
    assert runtime.stuck_bytes == 0
    assert runtime._loaded.device._backend == 0, "what the model took was not freed"
    assert not runtime._engine._outstanding.waits


# signs of life


def test_an_idle_engine_has_nothing_to_do(opened: Runtime) -> None:
    opened.generate(prompt_ids=[40] * 9, max_tokens=3)
    until(lambda: not opened.pulse().busy)
    first = opened.pulse()
    time.sleep(0.02)
    second = opened.pulse()
    assert not second.busy and second.doing == "nothing" and second.idle_s > first.idle_s
    opened.close()
    assert opened.pulse() == Pulse(busy=False, idle_s=0.0, doing="nothing: the engine has stopped")


def test_work_is_progress(opened: Runtime) -> None:
    """However long an answer takes: every pass is a sign of life."""
    with opened.stream(prompt_ids=[40] * 9, **LONG) as stream:
        next(stream)
        began, seen = time.monotonic(), []
        while time.monotonic() < began + 0.1:
            seen.append(opened.pulse())
            time.sleep(0.001)
        assert any(
            each.busy and each.doing == "prompts: 0, answers: 1, waiting: 0" for each in seen
        )
        assert min(each.idle_s for each in seen) < 0.05


def test_a_hung_engine_is_busy_and_idle(opened: Runtime, hang: Hang) -> None:
    hang.on.set()
    stream = opened.stream(prompt_ids=[40] * 9, max_tokens=3)
    assert hang.entered.wait(WAIT_S)
    first = opened.pulse()
    assert first.busy and first.doing.startswith("prompts: 1, answers: 0")
    until(lambda: opened.pulse().idle_s > first.idle_s + 0.05)
    other = opened.stream(prompt_ids=[40] * 9, max_tokens=3)  # no sign of life
    assert opened.pulse().idle_s > first.idle_s + 0.05
    opened.interrupt()
    assert opened.pulse().idle_s > first.idle_s + 0.05
    hang.free.set()
    assert [list(each)[-1].finish_reason for each in (stream, other)] != []


def test_a_pause_before_a_request_is_no_stall(
    opened: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of silence is one of an idle engine's, until somebody waits."""
    entered, free = threading.Event(), threading.Event()

    def pause(_: Callable[[], bool]) -> None:
        entered.set()
        assert free.wait(WAIT_S)

    opened.generate(prompt_ids=[40] * 9, max_tokens=2)
    monkeypatch.setattr(opened._scheduler, "use_the_pause", pause)
    opened._engine.order(lambda: None)
    assert entered.wait(WAIT_S)
    opened.pulse()
    for heart in (opened._loaded.device, opened._engine._heart):
        heart.beat -= 3600
    opened._engine._heart._moved = -math.inf  # 0 is minutes ago on a machine that just started
    assert opened.pulse().idle_s > 3000 and not opened.pulse().busy
    stream = opened.stream(prompt_ids=[40] * 9, max_tokens=2)
    pulse = opened.pulse()
    assert pulse.busy and pulse.idle_s < 3000
    free.set()
    list(stream)


def test_a_hung_command_is_seen(opened: Runtime) -> None:
    entered, free = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert free.wait(WAIT_S)

    caller = threading.Thread(target=opened._engine.order, args=(wait,))
    caller.start()
    assert entered.wait(WAIT_S)
    assert opened.pulse().busy and opened.pulse().doing == "a command"
    free.set()
    caller.join()
    until(lambda: not opened.pulse().busy)


@pytest.mark.skipif(sys.platform != "linux", reason="counting needs the C library's semaphores")
def test_one_long_batch_is_progress(smollm2: Runtime) -> None:
    """On a slow machine a batch takes minutes: its operations count, not its end alone."""
    flag = smollm2._loaded.device.stop_flag
    stream = smollm2.stream(prompt_ids=[1000] * 200, max_tokens=1, prefix="off")
    until(lambda: smollm2.stats()["running"])
    seen = set()
    while smollm2.stats()["running"]:
        seen.add(flag.n_asked)
    list(stream)
    assert len(seen) > 5, "it was seen at one or two places only"


@pytest.mark.skipif(sys.platform != "linux", reason="counting needs the C library's semaphores")
def test_a_stop_is_no_progress(opened: Runtime) -> None:
    opened.generate(prompt_ids=[40] * 9, max_tokens=2)
    until(lambda: not opened.pulse().busy)
    n_asked = opened._loaded.device.stop_flag.n_asked
    opened.interrupt()
    assert opened._loaded.device.stop_flag.n_asked == n_asked > 10


def test_a_stop_flag_counts_and_stops() -> None:
    flag = StopFlag()
    assert not flag.is_set() and flag.n_asked == 0
    flag.set()
    flag.set()
    assert flag.is_set() and flag.n_asked == 0
    flag.clear()
    assert not flag.is_set()


# a thread that hangs


def outcomes(stream: Any) -> list[Any]:
    """All that a stream gives, an error included."""
    found: list[Any] = []
    try:
        found.extend(stream)
    except BaseException as error:
        found.append(error)
    return found


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_all_that_wait_for_a_hung_engine_are_told_once(
    phase: str, opened: Runtime, hang: Hang
) -> None:
    told: list[list[Any]] = [[], [], []]
    streams = [opened.stream(prompt_ids=[50 + i] * 200, **LONG) for i in range(3)]
    if phase == "decode":
        for stream in streams:
            next(stream)
    hang.on.set()
    assert hang.entered.wait(WAIT_S)
    caller = threading.Thread(target=lambda: told[0].extend(_try(
        lambda: opened.generate(prompt_ids=[60] * 9, max_tokens=2)
    )))  # fmt: skip
    command = threading.Thread(target=lambda: told[1].extend(_try(
        lambda: opened._engine.order(lambda: told[2].append("ran"))
    )))  # fmt: skip
    for thread in (caller, command):
        thread.start()
    until(lambda: len(opened._engine._outstanding.waits) == 5)

    assert opened.abandon(HUNG) == 5
    for thread in (caller, command):
        thread.join(WAIT_S)
    assert told == [[HUNG], [HUNG], []]
    for stream in streams:
        *before, last = outcomes(stream)
        assert last is HUNG and all(isinstance(each, Chunk) for each in before)
        assert outcomes(stream) == []
    with pytest.raises(errors.ClosedError, match="no progress"):
        opened.generate(prompt_ids=[40], max_tokens=1)
    with pytest.raises(errors.ClosedError, match="no progress"):
        opened.embed([[40]])
    assert opened.abandon(RuntimeError("again")) == 0
    began = time.monotonic()
    opened.close()
    assert time.monotonic() - began < 15
    assert opened.stuck_bytes > 0

    inboxes = [stream._inbox for stream in streams]
    hang.free.set()
    opened._engine._thread.join(WAIT_S)
    assert all(inbox.empty() for inbox in inboxes), "nothing comes behind the end"
    assert told[2] == [], "a command that nobody waits for is not run"
    assert opened._scheduler.n_running == 0
    kv = opened._loaded.kv
    assert kv.n_free_cells + opened._scheduler.prefix.n_kept_cells == kv.n_cells


def _try(call: Callable[[], object]) -> list[object]:
    try:
        return [call()]
    except errors.EdgerouteError as error:
        return [error]


def test_async_listeners_and_embeddings_are_told(opened: Runtime, hang: Hang) -> None:
    async def all_at_once() -> None:
        hang.on.set()
        tasks = [asyncio.create_task(each) for each in (
            opened.agenerate(prompt_ids=[40] * 100, max_tokens=5), opened.aembed([[50]] * 5),
            opened.aembed([[60] * 400]), _gather(opened.astream(prompt_ids=[70] * 5, **LONG)),
        )]  # fmt: skip
        while len(opened._engine._outstanding.waits) < 4 or not hang.entered.is_set():
            await asyncio.sleep(0.001)
        assert await asyncio.to_thread(opened.abandon, HUNG) == 4
        for task in tasks:
            with pytest.raises(errors.ClosedError) as told:
                await task
            assert told.value is HUNG
        hang.free.set()

    asyncio.run(all_at_once())


async def _gather(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def test_an_engine_that_came_back_at_once_is_closed_as_ever(opened: Runtime) -> None:
    stream = opened.stream(prompt_ids=[40] * 9, **LONG)
    next(stream)
    assert opened.abandon(HUNG) == 1
    assert outcomes(stream)[-1] is HUNG
    until(lambda: not opened._engine._thread.is_alive())
    assert opened._loaded.device._backend == 0, "freed without being closed"


def test_closing_waits_no_longer_once_it_is_abandoned(opened: Runtime, hang: Hang) -> None:
    hang.on.set()
    stream = opened.stream(prompt_ids=[40] * 9, max_tokens=2)
    assert hang.entered.wait(WAIT_S)
    closer = threading.Thread(target=opened.close)
    closer.start()
    time.sleep(0.05)
    assert closer.is_alive()
    assert opened.stuck_bytes == 0, "not yet given up"
    opened.abandon(HUNG)
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert outcomes(stream) == [HUNG]
    hang.free.set()


def test_a_storm_of_ends(tiny_path: Path) -> None:
    """Abandoned in the middle of work, at any moment: every listener hears one end."""
    for i in range(12):
        runtime = Runtime(tiny_path, **SETTINGS)
        streams = [runtime.stream(prompt_ids=[40 + n] * (9 + 30 * n), max_tokens=40)
                   for n in range(6)]  # fmt: skip
        time.sleep(0.004 * i)
        runtime.abandon(HUNG)
        for stream in streams:
            *before, last = outcomes(stream)
            assert last is HUNG or last.finish_reason is not None
            assert all(each.finish_reason is None for each in before)
        runtime.close()
        assert not runtime._engine._outstanding.waits and runtime.stuck_bytes == 0
        assert all(stream._inbox.empty() for stream in streams)


def test_a_bug_in_the_engine_still_tells_everybody(
    opened: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(opened._scheduler, "_decode", fails)
    with pytest.raises(errors.ClosedError, match="a bug"):
        opened.generate(prompt_ids=[40] * 3, max_tokens=5)
    until(lambda: not opened.pulse().busy)
    with pytest.raises(errors.ClosedError):
        opened.embed([[40]])


# stops


def test_an_interrupt_costs_an_answer_nothing_but_time(opened: Runtime) -> None:
    expected = opened.generate(prompt_ids=[50] * 300, max_tokens=30, prefix="off")
    stream = opened.stream(prompt_ids=[50] * 300, max_tokens=30, prefix="off")
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        opened.interrupt()
    answer = chunks[-1].generation
    assert answer is not None and answer.token_ids == expected.token_ids
