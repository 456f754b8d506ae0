"""A device that is gone: whose answers go on, who is told, and what the Runtime is after it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime, recovery
from edgeroute.runtime.errors import (
    ClosedError,
    ComputeError,
    DeviceLostError,
    EdgerouteError,
    UsageError,
)
from edgeroute.runtime.session_writer import SessionWriter
from edgeroute.scheduler import Scheduler
from edgeroute.tools import synth
from tests.device.loss_lab import (
    FAR,
    LONG,
    SETTINGS,
    WAIT_S,
    WHY,
    Far,
    Restarts,
    all_at_once,
    far,
    in_background,
    nowhere_else,
    outcome,
    restarts,
    until,
)
from tests.edgeroute.adapter_lab import make as make_adapter

__all__ = ["far", "nowhere_else", "restarts"]

PROMPT = [40 + i % 50 for i in range(150)]


@pytest.fixture(scope="module")
def plain(tiny_path: Path) -> Iterator[Runtime]:
    """The same model where nothing is lost."""
    with Runtime(tiny_path, **SETTINGS) as found:
        yield found


@pytest.fixture
def distant(tiny_path: Path, far: Far) -> Iterator[Runtime]:
    with Runtime(tiny_path, device=FAR, **SETTINGS) as found:
        yield found
    assert all(link.closed for link in far.links), "a device was not closed"


def ids(runtime: Runtime, **options: Any) -> tuple[int, ...]:
    return runtime.generate(prompt_ids=PROMPT, **LONG | options).token_ids


# answers that go on


@pytest.mark.parametrize(
    ("n", "down"), [(1, False), (2, True), (3, False), (4, False), (20, False), (20, True)]
)
def test_an_answer_goes_on(
    n: int, down: bool, distant: Runtime, plain: Runtime, far: Far, restarts: Restarts
) -> None:
    """In any batch of the prompt, and between any two tokens."""
    far.cut_after(n, down=down)
    found = distant.generate(prompt_ids=PROMPT, **LONG)
    assert found.token_ids == restarts.answer(plain, PROMPT) and found.finish_reason == "length"
    assert restarts[tuple(PROMPT)] == [max(0, n - 3)]
    (told,) = found.stats.to_dict()["continued"]  # type: ignore[misc]
    where = "cpu, which may be slower" if down else FAR
    assert told == (f"device {FAR} is gone: {WHY}; the model was opened again with device {where}")
    stats = distant.stats()
    assert stats["losses"] == {
        "lost": 1, "opened": 1, "continued": 1, "failed": 0, "down": False
    }  # fmt: skip
    assert any(told in each for each in stats["warnings"])  # type: ignore[attr-defined]
    assert stats["finished"] == 1 and ("cpu" in str(stats["device"]).lower()) == down
    again = distant.generate(prompt_ids=PROMPT, **LONG)
    assert again.token_ids == ids(plain) and "continued" not in again.stats.to_dict()


def test_what_was_drawn_stays_drawn(distant: Runtime, plain: Runtime, far: Far) -> None:
    """Random numbers, penalties, grammar, log-probabilities and text go on where they were."""
    options: dict[str, Any] = {
        "prompt_ids": PROMPT, "max_tokens": 40, "temperature": 100.0, "seed": 3, "logprobs": 2,
        "repeat_penalty": 1.2, "grammar": 'root ::= [a-z ]+ "."',
    }  # fmt: skip
    # So hot that the logits hardly count: what is drawn is the generator's and the grammar's.
    wanted = plain.generate(**options)
    far.cut_after(15)
    chunks = list(distant.stream(**options))
    found = chunks[-1].generation
    assert found is not None and found.stats.continued
    assert found.token_ids == wanted.token_ids
    assert found.text == wanted.text == "".join(chunk.text for chunk in chunks)
    assert [each.token_id for each in found.logprobs] == list(found.token_ids)
    assert sum(len(chunk.logprobs) for chunk in chunks) == len(found.logprobs)


def test_speculated_answers_go_on(
    tiny_path: Path, plain: Runtime, far: Far, restarts: Restarts
) -> None:
    prompt = [40, 41, 42, 43] * 20
    with Runtime(tiny_path, device=FAR, speculate="lookup", max_batch=4, **SETTINGS) as runtime:
        far.cut_after(12)
        found = runtime.generate(prompt_ids=prompt, **LONG)
        assert found.token_ids == restarts.answer(plain, prompt) and found.stats.continued


def test_all_that_run_and_wait_go_on(
    tiny_path: Path, plain: Runtime, far: Far, restarts: Restarts
) -> None:
    """Sync, stream and async, embeddings too, more than there are cells for."""
    prompts = [[50 + i] * (20 + 30 * i) for i in range(5)]
    vectors = plain.embed([[44] * 100, [45] * 9]).vectors
    with Runtime(tiny_path, device=FAR, **SETTINGS | {"n_kv": 768}) as runtime:
        far.cut_after(12)
        all_at_once(runtime, 6)
        streams = [runtime.stream(prompt_ids=each, **LONG) for each in prompts[:3]]
        thread, told = in_background(lambda: runtime.embed([[44] * 100, [45] * 9]).vectors)

        async def both() -> list[Any]:
            return await asyncio.gather(
                *(runtime.agenerate(prompt_ids=each, **LONG) for each in prompts[3:])
            )

        later = asyncio.run(asyncio.wait_for(both(), WAIT_S))
        found = [outcome(each) for each in streams] + later
        thread.join(WAIT_S)
        wanted = [restarts.answer(plain, each) for each in prompts]
        assert [each.token_ids for each in found] == wanted
        np.testing.assert_array_equal(told[0], vectors)
        losses: Any = runtime.stats()["losses"]
        assert losses["continued"] >= 3 and losses["failed"] == 0
        kv = runtime._loaded.kv
        assert kv.n_free_cells + runtime._scheduler.prefix.n_kept_cells == kv.n_cells


def test_one_loss_after_another(
    distant: Runtime, plain: Runtime, far: Far, restarts: Restarts
) -> None:
    stream = distant.stream(prompt_ids=PROMPT, **LONG)
    for i in range(3):
        far.cut_after(10)
        until(lambda n=i: len(far.links) == n + 2)  # type: ignore[misc]
    found = outcome(stream)
    assert found.token_ids == restarts.answer(plain, PROMPT) and len(found.stats.continued) == 3


def test_what_other_errors_come_of_a_loss(
    distant: Runtime, plain: Runtime, far: Far, restarts: Restarts
) -> None:
    """Zeros from a dead device may be met as any error: none of them is the answer's."""
    n = [0]

    def broken() -> bool:
        n[0] += 1
        if n[0] in (3, 9):
            far.links[-1].lost = WHY
            raise (ComputeError("no numbers") if n[0] == 3 else IndexError("expert 1000000"))
        return False

    far.when = broken
    found = distant.generate(prompt_ids=PROMPT, **LONG)
    assert found.token_ids == restarts.answer(plain, PROMPT)
    assert len(found.stats.continued or ()) == 2


# nobody runs


def test_a_loss_while_nothing_runs(distant: Runtime, plain: Runtime, far: Far) -> None:
    wanted = ids(plain)
    assert ids(distant) == wanted
    far.cut()
    found = distant.generate(prompt_ids=PROMPT, **LONG)
    assert found.token_ids == wanted and found.stats.n_cached == 0
    assert found.stats.continued is None, "it had not begun"
    (note,) = distant._engine.losses.notes
    assert note.endswith("cells kept for later prompts are gone")


def test_a_loss_in_a_pause(
    distant: Runtime, plain: Runtime, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause(scheduler: Scheduler, _: Callable[[], bool]) -> None:
        if far.links[0].lost is None:
            far.cut()
            scheduler.check()

    monkeypatch.setattr(Scheduler, "use_the_pause", pause)
    ids(distant)
    until(lambda: len(far.links) == 2)
    assert ids(distant) == ids(plain)


# nothing can be opened


def test_neither_works(distant: Runtime, plain: Runtime, far: Far, nowhere_else: None) -> None:
    streams = [distant.stream(prompt_ids=[50 + i] * 100, **LONG) for i in range(3)]
    next(streams[0])
    far.cut(down=True)
    found = [outcome(each) for each in streams]
    for error in found:
        assert isinstance(error, DeviceLostError) and str(error).startswith(
            f"device {FAR} is gone: {WHY}; it could not be opened with device {FAR}: device {FAR} "
            "does not answer: refused; it could not be opened with device no-such-device: "
        )  # fmt: skip
        assert "bring the device back" in str(error)
    stats: Any = distant.stats()
    assert stats["losses"] == {
        "lost": 1, "opened": 0, "continued": 0, "failed": 3, "down": True
    }  # fmt: skip
    assert stats["warnings"][-1] == str(found[0]) and stats["running"] == stats["waiting"] == 0
    assert distant.residency() is None and distant.encode("a") == plain.encode("a")
    assert not distant.pulse().busy
    n_tries = far.n_tries
    for _ in range(3):
        with pytest.raises(DeviceLostError, match="refused"):
            ids(distant)
    with pytest.raises(DeviceLostError, match="refused"):
        distant._engine.order(lambda: None)
    assert far.n_tries == n_tries, "a try just failed"
    assert not distant._engine._outstanding.waits


def test_each_later_request_tries_again(
    distant: Runtime, plain: Runtime, far: Far, nowhere_else: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "AGAIN_S", 0.0)
    far.cut(down=True)
    for n_tries in (2, 3, 4):
        with pytest.raises(DeviceLostError, match=f"^device {FAR} is gone: {WHY}; it could"):
            ids(distant)
        assert far.n_tries == n_tries
    far.down = None
    assert ids(distant) == ids(plain)
    losses: Any = distant.stats()["losses"]
    assert losses["lost"] == losses["opened"] == 1 and not losses["down"]
    distant._engine.order(lambda: None)


def test_opening_may_fail_otherwise(
    distant: Runtime, far: Far, nowhere_else: None, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise MemoryError("no")

    far.cut()
    monkeypatch.setattr("edgeroute.loaded.LoadedModel.__init__", full)
    with pytest.raises(DeviceLostError, match="opening the model again failed: MemoryError"):
        ids(distant)
    distant._engine._thread.join(WAIT_S)
    with pytest.raises(ClosedError, match="the engine stopped: no"):
        ids(distant)


# meanwhile


def test_it_is_no_stall_and_no_hang(
    distant: Runtime, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is opened again: a sign of life, deadlines, cancels, and an end."""
    monkeypatch.setattr(recovery, "RECONNECT_S", 60.0)
    hasty = distant.stream(prompt_ids=PROMPT, **LONG | {"timeout_s": 0.3})
    left = distant.stream(prompt_ids=PROMPT, **LONG)
    stays = distant.stream(prompt_ids=PROMPT, **LONG)
    for each in (hasty, left, stays):
        next(each)
    far.cut(down=True)
    until(lambda: far.n_tries > 2)
    pulse = distant.pulse()
    assert pulse.busy and pulse.idle_s == 0 and pulse.doing == "opening the model again"
    left.cancel()
    assert outcome(left).finish_reason == "cancelled"
    assert outcome(hasty).finish_reason == "timeout"
    distant.stats()
    thread, _ = in_background(distant.close)
    assert isinstance(outcome(stays), EdgerouteError)
    thread.join(WAIT_S)
    assert not thread.is_alive() and not distant._engine._thread.is_alive()


def test_closed_right_after_a_loss(distant: Runtime, far: Far) -> None:
    stream = distant.stream(prompt_ids=PROMPT, **LONG)
    next(stream)
    far.cut(down=True)
    distant.close()
    last = outcome(stream)
    assert isinstance(last, EdgerouteError) or last.finish_reason == "length"


def test_a_command_meets_a_loss(distant: Runtime, far: Far) -> None:
    def work() -> None:
        far.cut()
        raise ValueError("zeros")

    with pytest.raises(DeviceLostError, match=FAR):
        distant._engine.order(work)
    ran = threading.Event()
    distant._engine.order(ran.set)
    assert ran.is_set() and len(far.links) == 2


# what cannot go on


def test_two_models_lose_their_answer(tiny_path: Path, tmp_path: Path, far: Far) -> None:
    """What two models write together is in the middle of something; what waits goes on."""
    synth.make("llama", small := tmp_path / "small.gguf", seed=2)
    options = {"prompt_ids": [41] * 30, **LONG, "steps": "random:0.5"}
    with Runtime(tiny_path, device=FAR, small=small, **SETTINGS | {"n_kv": 512}) as runtime:
        wanted = ids(runtime, steps="off")
        served = runtime.generate(**options | {"steps": "accuracy:0.8"})
        far.cut_after(30)
        all_at_once(runtime, 4)
        streams = [runtime.stream(**options) for _ in range(4)]
        found = [outcome(each) for each in streams]
        lost = [each for each in found if isinstance(each, DeviceLostError)]
        assert lost and FAR in str(lost[0]) and len(lost) < len(found)
        assert all(len(each.token_ids) == 60 for each in found if each not in lost)
        losses: Any = runtime.stats()["losses"]
        assert losses["failed"] == len(lost)
        assert ids(runtime, steps="off") == wanted and len(outcome(
            runtime.stream(**options)
        ).token_ids) == 60  # fmt: skip
        runtime.feedback(served.id, 1.0)
        with pytest.raises(UsageError):
            runtime.feedback(served.id, 1.0)


# what is kept


def test_adapters_stay(tiny_path: Path, tmp_path: Path, far: Far, restarts: Restarts) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    for i, name in enumerate(("one", "two")):
        make_adapter(folder / name, tiny_path, seed=i + 1)
    make_adapter(extra := tmp_path / "extra", tiny_path, seed=9)
    settings = SETTINGS | {"adapters": str(folder), "adapter_state": "off"}
    with Runtime(tiny_path, **settings) as runtime:
        one = ids(runtime, adapter="one")
    with Runtime(tiny_path, device=FAR, **settings) as runtime:
        runtime.add_adapter(extra)
        runtime.remove_adapter("two")
        first = runtime.generate(prompt_ids=PROMPT, adapter="auto", max_tokens=3)
        far.cut_after(8)
        found = runtime.generate(prompt_ids=PROMPT, adapter="extra", **LONG)
        assert found.adapter == "extra"
        assert found.stats.continued and runtime.adapters == ["extra", "one"]
        runtime.feedback(first.id, 1.0)
        assert ids(runtime, adapter="one") == one
        far.cut()
        assert runtime.add_adapter(folder / "two") == "two"
        assert runtime.adapters == ["extra", "one", "two"]
    with Runtime(tiny_path, **settings) as runtime:
        runtime.add_adapter(extra)
        assert found.token_ids == restarts.answer(runtime, PROMPT, adapter="extra")


def test_nothing_is_saved_of_what_was_lost(
    tiny_path: Path, tmp_path: Path, far: Far, plain: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells read from a dead device are zeros: no session may have them."""
    add = SessionWriter.add

    def cut(writer: SessionWriter, cells: Any) -> None:
        if far.links[0].lost is None:
            far.cut()
        add(writer, cells)

    monkeypatch.setattr(SessionWriter, "add", cut)
    with Runtime(tiny_path, device=FAR, sessions=str(tmp_path), **SETTINGS) as runtime:
        first: Any = runtime._scheduler.sessions
        ids(runtime, session="chat")
        until(lambda: not first.stats()["pending"])
        assert first.stats()["failed"] == 1 and "is gone" in first.stats()["last_error"]
        assert runtime.sessions() == []
        again = runtime.generate(prompt_ids=PROMPT, session="chat", **LONG)
        assert again.token_ids == ids(plain)
    with Runtime(tiny_path, device=FAR, sessions=str(tmp_path), **SETTINGS) as runtime:
        assert [each.name for each in runtime.sessions()] == ["chat"]
        far.cut_after(8)
        found = runtime.generate(prompt_ids=PROMPT, session="chat", **LONG)
        assert found.finish_reason == "length" and found.stats.continued
        assert (found.stats.session or {})["saved"] is True
