"""Learned thresholds in played streams: targets are held, drift is followed, files not trusted."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_targets import (
    LEVELS,
    MAX_PENDING,
    N_RANKED,
    SHARES,
    Ranks,
    TargetAccuracy,
    TargetPace,
    TargetShare,
)
from edgeroute.skippers.steps import Glance, StepPart, Who

Entropy = Callable[[random.Random, int], float]
SMALL_S, LARGE_S = 0.05, 0.25


def seen(entropy: float) -> Glance:
    return Glance(index=0, position=0, entropy=entropy, top_entropy=0.0, margin=0.0)


def usual(rng: random.Random, index: int) -> float:
    """As measured: openings are unsure, other steps either sure or not."""
    if not index:
        return rng.gauss(2.4, 0.6)
    return rng.random() * 0.1 if rng.random() < 0.4 else rng.gauss(1.4, 0.5)


def drifted(rng: random.Random, index: int) -> float:
    return 2.0 + 0.3 * usual(rng, index)


def play(
    policy: TargetShare | TargetPace, entropy: Entropy, n_answers: int, seed: int = 1
) -> tuple[float, float]:
    """Return the large model's share of the tokens and the seconds per token.

    Unsure steps are longer, which a threshold for the share of steps would not see.
    """
    rng, tokens, seconds = random.Random(seed), {"small": 0, "large": 0}, 0.0
    for answer in range(n_answers):
        run = policy.begin(answer)
        for index in range(rng.randint(3, 8)):
            nats = max(0.0, entropy(rng, index))
            who = run.choose(seen(nats))
            n = int(6 + 6 * nats + rng.choice([0, 3, 20]))
            took = n * (SMALL_S if who == "small" else LARGE_S)
            run.note(StepPart(index=index, model=who, n_tokens=n, seconds=took))
            tokens[who] += n
            seconds += took
    total = sum(tokens.values())
    return tokens["large"] / total, seconds / total


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_a_share_of_tokens_is_held_and_drift_followed(share: float) -> None:
    policy = TargetShare(share)
    assert play(policy, usual, 120)[0] == pytest.approx(share, abs=0.03)
    play(policy, drifted, 40)  # the change itself
    assert play(policy, drifted, 120)[0] == pytest.approx(share, abs=0.03)
    assert play(policy, lambda rng, index: 0.0, 120)[0] == pytest.approx(share, abs=0.04)


def test_it_takes_the_unsure_steps() -> None:
    policy, rng = TargetShare(0.3), random.Random(1)
    found: dict[Who, list[float]] = {"small": [], "large": []}
    for _ in range(1000):
        nats = rng.random() * 3
        who = policy.choose(seen(nats))
        found[who].append(nats)
        policy.note(StepPart(index=0, model=who, n_tokens=12))
    means = {who: sum(each) / len(each) for who, each in found.items()}
    assert means["small"] < 1.3 and means["large"] > 2.3


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**6), st.booleans()), max_size=80),
       st.floats(0, 1))  # fmt: skip
def test_a_level_stays_within_bounds(parts: list[tuple[float, int, bool]], share: float) -> None:
    """Whatever comes: other writers than named, empty parts, any lengths and times."""
    policies: list[TargetShare | TargetPace] = [TargetShare(share), TargetPace(0.1)]
    for policy in policies:
        for nats, n, large in parts:
            assert policy.choose(seen(nats)) in ("small", "large")
            policy.note(StepPart(index=0, model="large" if large else "small", n_tokens=n,
                                 seconds=nats * 1e300))  # fmt: skip
            assert LEVELS[0] <= policy.level <= LEVELS[1] and math.isfinite(policy.length)


def test_a_failed_model_teaches_nothing() -> None:
    policy = TargetShare(0.5)
    before = policy.level
    for _ in range(200):
        policy.note(StepPart(index=0, model="small", n_tokens=20, reason="fallback"))
    assert policy.level == before


@pytest.mark.parametrize("pace", [0.08, 0.12, 0.2])
def test_a_pace_is_held(pace: float) -> None:
    policy = TargetPace(pace)
    play(policy, usual, 40)
    assert play(policy, usual, 150)[1] == pytest.approx(pace, rel=0.05)
    play(policy, drifted, 40)
    assert play(policy, drifted, 150)[1] == pytest.approx(pace, rel=0.05)


def test_a_pace_out_of_reach_ends_with_one_model() -> None:
    for pace, share in ((0.04, 0.0), (0.3, 1.0)):
        policy = TargetPace(pace)
        play(policy, usual, 60)
        assert play(policy, usual, 30)[0] == share


def test_a_time_that_is_none_teaches_nothing() -> None:
    policy = TargetPace(0.1)
    before = policy.level
    policy.note(StepPart(index=0, model="large", n_tokens=9, seconds=math.nan))
    assert policy.level == before


# accuracy


def reward_stream(
    policy: TargetAccuracy, chance: Callable[[float], float], n: int, seed: int
) -> tuple[float, float]:
    """Return the mean reward and the mean share of large steps."""
    rng, total, n_large, n_steps = random.Random(seed), 0.0, 0, 0
    for _ in range(n):
        answer = rng.randrange(1 << 40)
        run = policy.begin(answer)
        writers = [run.choose(seen(max(0.0, usual(rng, index)))) for index in range(6)]
        share = writers.count("large") / len(writers)
        reward = float(rng.random() < chance(share))
        assert policy.feedback(answer, reward)
        total, n_large, n_steps = total + reward, n_large + writers.count("large"), n_steps + 6
    return total / n, n_large / n_steps


def test_the_cheapest_share_that_is_good_enough() -> None:
    policy = TargetAccuracy(0.8)
    reward_stream(policy, lambda share: 0.95 if share >= 0.15 else 0.4, 600, 1)
    reward, share = reward_stream(policy, lambda share: 0.95 if share >= 0.15 else 0.4, 600, 2)
    assert reward > 0.75 and share < 0.6


def test_accuracy_adapts_to_drift() -> None:
    policy = TargetAccuracy(0.8)
    reward_stream(policy, lambda share: 0.9, 500, 1)
    reward, share = reward_stream(policy, lambda share: 0.9, 300, 2)
    assert reward > 0.85 and share < 0.05  # small alone is good enough

    def harder(share: float) -> float:
        return 0.3 + 0.65 * share

    reward_stream(policy, harder, 600, 3)
    reward, share = reward_stream(policy, harder, 800, 4)
    assert reward > 0.7 and share > 0.6
    reward_stream(policy, lambda share: 0.9, 1500, 5)
    assert reward_stream(policy, lambda share: 0.9, 300, 6)[1] < 0.15  # and back


def test_equal_seeds_explore_as_well() -> None:
    """Callers that never change the seed must not get the same draw forever."""
    policy, arms = TargetAccuracy(0.5), set()
    for _ in range(60):
        run = policy.begin(1)
        arms.add(tuple(run.choose(seen(nats)) for nats in (0.1, 0.6, 1.1, 1.6, 2.1, 2.6, 3.4)))
        policy.feedback(1, 0.5)
    assert len(arms) > 2


def test_every_answer_is_judged_once() -> None:
    policy = TargetAccuracy(0.9)
    assert not policy.feedback(7, 1.0)
    policy.begin(7)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="from 0 to 1"):
            policy.feedback(7, bad)
    assert policy.feedback(7, 1.0) and not policy.feedback(7, 1.0)
    for seed in range(MAX_PENDING + 5):
        policy.begin(seed)
    assert policy.n_pending == MAX_PENDING and not policy.feedback(0, 1.0)


# ranks and what is kept


@given(st.lists(st.floats(0, 10), max_size=600))
def test_ranks_are_shares_of_the_last_ones(entropies: list[float]) -> None:
    ranks = Ranks()
    for nats in entropies:
        last = ranks.to_list()
        below = sum(each < nats for each in last) + sum(each == nats for each in last) / 2
        assert ranks.rank(nats) == pytest.approx(below / len(last))
        ranks.enter(nats)
        assert len(ranks.to_list()) <= N_RANKED
    if len(entropies) >= N_RANKED:
        assert ranks.to_list() == entropies[-N_RANKED:]


def made() -> list[Any]:
    found: list[Any] = [TargetShare(0.3), TargetPace(0.1)]
    for policy in found:
        play(policy, usual, 60)
    accuracy = TargetAccuracy(0.8)
    reward_stream(accuracy, lambda share: share, 100, 1)
    return [*found, accuracy]


def test_what_was_learned_survives_its_dict() -> None:
    fresh: list[Any] = [TargetShare(0.3), TargetPace(0.1), TargetAccuracy(0.8)]
    for policy, other in zip(made(), fresh, strict=True):
        other.restore(json.loads(json.dumps(policy.to_dict())))
        assert other.to_dict() == policy.to_dict()
        rng = random.Random(5)
        for _ in range(30):
            nats = rng.random() * 4
            first, second = (each.begin(3).choose(seen(nats)) for each in (policy, other))
            if not isinstance(policy, TargetAccuracy):  # which also draws by how many began
                assert first == second


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spec", "target:0.4"), ("level", 2.0), ("level", math.nan), ("length", 0.0),
        ("length", "9"), ("entropies", []), ("entropies", [0.0] * (N_RANKED + 1)),
        ("entropies", [-1.0]), ("entropies", [math.inf]), ("entropies", [None]), ("more", 1),
    ],
)  # fmt: skip
def test_a_hostile_state_is_refused_and_changes_nothing(key: str, value: object) -> None:
    policy = TargetShare(0.3)
    before = policy.to_dict()
    changed = before | {"level": 0.1, "length": 99.0} | {key: value}
    with pytest.raises(UsageError, match="what a step policy learned"):
        policy.restore(changed)
    assert policy.to_dict() == before


@pytest.mark.parametrize("good", [[1.0], [-1.0] * len(SHARES), [math.nan] * len(SHARES), None])
def test_hostile_rewards_are_refused(good: object) -> None:
    policy = TargetAccuracy(0.8)
    before = policy.to_dict()
    with pytest.raises(UsageError, match="what a step policy learned"):
        policy.restore(before | {"good": good})
    assert policy.to_dict() == before
