"""Reuse distances and working sets, against values counted by hand and by brute force."""

import random

import pytest

from edgeroute.offload.reuse import reuse_distances, working_set
from edgeroute.offload.routes import routes_of
from edgeroute.offload.stack_distance import NONE, pages_between, uses_of
from edgeroute.offload.trace import Trace, make_step
from edgeroute.runtime.errors import UsageError
from tests.offload.routing_lab import Draw, any_draw, drawn, meta_of, written

META = meta_of(1, 8, 1)


def test_distances_counted_by_hand() -> None:
    """0 comes back after {1}, 1 after {0, 2, 3, 4}, 4 and 0 at once, 2 after {3, 4, 1, 0}."""
    order = [0, 1, 0, 2, 3, 4, 1, 1, 0, 0, 2]
    trace = written(META, [[[expert]] for expert in order])
    distances = pages_between(uses_of(trace))
    assert distances.tolist() == [NONE, NONE, 1, NONE, NONE, NONE, 4, 0, 4, 0, 4]
    found = reuse_distances(trace)
    assert found.bounds == (1, 2, 4)
    assert found.shares == pytest.approx((3 / 11, 0, 3 / 11))
    assert found.cold == pytest.approx(5 / 11)
    assert sum(found.shares) + found.cold == pytest.approx(1)
    three = reuse_distances(written(META, [[[expert]] for expert in (0, 1, 2, 3, 0)]))
    assert three.bounds == (1, 2, 4) and three.shares == pytest.approx((0, 0, 0.2))


@pytest.mark.parametrize("seed", range(5))
def test_distances_are_those_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    trace = drawn(any_draw(rng), rng)
    uses = uses_of(trace)
    requests = [
        uses.page[start:end].tolist()
        for start, end in zip(uses.start[:-1], uses.start[1:], strict=True)
    ]
    expected = []
    for now, pages in enumerate(requests):
        for page in pages:
            past = [at for at in range(now) if page in requests[at]]
            between = (
                {other for at in range(past[-1] + 1, now) for other in requests[at]} if past else ()
            )
            expected.append(len(between) if past else NONE)
    assert pages_between(uses).tolist() == expected


def test_a_page_named_twice_in_a_request_is_used_once() -> None:
    meta = meta_of(1, 4, 2)
    steps = tuple(
        make_step(meta, False, [(0, ids)]) for ids in ([0, 1, 1, 2], [2, 0, 2, 0], [1, 3])
    )
    uses = uses_of(Trace(meta=meta, steps=steps))
    assert uses.page.tolist() == [0, 1, 2, 2, 0, 1, 3]
    assert uses.start.tolist() == [0, 3, 5, 7] and uses.max_request == 3
    assert pages_between(uses).tolist() == [NONE, NONE, NONE, 0, 0, 2, NONE]


def test_a_working_set_counted_by_hand() -> None:
    """Two layers; windows do not cross from one sequence to the next."""
    tokens = [[[0], [0]], [[0], [1]], [[1], [2]], [[1], [3]], [[5], [5]]]
    trace = written(meta_of(2, 8, 1), tokens, (0, "a"), (4, "b"))
    found = working_set(routes_of(trace), 8, (4, 1, 2, 64))
    # Of two tokens the first layer uses 1, 2, 1 experts and the second 2, 2, 2.
    assert found == ((1, 2.0), (2, pytest.approx(4 / 3 + 2)), (4, 6.0))


def test_a_constant_route_has_one_tokens_working_set() -> None:
    trace = written(meta_of(3, 8, 2), [[[1, 2], [0, 7], [3, 4]]] * 300)
    assert {pages for _, pages in working_set(routes_of(trace), 8)} == {6.0}
    found = reuse_distances(trace)
    assert found.bounds == (1, 2, 4) and found.shares[2] == pytest.approx(299 / 300)


def test_nothing_to_measure_is_refused() -> None:
    rng = random.Random(1)
    trace = drawn(Draw(n_layer=1, n_expert=4, n_expert_used=1, n_step=4), rng)
    with pytest.raises(UsageError, match="there are none"):
        working_set([], 4)
    with pytest.raises(UsageError, match="at least 1 token"):
        working_set(routes_of(trace), 4, [0])
    with pytest.raises(UsageError, match="expert"):
        working_set(routes_of(written(META, [[[7]]])), 4)
    with pytest.raises(UsageError, match="has none"):
        reuse_distances(Trace(meta=META, steps=()))
