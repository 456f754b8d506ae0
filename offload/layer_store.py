"""Dense layers on demand: some stay for good, the others stream through a ring of rooms.

Layers are needed in turn, again and again. For such a cycle the best that a cache can do is to
keep a fixed part of it (least recently used would never hit), and which layer comes next is
known: a room is filled for its next user as soon as the one before was computed, so that the
disk reads while layers are computed and while a token is chosen.
Answers `runtime.rooms.LayerPager`; all of it runs on the engine thread but the reads.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from edgeroute.offload.pressure import Pressure, PressureParams
from edgeroute.offload.transfer import Extent, LoadJob, Ticket, Transfer
from edgeroute.runtime import machine
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.joints import Joint
from edgeroute.runtime.rooms import Rooms, Unit, room_bytes
from edgeroute.runtime.units import MIB
from edgeroute.runtime.weights import Weights, apart

READING_S: Final = 0.25
LOW_BYTES, LOW_RATIO = 128 * MIB, 0.02
"""Less available than this, absolute and of all there is, and layers are given up. Unlike other
memory they are clean pages of the file: the kernel takes them without ending anybody."""


class Keeper(Protocol):
    """Brings units into the memory that they have outside the rooms, and lets them go."""

    def keep(self, unit: Unit) -> None:
        """Read a unit in, as far as it is not there."""

    def let_go(self, unit: Unit) -> None:
        """Say that a unit is not needed there now; it may be needed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParams:
    """What streams: units in the order of use, at least one, of `n_units` that the model has.

    `n_rooms` is the length of the ring; from 2 on, neighbours share no room. `resident` are
    further units that `keeper` holds, which stream too while memory is scarce: those furthest
    from what streams first, or, where `together`, those next to it.
    """

    units: Sequence[Unit]
    n_units: int
    n_rooms: int
    resident: Sequence[Unit] = ()
    keeper: Keeper | None = None
    together: bool = False


@dataclass(slots=True)
class _Room:
    """What a room holds, or is being filled with, and who uses it in this pass.

    `first` is its first user in this pass, taken for that of the next one too.
    """

    holds: int | None = None
    ticket: Ticket | None = None
    first: int | None = None
    waiting: deque[int] = field(default_factory=deque)


class LayerStore(Closing):
    """The streamed units of one model. Not thread-safe: the engine thread owns it.

    Lifetime: owns rooms and transfer; `base` must outlive it.
    """

    def __init__(
        self, base: Weights, device: Device, transfer: Transfer, params: LayerParams
    ) -> None:
        """Allocate the rooms; nothing is read yet.

        Args:
            base: all other weights.
            device: where the rooms are.
            transfer: reads from the model's file, which is its file 0.
            params: what streams.

        Raises:
            CapacityError: the device holds too little.
        """
        self._base = base
        self._device = device
        self._transfer = transfer
        self._params = params
        self.n_rooms = min(params.n_rooms, len(params.units))
        self._units = list(params.units)
        self._resident = list(params.resident)
        self._given_up: list[Unit] = []
        self._rooms = Rooms(device, self.n_rooms, room_bytes([*self._units, *self._resident]))
        self._ring = [_Room() for _ in range(self.n_rooms)]
        self._settle()
        self._prefill = False
        self.stalled_s = 0.0
        """Seconds that passes over the model have waited for reads so far."""
        self.pressure = Pressure(self.resident_bytes, _margins())
        self.available: Callable[[], int] = self._available_bytes
        self._next_reading = 0.0

    def _settle(self) -> None:
        """Give the units that stream now their rooms."""
        self._rooms.settle(self._units)
        self._room_of = {
            unit.number: self._ring[j % self.n_rooms] for j, unit in enumerate(self._units)
        }
        self._jobs = {unit.number: self._job(unit) for unit in self._units}
        self.streamed = frozenset(self._room_of)

    def _job(self, unit: Unit) -> LoadJob:
        extents = [
            Extent(0, stretch.offset, stretch.nbytes, part)
            for part, stretch in enumerate(unit.stretches)
        ]
        return LoadJob(id=unit.number, sink=self._rooms.sinks[unit.number], extents=extents)

    # weights

    def __getitem__(self, name: str) -> Tensor:
        found = self._rooms.tensors.get(name)
        return self._base[name] if found is None else found

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None where the file has none of that name."""
        found = self._rooms.tensors.get(name)
        return self._base.get(name) if found is None else found

    def joints(self, names: Sequence[str]) -> list[Joint]:
        """Join fixed weights; those of layers move between rooms and stay apart."""
        if any(name in self._rooms.tensors for name in names):
            return apart(self, names)
        return self._base.joints(names)

    # a pass over the model

    def begin(self, units: Sequence[int], *, prefill: bool) -> None:
        """Begin a pass over these units, in rising order: see LayerPager.

        Raises:
            ModelFileError, ClosedError: reading cannot begin.
        """
        self._prefill = prefill
        for room in self._ring:
            room.waiting.clear()
        for unit in sorted(set(units)):
            self._room_of[unit].waiting.append(unit)
        first = [room for room in self._ring if room.waiting]
        for room in sorted(first, key=lambda room: room.waiting[0]):
            room.first = room.waiting[0]
            if room.ticket is not None and room.ticket.error is not None:
                self._empty(room)  # read ahead in vain; it is tried again for the one who waits
            self._fill(room)

    def hold(self, units: Sequence[int]) -> bool:
        """Wait until units of the pass are there; False if a stop was asked for meanwhile.

        Raises:
            ModelFileError: their bytes cannot be read.
        """
        return all([self._wait(self._room_of[unit], unit) for unit in units])

    def release(self, units: Sequence[int]) -> None:
        """Say that units of the pass were computed; their rooms are filled for others."""
        for unit in units:
            room = self._room_of[unit]
            assert room.waiting[0] == unit
            room.waiting.popleft()
            self._fill(room)

    def close(self) -> None:
        """Stop the I/O threads, then free the rooms; safe to call twice."""
        self._transfer.close()
        self._rooms.close()

    def stats(self) -> dict[str, int | float]:
        """Return how many layers stay and stream, the head counted as one; and what that cost.

        `bytes` were brought so far, `stall_s` is how long computing waited for them.
        """
        return {
            "resident": self._params.n_units - len(self.streamed),
            "streamed": len(self.streamed),
            "bytes": self._transfer.stats.demand_bytes,
            "stall_s": round(self.stalled_s, 6),
        }

    def in_rooms(self) -> list[int | None]:
        """List what each room holds or is being filled with; any thread may ask."""
        return [room.holds for room in self._ring]

    # memory that comes and goes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the units that could be given up."""
        return sum(unit.nbytes for unit in self._resident)

    def reconsider(self) -> bool:
        """Look at the machine's memory now and then: see LayerPager.

        Raises:
            ClosedError: after `close`.
        """
        now = time.perf_counter()
        if now < self._next_reading or self._params.keeper is None:
            return False
        self._next_reading = now + READING_S
        target = self.pressure.read(self.available(), self.resident_bytes)
        return target is not None and self.resize(target)

    def resize(self, resident_bytes: int) -> bool:
        """Give units up until at most so many bytes of them stay, or take some back.

        True where other units stream now.
        """
        keeper = self._params.keeper
        if keeper is None:
            return False
        streamed = len(self._units)
        while self._resident and self.resident_bytes > resident_bytes:
            unit = self._least_missed()
            self._resident.remove(unit)
            self._given_up.append(unit)
            keeper.let_go(unit)
        while self._given_up and self.resident_bytes + self._given_up[-1].nbytes <= resident_bytes:
            unit = self._given_up.pop()
            self._resident.append(unit)
            keeper.keep(unit)
        self._units = sorted([*self._params.units, *self._given_up], key=lambda u: u.number)
        if len(self._units) == streamed:
            return False
        for room in self._ring:
            self._empty(room)
            room.first = None
            room.waiting.clear()
        self._settle()
        return True

    def _least_missed(self) -> Unit:
        """The resident unit to stream next, so that reads stay spread, or a block a block."""
        numbers = [*self.streamed, *(unit.number for unit in self._given_up)]
        away = {u.number: min(abs(u.number - n) for n in numbers) for u in self._resident}
        if self._params.together:
            return min(self._resident, key=lambda u: (away[u.number], -u.number))
        return max(self._resident, key=lambda u: away[u.number])

    def _available_bytes(self) -> int:
        """What the machine could give now, beside resident units.

        They are pages of a file, which a machine counts as available, though we need them.
        """
        found = machine.memory()
        return found.available_bytes - self.resident_bytes * (found.limit == "machine")

    # rooms

    def _fill(self, room: _Room) -> None:
        """Begin to read a room's next user, of this pass or the next."""
        unit = room.waiting[0] if room.waiting else room.first
        if unit is None or room.holds == unit:
            return
        self._empty(room)
        room.ticket = self._transfer.load([self._jobs[unit]])
        room.holds = unit

    def _empty(self, room: _Room) -> None:
        """Have reads into a room ended, so that others may begin."""
        ticket, room.ticket, room.holds = room.ticket, None, None
        if ticket is not None and not ticket.done:
            self._transfer.cancel(ticket)
            with ticket.finished:
                pass

    def _wait(self, room: _Room, unit: int) -> bool:
        """Wait for a room's bytes; if they do not come, the room is empty."""
        assert room.holds == unit
        if room.ticket is None:
            return True
        arrived = False
        began = time.perf_counter()
        try:
            stop = self._device.stop_flag.is_set if self._prefill else None
            arrived = self._transfer.wait(room.ticket, stop)
        finally:
            self.stalled_s += time.perf_counter() - began
            if arrived:
                room.ticket = None
            else:
                self._empty(room)
        return arrived


def _margins() -> PressureParams:
    """A part of what there is: a control group's limit may be smaller than the model."""
    low = min(LOW_BYTES, int(LOW_RATIO * machine.memory().total_bytes))
    return PressureParams(low_bytes=low, high_bytes=2 * low)
