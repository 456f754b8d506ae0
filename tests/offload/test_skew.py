"""Skew of loads and overlap of domains, against values computed by hand."""

import pytest

from edgeroute.offload.routes import routes_of
from edgeroute.offload.skew import domain_overlap, skew
from edgeroute.runtime.errors import UsageError
from tests.offload.routing_lab import meta_of, written

META = meta_of(2, 10, 1)


def test_skew_computed_by_hand() -> None:
    """Loads of the first layer are 4, 3, 2, 1 of ten experts, of the second all are 1."""
    first = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    trace = written(META, [[[expert], [at]] for at, expert in enumerate(first)])
    found = skew(routes_of(trace), 10)
    assert found.layers == (0, 1)
    assert found.top_shares[10] == pytest.approx((0.4, 0.1))
    assert found.top_shares[25] == pytest.approx((0.9, 0.3))  # 2.5 experts are 3
    assert found.top_shares[50] == pytest.approx((1.0, 0.5))
    # Mean 1; squares 9 + 4 + 1 + 0 + 6 * 1 = 20 over ten.
    assert found.load_sd == pytest.approx((2**0.5, 0.0))


def test_overlap_computed_by_hand() -> None:
    tokens = [
        *([[[0], [0]], [[1], [1]]] * 2),  # a: half 0, half 1 in both layers
        *([[[0], [8]], [[2], [9]]] * 3),  # b: half 0, half 2; nothing in common
        *([[[1], [1]], [[0], [0]]] * 1),  # c: as a, and shorter
    ]
    trace = written(META, tokens, (0, "a"), (4, "b"), (10, "c"))
    found = domain_overlap(routes_of(trace), 10)
    assert found.domains == ("a", "b", "c")
    assert [list(row) for row in found.overlap] == [
        pytest.approx([1, 0.25, 1]),
        pytest.approx([0.25, 1, 0.25]),
        pytest.approx([1, 0.25, 1]),
    ]


def test_sequences_of_one_label_are_one_domain() -> None:
    tokens = [[[0], [0]], [[1], [1]], [[0], [5]], [[1], [6]]]
    trace = written(META, tokens, (0, "a"), (1, "b"), (2, "a"), (3, "b"))
    found = domain_overlap(routes_of(trace), 10)
    assert found.domains == ("a", "b")
    assert found.overlap[0] == pytest.approx((1, 0))


def test_no_route_is_refused() -> None:
    with pytest.raises(UsageError, match="not all among"):
        skew([], 10)
    with pytest.raises(UsageError, match="expert 9"):
        skew(routes_of(written(META, [[[9], [0]]])), 8)
