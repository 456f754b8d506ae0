"""Boards from recorded trees of /proc and /sys: what they are, their mode, what slows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgeroute.runtime import board_files
from edgeroute.runtime.board import board
from edgeroute.runtime.board_files import MAX_BYTES, Tree, run_command
from edgeroute.runtime.board_throttle import counted

CPUFREQ = "sys/devices/system/cpu/cpufreq/policy0"
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
    "proc/self/mounts": "sysfs /sys sysfs rw 0 0\n/dev/nvme0n1p1 / ext4 rw 0 0\n",
    "var/lib/nvpmodel/status": "pmode:0000 fmode:fan_mode_quiet\n",
    "etc/nvpmodel.conf": "# < POWER_MODEL ID=id_num NAME=mode_name >\n"
    "< POWER_MODEL ID=0 NAME=15W >\n"
    "CPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL NAME=MAXN_SUPER ID=2 >\n",
    f"{CPUFREQ}/scaling_cur_freq": "729600\n",
    f"{CPUFREQ}/scaling_max_freq": "1510400\n",
    f"{CPUFREQ}/cpuinfo_max_freq": "1728000\n",
    f"{CPUFREQ}/scaling_governor": "schedutil\n",
    f"{CPUFREQ}/scaling_driver": "tegra194\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/thermal/cooling_device4/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device4/cur_state": "1\n",
    "sys/class/thermal/cooling_device5/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device5/cur_state": "0\n",
    "sys/class/hwmon/hwmon1/oc3_event_cnt": "7\n",
}  # fmt: skip
RPI5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/self/mounts": "/dev/mmcblk0p2 / ext4 rw,noatime 0 0\n",
    "sys/block/mmcblk0/device/type": "SD\n",
    f"{CPUFREQ}/scaling_cur_freq": "2400000\n",
    f"{CPUFREQ}/scaling_max_freq": "2400000\n",
    f"{CPUFREQ}/cpuinfo_max_freq": "2400000\n",
    f"{CPUFREQ}/scaling_governor": "ondemand\n",
    f"{CPUFREQ}/scaling_driver": "cpufreq-dt\n",
}
LAPTOP = {
    "sys/class/dmi/id/product_name": "Laptop 13 (13th Gen Intel Core)\n",
    "proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: i7-1360P\n",
    "proc/self/mounts": "/dev/nvme0n1p2 / btrfs rw 0 0\n",
    "sys/class/drm/card1/device/uevent": "DRIVER=i915\nPCI_SLOT_NAME=0000:00:02.0\n",
    "sys/class/drm/card1-eDP-1/status": "connected\n",
    "sys/class/power_supply/ACAD/type": "Mains\n",
    "sys/class/power_supply/ACAD/online": "0\n",
    "sys/class/power_supply/BAT1/type": "Battery\n",
    "sys/class/power_supply/BAT1/status": "Discharging\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
    "sys/firmware/acpi/platform_profile": "low-power\n",
    f"{CPUFREQ}/scaling_cur_freq": "1000000\n",
    f"{CPUFREQ}/scaling_max_freq": "5000000\n",
    f"{CPUFREQ}/cpuinfo_max_freq": "5000000\n",
    f"{CPUFREQ}/scaling_governor": "powersave\n",
    f"{CPUFREQ}/scaling_driver": "intel_pstate\n",
    f"{CPUFREQ}/energy_performance_preference": "power\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "5\n",
}


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def answers(**known: str):  # type: ignore[no-untyped-def]
    def run(command: Sequence[str]) -> str:
        return known.get(Path(command[0]).name, "")

    return run


def test_a_jetson_orin_nano(tmp_path: Path) -> None:
    found = board(tree(tmp_path, ORIN_NANO), answers(), "linux")
    assert (found.kind, found.unified, found.storage) == ("jetson", True, "nvme")
    assert found.model.endswith("Developer Kit Super")
    assert found.power_mode == "15W"
    assert found.power_modes == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}
    assert found.on_battery is None and found.counters == {"oc3_event_cnt": 7}
    assert found.clock is not None and found.clock.limit_hz == 1_510_400_000
    what = {each.what: each for each in found.throttles}
    assert set(what) == {"clock limit", "temperature"}  # neither the fan nor an idle alert
    assert "gpu-throttle-alert" in what["temperature"].why
    assert "nvpmodel" in what["clock limit"].remedy


def test_a_jetson_without_a_status_file_is_asked(tmp_path: Path) -> None:
    files = {name: text for name, text in ORIN_NANO.items() if "status" not in name}
    run = answers(nvpmodel="NV Power Mode: MAXN_SUPER\n2\n")
    assert board(tree(tmp_path, files), run, "linux").power_mode == "MAXN_SUPER"
    assert board(tmp_path, answers(), "linux").power_mode is None


def test_a_raspberry_pi_tells_now_from_then(tmp_path: Path) -> None:
    run = answers(vcgencmd="throttled=0x50004\n")  # throttled now; voltage was low; throttled then
    found = board(tree(tmp_path, RPI5), run, "linux")
    assert (found.kind, found.unified, found.storage) == ("raspberry-pi", True, "sd")
    assert found.power_mode is None
    assert [each.what for each in found.throttles] == ["voltage", "throttling"]
    assert "since it was started" in found.throttles[0].why
    assert "since" not in found.throttles[1].why
    assert board(tmp_path, answers(vcgencmd="throttled=0x0\n"), "linux").throttles == ()


def test_a_raspberry_pi_by_sysfs(tmp_path: Path) -> None:
    where = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    found = board(tree(tmp_path, RPI5 | {where: "8\n"}), answers(), "linux")
    assert [each.what for each in found.throttles] == ["temperature"]


def test_a_laptop_on_battery(tmp_path: Path) -> None:
    found = board(tree(tmp_path, LAPTOP), answers(), "linux")
    assert (found.kind, found.model) == ("pc", "Laptop 13 (13th Gen Intel Core)")
    assert found.unified  # one card, and that is Intel's own
    assert found.on_battery and found.power_mode == "low-power, battery"
    what = [each.what for each in found.throttles]
    # With intel_pstate, `powersave` is how every machine scales by load.
    assert what == ["energy preference", "platform profile", "battery"]
    assert found.counters == {"core_throttle_count": 5}


def test_a_plugged_laptop_with_a_second_card(tmp_path: Path) -> None:
    more = {
        "sys/class/power_supply/ACAD/online": "1\n",
        "sys/class/power_supply/BAT1/status": "Full\n",
        "sys/class/drm/card0/device/uevent": "PCI_SLOT_NAME=0000:01:00.0\n",
        "sys/firmware/acpi/platform_profile": "balanced\n",
        f"{CPUFREQ}/energy_performance_preference": "balance_performance\n",
    }
    found = board(tree(tmp_path, LAPTOP | more), answers(), "linux")
    assert found.on_battery is False and found.power_mode == "balanced, ac"
    assert not found.unified and found.throttles == ()


def test_the_battery_of_a_mouse_is_not_the_machines(tmp_path: Path) -> None:
    files = {name: text for name, text in LAPTOP.items() if "BAT1" not in name}
    found = board(tree(tmp_path, files), answers(), "linux")
    assert found.on_battery is None and found.power_mode == "low-power"


def test_powersave_without_pstate_is_named(tmp_path: Path) -> None:
    files = RPI5 | {f"{CPUFREQ}/scaling_governor": "powersave\n"}
    found = board(tree(tmp_path, files), answers(), "linux")
    assert [each.what for each in found.throttles] == ["governor"]


def test_a_mac(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str:
        known = {"sysctl": "Apple M4\n", "pmset -g": " lowpowermode         1\n",
                 "pmset -g therm": "CPU_Speed_Limit \t= 60\n"}  # fmt: skip
        return known.get(command[0], known.get(" ".join(command), ""))

    found = board(None, run, "darwin")
    assert (found.kind, found.model, found.unified) == ("apple", "Apple M4", True)
    assert found.power_mode is not None and found.power_mode.startswith("low power")
    assert [each.what for each in found.throttles] == ["low power mode", "temperature"]


def test_windows_says_what_psutil_knows() -> None:
    found = board(None, answers(), "win32")
    assert found.kind == "pc" and found.clock is None


def test_this_machine_is_looked_at_without_harm() -> None:
    assert board().model


def test_nothing_at_all_is_something(tmp_path: Path) -> None:
    found = board(tmp_path, answers(), "linux")
    assert (found.kind, found.power_mode, found.clock) == ("other", None, None)
    assert found.throttles == () and found.counters == {}


@pytest.mark.parametrize(
    "rubbish", [b"", b"\0\0\0", b"\xff\xfe" * 99, b"-1", b"9" * 400, b"\x1b[2J", b"nan\n"]
)
def test_rubbish_in_every_file_is_ignored(tmp_path: Path, rubbish: bytes) -> None:
    files = {name: rubbish for trees in (ORIN_NANO, RPI5, LAPTOP) for name in trees}
    found = board(tree(tmp_path, files), answers(vcgencmd="throttled=0x", nvpmodel="?"), "linux")
    assert found.model.isprintable() and len(found.model) <= 200
    assert found.clock is None and found.power_modes == {}


def test_a_counter_counts_only_what_happened_between() -> None:
    assert counted({"core_throttle_count": 3}, {"core_throttle_count": 3, "oc1_event_cnt": 9}) == ()
    both = counted({"core_throttle_count": 3, "oc1_event_cnt": 8},
                   {"core_throttle_count": 4, "oc1_event_cnt": 9})  # fmt: skip
    assert [each.what for each in both] == ["temperature", "over-current"]


def test_files_and_commands_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big").write_bytes(b"a" * (3 * MAX_BYTES))
    assert len(Tree(tmp_path).text("big")) == MAX_BYTES
    assert Tree(tmp_path).text(".") == ""  # a folder
    assert run_command(["no-such-program-anywhere"]) == ""
    monkeypatch.setattr(board_files, "COMMAND_S", 0.05)
    assert run_command(["sleep", "5"]) == ""
