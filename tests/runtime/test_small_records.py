"""Units, ledger, machine and settings: small things that everything trusts."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.config import RunParams, merge_settings
from edgeroute.runtime import machine
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.ledger import Ledger
from edgeroute.runtime.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("512m", 512 << 20), (77, 77), ("0", 0)],
)
def test_byte_counts_are_read(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1 GiBB", "1e9", "nan", "9" * 30, "1..2G", -5])
def test_what_is_no_byte_count_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


@given(st.integers(0, 1 << 49))
def test_printed_bytes_are_close_and_short(n_bytes: int) -> None:
    text = format_bytes(n_bytes)
    number, unit = text.split(" ")
    assert len(number) <= 5
    if unit != "B":
        assert parse_bytes(text) == pytest.approx(n_bytes, rel=6e-3)


def test_the_ledger_enters_all_or_nothing() -> None:
    ledger = Ledger(100)
    ledger.reserve({"a": 60})
    with pytest.raises(CapacityError, match="over the budget of 100 B"):
        ledger.reserve({"b": 30, "c": 11})
    assert ledger.used_bytes == 60
    ledger.reserve({"b": 30, "c": 10})
    assert ledger.free_bytes == 0
    assert [entry.owner for entry in ledger.entries()] == ["a", "b", "c"]
    ledger.release("b")
    assert ledger.free_bytes == 30
    with pytest.raises(KeyError):
        ledger.release("b")
    with pytest.raises(ValueError, match="already"):
        ledger.reserve({"a": 1})


def test_memory_and_cores_are_plausible() -> None:
    memory = machine.memory()
    assert 0 < memory.available_bytes <= memory.total_bytes <= psutil.virtual_memory().total
    assert 1 <= machine.usable_cores() <= (psutil.cpu_count() or 1)


def test_a_control_group_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page cache inside the group can be dropped, so it is not used memory."""
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    monkeypatch.setattr(machine, "_group_folders", lambda _: [(2, tmp_path)])
    memory = machine.memory()
    assert (memory.total_bytes, memory.available_bytes) == (1_000_000, 500_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory().limit == "machine"


def test_a_cpu_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "_group_folders", lambda _: [(2, tmp_path)])
    assert machine.cpu_quota() == 1.5
    assert machine.usable_cores() == 1


def test_load_meter_counts_only_others() -> None:
    meter = machine.LoadMeter()
    n = 0
    while meter.age_s < 0.25:  # our own spinning must not look like somebody else's
        n += 1
    others, covered = meter.read()
    assert 0 <= others <= (psutil.cpu_count() or 1)
    assert covered >= 0.25


def test_settings_merge_in_rising_order() -> None:
    env = {"EDGEROUTE_N_CTX": "1024", "EDGEROUTE_MEMORY": "3GiB", "OTHER": "x"}
    assert merge_settings({}, {}) == RunParams()
    assert merge_settings({}, env).n_ctx == 1024
    merged = merge_settings({"n_ctx": 2048, "memory": None}, env)
    assert (merged.n_ctx, merged.memory) == (2048, "3GiB")
    with pytest.raises(UsageError, match="EDGEROUTE_THREADS"):
        merge_settings({}, {"EDGEROUTE_THREADS": "two"})
    with pytest.raises(UsageError, match="did you mean n_ctx"):
        merge_settings({"n_ctxt": 5}, {})


def test_large_blocks_leave_the_heap_when_they_are_freed() -> None:
    """In a process of its own, for it concerns all of one."""
    code = (
        "import ctypes, psutil\n"
        "from edgeroute.runtime.host_memory import keep_heap_small\n"
        "if not keep_heap_small(): print('no such C library'); raise SystemExit\n"
        "c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p\n"
        "c.malloc.argtypes = [ctypes.c_size_t]; c.free.argtypes = [ctypes.c_void_p]\n"
        "def get(n):\n"
        "    p = c.malloc(n); ctypes.memset(p, 1, n); return p\n"
        "c.free(get(16 << 20))\n"  # from here on, glibc itself would keep blocks up to this
        "rss = lambda: psutil.Process().memory_info().rss\n"
        "before = rss(); blocks = [get(1 << 20) for _ in range(64)]\n"
        "for block in blocks[:-1]: c.free(block)\n"
        "print(rss() - before < 8 << 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("True", "no such C library")
