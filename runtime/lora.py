"""Slots for LoRA adapters: each token of a batch computes with the slots of its own.

The A and B matrices of a weight lie in slot tensors, one slot per block of `rank` rows; what a
graph does with them is in `lora_graph`. One batch mixes adapters, mixtures of them, and tokens
without any (slot 0 holds zeros). An adapter of a higher rank takes several slots: the product
of a longer A and B is the sum over blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.tensor import F16, F16_BYTES, Descriptors, new_tensor, place_all, shape

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
    outs: tuple[int, ...] = ()
    """Tokens of each sequence that get logits; empty for all of a batch of one sequence."""


class LoraTarget(NamedTuple):
    """A weight that adapters may change: its stem, such as `blk.0.attn_q`, and its extents."""

    name: str
    n_in: int
    n_out: int


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Slot tensors of weights that read the same input.

    `down` F16 [n_in, n_targets * rank, n_slots] has their A one below the other. `up` F16 [row,
    n_slots] has their B one behind the other, each transposed: [n_out, rank].
    """

    down: Tensor
    up: Tensor
    targets: tuple[LoraTarget, ...]

    @property
    def row(self) -> int:
        """Numbers in a slot of `up`."""
        return shape(self.up)[0]

    def alike(self, part: int) -> range:
        """The parts around one that follow each other and have its n_out."""
        first, end, n_out = part, part + 1, self.targets[part].n_out
        while first and self.targets[first - 1].n_out == n_out:
            first -= 1
        while end < len(self.targets) and self.targets[end].n_out == n_out:
            end += 1
        return range(first, end)


class LoraPlace(NamedTuple):
    """Where a weight's matrices are: `part` of a group, its B from number `first` of a row on."""

    group: LoraGroup
    part: int
    first: int

    @property
    def target(self) -> LoraTarget:
        """The weight."""
        return self.group.targets[self.part]


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
        self._places: dict[str, LoraPlace] = {}
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
        descriptors = Descriptors(2 * len(groups))
        places: dict[str, LoraPlace] = {}
        tensors: dict[Device, list[Tensor]] = {}
        for targets in groups:
            down = (targets[0].n_in, len(targets) * self.rank, n_all)
            up = (self.rank * sum(target.n_out for target in targets), n_all)
            group = LoraGroup(
                new_tensor(descriptors, F16, down, "lora_a"),
                new_tensor(descriptors, F16, up, "lora_b"), tuple(targets),
            )  # fmt: skip
            tensors.setdefault(self.device_of(targets[0].name), []).extend([group.down, group.up])
            first = 0
            for part, target in enumerate(targets):
                places[target.name] = LoraPlace(group, part, first)
                first += self.rank * target.n_out
        held: dict[Device, Buffer] = {}
        try:
            for device, mine in tensors.items():
                held[device] = place_all(mine, device)
                for tensor in mine:
                    n_clear = n_all if self._owned else 1  # nothing is in use before the first call
                    size = ggml().ggml_nbytes(tensor) // n_all * n_clear
                    ggml().ggml_backend_tensor_memset(tensor, 0, 0, size)
                device.check()
        except BaseException:
            _free(descriptors, held)
            raise
        self._owned.append((descriptors, held))
        self._places |= places

    def place(self, name: str) -> LoraPlace | None:
        """Return where a weight's matrices are; None where no adapter changes it."""
        return self._places.get(name)

    def write(self, slot: int, name: str, a: Halves, b: Halves) -> None:
        """Put a block of a weight's matrices into a slot: A (rank, n_in), B (n_out, rank).

        Any thread may call it for a slot that no running graph reads.
        """
        place = self._places[name]
        group, target = place.group, place.target
        if a.shape != (self.rank, target.n_in) or b.shape != (target.n_out, self.rank):
            raise ValueError(f"{name}: A {a.shape} and B {b.shape} do not fill a slot")
        _set(group.down, a.nbytes * (slot * len(group.targets) + place.part), a)
        _set(group.up, F16_BYTES * (slot * group.row + place.first), b.T)

    def clear(self, slot: int, names: Iterable[str]) -> None:
        """Put zeros into a slot for the weights named; any thread, as `write`."""
        memset = ggml().ggml_backend_tensor_memset
        for name in names:
            place = self._places[name]
            group, target = place.group, place.target
            one = F16_BYTES * self.rank * target.n_in
            memset(group.down, 0, one * (slot * len(group.targets) + place.part), one)
            one = F16_BYTES * self.rank * target.n_out
            memset(group.up, 0, F16_BYTES * (slot * group.row + place.first), one)

    def close(self) -> None:
        """Free the tensors; safe to call twice."""
        self._places.clear()
        for descriptors, held in self._owned:
            _free(descriptors, held)
        self._owned.clear()


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


def lora_shape(rows: Sequence[tuple[LoraRow | None, int]]) -> LoraShape | None:
    """Return what a graph for these sequences needs, given as (row, tokens with logits).

    None where none has an adapter.
    """
    given = [row for row, _ in rows if row is not None and row.slots]
    if not given:
        return None
    weighted = any(weight != 1.0 for row in given for weight in row.weights)
    n_used = max(len(row.slots) for row in given)
    return LoraShape(n_used, weighted, tuple(n_out for _, n_out in rows))


def _free(descriptors: Descriptors, held: dict[Device, Buffer]) -> None:
    for buffer in held.values():
        buffer.free()
    descriptors.free()


def _set(tensor: Tensor, at: int, values: Halves) -> None:
    data = np.ascontiguousarray(values)
    ggml().ggml_backend_tensor_set(tensor, data.ctypes.data, at, data.nbytes)
