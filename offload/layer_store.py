"""Dense layers on demand: some stay for good, the others stream through a ring of rooms.

Layers are needed in turn, again and again. For such a cycle the best that a cache can do is to
keep a fixed part of it (least recently used would never hit), and which layer comes next is
known: a room is filled for its next user as soon as the one before was computed.
Answers `runtime.rooms.LayerPager`; all of it runs on the engine thread but the reads.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeroute.offload.transfer import Extent, LoadJob, Ticket, Transfer
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.rooms import Rooms, Unit
from edgeroute.runtime.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParams:
    """What streams: units in the order of use, at least one, of `n_units` that the model has.

    `n_rooms` is the length of the ring; from 2 on, neighbours share no room.
    """

    units: Sequence[Unit]
    n_units: int
    n_rooms: int


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
        units = params.units
        self._base = base
        self._device = device
        self._transfer = transfer
        self._n_units = params.n_units
        self.n_rooms = min(params.n_rooms, len(units))
        self._rooms = Rooms(device, units, self.n_rooms)
        self._ring = [_Room() for _ in range(self.n_rooms)]
        self._room_of = {unit.number: self._ring[j % self.n_rooms] for j, unit in enumerate(units)}
        self._jobs = {unit.number: self._make_jobs(unit.number) for unit in units}
        self.streamed = frozenset(self._room_of)
        """Units that must be held while they are computed with."""
        self._prefill = False
        self._stall_s = 0.0

    def _make_jobs(self, number: int) -> list[LoadJob]:
        return [
            LoadJob(id=number, sink=load.sink, extents=[
                Extent(0, info.offset, info.nbytes, part) for part, info in enumerate(load.infos)
            ])
            for load in self._rooms.loads[number]
        ]  # fmt: skip

    # weights

    def __getitem__(self, name: str) -> Tensor:
        found = self._rooms.tensors.get(name)
        return self._base[name] if found is None else found

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None where the file has none of that name."""
        found = self._rooms.tensors.get(name)
        return self._base.get(name) if found is None else found

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
            "resident": self._n_units - len(self.streamed),
            "streamed": len(self.streamed),
            "bytes": self._transfer.stats.demand_bytes,
            "stall_s": round(self._stall_s, 6),
        }

    # rooms

    def _fill(self, room: _Room) -> None:
        """Begin to read a room's next user, of this pass or the next."""
        unit = room.waiting[0] if room.waiting else room.first
        if unit is None or room.holds == unit:
            return
        self._empty(room)
        room.ticket = self._transfer.load(self._jobs[unit])
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
            self._stall_s += time.perf_counter() - began
            if arrived:
                room.ticket = None
            else:
                self._empty(room)
        return arrived
