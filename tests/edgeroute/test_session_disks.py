"""Sessions on disks that are slow, full or gone, and in processes that are killed."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Generation, Runtime, sessions
from edgeroute.runtime import session_writer
from edgeroute.runtime.session_file import SessionReader
from edgeroute.runtime.session_writer import SessionWriter
from edgeroute.session_folder import SessionFolder
from edgeroute.session_gauge import RETRY, RestoreGauge
from tests.edgeroute.session_lab import (
    PROMPT,
    SETTINGS,
    WAIT_S,
    ask,
    cells_accounted,
    figures,
    same,
    settled,
    told,
)


class Gate:
    """A place in the code where a thread waits until the test lets it go."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real = getattr(owner, name)

        def wait(*args: Any) -> Any:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            return real(*args)

        patch.setattr(owner, name, wait)


def test_a_disk_that_hangs_does_not_hold_up_a_request(
    one: Runtime, saved: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, SessionReader, "read_block")
    monkeypatch.setattr(sessions, "RESTORE_MAX_S", 0.05)
    answer = ask(one, session="a")
    assert "took longer" in told(answer)["not_restored"] and same(answer, saved)
    assert gate.reached.is_set()
    gate.open.set()
    assert same(ask(one, prefix="off"), saved)
    assert cells_accounted(one)


def test_a_disk_that_does_not_answer_at_all(
    one: Runtime, saved: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, SessionReader, "__init__")
    monkeypatch.setattr(sessions, "LOOK_S", 0.05)
    answer = ask(one, session="a")
    assert "did not answer" in told(answer)["not_restored"] and same(answer, saved)
    gate.open.set()


def test_a_request_that_is_cancelled_while_its_cells_are_read(
    one: Runtime, saved: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, SessionReader, "read_block")
    stream = one.stream(prompt_ids=PROMPT, session="a")
    assert gate.reached.wait(WAIT_S)
    running = ask(one, PROMPT[::-1])  # others do not wait for that disk
    stream.cancel()
    last = list(stream)[-1].generation
    assert last is not None and last.finish_reason == "cancelled"
    assert told(last)["not_restored"] and told(last)["saved"] is not True
    gate.open.set()
    assert running.stats.n_generated > 0 and cells_accounted(one)
    assert same(ask(one, session="a"), saved)


def test_a_slow_save_gives_its_cells_up_when_others_need_them(
    tiny_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PATIENCE_S", 0.05)
    gate = Gate(monkeypatch, SessionWriter, "__init__")
    settings = SETTINGS | {"n_kv": 512}
    with Runtime(tiny_path, sessions=folder, **settings) as runtime:
        assert told(ask(runtime, session="a"))["saved"] is True
        assert gate.reached.wait(WAIT_S)
        other = ask(runtime, PROMPT[::-1])  # needs the whole pool
        assert other.finish_reason == "length"
        gate.open.set()
        stats = settled(runtime)
        assert stats["failed"] == 1 and "others needed its cells" in stats["last_error"]
    assert list(Path(folder).iterdir()) == []


def test_a_full_disk_is_told_and_closing_is_bounded(
    tiny_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SessionWriter, view: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        ask(runtime, session="a")
        settled(runtime)
        with monkeypatch.context() as patch:
            patch.setattr(SessionWriter, "_write", full)
            ask(runtime, PROMPT[::-1], session="a")
            stats = settled(runtime)
        assert stats["failed"] == 1 and "No space" in stats["last_error"]
        assert runtime.sessions()[0].n_tokens == 311  # the one before
        gate = Gate(monkeypatch, session_writer.os, "fsync")
        monkeypatch.setattr(sessions, "CLOSE_S", 0.05)
        ask(runtime, PROMPT[5:], session="b")
        assert gate.reached.wait(WAIT_S)
    gate.open.set()


def test_closing_waits_for_a_save_that_is_under_way(
    tiny_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed before would be read all the same, and saved."""
    gate = Gate(monkeypatch, SessionWriter, "add")
    runtime = Runtime(tiny_path, sessions=folder, **SETTINGS)
    ask(runtime, session="a")
    assert gate.reached.wait(WAIT_S)
    closing = threading.Thread(target=runtime.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    gate.open.set()
    closing.join(WAIT_S)
    assert [each.n_tokens for each in SessionFolder(Path(folder)).sessions()] == [311]


def test_a_later_save_replaces_one_that_has_not_begun(
    one: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, SessionWriter, "__init__")
    ask(one, PROMPT[1:], session="b")
    assert gate.reached.wait(WAIT_S)
    for n in (200, 220, 240):
        ask(one, PROMPT[:n], session="a")
    ask(one, PROMPT[2:], session="gone")
    one.remove_session("gone")
    assert figures(one)["pending"] >= 3
    gate.open.set()
    stats = settled(one)
    assert stats["saved"] == 2 and stats["failed"] == 0
    assert {(each.name, each.n_tokens) for each in one.sessions()} == {("a", 251), ("b", 310)}


def test_too_many_saves_are_refused(one: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, SessionWriter, "__init__")
    monkeypatch.setattr(sessions, "MAX_SAVING", 2)
    answers = [ask(one, PROMPT[n : n + 40], session=f"s{n}") for n in range(3)]
    assert [told(answer)["saved"] is True for answer in answers] == [True, True, False]
    gate.open.set()


def test_reading_is_switched_off_where_it_loses() -> None:
    gauge = RestoreGauge()
    assert gauge.why_not(1000, 1 << 30) is None  # nobody knows yet
    gauge.saw_prefill(10, 1e-3)
    assert gauge.compute_s(1) is None  # too short to tell
    gauge.saw_prefill(1000, 1.0)
    gauge.saw_read(1 << 20, 1.0)
    assert gauge.why_not(3000, 1 << 20) is None
    answers = [gauge.why_not(1000, 3 << 20) for _ in range(RETRY + 1)]
    assert all("3.00 s, computing" in str(why) for why in answers[:-1])
    assert answers[-1] is None and gauge.n_refused == RETRY


def test_a_slow_disk_is_left_alone(one: Runtime, saved: Generation) -> None:
    gauge = one._scheduler.sessions.gauge  # type: ignore[union-attr]
    gauge.saw_prefill(10_000, 0.001)
    gauge.saw_read(1, 1.0)
    answer = ask(one, session="a")
    assert "computing those tokens" in told(answer)["not_restored"]
    assert figures(one)["not_worth_it"] == 1 and same(answer, saved)


KILLED = """
import sys
from edgeroute import Runtime
from edgeroute.runtime.session_writer import SessionWriter
import time

real = SessionWriter._write
def slow(self, view):
    for at in range(0, len(view), 1 << 13):
        real(self, view[at : at + (1 << 13)])
        time.sleep(0.001)
SessionWriter._write = slow
prompt = [3 + 7 * i % 290 for i in range(300)]
with Runtime(sys.argv[1], sessions=sys.argv[2], n_ctx=512, n_ubatch=64, threads=1) as runtime:
    while True:
        runtime.generate(prompt_ids=prompt, max_tokens=12, session="a")
        if runtime.stats()["sessions"]["saved"]:
            print("saved", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_while_it_saves_leaves_the_last_whole_save(
    tiny_path: Path, folder: str, saved: Generation
) -> None:
    for delay_s in (0.0, 0.013, 0.029):
        command = [sys.executable, "-c", KILLED, str(tiny_path), folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "saved\n"
            time.sleep(delay_s)
            process.kill()
        with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
            assert len(runtime.sessions()) == 1
            answer = ask(runtime, session="a")
            assert told(answer)["restored_tokens"] >= 256 and same(answer, saved)
