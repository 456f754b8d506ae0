"""From a trace to a profile: its figures against what is known of the routes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeroute.offload.trace import (
    Mark,
    Pools,
    PoolState,
    StepPaging,
    Trace,
    TraceMeta,
    TraceStep,
    TraceWriter,
    make_step,
)
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile import analyse as module
from edgeroute.tools.profile.analyse import About, analyse, load
from edgeroute.tools.profile.hits import cycle_of, decode_part, first_part, sizes_of
from edgeroute.tools.profile.live import live_of
from edgeroute.tools.profile.predictors import predictor_rows
from edgeroute.tools.profile.record import Recorded
from edgeroute.tools.profile.table import sections

META = TraceMeta(
    model="tiny.gguf", n_layer=5, n_expert=16, n_expert_used=2, page_bytes=100, layers=(1, 2, 3, 4)
)


def silent(phase: str, n_done: int, n_total: int) -> None:
    assert 0 < n_done <= n_total


def routes(
    n: int, seed: int, experts: Sequence[int] = range(16)
) -> list[list[tuple[int, list[int]]]]:
    """What n tokens choose, by chance among some experts."""
    rng = np.random.default_rng(seed)
    return [
        [
            (il, rng.choice(experts, META.n_expert_used, replace=False).tolist())
            for il in META.layers
        ]
        for _ in range(n)
    ]


def prompt_of(tokens: list[list[tuple[int, list[int]]]]) -> TraceStep:
    """One prefill step over several tokens; of the last layer only the last token is run."""
    chosen = [
        (il, [e for token in tokens for e in token[i][1]] if il != 4 else tokens[-1][i][1])
        for i, il in enumerate(META.layers)
    ]
    return make_step(META, True, chosen)


def write(path: Path, texts: Sequence[tuple[str, int, Sequence[int]]], n_prompt: int = 6) -> Path:
    """Write a trace: of each text a label, the number of decoded tokens, and its experts."""
    with TraceWriter(path, META) as writer:
        for i, (label, n, experts) in enumerate(texts):
            writer.append(Mark(step=writer.n_steps, label=label))
            found = routes(n_prompt + n, i, experts)
            writer.append(prompt_of(found[:n_prompt]))
            for token in found[n_prompt:]:
                writer.append(make_step(META, False, token))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.trace", [("one", 30, range(8)), ("two", 30, range(4, 12)),
                                        ("one", 20, range(8))])  # fmt: skip


def test_a_profile_has_every_section_and_is_plain_json(path: Path) -> None:
    found = analyse(path, About(slot_bytes=128, fixed_bytes=10_000), silent)
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["subject"]["n_decode_token"] == 80 and again["subject"]["n_prompt_token"] == 18
    assert again["subject"]["domains"] == ["one", "two"] and again["live"] is None
    assert {"hits", "reuse", "locality", "skew", "predictors", "advice"} <= again.keys()
    assert sum(map(sum, again["skew"]["loads"])) == 2 * (3 * 98 + 83)
    # 4 of 12 experts are shared, all of a domain's are used alike.
    assert 0.3 < again["skew"]["overlap"][0][1] < 0.7


def test_the_optimum_is_never_beaten_and_curves_rise(path: Path) -> None:
    hits = analyse(path, About(), silent).hits
    curves = {curve.policy: curve.hit_ratios for curve in hits.pooled}
    assert [*curves] == ["lru", "lfu", "lfru", "belady"] and hits.active == "lfru"
    for name, ratios in curves.items():
        assert all(a <= b for a, b in zip(ratios, curves["belady"], strict=True)), name
    assert list(curves["lru"]) == sorted(curves["lru"])
    sizes = hits.pooled[0].n_slots
    assert hits.cliff_slots == 8 in sizes and sizes[-1] == 64
    # With all experts in memory only first uses miss, whatever the policy.
    assert len({ratios[-1] for ratios in curves.values()}) == 1
    assert hits.layers == META.layers and len(hits.by_layer["lru"]) == 4


def test_a_constant_route_is_perfectly_local(tmp_path: Path) -> None:
    path = write(tmp_path / "a.trace", [("", 70, (3, 9))])
    found = analyse(path, About(), silent)
    assert {m: each.value for m, each in found.locality.srp.items()} == {4: 1.0, 16: 1.0, 64: 1.0}
    assert found.locality.srp_by_layer == {16: (1.0,) * 4}
    assert found.reuse.working_set[0] == (1, 8.0) and found.reuse.working_set[-1] == (64, 8.0)
    assert found.skew.domains == () and found.subject.domains == ()
    assert found.skew.top_shares[25] == (1.0,) * 4
    eam = next(row for row in found.predictors if row.name == "eam" and row.n_guess == 2)
    assert eam.recall > 0.95 and eam.wasted_bytes_token < 20
    assert [each.n_slots for each in found.advice] == [8]


def test_budgets_rise_and_name_what_they_take(path: Path) -> None:
    found = analyse(path, About(slot_bytes=128, fixed_bytes=10_000), silent)
    slots = [each.n_slots for each in found.advice]
    assert slots == sorted(set(slots)) and slots[0] == 8
    assert all(each.budget_bytes == 10_000 + 128 * each.n_slots for each in found.advice)
    for each in found.advice:
        optimum = re.search(r"optimum there is ([0-9.]+)%", each.why)
        assert optimum is not None and float(optimum[1]) >= 100 * each.hit_ratio - 0.05
    full = found.hits.pooled[0].hit_ratios[-1]
    assert found.advice[-1].hit_ratio >= 0.95 * full - 0.005
    assert all(each.budget_bytes == 0 for each in analyse(path, About(), silent).advice)


def test_random_guesses_are_as_right_as_chance(path: Path) -> None:
    rows = {(row.name, row.n_guess): row for row in predictor_rows(load(path)[0])}
    assert {name for name, _ in rows} == {"eam", "frequency", "popularity", "random"}
    assert abs(rows["random", 2].recall - 2 / 16) < 0.07
    assert rows["popularity", 4].recall > rows["popularity", 2].recall > 0.15
    # Three of four layers can be guessed, two experts each.
    assert rows["random", 2].bytes_token == pytest.approx(3 * 2 * META.page_bytes)


def test_sizes_hold_the_cliff_for_any_shape() -> None:
    for n_layer, n_expert, used in ((1, 2, 1), (1, 2, 2), (48, 128, 8), (32, 8, 2), (3, 512, 10)):
        meta = TraceMeta(model="x", n_layer=n_layer, n_expert=n_expert, n_expert_used=used,
                         page_bytes=1, layers=tuple(range(n_layer)))  # fmt: skip
        sizes = sizes_of(meta)
        assert list(sizes) == sorted(set(sizes)) and used <= sizes[0]
        assert sizes[-1] == n_layer * n_expert and cycle_of(meta) in sizes


def test_a_long_trace_is_replayed_in_part_and_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, more = load(path)
    assert not more
    part = decode_part(trace, most=8 * 45)
    labels = [mark.label for mark in part.marks]
    assert len(part.steps) == 45 and sorted(labels) == ["one", "one", "two"]
    assert not any(step.prefill for step in part.steps)
    assert len(first_part(trace, most=400).steps) < 60
    monkeypatch.setattr(module, "MAX_REQUESTS", 8 * 45)
    assert any("45 of the 80" in note for note in analyse(path, About(), silent).notes)


def test_a_trace_beyond_the_limit_is_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, more = load(path, most=500)
    assert more and 0 < len(trace.steps) < 81
    monkeypatch.setattr(module, "MAX_IDS", 500)
    assert any("it goes on" in note for note in analyse(path, About(), silent).notes)


def test_a_file_that_ends_inside_a_record_still_counts(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])
    found = analyse(path, About(), silent)
    assert found.subject.n_decode_token == 79
    assert any("ends inside a record" in note for note in found.notes)


@pytest.mark.parametrize("data", [b"", b"EDGETRAC", b"no trace at all, but long enough"])
def test_what_is_no_trace_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.trace").write_bytes(data)
    with pytest.raises(UsageError):
        analyse(tmp_path / "a.trace", About(), silent)


def test_a_trace_without_a_decoded_token_says_what_to_do(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.trace", META) as writer:
        writer.append(prompt_of(routes(5, 1)))
    with pytest.raises(UsageError, match="no decoded token; record some with --tokens"):
        analyse(tmp_path / "a.trace", About(), silent)
    with pytest.raises(UsageError, match="cannot read the trace"):
        analyse(tmp_path / "none", About(), silent)


def test_the_live_run_is_summed_from_its_decode_steps() -> None:
    steps = (prompt_of(routes(3, 1)), *(make_step(META, False, each) for each in routes(2, 2)))
    state = PoolState(layers=META.layers, n_slots=20, policy="lfu", page_bytes=100, slot_bytes=128)
    pools = Pools(step=0, begins=True, pools=(state,), group_bytes=1, n_ahead=1)
    paging = tuple(
        StepPaging(step=i, seconds=0.5, stall_s=0.1, hits=hits, late=1, misses=7 - hits,
                   demand_bytes=300, prefetch_bytes=100)
        for i, hits in enumerate((0, 4, 6))
    )  # fmt: skip
    trace = Trace(meta=META, steps=steps, paging=paging, live=(pools,))
    found = live_of(trace)
    assert found is not None
    assert (found.policy, found.n_slots, found.slots_bytes) == ("lfu", 20, 20 * 128)
    assert found.hit_ratio == 10 / 16 and found.demand_bytes_token == 300
    assert found.decode_tok_s == 2.0 and found.prefill_tok_s == 6.0
    run = Recorded(n_decode_token=4, decode_s=1.0, joules=2.0, energy_source="rapl",
                   energy_estimated=False, budget_bytes=7)  # fmt: skip
    whole = live_of(trace, run, replay_equal=True)
    assert whole is not None and whole.decode_tok_s == 4.0 and whole.joules_token == 0.5
    assert whole.budget_bytes == 7 and whole.replay_equal is True
    assert live_of(Trace(meta=META, steps=steps)) is None


def test_the_table_is_short_and_names_the_active_policy(path: Path) -> None:
    found = analyse(path, About(arch="qwen3moe"), silent)
    shown = dict(sections(found))
    assert [*shown] == ["tiny.gguf", "Hits by experts held", "Locality", "Skew",
                        "Prefetch, replayed", "Advice", "Notes"]  # fmt: skip
    text = "\n".join(f"{a} {b}" for rows in shown.values() for a, b in rows)
    assert "lfru*" in text and "qwen3moe" in text and "8 experts are one token's cycle" in text
    assert len(text.splitlines()) < 60
