"""Device profiles: every figure with a source, hostile files refused by name and key."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgeroute.offload.throttle import Point, Throttle
from edgeroute.runtime.board import Board
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.forecast.devices import (
    FIGURES,
    device_of,
    find_device,
    find_mode,
    load_devices,
)
from edgeroute.tools.forecast.records import DeviceProfile

GIB = 1 << 30
MINE = """
[mine]
title = "A board"
processor = "cpu"
unified = true
memory = "4GiB"
system = "512MiB"
memory_bytes_s = 8e9
flops_s = 50e9
cores = 4
active_watts = 6
idle_watts = 2
storage = [{read = "1MiB", depth = 1, bytes_s = 1e8}]
"""


def test_what_was_asked_for_is_there() -> None:
    known = load_devices()
    assert {"orin-nano-8gb-super", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb",
            "agx-orin-32gb", "xavier-nx-16gb", "agx-xavier-32gb", "thor-t5000", "rpi5-8gb-sd",
            "rpi5-8gb-nvme", "rpi5-16gb-sd", "rpi5-16gb-nvme", "laptop-16gb",
            "phone-snapdragon-8-gen-3", "apple-m4-16gb"} <= known.keys()  # fmt: skip


@pytest.mark.parametrize("device", load_devices().values(), ids=lambda device: device.name)
def test_every_figure_has_a_source(device: DeviceProfile) -> None:
    optional = {"decode_ratio": device.decode_ratio, "layer_s": device.layer_s,
                "power_modes": device.power_modes or None}  # fmt: skip
    for figure in FIGURES:
        if figure in optional and optional[figure] is None:
            continue
        source = device.sources[figure]
        assert not source.startswith("stated in"), figure  # a figure whose source was forgotten
        said = "estimate" in source or "://" in source or "data sheet" in source
        assert said or "computed" in source or "class of machine" in source or "Apple" in source
    Throttle([Point(p.read_bytes, p.depth, p.bytes_s) for p in device.storage])
    assert 0 < device.idle_watts < device.active_watts
    assert device.active_watts <= max((m.watts for m in device.power_modes), default=1e9)
    best = [m for m in device.power_modes if m.memory_ratio == 1 == m.compute_ratio]
    assert best or not device.power_modes  # the mode in which the figures hold


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean orin-nano-8gb"):
        find_device("orin_nano")
    with pytest.raises(UsageError, match="there are orin-nano"):
        find_device("zzzzzz")
    with pytest.raises(UsageError):
        find_device("\0\x1b[2J" * 1000)


def test_a_user_adds_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    found = find_device(str(path))
    assert (found.name, found.memory_bytes, found.decode_ratio) == ("mine", 4 * GIB, None)
    assert found.sources["memory"] == "stated in mine.toml"
    assert find_device("mine", path) == found
    assert find_device("thor-t5000", path).cores == 14
    path.write_text(MINE + MINE.replace("[mine]", "[other]"))
    with pytest.raises(UsageError, match="2 devices"):
        find_device(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        find_device(str(tmp_path / "none.toml"))


def test_like_takes_figures_with_their_sources(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[mine]\nlike = "rpi5-8gb-sd"\nactive_watts = 9\n')
    base, found = load_devices()["rpi5-8gb-sd"], find_device(str(path))
    sources = {**base.sources, "active_watts": "stated in mine.toml"}
    assert found == replace(base, name="mine", active_watts=9.0, sources=sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("cores = 4", "cores = 0"), r"mine\.cores: a whole number"),
        (("cores = 4", "cores = true"), r"mine\.cores"),
        (("cores = 4", "kores = 4"), "no key 'kores'; did you mean cores"),
        (("cores = 4\n", ""), r"mine\.cores"),
        (("flops_s = 50e9", "flops_s = nan"), r"mine\.flops_s: a number"),
        (("memory_bytes_s = 8e9", "memory_bytes_s = inf"), r"mine\.memory_bytes_s"),
        (('memory = "4GiB"', 'memory = "9999999 TiB"'), r"mine\.memory: .* more than any device"),
        (('system = "512MiB"', 'system = "4GiB"'), r"mine\.system: .* leave nothing"),
        (('processor = "cpu"', 'processor = "npu"'), r"mine\.processor: cpu or gpu"),
        (("unified = true", "unified = 1"), r"mine\.unified: true or false"),
        (('title = "A board"', 'title = "a\\nb"'), r"mine\.title: a line of text"),
        (('read = "1MiB"', "read = 0"), r"mine\.storage\[0\]\.read"),
        (("depth = 1", "depth = 1e3"), r"mine\.storage\[0\]\.depth"),
        (("depth = 1", "deep = 1"), r"mine\.storage\[0\]: there is no key 'deep'"),
        (('[{read = "1MiB", depth = 1, bytes_s = 1e8}]', "[]"), r"mine\.storage: at least one"),
        (('[{read = "1MiB", depth = 1, bytes_s = 1e8}]', "7"), r"mine\.storage: a list"),
        (("idle_watts = 2", 'idle_watts = 2\nlike = "mine"'), r"mine\.like: 'mine' is no other"),
        (("idle_watts = 2", 'idle_watts = 2\npower_modes = [{name = "a b", watts = 1}]'),
         r"power_modes\[0\]\.name"),
        (("idle_watts = 2", "idle_watts = 2\nboards = [7]"), r"mine\.boards"),
        (("idle_watts = 2", "idle_watts = 2\nsources = {cores = 7}"), r"mine\.sources\.cores"),
        (("[mine]", '["a/b"]'), "is no name"),
        (("[mine]", "[[mine]]"), "a table is needed"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    text = MINE.replace(*change)
    assert text != MINE
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_devices(path)


def test_devices_that_are_like_each_other_end_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text('[a]\nlike = "b"\n[b]\nlike = "a"\n')
    with pytest.raises(UsageError, match="is no other device"):
        load_devices(path)


def test_power_modes_are_found_by_name() -> None:
    orin = load_devices()["orin-nano-8gb-super"]
    assert find_mode(orin, "maxn_super").memory_ratio == 1.0
    with pytest.raises(UsageError, match="there are MAXN_SUPER, 25W"):
        find_mode(orin, "99W")


@pytest.mark.parametrize(
    ("model", "gib", "storage", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.44, "nvme",
         "orin-nano-8gb-super"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7.4, "sd", "orin-nano-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 29.8, "nvme", "agx-orin-32gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, "nvme", "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "nvme", "thor-t5000"),
        ("Raspberry Pi 5 Model B Rev 1.0", 7.9, "sd", "rpi5-8gb-sd"),
        ("Raspberry Pi 5 Model B Rev 1.1", 15.8, "nvme", "rpi5-16gb-nvme"),
        ("Raspberry Pi 5 Model B Rev 1.0", 3.9, "sd", None),
        ("Some Laptop", 16, "nvme", None),
    ],
)  # fmt: skip
def test_a_board_finds_its_profile(model: str, gib: float, storage: str, name: str | None) -> None:
    board = Board(kind="jetson", model=model, unified=True, storage=storage)
    found = device_of(board, int(gib * GIB))
    assert (found.name if found else None) == name
