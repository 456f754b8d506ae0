"""What the host reads of a router's answer: which pairs compute, and where outputs are found."""

import numpy as np
import pytest

from edgeroute.models.base import MoeHparams
from edgeroute.models.carry import Carry, Choice
from edgeroute.runtime.device import Device
from edgeroute.runtime.tensor import set_bytes

IDS = [[4, 2, 7, 1], [3, 4, 0, 5], [6, 1, 2, 3]]
WEIGHTS = [[0.5, 0.2, 0.0, 0.0], [0.9, 0.0, 0.0, 0.0], [0.4, 0.0, 0.3, 0.0]]


def choose(
    weights: list[list[float]], *, thinned: bool = True, ids: list[list[int]] = IDS
) -> Choice:
    """Read a choice of four experts per token out of a carry."""
    moe = MoeHparams(n_expert=8, n_expert_used=4, n_ff_exp=32)
    with Device.open("cpu") as device:
        carry = Carry(device, 8, moe, 5)
        set_bytes(carry._all["ids"], np.array(ids, np.int32))
        set_bytes(carry._all["weights"], np.array(weights, np.float32))
        found = carry.read_choice(len(ids), 4, thinned=thinned)
        carry.close()
    return found


def test_all_of_a_choice() -> None:
    for choice in (choose(WEIGHTS, thinned=False), choose([[0.25] * 4] * 3)):
        assert choice.k == 4 and choice.left_out is None
        assert choice.ids == choice.computed() == choice.numbers.tolist() == np.ravel(IDS).tolist()
        assert choice.rows(4).tolist() == list(range(12))


def test_experts_that_weigh_nothing_are_left_out() -> None:
    """Three at most compute; the row of one left out is its own token's best."""
    choice = choose(WEIGHTS)
    assert choice.k == 3
    assert choice.ids == [4, 2, 7, 3, 4, 0, 6, 1, 2]
    assert choice.computed() == [4, 2, 3, 6, 2]
    assert choice.pairs(np.ones(9, np.bool_)).tolist() == [0, 1, 3, 6, 8]
    assert choice.pairs(choice.numbers == 4).tolist() == [0]
    assert choice.rows(4).tolist() == [0, 1, 0, 0, 3, 3, 3, 3, 6, 6, 8, 6]


def test_one_token_computes_the_first_ones() -> None:
    choice = choose([[0.5, 0.2, 0.0, 0.0]], ids=IDS[:1])
    assert (choice.ids, choice.k, choice.left_out) == ([4, 2], 2, None)
    assert choice.rows(4).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("worth", [0.0, float("nan")])
def test_the_best_always_computes(worth: float) -> None:
    """Also where a broken model gives it no weight, or none that is a number."""
    choice = choose([[worth, 0.0, 0.0, 0.0]] * 3)
    assert choice.k == 1 and choice.computed() == [4, 3, 6]
    assert choice.rows(4).tolist() == [0] * 4 + [1] * 4 + [2] * 4
