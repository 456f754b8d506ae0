"""What feedback teaches a pool: simulated streams, restarts, and states that nobody vouches for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.pool_config import PoolParams, Profile
from edgeroute.pool_learning import PoolLearner
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.pool_choice import DIMENSIONS, rank

NAMES = ("small", "middle", "large")
COSTS = (1.0, 3.0, 10.0)
WORTH = 0.02
"""Of a second, in rewards: what regret counts a dearer answer as."""
RIGHT = ((0.2, 0.2, 0.6, 0.2, 0.8), (0.4, 0.9, 0.8, 0.9, 0.9), (1.0,) * 5)
WRONG = ((1.0,) * 5,) * 3
ASKED = (
    ("Tell me about the sea.", "Name a bird that can swim.", "What colour is a ripe banana?"),
    ("A farmer has {} sheep and sells {}. How many sheep are left in total?",),
    ("Write a Python function that returns item {}.\n```python\ndef f(x): return x[{}]\n```",),
    ("Translate to French: the train leaves at {} and the weather is fine.",),
)
QUALITY = np.array([[0.95, 0.95, 0.95], [0.1, 0.5, 0.95], [0.2, 0.9, 0.95], [0.3, 0.9, 0.92]])
"""Mean reward by kind of query and model."""


def profiles(tmp_path: Path, capabilities: Sequence[Sequence[float]]) -> PoolParams:
    file = tmp_path / "model.gguf"
    file.touch()
    models = {
        name: Profile(name=name, path=file, capabilities=np.array(each))
        for name, each in zip(NAMES, capabilities, strict=True)
    }
    return PoolParams(models=models, source="test", weights=np.ones(len(DIMENSIONS)))


@dataclass
class Regret:
    """Reward less the worth of its cost that was missed, by who chose."""

    learner: float = 0.0
    random: float = 0.0
    fixed: npt.NDArray[np.float64] | float = 0.0


def play(learner: PoolLearner, qualities: Sequence[npt.NDArray[np.float64]], n: int) -> Regret:
    """Put n queries to the learner, the quality changing at equal intervals."""
    rng, found = np.random.default_rng(5), Regret()
    for turn in range(n):
        kind = int(rng.integers(len(ASKED)))
        text = str(rng.choice(ASKED[kind])).format(*rng.integers(2, 99, 2))
        quality = qualities[turn * len(qualities) // n][kind]
        query = learner.look(text)
        order = rank(learner.candidates(query, dict(zip(NAMES, COSTS, strict=True))), 0.1)
        chosen = NAMES.index(order[0][0].name)
        learner.learn(NAMES[chosen], query, float(rng.random() < quality[chosen]))
        missed = (quality - WORTH * np.array(COSTS)).max() - (quality - WORTH * np.array(COSTS))
        found.learner += missed[chosen]
        found.random += missed.mean()
        found.fixed += missed
    return found


@pytest.mark.parametrize("capabilities", [RIGHT, WRONG], ids=["right profiles", "wrong profiles"])
@pytest.mark.parametrize("drifts", [False, True])
def test_it_beats_every_fixed_model_and_chance(
    tmp_path: Path, capabilities: Sequence[Sequence[float]], drifts: bool
) -> None:
    """With drift, the middle model loses code half way, and the large one what it translated."""
    later = QUALITY.copy()
    later[2, 1], later[3, 2] = 0.2, 0.4
    qualities = [QUALITY, later] if drifts else [QUALITY]
    regret = play(PoolLearner(profiles(tmp_path, capabilities)), qualities, 1200)
    assert regret.learner < 0.6 * np.min(regret.fixed)
    assert regret.learner < 0.4 * regret.random


def test_a_model_that_recovers_is_found_again(tmp_path: Path) -> None:
    """Its profile says it can do all; it could nothing, and after a repair it can."""
    broken = QUALITY.copy()
    broken[:, 0] = 0.0
    learner = PoolLearner(profiles(tmp_path, WRONG))
    play(learner, [broken], 300)
    repaired = np.full_like(QUALITY, 0.95)
    play(learner, [repaired], 1500)
    query = learner.look("Tell me about the sea.")
    costs = dict(zip(NAMES, COSTS, strict=True))
    assert rank(learner.candidates(query, costs), 0.1)[0][0].name == "small"


def test_profiles_alone_decide_where_nobody_teaches(tmp_path: Path) -> None:
    learner = PoolLearner(profiles(tmp_path, RIGHT))
    for kind, name in ((0, "small"), (1, "large"), (2, "middle"), (3, "middle")):
        query = learner.look(ASKED[kind][0].format(17, 5))
        found = rank(learner.candidates(query, dict(zip(NAMES, COSTS, strict=True))), 0.1)
        assert found[0][0].name == name, ASKED[kind][0]
        assert found[0][0].learned == found[0][0].trust == 0


def test_a_model_that_does_as_its_profile_says_is_judged_by_it(tmp_path: Path) -> None:
    learner = PoolLearner(profiles(tmp_path, RIGHT))
    query = learner.look(ASKED[1][0].format(17, 5))
    costs = dict(zip(NAMES, COSTS, strict=True))
    stated = learner.candidates(query, costs)[0].stated
    assert 0.2 < stated < 0.9
    for _ in range(50):
        learner.learn("small", query, 1 - stated)
    assert learner.candidates(query, costs)[0].learned == pytest.approx(0, abs=1e-9)
    for _ in range(50):
        learner.learn("small", query, 1.0)
    assert learner.candidates(query, costs)[0].learned > 0.4 * stated


def known(learner: PoolLearner) -> Mapping[str, tuple[float, float, float | None]]:
    query = learner.look("Tell me about the sea.")
    each = learner.candidates(query, dict.fromkeys(NAMES, 1.0))
    return {one.name: (one.learned, one.trust, learner.cost_s(one.name)) for one in each}


def test_what_was_learned_survives_a_restart(tmp_path: Path) -> None:
    params, state = profiles(tmp_path, RIGHT), tmp_path / "new" / "pool.polar"
    first = PoolLearner(params, state)
    play(first, [QUALITY], 100)
    first.paid("small", 0.25)
    first.save()
    again = PoolLearner(params, state)
    for name, values in known(again).items():
        assert values == pytest.approx(known(first)[name]), name
    assert again.cost_s("small") == 0.25 and again.cost_s("large") is None


def test_another_profile_begins_anew(tmp_path: Path) -> None:
    """Rewards are learned beyond a profile: with another, they would count twice."""
    state = tmp_path / "pool.polar"
    first = PoolLearner(profiles(tmp_path, RIGHT), state)
    play(first, [QUALITY], 50)
    first.save()
    other = PoolLearner(profiles(tmp_path, ((0.9,) * 5, *RIGHT[1:])), state)
    assert other.n_plays("small") == 0
    assert other.n_plays("middle") == first.n_plays("middle") > 0


@pytest.mark.parametrize("content", [b"", b"EDGEPOLR", b"\0" * 4096])
def test_a_damaged_state_is_set_aside(tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "pool.polar"
    state.write_bytes(content)
    learner = PoolLearner(profiles(tmp_path, RIGHT), state)
    assert learner.n_plays("small") == 0
    assert state.with_name("pool.polar.refused").read_bytes() == content


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan"), True, "1", None])
def test_a_reward_that_is_none_teaches_nothing(tmp_path: Path, reward: float) -> None:
    learner = PoolLearner(profiles(tmp_path, RIGHT))
    with pytest.raises(UsageError):
        learner.learn("small", learner.look("x"), reward)
    assert learner.n_plays("small") == 0


def test_measured_seconds_are_smoothed_and_given_ones_stay(tmp_path: Path) -> None:
    params = profiles(tmp_path, RIGHT)
    learner = PoolLearner(params)
    for s_per_token in (0.1, 0.2, float("inf"), 0.0):
        learner.paid("large", s_per_token)
    assert learner.cost_s("large") == pytest.approx(0.12)
