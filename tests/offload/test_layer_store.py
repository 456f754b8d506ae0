"""A ring of rooms brings what comes next, whatever pass follows, and recovers from any end."""

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.layer_store import LayerParams, LayerStore
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ClosedError, ModelFileError
from edgeroute.runtime.gguf import GGMLType, TensorInfo
from edgeroute.runtime.rooms import Unit, make_unit, room_bytes
from edgeroute.runtime.tensor import get_bytes
from edgeroute.runtime.weights import TensorSpec
from tests.offload import faulty_disk as faulty

N_UNITS, N_IN = 7, 64
"""Unit j has a matrix of 64 x (8 + j) numbers and one of 64 x 4: no two are of one size."""


class Lab:
    """A store over a file of numbers, and what was read when."""

    def __init__(self, path: Path, n_rooms: int, own: contextlib.ExitStack) -> None:
        self.device = own.enter_context(Device.open("cpu"))
        infos = _infos()
        content = np.random.default_rng(1).standard_normal(
            (infos[-1].offset + infos[-1].nbytes) // 4
        )
        self.content = content.astype(np.float32)
        path.write_bytes(self.content.tobytes())
        self.units = _units(self.device, infos)
        self.disk = faulty.FaultyDisk(DiskFile.open(path))
        self.transfer = own.enter_context(Transfer([self.disk], 2, 4096, 1 << 20))
        self.store = LayerStore(
            _Nothing(), self.device, self.transfer,
            LayerParams(units=self.units, n_units=N_UNITS + 2, n_rooms=n_rooms),
        )  # fmt: skip
        own.callback(self.store.close)

    def run(self, units: Sequence[int], *, prefill: bool = False) -> None:
        """Do a pass, and compare every number of every unit while it is held."""
        self.store.begin(units, prefill=prefill)
        for unit in units:
            assert self.store.hold([unit])
            self.check(unit)
            self.store.release([unit])

    def check(self, unit: int) -> None:
        for part in self.units[unit].parts:
            found = np.empty(part.info.nbytes // 4, np.float32)
            get_bytes(self.store[part.name], found)
            first = part.info.offset // 4
            assert np.array_equal(found, self.content[first : first + len(found)]), part.name

    def settle(self) -> int:
        """Wait until nothing is on its way; return the bytes that were brought so far."""
        for room in self.store._ring:
            if room.ticket is not None:
                with room.ticket.finished:
                    pass
        return int(self.store.stats()["bytes"])

    def nbytes(self, units: Sequence[int]) -> int:
        return sum(self.units[unit].read_bytes for unit in units)


class _Nothing:
    """No other weights."""

    def __getitem__(self, name: str) -> int:
        raise KeyError(name)

    def get(self, name: str) -> int | None:
        return None


def _infos() -> list[TensorInfo]:
    found, offset = [], 4096
    for j in range(N_UNITS):
        offset = -(-offset // 4096) * 4096  # so that no unit is read with its neighbour
        for name, n_out in ((f"blk.{j}.a", 8 + j), (f"blk.{j}.b", 4)):
            n_bytes = N_IN * n_out * 4
            found.append(
                TensorInfo(name=name, ne=(N_IN, n_out), type=GGMLType.F32, offset=offset,
                           nbytes=n_bytes)
            )  # fmt: skip
            offset += n_bytes
    return found


def _units(device: Device, infos: Sequence[TensorInfo]) -> list[Unit]:
    found, file_bytes = [], infos[-1].offset + infos[-1].nbytes
    for j in range(N_UNITS):
        mine = infos[2 * j : 2 * j + 2]
        specs = [TensorSpec(name=info.name, ne=info.ne, use="mul_mat") for info in mine]
        found.append(make_unit(device, j, list(zip(specs, mine, strict=True)), file_bytes))
    return found


@pytest.fixture
def open_lab(tmp_path: Path) -> Iterator[Callable[[int], Lab]]:
    with contextlib.ExitStack() as own:
        yield lambda n_rooms: Lab(tmp_path / "units.bin", n_rooms, own)


ALL = list(range(N_UNITS))


@pytest.mark.parametrize("n_rooms", [1, 2, 3, 7, 9])
def test_every_pass_finds_its_bytes_and_reads_them_once(
    n_rooms: int, open_lab: Callable[[int], Lab]
) -> None:
    lab = open_lab(n_rooms)
    for _ in range(5):
        lab.run(ALL)
    kept = n_rooms >= N_UNITS
    # As many passes, and the rooms are full again with what the next one begins with.
    ahead = ALL[: lab.store.n_rooms]
    expected = lab.nbytes(ALL) if kept else 5 * lab.nbytes(ALL) + lab.nbytes(ahead)
    if n_rooms == 1:
        assert lab.store.n_rooms == 1
    assert lab.settle() == expected
    stats = lab.store.stats()
    assert (stats["resident"], stats["streamed"]) == (2, N_UNITS)
    assert float(stats["stall_s"]) >= 0


@pytest.mark.parametrize("n_rooms", [2, 3])
def test_a_skipped_layer_is_not_read(n_rooms: int, open_lab: Callable[[int], Lab]) -> None:
    """The pass before is taken for the next one; then nothing else is read either."""
    lab = open_lab(n_rooms)
    some = [0, 1, 4, 6]
    lab.run(some)
    for _ in range(3):
        lab.run(some)
    brought = lab.settle()
    assert brought <= 4 * lab.nbytes(some) + lab.nbytes(some[:n_rooms])

    def pages(unit: int) -> range:
        """Of a file, what is read for a layer; layers may be shorter than a page."""
        first, size = lab.units[unit].parts[0].info.offset, mmap.PAGESIZE
        end = first + lab.units[unit].read_bytes
        return range(first // size * size, -(-end // size) * size)

    offsets = {at for at in lab.disk.offsets if not any(at in pages(unit) for unit in some)}
    for unit in set(ALL) - set(some):
        assert not offsets.intersection(pages(unit))


def test_passes_over_ever_other_layers(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(3)
    rng = np.random.default_rng(2)
    for _ in range(60):
        n = int(rng.integers(0, N_UNITS + 1))
        lab.run(sorted(rng.choice(N_UNITS, n, replace=False).tolist()))


def test_two_units_held_at_once(open_lab: Callable[[int], Lab]) -> None:
    """The last layer and the head are computed together."""
    lab = open_lab(2)
    for _ in range(2):
        lab.store.begin(ALL, prefill=False)
        for units in ([0], [1], [2], [3], [4], [5, 6]):
            assert lab.store.hold(units)
            for unit in units:
                lab.check(unit)
            lab.store.release(units)


@pytest.mark.parametrize("n_done", [0, 1, 3, 6])
def test_a_pass_that_ends_early_leaves_nothing_wrong(
    n_done: int, open_lab: Callable[[int], Lab]
) -> None:
    lab = open_lab(2)
    lab.store.begin(ALL, prefill=True)
    for unit in range(n_done):
        assert lab.store.hold([unit])
        lab.store.release([unit])
    lab.run(ALL)


def test_a_stop_ends_the_wait_of_a_prompt(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(2)
    lab.disk.gate.clear()
    lab.store.begin(ALL, prefill=True)
    lab.device.stop_flag.set()
    # The read under way ends before `hold` does, or its bytes would land in a room in use.
    lab.disk.slow_s = 0.05
    lab.disk.gate.set()
    while lab.store.hold([0]):
        lab.store.release([0])
        pytest.fail("a unit of several slow reads cannot have been there at once")
    lab.device.stop_flag.clear()
    lab.disk.slow_s = 0.0
    lab.run(ALL)


def test_a_failed_read_is_an_error_and_is_tried_again(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(2)
    for unit in (0, 1, 5):
        lab.run(ALL)
        lab.settle()
        lab.disk.eio_offset = lab.units[unit].parts[0].info.offset
        with pytest.raises(ModelFileError, match="Input/output error"):
            for _ in range(2):  # it may have been read ahead before the disk failed
                lab.run(ALL)
        lab.settle()
        lab.disk.eio_offset = None
        lab.run(ALL)


def test_a_file_that_ends_early_is_an_error(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(2)
    lab.run(ALL)
    lab.disk.empty = True
    with pytest.raises(ModelFileError):
        for _ in range(2):
            lab.run(ALL)


def test_closing_while_layers_are_on_their_way(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(2)
    lab.disk.slow_s = 0.02
    lab.store.begin(ALL, prefill=False)
    lab.store.close()
    assert lab.disk.closed
    lab.store.close()
    with pytest.raises(ClosedError):
        lab.store.hold([0])


def test_a_room_holds_the_largest_unit_only(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(2)
    largest = max(unit.room_bytes for unit in lab.units)
    assert lab.store._rooms.n_bytes == room_bytes(lab.units)
    assert largest <= room_bytes(lab.units) <= largest + mmap.PAGESIZE


class _Keeper:
    """Notes what is kept, and what is in the memory outside the rooms."""

    def __init__(self, kept: Sequence[Unit]) -> None:
        self.kept = {unit.number for unit in kept}

    def keep(self, unit: Unit) -> None:
        self.kept.add(unit.number)

    def let_go(self, unit: Unit) -> None:
        self.kept.remove(unit.number)


def _with_residents(lab: Lab, own: contextlib.ExitStack) -> tuple[LayerStore, _Keeper]:
    """A store of units 2 and 5 beside residents: the others."""
    streamed = [lab.units[2], lab.units[5]]
    resident = [unit for unit in lab.units if unit not in streamed]
    keeper = _Keeper(resident)
    transfer = own.enter_context(Transfer([lab.disk], 2, 4096, 1 << 20))
    store = LayerStore(_Nothing(), lab.device, transfer, LayerParams(
        units=streamed, n_units=N_UNITS, n_rooms=2, resident=resident, keeper=keeper
    ))  # fmt: skip
    own.callback(store.close)
    lab.store = store
    return store, keeper


def test_layers_are_given_up_and_come_back(open_lab: Callable[[int], Lab]) -> None:
    """Whatever the size, what streams has the file's bytes, and nothing is in two places."""
    with contextlib.ExitStack() as own:
        lab = open_lab(2)
        store, keeper = _with_residents(lab, own)
        full = store.resident_bytes
        rng = np.random.default_rng(4)
        for share in [0.0, 1.0, *rng.random(30).tolist(), 1.0]:
            before = store.streamed
            assert store.resize(int(share * full)) == (store.streamed != before)
            assert store.resident_bytes <= max(0, int(share * full))
            assert keeper.kept == set(ALL) - store.streamed
            assert store.stats()["resident"] == N_UNITS - len(store.streamed)
            lab.run(sorted(store.streamed))
        assert store.streamed == {2, 5}


def test_scarce_memory_makes_more_layers_stream(open_lab: Callable[[int], Lab]) -> None:
    with contextlib.ExitStack() as own:
        lab = open_lab(2)
        store, _ = _with_residents(lab, own)
        margins = store.pressure.params
        readings = [0, *[4 * margins.high_bytes + store.resident_bytes] * 40]
        store.available = lambda: readings.pop(0)
        sizes = []
        while readings:
            store._next_reading = 0.0
            before = store.streamed
            assert store.reconsider() == (store.streamed != before)
            sizes.append(len(store.streamed))
            lab.run(sorted(store.streamed))
        assert sizes[0] == N_UNITS and sizes[-1] == 2
        assert not store.reconsider()  # looked at only now and then


def test_a_file_truncated_while_running_is_an_error(open_lab: Callable[[int], Lab]) -> None:
    lab = open_lab(2)
    lab.run(ALL)
    lab.settle()
    path = lab.disk.path
    with path.open("r+b") as file:
        file.truncate(lab.units[3].parts[0].info.offset)
    with pytest.raises(ModelFileError, match="must be replaced, not rewritten"):
        for _ in range(2):
            lab.run(ALL)


def test_neighbours_are_one_stretch_of_whole_pages() -> None:
    """The gap of 64 KiB and more is not read, nor anything behind the file's end."""
    page = mmap.PAGESIZE
    offsets = (page + 32, 2 * page, 2 * page + (128 << 10))
    with Device.open("cpu") as device:
        pairs = []
        for j, offset in enumerate(offsets):
            info = TensorInfo(name=f"t{j}", ne=(64, 4), type=GGMLType.F32, offset=offset,
                              nbytes=1024)  # fmt: skip
            pairs.append((TensorSpec(name=info.name, ne=info.ne, use="mul_mat"), info))
        end = offsets[-1] + 1024
        unit = make_unit(device, 0, pairs, end)
        first, last = unit.stretches
        assert (first.offset, first.nbytes, len(first.parts)) == (page, 2 * page, 2)
        assert last.offset + last.nbytes == end and last.room_bytes % page == 0
        assert unit.nbytes == 3072 and unit.read_bytes == 2 * page + last.nbytes
        odd = TensorInfo(name="odd", ne=(64, 4), type=GGMLType.F32, offset=page + 8, nbytes=1024)
        pairs.append((TensorSpec(name="odd", ne=odd.ne, use="mul_mat"), odd))
        copied = make_unit(device, 0, pairs, end)  # not where a tensor may be
        assert [len(stretch.parts) for stretch in copied.stretches] == [1] * 4
