"""Slots for adapters: what is written where, what stays zero, and the tables that graphs read."""

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.runtime.device import Device
from edgeroute.runtime.lora import (
    NO_ADAPTER,
    LoraRow,
    LoraShape,
    LoraSlots,
    LoraTarget,
    lora_factors,
    lora_ids,
    lora_shape,
)
from edgeroute.runtime.lora_graph import Run, runs_of
from edgeroute.runtime.tensor import get_bytes, shape

RANK, N_SLOTS = 4, 3
Q, K = LoraTarget("blk.0.attn_q", 8, 12), LoraTarget("blk.0.attn_k", 8, 6)
DOWN = LoraTarget("blk.0.ffn_down", 16, 8)
LATE = LoraTarget("blk.1.attn_q", 8, 12)
Halves = npt.NDArray[np.float16]
Pair = tuple[Halves, Halves]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with Device.open("cpu") as opened:
        yield opened


@pytest.fixture
def slots(device: Device) -> Iterator[LoraSlots]:
    with LoraSlots(device, RANK, N_SLOTS) as made:
        made.extend([[Q, K], [DOWN]])
        for slot in range(1, N_SLOTS + 1):
            made.clear(slot, made.names)  # only slot 0 is promised to be zero
        yield made


def numbers(target: LoraTarget, seed: int) -> Pair:
    rng = np.random.default_rng((seed, target.n_in, target.n_out))
    a = rng.standard_normal((RANK, target.n_in)).astype(np.float16)
    return a, rng.standard_normal((target.n_out, RANK)).astype(np.float16)


def stored(slots: LoraSlots, slot: int, target: LoraTarget) -> Pair:
    """Read a block back through the tensors that a graph multiplies with."""
    place = slots.place(target.name)
    assert place is not None
    n_in, rows, n_all, _ = shape(place.group.down)
    down = np.empty((n_all, rows, n_in), np.float16)
    get_bytes(place.group.down, down)
    up = np.empty((n_all, place.group.row), np.float16)
    get_bytes(place.group.up, up)
    first = place.part * slots.rank
    b = up[slot, place.first : place.first + slots.rank * target.n_out]
    return down[slot, first : first + slots.rank], b.reshape(slots.rank, target.n_out).T


def same(found: Pair, wanted: Pair) -> bool:
    return all(np.array_equal(f, w) for f, w in zip(found, wanted, strict=True))


def is_zero(slots: LoraSlots, slot: int, target: LoraTarget) -> bool:
    return not any(each.any() for each in stored(slots, slot, target))


def test_a_block_lies_in_its_own_slot_and_nowhere_else(slots: LoraSlots) -> None:
    for target in (Q, K, DOWN):
        slots.write(2, target.name, *numbers(target, 1))
    for target in (Q, K, DOWN):
        assert same(stored(slots, 2, target), numbers(target, 1))
        for other in (NO_ADAPTER, 1, 3):
            assert is_zero(slots, other, target)


def test_clearing_one_weight_leaves_the_others_of_its_group(slots: LoraSlots) -> None:
    """Q and K share a tensor of A: clearing one must not reach into the other."""
    for slot in (1, 2):
        for target in (Q, K):
            slots.write(slot, target.name, *numbers(target, slot))
    slots.clear(1, [Q.name])
    assert is_zero(slots, 1, Q) and same(stored(slots, 1, K), numbers(K, 1))
    assert same(stored(slots, 2, Q), numbers(Q, 2)) and same(stored(slots, 2, K), numbers(K, 2))


def test_a_slot_is_overwritten_whole(slots: LoraSlots) -> None:
    slots.write(3, Q.name, *numbers(Q, 1))
    slots.write(3, Q.name, *numbers(Q, 2))
    assert same(stored(slots, 3, Q), numbers(Q, 2))


def test_matrices_that_are_not_contiguous_are_written_right(slots: LoraSlots) -> None:
    a, b = numbers(DOWN, 5)
    slots.write(1, DOWN.name, np.asfortranarray(a), np.asfortranarray(b))
    assert same(stored(slots, 1, DOWN), (a, b))


@pytest.mark.parametrize("part", ["a", "b", "rank"])
def test_matrices_of_another_shape_are_refused(slots: LoraSlots, part: str) -> None:
    a, b = numbers(Q, 1)
    wrong = {"a": (a[:, :-1], b), "b": (a, b[:-1]), "rank": (a[:-1], b[:, :-1])}[part]
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q"):
        slots.write(1, Q.name, *wrong)
    assert is_zero(slots, 1, Q)


def test_more_weights_come_as_zeros_and_touch_nothing_in_use(slots: LoraSlots) -> None:
    for slot in (1, 2, 3):
        for target in (Q, K, DOWN):
            slots.write(slot, target.name, *numbers(target, slot))
    before = slots.n_bytes
    slots.extend([[LATE]])
    assert slots.names == {Q.name, K.name, DOWN.name, LATE.name}
    for slot in (1, 2, 3):
        assert is_zero(slots, slot, LATE)
        for target in (Q, K, DOWN):
            assert same(stored(slots, slot, target), numbers(target, slot))
    assert is_zero(slots, NO_ADAPTER, LATE)
    more = slots.n_bytes - before
    assert more >= (N_SLOTS + 1) * LoraSlots.bytes_per_slot([LATE], RANK)


def test_slots_that_begin_without_any_weight_can_grow(device: Device) -> None:
    with LoraSlots(device, RANK, N_SLOTS) as made:
        made.extend([])
        assert made.n_bytes == 0 and not made.names and made.place(Q.name) is None
        made.extend([[Q]])
        assert is_zero(made, NO_ADAPTER, Q)
        made.write(1, Q.name, *numbers(Q, 1))
        assert same(stored(made, 1, Q), numbers(Q, 1))


def test_a_thread_may_write_while_weights_are_added(slots: LoraSlots) -> None:
    """A load runs while the engine extends: it sees a weight whole or not at all."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def load() -> None:
        try:
            while not stop.is_set():
                slots.clear(1, slots.names)
                slots.write(1, Q.name, *numbers(Q, 1))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for i in range(300):
            slots.extend([[LoraTarget(f"blk.{i}.attn_v", 8, 4)]])
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert same(stored(slots, 1, Q), numbers(Q, 1))


def test_bytes_are_those_of_all_slots_and_the_one_of_zeros(slots: LoraSlots) -> None:
    one = LoraSlots.bytes_per_slot([Q, K, DOWN], RANK)
    assert one == 2 * RANK * (8 + 12 + 8 + 6 + 16 + 8)
    assert (N_SLOTS + 1) * one <= slots.n_bytes <= (N_SLOTS + 1) * one + 6 * 128


def test_closing_twice_is_safe_and_gives_the_memory_back(device: Device) -> None:
    made = LoraSlots(device, RANK, N_SLOTS)
    made.extend([[Q]])
    made.close()
    made.close()
    assert made.n_bytes == 0 and not made.names


ONE, TWO = LoraRow((2,), (1.0,)), LoraRow((1, 3), (0.25, -2.0))


def test_a_graph_depends_on_the_most_slots_and_on_factors() -> None:
    assert lora_shape([(None, 1), (None, 1)]) is None and lora_shape([]) is None
    assert lora_shape([(LoraRow((), ()), 1)]) is None
    assert lora_shape([(None, 0), (ONE, 1)]) == LoraShape(1, weighted=False, outs=(0, 1))
    assert lora_shape([(ONE, 3), (TWO, 1)]) == LoraShape(2, weighted=True, outs=(3, 1))
    both = LoraRow((1, 2), (1.0, 1.0))
    assert lora_shape([(both, 1)]) == LoraShape(2, weighted=False, outs=(1,))


def test_every_token_has_the_slots_and_factors_of_its_sequence() -> None:
    rows = [(ONE, 2), (None, 1), (TWO, 1)]
    ids, factors = lora_ids(rows, 2), lora_factors(rows, 2)
    assert ids.dtype == np.int32 and factors.dtype == np.float32
    assert ids.tolist() == [[2, 0], [2, 0], [0, 0], [1, 3]]
    assert factors.tolist() == [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.25, -2.0]]


def test_a_sequence_without_outputs_leaves_no_row_behind() -> None:
    assert lora_ids([(ONE, 0), (TWO, 1)], 2).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ((1, 1, 1), [Run(0, 0, 3, 1)]),
        ((5,), [Run(0, 0, 1, 5)]),
        ((1, 1, 7, 7, 1), [Run(0, 0, 2, 1), Run(2, 2, 2, 7), Run(4, 16, 1, 1)]),
        ((0, 1, 0, 0, 2), [Run(1, 0, 1, 1), Run(4, 1, 1, 2)]),
        ((0, 0), []),
    ],
)
def test_neighbours_of_equal_length_are_computed_together(
    columns: tuple[int, ...], wanted: list[Run]
) -> None:
    assert list(runs_of(columns)) == wanted
