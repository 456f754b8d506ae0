"""Groups of a prompt's experts, and the room that slots take beyond their experts' bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.offload.expert_turns import cut_groups
from edgeroute.runtime import slots


@given(
    counts=st.dictionaries(st.integers(0, 127), st.integers(1, 900), max_size=40),
    n_most=st.integers(1, 20),
    most=st.integers(1, 2048),
)
def test_groups_hold_everybody_in_order_and_no_more_than_fit(
    counts: dict[int, int], n_most: int, most: int
) -> None:
    groups = list(cut_groups(list(counts), counts, n_most, most))
    assert [expert for group in groups for expert in group] == list(counts)
    for i, group in enumerate(groups):
        total = sum(counts[expert] for expert in group)
        assert 0 < len(group) <= n_most and (total <= most or len(group) == 1)
        if i:  # none is cut short
            before = groups[i - 1]
            full = len(before) == n_most
            assert full or sum(counts[e] for e in before) + counts[group[0]] > most


@pytest.mark.parametrize(
    ("nbytes", "stride"),
    [
        (slots.IN_PLACE_MIN_BYTES - 512, slots.IN_PLACE_MIN_BYTES - 512),
        (884_736, 884_736 + 4096),
        (884_736 + 512, 884_736 + 8192),
        (884_736 + 32, 884_736 + 32),  # the next expert lies otherwise: nothing to gain
    ],
)
def test_slots_have_slack_where_it_spares_a_copy(nbytes: int, stride: int) -> None:
    assert slots.stride_bytes(nbytes) == stride
