"""The doctor's memory: earlier figures, the device's profile, what is throttled and what helps."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.cli import cli
from edgeroute.commands import doctor_compare, doctor_facts
from edgeroute.commands.doctor_compare import compare
from edgeroute.commands.doctor_findings import Measured, figures_of, findings
from edgeroute.commands.doctor_history import (
    MOST_ENTRIES,
    Entry,
    add_entry,
    best_mode,
    read_history,
    usual,
)
from edgeroute.runtime.board import Board
from edgeroute.runtime.board_throttle import Throttle
from edgeroute.runtime.cache_file import cache_path
from edgeroute.tools.forecast.devices import load_devices

DISK, MEMORY = "disk 1, depth 2, an installed model, bypassed", "memory read, 6 threads"
MB, GB = 10**6, 10**9
PC = Board(kind="pc", model="A machine", unified=False)
ORIN = Board(
    kind="jetson", model="NVIDIA Jetson Orin Nano Super", unified=True, power_mode="15W",
    power_modes={0: "15W", 1: "25W", 2: "MAXN_SUPER"}, storage="nvme",
)  # fmt: skip


def entry(mode: str | None = None, **figures: float) -> Entry:
    names = {"disk": DISK, "memory": MEMORY}
    return Entry(when=int(time.time()) - 60, version="0.1.0", power_mode=mode,
                 figures={names[key]: value for key, value in figures.items()})  # fmt: skip


def now(board: Board = PC, others_busy: float = 0.0, **figures: float) -> Measured:
    return Measured(figures=entry(**figures).figures, board=board, others_busy=others_busy)


# history


def test_a_history_is_kept_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "h.jsonl"
    assert read_history(path) == []
    for i in range(MOST_ENTRIES + 5):
        add_entry({MEMORY: 1e9 + i}, "15W", path)
    found = read_history(path)
    assert len(found) == MOST_ENTRIES == path.read_text().count("\n")
    assert found[-1].figures == {MEMORY: 1e9 + MOST_ENTRIES + 4}
    assert found[0].figures == {MEMORY: 1e9 + 5} and found[0].power_mode == "15W"


@pytest.mark.parametrize(
    "line",
    [
        "", "rubbish", "[1]", "null", "[" * 5000, '{"when": 1}', "\xff\xfe",
        '{"when": 1, "version": "0", "power_mode": null, "figures": {"a": 1.0}}',  # 1970
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {}}',
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {"a": -1}}',
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {"a": NaN}}',
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {"a": 1e99}}',
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {"a": true}}',
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {"a": "1"}}',
        '{"when": NOW, "version": "0", "power_mode": null, "figures": {"\\u001b[2J": 1.0}}',
        '{"when": NOW, "version": "0", "power_mode": 7, "figures": {"a": 1.0}}',
        '{"when": NOW.5, "version": "0", "power_mode": null, "figures": {"a": 1.0}}',
        '{"when": FUTURE, "version": "0", "power_mode": null, "figures": {"a": 1.0}}',
    ],
)  # fmt: skip
def test_lines_that_cannot_be_believed_are_left_out(tmp_path: Path, line: str) -> None:
    good = '{"when": NOW, "version": "0", "power_mode": null, "figures": {"a": 1.0}}'
    text = f"{line}\n{good}\n".replace("NOW", str(int(time.time()) - 9))
    path = tmp_path / "h.jsonl"
    path.write_text(text.replace("FUTURE", str(int(time.time()) + 9999)), encoding="latin-1")
    assert [each.figures for each in read_history(path)] == [{"a": 1.0}]


def test_what_is_usual_takes_three() -> None:
    two = [entry(disk=900 * MB), entry(disk=800 * MB)]
    assert usual(two, DISK) is None
    three = [*two, entry(disk=100 * MB, mode="15W")]
    known = usual(three, DISK)
    assert known is not None and (known.value, known.n) == (800 * MB, 3)
    assert usual(three, DISK, "15W") is None and best_mode(three, DISK) is None


# findings


def test_a_slow_disk_is_named_with_its_usual() -> None:
    history = [entry(disk=rate * MB, memory=20 * GB) for rate in (880, 900, 950)]
    (found,) = findings(now(disk=306 * MB, memory=19 * GB), history, None)
    assert found.what == "disk reads at depth 2" and found.expected == 900 * MB
    assert found.why.startswith("disk reads at depth 2 292 MiB/s, 0.34 of this machine's usual 858")
    assert "iotop" in found.remedy


def test_noise_is_not_reported() -> None:
    history = [entry(disk=900 * MB)] * 3
    assert findings(now(disk=770 * MB), history, None) == []
    assert len(findings(now(disk=760 * MB), history, None)) == 1
    assert findings(now(disk=2000 * MB), history, None) == []
    assert findings(now(disk=9 * MB), history[:2], None) == []


def test_a_disk_that_varies_is_given_its_spread() -> None:
    """500 to 1050 MB/s in turn is what this one does; a fourth of the usual is not."""
    varying = [entry(disk=rate * MB) for rate in (500, 750, 520, 930, 1000, 510, 1050)]
    assert findings(now(disk=515 * MB), varying, None) == []
    assert len(findings(now(disk=200 * MB), varying, None)) == 1
    # Slow twice running is still slow.
    steady = [entry(disk=rate * MB) for rate in (900, 900, 900, 306)]
    assert len(findings(now(disk=300 * MB), steady, None)) == 1


def test_busy_neighbours_and_heat_are_given_as_causes() -> None:
    history = [entry(memory=20 * GB)] * 3
    (found,) = findings(now(memory=10 * GB, others_busy=1.4), history, None)
    assert "others kept 1.4 cores busy" in found.why and "end what keeps" in found.remedy
    hot = Throttle(what="temperature", why="it is too hot", remedy="cool it")
    board = replace(PC, throttles=(hot,))
    slow, said = findings(now(board, memory=10 * GB), history, None)
    assert "seen: temperature" in slow.why and slow.remedy == "cool it"
    assert (said.what, said.why, said.value) == ("temperature", "it is too hot", None)


def test_a_smaller_power_mode_is_told_by_this_machines_own_figures() -> None:
    history = [entry("MAXN_SUPER", memory=68 * GB)] * 3 + [entry("15W", memory=45 * GB)] * 3
    (found,) = findings(now(ORIN, memory=45 * GB), history, None)
    assert found.against == "this machine in power mode MAXN_SUPER"
    assert found.why.startswith("power mode 15W: memory reads 41.9 GiB/s, 0.66 of")
    assert found.remedy == "sudo nvpmodel -m 2"
    fast = replace(ORIN, power_mode="MAXN_SUPER")
    assert findings(now(fast, memory=66 * GB), history, None) == []


def test_a_profile_says_what_the_mode_and_the_drive_cost() -> None:
    device = load_devices()["orin-nano-8gb-super"]
    (mode,) = findings(now(ORIN, memory=45 * GB, disk=1500 * MB), [], device)
    assert mode.what == "power mode" and mode.remedy == "sudo nvpmodel -m 2"
    assert "0.66 of decoding's speed in MAXN_SUPER" in mode.why
    drive, _ = findings(now(ORIN, memory=45 * GB, disk=90 * MB), [], device)
    assert drive.what == "disk reads at depth 2" and drive.against == device.title
    assert "estimate" in drive.why  # the profile's figure is nobody's measurement
    fast = replace(ORIN, power_mode="MAXN_SUPER")
    (memory,) = findings(now(fast, memory=9 * GB), [], device)
    assert "0.09 of what NVIDIA Jetson Orin Nano" in memory.why
    assert findings(now(replace(ORIN, power_mode="MINE"), memory=45 * GB), [], device) == []


def test_names_of_figures_say_what_they_depend_on() -> None:
    facts: dict[str, Any] = {
        "memory_bandwidth": {"read_bytes_s": 5, "copy_bytes_s": 4, "n_threads": 2},
        "disk_bandwidth": {"file": "a file", "cache": "bypassed",
                           "by_queue_depth": {"1": {"bytes_s": 3, "n_bytes": 9}}},
    }  # fmt: skip
    assert figures_of(facts, "77") == {
        "memory read, 2 threads": 5.0, "memory copy, 2 threads": 4.0,
        "disk 77, depth 1, a file, bypassed": 3.0,
    }  # fmt: skip
    failed = {"memory_bandwidth": {"error": "no"}, "disk_bandwidth": {"error": "no"}}
    assert figures_of(failed, "77") == {} == figures_of({}, "77")


# the command


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "doctor.jsonl"
    monkeypatch.setattr("edgeroute.commands.doctor_history.cache_path", lambda name: path)
    return path


def facts_of(disk: int) -> dict[str, Any]:
    return {
        "memory": {"total_bytes": 8 * GB}, "cpu": {"others_busy": 0.0},
        "disk_bandwidth": {"file": "a file", "cache": "bypassed",
                           "by_queue_depth": {"2": {"bytes_s": disk, "n_bytes": 9}}},
    }  # fmt: skip


def test_a_run_is_compared_before_it_is_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_compare, "_disk", lambda: "1")
    for n_earlier in range(3):
        found = compare(facts_of(900 * MB), (ORIN, ORIN), None)
        assert found["comparison"]["n_earlier"] == n_earlier
        assert [each["what"] for each in found["findings"]] == ["power mode"]
    assert found["comparison"]["device"] == "orin-nano-8gb-super"
    slow = compare(facts_of(300 * MB), (ORIN, ORIN), None)
    (figure,) = slow["comparison"]["figures"].values()
    assert figure == {"bytes_s": 300 * MB, "usual_bytes_s": 900 * MB, "ratio": 0.3333}
    assert slow["findings"][0]["what"] == "disk reads at depth 2"
    assert len(cache.read_text().splitlines()) == 4
    json.dumps(slow)
    unmeasured = compare({"memory": {"error": "no"}}, (PC, PC), None)
    assert unmeasured["comparison"] == {"device": None, "n_earlier": 4, "figures": {}}
    assert len(cache.read_text().splitlines()) == 4  # nothing measured, nothing kept


def test_throttling_while_it_measured_is_told(cache: Path) -> None:
    before = replace(PC, counters={"core_throttle_count": 1})
    after = replace(PC, counters={"core_throttle_count": 5})
    (found,) = compare({}, (before, after), None)["findings"]
    assert found["what"] == "temperature" and "while this was measured" in found["why"]


def run_doctor(monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    monkeypatch.setattr(doctor_facts, "_build", lambda: {"rpc": True, "features": []})
    return CliRunner().invoke(cli, ["doctor", "--no-measure", *options])


def test_the_doctor_prints_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Throttle(what="battery", why="it runs on battery", remedy="plug it in")
    board = replace(PC, throttles=(slow,))
    monkeypatch.setattr("edgeroute.runtime.board.board", lambda: board)
    text = run_doctor(monkeypatch).stdout
    assert "it runs on battery" in text and "plug it in" in text and "A machine (pc)" in text
    found = json.loads(run_doctor(monkeypatch, "--json", "--device", "rpi5-8gb-sd").stdout)
    assert found["board"]["model"] == "A machine"
    assert found["comparison"]["device"] == "rpi5-8gb-sd"
    assert found["findings"][0]["remedy"] == "plug it in"
    monkeypatch.setattr("edgeroute.runtime.board.board", lambda: PC)
    assert "nothing is known to be (no earlier figures yet)" in run_doctor(monkeypatch).stdout


def test_an_unknown_device_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_doctor(monkeypatch, "--device", "orin")
    assert found.exit_code == 2 and "did you mean" in found.output


def test_the_history_lies_in_the_users_cache() -> None:
    assert cache_path("doctor.jsonl").name == "doctor.jsonl"
