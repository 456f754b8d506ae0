"""Which devices share the host's memory: one rule, from what ggml and the board say."""

import pytest

from edgeroute.runtime.board import Board
from edgeroute.runtime.device import Device, devices
from edgeroute.runtime.unified import shares_memory

PC = Board(kind="pc", model="a tower", unified=False)
LAPTOP = Board(kind="pc", model="Intel's graphics only", unified=True)
JETSON = Board(kind="jetson", model="NVIDIA Jetson Orin Nano", unified=True)
PHONE = Board(kind="phone", model="a phone", unified=True)


@pytest.mark.parametrize(
    ("kind", "host_pointers", "registry", "board", "shares"),
    [
        ("cpu", True, "CPU", PC, True),
        ("accel", True, "BLAS", PC, True),
        ("igpu", False, "CUDA", JETSON, True),
        ("gpu", False, "CUDA", JETSON, True),  # a driver that does not say so
        ("igpu", False, "Vulkan", PC, True),
        ("gpu", False, "CUDA", PC, False),
        ("gpu", False, "CUDA", LAPTOP, False),  # a GPU without a screen beside Intel's
        ("gpu", False, "Vulkan", PHONE, False),  # on a slot of its own: Vulkan knows
        ("gpu", True, "MTL", PC, True),
        ("gpu", False, "OpenCL", PHONE, True),
        ("gpu", False, "OpenCL", PC, False),
        ("gpu", False, "RPC", JETSON, False),
        ("cpu", True, "RPC[there:1]", PC, False),
        ("other", False, "Meta", PC, False),
    ],
)
def test_the_rule(
    kind: str, host_pointers: bool, registry: str, board: Board, shares: bool
) -> None:
    assert shares_memory(kind, host_pointers, registry, board) == shares


def test_this_machine_decides_where_no_board_is_given() -> None:
    assert shares_memory("gpu", False, "CUDA") in (True, False)


def test_the_processor_says_what_it_is() -> None:
    cpu = next(info for info in devices() if info.kind == "cpu")
    assert (cpu.asynchronous, cpu.events, cpu.pinned) == (False, False, False)
    assert cpu.unified and cpu.host_pointers
    with Device.open("cpu") as device:
        assert device.is_cpu and device.second_backend() is None
        free, total = device.memory()
        assert 0 < free <= total
