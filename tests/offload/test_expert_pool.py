"""Groups of a prompt's experts, and the room that slots take beyond their experts' bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.offload.expert_pool import ExpertLayer, PoolPlan, spares_reads
from edgeroute.offload.expert_turns import cut_groups
from edgeroute.runtime import slots
from edgeroute.runtime.gguf import GGMLType, TensorInfo


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


@pytest.mark.parametrize(
    ("part_bytes", "read_kib", "spares"),
    [
        (884_736, 256, False),  # 3 x 3 reads, or 10
        (884_736, 1024, False),  # 3, or 3
        (884_736, 4096, True),  # 3, or 1
        (294_912, 256, False),
        (294_912, 1024, True),
        (1000, 256, True),
    ],
)
def test_one_piece_spares_reads_where_parts_are_shorter_than_a_read(
    part_bytes: int, read_kib: int, spares: bool
) -> None:
    infos = tuple(
        TensorInfo(name=f"blk.0.{part}", type=GGMLType.F32, ne=(1, 1, 4), offset=0,
                   nbytes=4 * part_bytes) for part in ("gate", "up", "down")
    )  # fmt: skip
    pool = PoolPlan(layers=(ExpertLayer(0, infos),), n_expert=4)
    assert spares_reads([pool], read_kib << 10) == spares
