"""Slots for LoRA adapters, and their part of a graph: each token by the slots of its own.

The A and B matrices of a weight lie in slot tensors, one slot per block of `rank` rows.
`ggml_mul_mat_id` takes slot numbers per token, so one batch mixes adapters, mixtures of them,
and tokens without any (slot 0 holds zeros). An adapter of a higher rank takes several slots:
the product of a longer A and B is the sum over blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.tensor import F16, Descriptors, new_tensor, place_all, shape, strides

NO_ADAPTER = 0
"""The slot of zeros, which tokens without an adapter use."""
T = TypeVar("T")
Halves = npt.NDArray[np.float16]


class LoraRow(NamedTuple):
    """What the tokens of one sequence add to each linear layer: slots, and a factor on each."""

    slots: tuple[int, ...]
    weights: tuple[float, ...]


class LoraShape(NamedTuple):
    """What a graph depends on: slots per token, and whether they have factors."""

    n_used: int
    weighted: bool


class LoraTarget(NamedTuple):
    """A weight that adapters may change: its stem, such as `blk.0.attn_q`, and its extents."""

    name: str
    n_in: int
    n_out: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight's matrices are: A shares its tensor with others of the same input.

    `down` F16 [n_in, n_group * rank, n_slots], `up` F16 [rank, n_out, n_slots].
    """

    down: Tensor
    up: Tensor
    part: int
    group: tuple[str, ...]


class LoraSlots(Closing):
    """Slot tensors for some weights of a model. Memory is touched when a slot is written.

    Lifetime: graphs built with it are valid until `extend` or `close`.
    """

    def __init__(self, device: Device | Callable[[str], Device], rank: int, n_slots: int) -> None:
        """Describe `n_slots` slots of `rank` rows beside the slot of zeros; see `extend`.

        Args:
            device: where they are; or says so for the stem of a weight. Weights that read the
                same input are on one device.
            rank: rows of a slot.
            n_slots: how many.
        """
        self.rank = rank
        self.n_slots = n_slots
        self._device = device
        self._places: dict[str, _Place] = {}
        self._targets: dict[str, LoraTarget] = {}
        self._owned: list[tuple[Descriptors, dict[Device, Buffer]]] = []

    @staticmethod
    def bytes_per_slot(targets: Iterable[LoraTarget], rank: int) -> int:
        """Return the bytes that one slot takes over all weights."""
        return sum(2 * rank * (target.n_in + target.n_out) for target in targets)

    @property
    def n_bytes(self) -> int:
        """Bytes of all slot tensors, the slot of zeros included."""
        return sum(buffer.n_bytes for _, held in self._owned for buffer in held.values())

    @property
    def devices(self) -> list[Device]:
        """Devices that have slot tensors."""
        return list(dict.fromkeys(device for _, held in self._owned for device in held))

    def bytes_on(self, device: Device) -> int:
        """Bytes of the slot tensors that are on one device."""
        return sum(held[device].n_bytes for _, held in self._owned if device in held)

    def device_of(self, name: str) -> Device:
        """Return where the slots of a weight are, or would be."""
        return self._device if isinstance(self._device, Device) else self._device(name)

    def by_device(self, targets: Iterable[LoraTarget]) -> dict[Device, list[LoraTarget]]:
        """Sort weights by the device that their slots are on, or would be."""
        found: dict[Device, list[LoraTarget]] = {}
        for target in targets:
            found.setdefault(self.device_of(target.name), []).append(target)
        return found

    @property
    def names(self) -> frozenset[str]:
        """Stems of the weights that have slots."""
        return frozenset(self._places)

    def extend(self, groups: Sequence[Sequence[LoraTarget]]) -> None:
        """Make slots of zeros for more weights; those of one group read the same input.

        Graphs built before do not know them: build those anew. Slots that are in use change
        nothing about the new weights.

        Raises:
            CapacityError: no memory for them; nothing was added.
        """
        n_all = self.n_slots + 1
        descriptors = Descriptors(2 * sum(len(group) for group in groups))
        places: dict[str, _Place] = {}
        tensors: dict[Device, list[Tensor]] = {}
        for group in groups:
            mine = tensors.setdefault(self.device_of(group[0].name), [])
            names = tuple(target.name for target in group)
            down = (group[0].n_in, len(group) * self.rank, n_all)
            shared = new_tensor(descriptors, F16, down, "lora_a")
            mine.append(shared)
            for part, target in enumerate(group):
                up = new_tensor(descriptors, F16, (self.rank, target.n_out, n_all), "lora_b")
                mine.append(up)
                places[target.name] = _Place(shared, up, part, names)
        held: dict[Device, Buffer] = {}
        try:
            for device, mine in tensors.items():
                held[device] = place_all(mine, device)
                for tensor in mine:
                    n_clear = n_all if self._owned else 1  # nothing is in use before the first call
                    ggml().ggml_backend_tensor_memset(tensor, 0, 0, n_clear * strides(tensor)[2])
                device.check()
        except BaseException:
            _free(descriptors, held)
            raise
        self._owned.append((descriptors, held))
        # In this order: a load that runs meanwhile takes what has a place for complete.
        self._targets |= {target.name: target for group in groups for target in group}
        self._places |= places

    def place(self, name: str) -> _Place | None:
        """Return where a weight's matrices are; None where no adapter changes it."""
        return self._places.get(name)

    def write(self, slot: int, name: str, a: Halves, b: Halves) -> None:
        """Put a block of a weight's matrices into a slot: A (rank, n_in), B (n_out, rank).

        Any thread may call it for a slot that no running graph reads.
        """
        place, target = self._places[name], self._targets[name]
        if a.shape != (self.rank, target.n_in) or b.shape != (target.n_out, self.rank):
            raise ValueError(f"{name}: A {a.shape} and B {b.shape} do not fill a slot")
        _, at = self._part(slot, place, target)
        _set(place.down, at, a)
        _set(place.up, slot * b.nbytes, b)

    def clear(self, slot: int, names: Iterable[str]) -> None:
        """Put zeros into a slot for the weights named; any thread, as `write`."""
        memset = ggml().ggml_backend_tensor_memset
        for name in names:
            place, target = self._places[name], self._targets[name]
            one, at = self._part(slot, place, target)
            memset(place.down, 0, at, one)
            size = 2 * self.rank * target.n_out
            memset(place.up, 0, slot * size, size)

    def _part(self, slot: int, place: _Place, target: LoraTarget) -> tuple[int, int]:
        """Return the bytes of a weight's A in a slot, and where they begin."""
        one = 2 * self.rank * target.n_in
        return one, one * (slot * len(place.group) + place.part)

    def close(self) -> None:
        """Free the tensors; safe to call twice."""
        self._places.clear()
        for descriptors, held in self._owned:
            _free(descriptors, held)
        self._owned.clear()


LoraInputs = tuple[Tensor, Tensor | None]
"""Slots I32 [n_used, n] and, where any is not 1, factors F32 [1, n_used, n]; n is n_tokens, or
n_out behind the choice of outputs."""


class LoraUse:
    """What a Builder needs to add adapters to its linear layers."""

    def __init__(self, slots: LoraSlots, shape_: LoraShape) -> None:
        self.slots = slots
        self.shape = shape_
        self._down: dict[tuple[tuple[str, ...], Tensor], Tensor] = {}

    def down(self, ctx: int, place: _Place, x: Tensor, ids: Tensor) -> Tensor:
        """Build A x of a group's weights, once: F32 [n_group * rank, n_used, n]."""
        key = (place.group, x)
        found = self._down.get(key)
        if found is None:
            g = ggml()
            n_in, n = shape(x)[:2]
            flat = g.ggml_reshape_3d(ctx, x, n_in, 1, n)
            found = g.ggml_mul_mat_id(ctx, place.down, flat, ids)
            self._down[key] = found
        return found

    def delta(self, ctx: int, place: _Place, x: Tensor, inputs: LoraInputs) -> Tensor:
        """Build what the adapters add to one weight's product: F32 [n_out, n]."""
        g, rank = ggml(), self.slots.rank
        down = self.down(ctx, place, x, inputs[0])
        (_, k, n, _), nb = shape(down), strides(down)
        mine = g.ggml_view_3d(ctx, down, rank, k, n, nb[1], nb[2], place.part * rank * 4)
        out = g.ggml_mul_mat_id(ctx, place.up, mine, inputs[0])
        if inputs[1] is not None:
            out = g.ggml_mul(ctx, out, inputs[1])  # where llama.cpp scales, for its bits
        n_out, nb = shape(out)[0], strides(out)
        total = g.ggml_view_2d(ctx, out, n_out, n, nb[2], 0)
        for i in range(1, k):
            part = g.ggml_view_2d(ctx, out, n_out, n, nb[2], i * nb[1])
            total = g.ggml_add(ctx, total, part)
        return total


def lora_ids(rows: Iterable[tuple[LoraRow | None, int]], n_used: int) -> npt.NDArray[np.int32]:
    """Return the slots of every token: I32 (n, n_used), for (row, number of tokens) pairs."""
    found = _fill(rows, n_used, NO_ADAPTER, lambda row: row.slots)
    return np.array(found, np.int32)


def lora_factors(
    rows: Iterable[tuple[LoraRow | None, int]], n_used: int
) -> npt.NDArray[np.float32]:
    """Return the factors of every token: F32 (n, n_used), likewise."""
    return np.array(_fill(rows, n_used, 1.0, lambda row: row.weights), np.float32)


def _fill(
    rows: Iterable[tuple[LoraRow | None, int]], n_used: int, empty: T,
    part: Callable[[LoraRow], tuple[T, ...]],
) -> list[tuple[T, ...]]:  # fmt: skip
    """Repeat each row's values once per token, filled up to `n_used`."""
    found: list[tuple[T, ...]] = []
    for row, n_tokens in rows:
        given = () if row is None else part(row)
        found += [given + (empty,) * (n_used - len(given))] * n_tokens
    return found


def lora_shape(rows: Iterable[LoraRow | None]) -> LoraShape | None:
    """Return what a graph for these sequences needs; None where none has an adapter."""
    given = [row for row in rows if row is not None and row.slots]
    if not given:
        return None
    weighted = any(weight != 1.0 for row in given for weight in row.weights)
    return LoraShape(max(len(row.slots) for row in given), weighted)


def _free(descriptors: Descriptors, held: dict[Device, Buffer]) -> None:
    for buffer in held.values():
        buffer.free()
    descriptors.free()


def _set(tensor: Tensor, at: int, values: Halves) -> None:
    data = np.ascontiguousarray(values)
    ggml().ggml_backend_tensor_set(tensor, data.ctypes.data, at, data.nbytes)
