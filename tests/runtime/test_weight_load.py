"""Weights brought in by several threads, read ahead: the bytes of one after the other."""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute.models.registry import describe
from edgeroute.runtime import host_memory, weight_load
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import DeviceLostError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tensor import Descriptors, new_tensor, place_all
from edgeroute.runtime.weight_load import PIECE_BYTES, Copy, ReadAhead, copy_all, rank
from edgeroute.tools.synth import make

TYPES = ("Q4_0", "Q4_K", "Q8_0", "F32")
LONG_S = 60.0


@pytest.fixture(scope="module", params=TYPES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> (
    Iterator[GGUFFile]
):  # fmt: skip
    path = tmp_path_factory.mktemp("load") / "model.gguf"
    make("llama", path, weight_type=request.param)
    with GGUFFile.open(path) as found:
        yield found


@pytest.fixture
def cpu() -> Iterator[Device]:
    with Device.open("cpu") as device:
        yield device


class Room:
    """Matrices of a file, placed in a buffer of the first kind that repacks, or the plain one."""

    def __init__(self, file: GGUFFile, device: Device) -> None:
        names = [spec.file_name for spec in describe(file).specs() if spec.use == "mul_mat"]
        infos = [file.tensors[name] for name in dict.fromkeys(names)]
        home = next(iter(device.extra_buffer_types), device.buffer_type)
        if infos[0].type.name not in ("Q4_0", "Q4_K"):
            home = device.buffer_type
        self.descriptors = Descriptors(len(infos))
        tensors = [new_tensor(self.descriptors, i.type, i.ne, i.name) for i in infos]
        self.buffer = place_all(tensors, device, home)
        self.copies = [Copy(t, i, False) for t, i in zip(tensors, infos, strict=True)]

    def bytes(self) -> bytes:
        return ctypes.string_at(self.buffer.base, self.buffer.n_bytes)

    def clear(self) -> None:
        ctypes.memset(self.buffer.base, 0, self.buffer.n_bytes)

    def close(self) -> None:
        self.buffer.free()
        self.descriptors.free()


@pytest.fixture
def room(file: GGUFFile, cpu: Device) -> Iterator[Room]:
    made = Room(file, cpu)
    made.clear()
    yield made
    made.close()


def copy_here(file: GGUFFile, device: Device, room: Room) -> None:
    """Copy as a load does."""
    infos = sorted((each.info for each in room.copies), key=rank)
    with ReadAhead(file, infos) as ahead:
        copy_all(file, device, room.copies, ahead)


@pytest.mark.parametrize("n_threads", [1, 5])
def test_threads_write_the_bytes_of_one(
    file: GGUFFile, cpu: Device, room: Room, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in room.copies:
        ggml().ggml_backend_tensor_set(each.tensor, file.address(each.info), 0, each.info.nbytes)
    wanted = room.bytes()
    assert any(wanted)
    room.clear()
    monkeypatch.setattr(weight_load, "usable_cores", lambda: n_threads)
    copy_here(file, cpu, room)
    assert room.bytes() == wanted


def test_a_lost_device_ends_the_copying(
    file: GGUFFile, cpu: Device, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []

    def check(_device: Device) -> None:
        checks.append(1)
        if len(checks) == 2:
            raise DeviceLostError("it is gone")

    monkeypatch.setattr(Device, "check", check)
    monkeypatch.setattr(Device, "is_cpu", False)
    with pytest.raises(DeviceLostError):
        copy_here(file, cpu, room)
    assert len(checks) == 2 < len(room.copies)


def test_an_error_in_a_thread_is_raised(
    file: GGUFFile, cpu: Device, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_device: Device) -> None:
        raise DeviceLostError("it is gone")

    monkeypatch.setattr(Device, "check", check)
    monkeypatch.setattr(weight_load, "usable_cores", lambda: 4)
    with pytest.raises(DeviceLostError):
        copy_here(file, cpu, room)


class Wishes:
    """Stands in for the system: notes what is asked for, and takes a number of wishes at most."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most, self.asked = most, list[tuple[int, int]]()
        self.changed = threading.Condition()

    def will_need(self, address: int, nbytes: int) -> bool:
        with self.changed:
            self.asked.append((address, nbytes))
            self.changed.notify_all()
            return len(self.asked) < self.most

    def wait_for(self, n_bytes: int) -> None:
        with self.changed:
            enough = self.changed.wait_for(lambda: self.n_bytes >= n_bytes, LONG_S)
        assert enough, f"{self.n_bytes} bytes were asked for, not {n_bytes}"

    @property
    def n_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.asked)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFFile]:
    path = tmp_path_factory.mktemp("large") / "model.gguf"
    make("llama", path)
    with GGUFFile.open(path) as found:
        assert max(info.nbytes for info in found.tensors.values()) > PIECE_BYTES
        yield found


def ask(wishes: Wishes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "will_need", wishes.will_need)


def test_every_byte_is_asked_for_once_and_in_order(
    large: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = Wishes()
    ask(wishes, monkeypatch)
    infos = sorted(large.tensors.values(), key=rank)
    with ReadAhead(large, [*infos, *infos]) as ahead:
        wishes.wait_for(sum(info.nbytes for info in infos))
        for info in infos:
            ahead.used(info)
    at = 0
    for info in infos:
        end = large.address(info) + info.nbytes
        for start in range(large.address(info), end, PIECE_BYTES):
            assert wishes.asked[at] == (start, min(PIECE_BYTES, end - start))
            at += 1
    assert at == len(wishes.asked)


def test_no_more_is_asked_for_than_there_is_room(
    large: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes, most = Wishes(), 2 * PIECE_BYTES
    ask(wishes, monkeypatch)
    monkeypatch.setattr(weight_load, "MOST_AHEAD_BYTES", most)
    infos = sorted(large.tensors.values(), key=rank)
    with ReadAhead(large, infos) as ahead:
        n_used = 0
        for info in infos:
            wishes.wait_for(min(n_used + info.nbytes, most))
            assert wishes.n_bytes <= n_used + most
            n_used += info.nbytes
            ahead.used(info)
    assert wishes.n_bytes <= n_used


def test_what_has_been_used_is_asked_for_no_more(
    large: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = Wishes()
    ask(wishes, monkeypatch)
    monkeypatch.setattr(weight_load, "MOST_AHEAD_BYTES", PIECE_BYTES)
    first, *others = sorted(large.tensors.values(), key=rank)
    with ReadAhead(large, [first, others[-1]]) as ahead:
        wishes.wait_for(PIECE_BYTES)  # of a longer tensor: there is no room for its rest
        ahead.used(first)
        wishes.wait_for(PIECE_BYTES + others[-1].nbytes)
    assert wishes.asked[1:] == [(large.address(others[-1]), others[-1].nbytes)]


def test_it_can_be_closed_while_it_waits_for_room(
    large: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = Wishes()
    ask(wishes, monkeypatch)
    monkeypatch.setattr(weight_load, "MOST_AHEAD_BYTES", PIECE_BYTES)
    ahead = ReadAhead(large, sorted(large.tensors.values(), key=rank))
    wishes.wait_for(PIECE_BYTES)
    ahead.close()
    ahead.close()
    assert wishes.n_bytes == PIECE_BYTES


def test_a_system_that_takes_no_wishes_is_asked_once(
    large: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = Wishes(most=1)
    ask(wishes, monkeypatch)
    ahead = ReadAhead(large, large.tensors.values())
    wishes.wait_for(1)
    ahead.close()
    assert len(wishes.asked) == 1


def test_the_system_takes_wishes_for_mapped_files_only(large: GGUFFile, tmp_path: Path) -> None:
    if host_memory._madvise() is None:
        assert not host_memory.will_need(0, 1)
        return
    info = next(iter(large.tensors.values()))
    assert host_memory.will_need(large.address(info) + 1, info.nbytes - 1)
    assert not host_memory.will_need(1 << 60, 4096)
