"""Static plans: which sub-blocks each rule leaves out, and what that saves."""

import itertools

import numpy as np
import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.plan import SUB_BLOCKS, DepthPlan, LayerDepth
from edgeroute.skippers.static import (
    Choice,
    Costs,
    Greedy,
    Protect,
    Signals,
    Unit,
    Units,
    by_chance,
    by_influence,
    by_kl,
    contiguous,
    fill,
    leave_out,
    left_out,
    uniform,
    whole_layers,
)

N = 10
COSTS = Costs(attn=(1,) * N, ffn=(3,) * N, head=10)
PROTECT = Protect(first=2, last=1)


def signals(influence: dict[int, float] | None = None) -> Signals:
    """States that turn a little in every layer, more where `influence` says so."""
    turned = np.cumsum([0.0, *(0.05 + (influence or {}).get(il, 0.0) for il in range(N))])
    cosines = np.cos(turned[:, None] - turned[None, :])
    kl = {Unit(il, part): 0.1 + 0.01 * il for il in range(N) for part in SUB_BLOCKS}
    return Signals(cosines=cosines, kl=kl, kl_layer=np.array([0.1 + 0.01 * il for il in range(N)]))


def layers_of(units: Units) -> list[int]:
    """The layers that are left out whole."""
    return sorted(unit.il for unit in units if unit.part == "attn")


def test_costs_count_what_runs() -> None:
    units = {Unit(3, "ffn"), Unit(4, "attn")}
    assert COSTS.total == 50 and COSTS.layer_share == 4 / 50
    assert COSTS.share(units) == 4 / 50
    assert COSTS.compute(leave_out(units, N)) == pytest.approx(46 / 50)
    assert COSTS.compute(leave_out(units, N, "approximate"), 2) == pytest.approx(48 / 50)
    repeated = (LayerDepth(ffn="repeat"), *(LayerDepth(),) * (N - 1))
    assert COSTS.compute(repeated) == pytest.approx(53 / 50)


def test_what_is_left_out_is_read_back() -> None:
    units = frozenset({Unit(3, "ffn"), Unit(4, "attn")})
    for act in ("skip", "approximate"):
        plan = DepthPlan(name="x", layers=leave_out(units, N, act))  # type: ignore[arg-type]
        assert left_out(plan) == units


def test_influence_is_how_far_a_layer_turns_the_state() -> None:
    found = signals({4: 0.2}).influence
    assert found.shape == (N,) and found.argmax() == 4
    assert found[0] == pytest.approx(1 - np.cos(0.05))


def test_influence_and_kl_take_the_least_and_spare_the_ends() -> None:
    """Layers 0, 1 and the last have the least influence here and must stay all the same."""
    turned = {il: 0.1 + 0.01 * il for il in range(2, 9)}
    assert layers_of(by_influence(signals(turned), 3, PROTECT)) == [2, 3, 4]
    assert layers_of(by_kl(signals(), 2, PROTECT)) == [2, 3]
    assert layers_of(by_influence(signals(turned), 7, PROTECT)) == list(range(2, 9))
    with pytest.raises(UsageError, match="8 layers cannot be left out"):
        by_influence(signals(turned), 8, PROTECT)


def test_a_block_is_where_the_state_turns_least() -> None:
    turned = {il: 0.1 for il in range(N) if il not in (5, 6, 7)}
    assert layers_of(contiguous(signals(turned), 3, PROTECT)) == [5, 6, 7]
    assert layers_of(contiguous(signals(turned), 7, PROTECT)) == list(range(2, 9))
    less = {il: 0.1 for il in range(N) if il not in (3, 5, 6)}
    assert layers_of(contiguous(signals(less), 1, PROTECT, 1)) == [5]
    assert layers_of(contiguous(signals(less), 7, PROTECT, 9)) == list(range(2, 9))


def test_controls() -> None:
    assert layers_of(uniform(N, 2, PROTECT)) == [3, 7]
    assert layers_of(uniform(N, 7, PROTECT)) == list(range(2, 9))
    assert not uniform(N, 0, PROTECT)
    drawn = {tuple(layers_of(by_chance(N, 3, PROTECT, seed))) for seed in range(20)}
    assert len(drawn) > 5 and all(set(each) <= set(range(2, 9)) for each in drawn)
    assert by_chance(N, 3, PROTECT, 1) == by_chance(N, 3, PROTECT, 1)


def test_protection_leaves_something_to_leave_out() -> None:
    for n_layer in range(2, 6):
        assert Protect(first=4, last=4).layers(n_layer)
    assert Protect(first=0, last=0).layers(3) == [0, 1, 2]


@pytest.mark.parametrize("save", [0.02, 0.06, 0.08, 0.1, 0.14, 0.16, 0.2, 0.3])
def test_a_control_never_computes_less_than_it_is_compared_with(save: float) -> None:
    """One that saved more would look worse than it is."""
    units = fill(lambda n: uniform(N, n, PROTECT), COSTS, save)
    assert COSTS.share(units) <= save + 1e-9
    assert save - COSTS.share(units) < COSTS.ffn[0] / COSTS.total
    assert whole_layers(COSTS, save) == int(save / 0.08 + 1e-9)


def greedy(
    bench: "Bench", saves: list[float], n_look: int = 4
) -> list[Choice]:  # fmt: skip
    """The choices for all savings that can be had."""
    search = Greedy(bench.first, COSTS, bench, n_look)
    found = [search.reach(save) for save in saves]
    return [choice for choice in found if choice is not None]


class Bench:
    """Divergences that add up, with a surcharge for every pair of neighbouring sub-blocks."""

    def __init__(self, surcharge: float = 0.0) -> None:
        self.first = {Unit(il, part): 0.01 * (1 + (7 * il + (part == "ffn") * 5) % 11)
                      for il in range(2, 9) for part in SUB_BLOCKS}  # fmt: skip
        self.surcharge = surcharge
        self.asked: list[Units] = []

    def __call__(self, units: Units) -> float:
        self.asked.append(units)
        pairs = sum(Unit(unit.il + 1, unit.part) in units for unit in units)
        return sum(self.first[unit] for unit in units) + self.surcharge * pairs


def test_greedy_pays_least_per_weight() -> None:
    """Where divergences add up, it takes them in the order of divergence per weight."""
    bench = Bench()
    order = sorted(bench.first, key=lambda unit: bench.first[unit] / COSTS.of(unit))
    choice = greedy(bench, [0.2])[0]
    n = len(choice.units)
    assert COSTS.share(choice.units) >= 0.2 > COSTS.share(set(order[: n - 2]))
    assert len(choice.units & set(order[:n])) >= n - 1  # the last one only has to fill up
    assert choice.kl == pytest.approx(bench(choice.units))


def test_greedy_sees_what_only_shows_together() -> None:
    """Ranked one by one, neighbours go together and cost the surcharge; measured, they do not."""
    bench = Bench(surcharge=0.5)
    order = sorted(bench.first, key=lambda unit: bench.first[unit] / COSTS.of(unit))
    choice = greedy(bench, [0.25], n_look=20)[0]
    ranked = set[Unit]()
    while COSTS.share(ranked) < 0.25:
        ranked.add(order[len(ranked)])
    assert choice.kl < bench(frozenset(ranked))
    assert choice.kl == pytest.approx(bench(choice.units))


def test_greedy_goes_on_from_saving_to_saving_and_asks_once() -> None:
    bench = Bench(surcharge=0.02)
    saves = [0.05, 0.1, 0.2, 0.5, 0.9]
    found = greedy(bench, saves)
    assert len(found) == 4  # 56 % is all there is
    assert all(a.units <= b.units for a, b in itertools.pairwise(found))
    assert all(COSTS.share(c.units) >= save for c, save in zip(found, saves, strict=False))
    assert len(bench.asked) == len(set(bench.asked))
    assert all(choice.kl == pytest.approx(bench(choice.units)) for choice in found)


def test_greedy_looks_at_few_per_step() -> None:
    bench = Bench(surcharge=0.02)
    greedy(bench, [0.5], n_look=2)
    by_size: dict[int, int] = {}
    for units in bench.asked:
        by_size[len(units)] = by_size.get(len(units), 0) + 1
    assert max(by_size.values()) <= 2


def test_greedy_goes_on_from_what_another_rule_found() -> None:
    bench = Bench()
    search = Greedy(bench.first, COSTS, bench)
    search.reach(0.1)
    block = frozenset(Unit(il, part) for il in (4, 5) for part in SUB_BLOCKS)
    search.restart(Choice(block, bench(block)))
    same = search.reach(0.16)
    assert same is not None and same.units == block
    more = search.reach(0.25)
    assert more is not None and block < more.units
    assert more.kl == pytest.approx(bench(more.units))
    assert search.reach(0.57) is None
