"""What calibrating step routing makes of answers: workloads, points, and what is learned."""

from dataclasses import replace

import numpy as np
import pytest

from edgeroute.skippers.step_learned import LearnedGlimpse
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_price import Workload
from edgeroute.skippers.steps import Glance, StepPart
from edgeroute.steps_file import Point
from edgeroute.tools.step_calibrate import (
    choose,
    point_of,
    thresholds,
    workload_of,
)
from edgeroute.tools.step_learn import halves_of, learn, projection_of
from edgeroute.tools.step_pair import Result


def result(*parts: StepPart, right: bool = True, passes: int = 0) -> Result:
    return Result(right=right, text="", seconds=1.0, parts=parts, large_passes=passes)


def test_a_workload_tells_reading_from_writing() -> None:
    """The large model alone: 50 tokens of prompt in one pass, then 19 of one token each."""
    alone = result(
        StepPart(index=0, model="large", n_tokens=12, read_large=61),
        StepPart(index=1, model="large", n_tokens=8, read_large=8),
        passes=20,
    )
    assert workload_of([alone]) == Workload(large_written=19, large_passes=1, large_read=50)
    # The small one writes 10; the large one reads prompt and step in a pass and writes 5.
    both = result(
        StepPart(index=0, model="small", n_tokens=10, read_small=59),
        StepPart(index=1, model="large", n_tokens=5, read_small=1, read_large=64),
        passes=5,
    )
    assert workload_of([both]) == Workload(
        small_written=10, small_read=50, large_written=4, large_passes=1, large_read=60
    )
    # A draft of 10, of which 6 stay; the large model writes on from the row that refused.
    checked = result(
        StepPart(index=0, model="small", n_tokens=6, n_refused=4, read_small=60, read_large=60),
        StepPart(index=0, model="large", n_tokens=3, read_large=2),
        passes=3,
    )
    assert workload_of([checked]) == Workload(
        small_written=10, small_read=50, large_written=2, large_passes=1, large_read=60
    )
    mean = workload_of([alone, both])
    assert mean.large_written == 11.5 and mean.small_read == 25


def test_a_point_counts_answers_and_tokens() -> None:
    parts = (StepPart(index=0, model="small", n_tokens=30), StepPart(index=1, model="large",
                                                                     n_tokens=10))  # fmt: skip
    point = point_of("glimpse:1", [result(*parts), result(*parts, right=False)])
    assert (point.n, point.accuracy, point.large_share, point.seconds) == (2, 0.5, 0.25, 1.0)
    assert 0 < point.low < 0.5 < point.high < 1


POINT = Point(spec="large", n=10, accuracy=0.8, low=0.5, high=0.9, large_share=1.0, seconds=4.0,
              workload=Workload(large_written=10.0))  # fmt: skip


def test_the_quickest_that_keeps_the_accuracy_is_chosen() -> None:
    points = [
        POINT,
        replace(POINT, spec="small", accuracy=0.3, seconds=1.0),
        replace(POINT, spec="random:0.5", accuracy=0.9, seconds=0.5),
        replace(POINT, spec="glimpse:1", accuracy=0.77, seconds=3.0),
        replace(POINT, spec="verify:-1:-5", accuracy=0.76, seconds=2.0),
    ]
    assert choose(points, 0.95) is points[4]
    assert choose(points, 0.96) is points[3]
    assert choose(points, 0.97) is None  # neither the control nor the large model itself
    assert choose(points, 0.3) is points[1]
    nothing = [replace(point, accuracy=0.0, low=0.0) for point in points]
    assert choose(nothing, 0.95) is None  # tasks that the large model cannot do tell nothing


def test_thresholds_rise_and_are_never_0() -> None:
    assert thresholds([0.0] * 9 + [3.0], (0.4, 0.6, 1.0)) == [0.001, 3.0]
    assert thresholds([1.0, 2.0, 3.0], (0.5,)) == [2.0]


# learning


def outcomes(
    n: int, rng: np.random.Generator, *, hidden: bool
) -> tuple[list[list[Glance]], list[bool]]:
    """Tasks that the small model spoils where its hidden state says so, or else its entropy."""
    seen, labels = [], []
    for _ in range(n):
        spoilt = bool(rng.random() < 0.5)
        state = rng.standard_normal(8).astype(np.float32)
        state[2] = 6.0 if spoilt else -6.0
        entropy = float(rng.random()) + (0.0 if hidden else 2.0 * spoilt)
        seen.append([Glance(index=0, position=0, entropy=entropy, top_entropy=entropy, margin=1.0,
                            hidden=state)] * 2)  # fmt: skip
        labels.append(spoilt)
    return seen, labels


@pytest.mark.parametrize("hidden", [False, True])
def test_it_learns_from_whatever_tells(hidden: bool) -> None:
    rng = np.random.default_rng(3)
    lesson = learn(*outcomes(60, rng, hidden=hidden))
    assert not isinstance(lesson, str)
    glimpse = LearnedGlimpse.from_dict(lesson.weights)
    if hidden:
        assert glimpse.wants_hidden
    seen, labels = outcomes(40, rng, hidden=hidden)
    chances = [glimpse.probability(each[0]) for each in seen]
    assert all((chance > 0.5) == label for chance, label in zip(chances, labels, strict=True))
    parse_steps(lesson.spec, lesson.weights)


def test_halves_hold_every_task_once_each_label_and_each_kind() -> None:
    """Generators of questions take turns: even tasks would all be of other kinds than odd ones."""
    labels = [i % 5 == 0 for i in range(60)]
    halves = halves_of(labels)
    assert sorted([*halves[0], *halves[1]]) == list(range(60))
    for half in halves:
        assert len(half) == 30 and sum(labels[i] for i in half) == 6
        assert 5 < sum(i % 2 for i in half) < 25


def test_each_half_is_routed_by_what_the_other_one_taught() -> None:
    """In the first half unsure steps spoil answers, in the second sure ones do."""
    rng = np.random.default_rng(5)
    labels = [i % 2 == 0 for i in range(60)]
    first, second = halves_of(labels)
    seen = []
    for i, label in enumerate(labels):
        entropy = float(rng.random()) + 2.0 * (label == (i in first))
        seen.append([Glance(index=0, position=0, entropy=entropy, top_entropy=entropy, margin=1.0)])
    lesson = learn(seen, labels)
    assert not isinstance(lesson, str)
    for half, weights, spoils in ((first, 0, "sure"), (second, 1, "unsure")):
        glimpse = LearnedGlimpse.from_dict(lesson.halves[weights])
        sure = min((seen[i][0] for i in half), key=lambda glance: glance.entropy)
        unsure = max((seen[i][0] for i in half), key=lambda glance: glance.entropy)
        worse = "sure" if glimpse.probability(sure) > glimpse.probability(unsure) else "unsure"
        assert worse == spoils


def test_without_both_outcomes_it_says_why() -> None:
    seen, labels = outcomes(20, np.random.default_rng(1), hidden=True)
    why = learn(seen, [False] * len(labels))
    assert isinstance(why, str) and "only the large model has right" in why


def test_hidden_states_that_are_missing_or_wide_are_left_out() -> None:
    seen, _ = outcomes(20, np.random.default_rng(1), hidden=True)
    flat = [each[0] for each in seen]
    found = projection_of(flat)
    assert found is not None and found.shape == (8, 2)
    assert np.allclose(found.T @ found, np.eye(2), atol=1e-5)
    assert projection_of([replace(flat[0], hidden=None), *flat[1:]]) is None
    assert projection_of(flat[:5]) is None
    wide = [replace(each, hidden=np.ones(1 << 17, np.float32)) for each in flat]
    assert projection_of(wide) is None
