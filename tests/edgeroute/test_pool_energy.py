"""A pool that weighs accuracy against energy: what it learns and chooses, and what it opens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Pool
from edgeroute.config import RunParams
from edgeroute.pool_config import PoolParams, Profile, read_pool
from edgeroute.pool_learning import PoolLearner
from edgeroute.pool_seats import seat_all
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.pool_choice import DIMENSIONS, Candidate, rank_by_worth, relative
from edgeroute.tools.synth import make

NAMES = ("small", "middle", "large")
JOULES = np.array([0.1, 0.3, 1.0])
WEIGHT = 0.4
ASKED = (
    ("Tell me about the sea.", "Name a bird that can swim.", "What colour is a ripe banana?"),
    ("A farmer has {} sheep and sells {}. How many sheep are left in total?",),
    ("Write a Python function that returns item {}.\n```python\ndef f(x): return x[{}]\n```",),
    ("Translate to French: the train leaves at {} and the weather is fine.",),
)
QUALITY = np.array([[0.9, 0.95, 0.95], [0.05, 0.2, 0.95], [0.1, 0.9, 0.95], [0.1, 0.5, 0.6]])
"""Chance of a right answer, by kind of query and model."""
SHARED: dict[str, Any] = {"threads": 1, "n_ctx": 256, "n_ubatch": 64, "state": "off"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.touch()
    return path


def learner_of(file: Path, able: float = 0.5, alpha: float | None = None) -> PoolLearner:
    """Make a learner that knows nothing to tell its models apart by."""
    models = {
        name: Profile(name=name, path=file, capabilities=np.full(len(DIMENSIONS), able))
        for name in NAMES
    }
    params = PoolParams(models=models, source="test", weights=np.ones(len(DIMENSIONS)))
    return PoolLearner(params) if alpha is None else PoolLearner(params, alpha=alpha)


def energy(joules: float, source: str = "rapl") -> Mapping[str, object]:
    return {"joules": joules, "source": source, "scope": "x"}


def play(learner: PoolLearner, n: int, seed: int) -> tuple[float, float]:
    """Put n queries to a learner, which sees their texts alone; return regrets: its, the best's."""
    rng = np.random.default_rng(seed)
    rewards = (1 - WEIGHT) * QUALITY + WEIGHT * (1 - JOULES / JOULES.max())
    mine, fixed = 0.0, np.zeros(len(NAMES))
    for _ in range(n):
        kind = int(rng.integers(len(ASKED)))
        query = learner.look(str(rng.choice(ASKED[kind])).format(*rng.integers(2, 99, 2)))
        costs = dict(zip(NAMES, JOULES, strict=True))
        found = learner.candidates(query, costs, learner.energies(costs))
        chosen = NAMES.index(rank_by_worth(found, WEIGHT)[0][0].name)
        n_tokens = int(rng.integers(1, 50))
        joules = float(JOULES[chosen]) * n_tokens * rng.uniform(0.8, 1.2)
        learner.used(NAMES[chosen], energy(joules), n_tokens)
        learner.learn(NAMES[chosen], query, float(rng.random() < QUALITY[kind, chosen]))
        missed = rewards[kind].max() - rewards[kind]
        mine += missed[chosen]
        fixed += missed
    return mine, float(fixed.min())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_beats_the_best_model_though_nobody_tells_it_the_task(file: Path, seed: int) -> None:
    mine, best = play(learner_of(file), 800, seed)
    assert mine < 0.6 * best


def test_one_that_trusts_nobody_is_locked_in(file: Path) -> None:
    """Without optimism it stays with what it met first: why there is some."""
    locked = sum(play(learner_of(file, able=0.0, alpha=0.0), 500, seed)[0] for seed in range(3))
    mine = sum(play(learner_of(file, able=0.0), 500, seed)[0] for seed in range(3))
    assert mine < 0.7 * locked


# energies


def test_joules_per_token_are_smoothed_by_tokens(file: Path) -> None:
    learner = learner_of(file)
    assert learner.joules_per_token("small") is None
    learner.used("small", energy(10.0), 10)
    learner.used("small", energy(4.0), 1)
    # A short answer to a long prompt weighs by its one token.
    assert learner.joules_per_token("small") == pytest.approx(14 / 11)
    for _ in range(200):
        learner.used("small", energy(6.0), 2)
    assert learner.joules_per_token("small") == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("bad", [None, {}, {"joules": "1"}, {"joules": float("nan")},
                                 {"joules": -1.0}, {"joules": float("inf")}])  # fmt: skip
def test_what_is_no_energy_teaches_nothing(file: Path, bad: Any) -> None:
    learner = learner_of(file)
    learner.used("small", bad, 3)
    learner.used("small", energy(1.0), 0)
    assert learner.joules_per_token("small") is None


def test_joules_of_another_source_begin_anew(file: Path) -> None:
    learner = learner_of(file)
    learner.used("small", energy(1.0), 1)
    learner.used("large", energy(9.0, "estimate"), 1)
    assert learner.joules_per_token("small") is None
    assert learner.joules_per_token("large") == 9


def test_what_is_not_known_is_guessed_by_its_seconds(file: Path) -> None:
    learner = learner_of(file)
    costs = {"small": 0.1, "middle": 0.2, "large": 0.4}
    assert learner.energies(costs) == costs  # at a watt: only their ratios count
    learner.used("small", energy(1.0), 1)
    assert learner.energies(costs) == pytest.approx({"small": 1.0, "middle": 2.0, "large": 4.0})
    learner.used("large", energy(2.0), 1)
    assert learner.energies(costs)["middle"] == pytest.approx(0.2 * (10 + 5) / 2)


def test_worth_weighs_accuracy_and_energy() -> None:
    cheap = Candidate(name="cheap", price=1.0, stated=0.5, energy=0.2)
    dear = Candidate(name="dear", price=2.0, stated=0.0, energy=1.0)
    order = [[each.name for each, _ in rank_by_worth((cheap, dear), w)] for w in (0.1, 0.9)]
    assert order == [["dear", "cheap"], ["cheap", "dear"]]
    assert cheap.worth(0.25) == pytest.approx(0.75 * 0.5 + 0.25 * 0.8)
    assert rank_by_worth((dear,), 0.5)[0][1] == "most worth"
    with pytest.raises(ValueError, match="ranks nothing"):
        rank_by_worth((), 0.5)
    assert relative({"a": 1.0, "b": 4.0}) == {"a": 0.25, "b": 1.0}
    assert relative({}) == {} and relative({"a": 0.0}) == {"a": 0.0}


# configurations


def config(file: Path, **profiles: Mapping[str, Any]) -> dict[str, Any]:
    return {"models": {name: {"path": str(file), "capabilities": 0.5} | each
                       for name, each in profiles.items()}}  # fmt: skip


def seats(file: Path, **profiles: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seat profiles of one file; return place and options by profile, and settings by place."""
    params = read_pool(config(file, **profiles), {})
    found, models = seat_all(list(params.models.values()), RunParams(n_ctx=256))
    run = {
        each.name: (each.params.depth, each.params.depth_max_kl, each.params.small,
                    each.params.steps) for each in models
    }  # fmt: skip
    return {name: (each.place, dict(each.options)) for name, each in found.items()}, run


def test_profiles_of_one_file_share_a_model(file: Path) -> None:
    found, models = seats(file, whole={}, short={"depth": "auto", "depth_max_kl": 0.1})
    assert found == {"whole": ("whole", {"depth": "full"}), "short": ("whole", {})}
    assert models == {"whole": ("auto", 0.1, None, "auto")}


def test_steps_are_a_matter_of_the_request(file: Path) -> None:
    small = {"small": str(file)}
    found, models = seats(file, alone={}, pair=small, glimpse=small | {"steps": "glimpse:1.2"},
                          drafts=small | {"steps": "off"})  # fmt: skip
    assert found == {
        "alone": ("alone", {"steps": "off"}), "pair": ("alone", {"steps": "auto"}),
        "glimpse": ("alone", {"steps": "glimpse:1.2"}), "drafts": ("alone", {"steps": "off"}),
    }  # fmt: skip
    assert models == {"alone": ("full", None, str(file), "auto")}
    found, models = seats(file, alone={}, drafts=small | {"steps": "off"})
    assert found == {"alone": ("alone", {}), "drafts": ("alone", {})}
    assert models["alone"][3] == "off"


@pytest.mark.parametrize(
    "others", [({"depth": "a"}, {"depth": "b"}), ({"depth": "auto"}, {"memory": "1GiB"}),
               ({"depth": "auto", "depth_max_kl": 0.1}, {"depth": "auto", "depth_max_kl": 0.2}),
               ({"depth": "auto"}, {"depth": "auto", "depth_max_kl": 0.2})],
)  # fmt: skip
def test_profiles_that_exclude_each_other_are_models_of_their_own(
    file: Path, others: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    found, models = seats(file, a=others[0], b=others[1])
    assert {name: place for name, (place, _) in found.items()} == {"a": "a", "b": "b"}
    assert set(models) == {"a", "b"}
    assert all(not options for _, options in found.values()) or "memory" in others[1]


@pytest.mark.parametrize(
    ("profile", "words"),
    [({"steps": "glimpse:1"}, "models.a: .*needs two models"), ({"depth": 3}, "models.a.depth"),
     ({"depth_max_kl": -1}, "depth_max_kl"), ({"small": 7}, "models.a.small"),
     ({"detph": "x"}, "did you mean depth")],
)  # fmt: skip
def test_a_profile_that_cannot_be_run_is_refused(file: Path, profile: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        seats(file, a=profile)


@pytest.mark.parametrize("weight", [-0.1, 1.1, "1", True])
def test_a_weight_that_is_none_is_refused(file: Path, weight: Any) -> None:
    for content, given in (({"pool": {"energy": weight}}, {}), ({}, {"energy": weight})):
        with pytest.raises(UsageError, match=r"pool\.energy"):
            read_pool(config(file, a={}) | content, given)


def test_another_way_to_run_a_model_is_learned_anew(file: Path, tmp_path: Path) -> None:
    def learner(**profile: Any) -> PoolLearner:
        return PoolLearner(read_pool(config(file, a=profile), {}), tmp_path / "pool.polar")

    first = learner()
    first.learn("a", first.look("x"), 1.0)
    first.save()
    assert learner().n_plays("a") == 1
    assert learner(depth="auto").n_plays("a") == 0


# whole


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pool")
    found = {name: folder / f"{name}.gguf" for name in ("a", "b")}
    for seed, path in enumerate(found.values()):
        make("llama", path, seed=seed + 1)
    return found


def test_a_pool_chooses_by_worth_and_tells_it(files: dict[str, Path]) -> None:
    models = {
        "cheap": {"path": str(files["a"]), "capabilities": 0.6, "cost": 0.01},
        "dear": {"path": str(files["b"]), "capabilities": 0.7, "cost": 0.1},
    }
    hard = "12 * 7 + 3 * 9 - 4 * 8 = how many?"
    with Pool({"models": models}, memory="1GiB", **SHARED) as plain:
        found = plain.generate(hard, max_tokens=3)
        assert found.pool.model == "dear"  # it lacks less, and nothing else counts
        assert "worth" not in found.pool.to_dict()
    with Pool({"models": models}, memory="1GiB", energy=0.6, **SHARED) as pool:
        found = pool.generate(hard, max_tokens=3)
        assert (found.pool.model, found.pool.why) == ("cheap", "most worth")
        told: Any = found.pool.to_dict()
        assert 0 < told["worth"] < 1 and told["joules_per_token"] > 0
        stats: Any = pool.stats()
        assert stats["energy"] == 0.6
        assert stats["models"]["cheap"]["joules_per_token"] > 0
        assert stats["models"]["dear"]["joules_per_token"] is None
        for _ in range(20):
            pool.feedback(pool.generate(hard, max_tokens=1, model="cheap").id, 0.0)
            pool.feedback(pool.generate(hard, max_tokens=1, model="dear").id, 1.0)
        worth = {each.name: each.worth(0.6) for each, _ in pool._plan(hard, {}, None).order}
        learned = {each.name: each.learned for each, _ in pool._plan(hard, {}, None).order}
        assert set(worth) == {"cheap", "dear"} and learned["cheap"] < 0 < learned["dear"]


def test_configurations_of_one_file_answer_from_one_model(files: dict[str, Path]) -> None:
    models = {
        "alone": {"path": str(files["b"]), "capabilities": 0.5},
        "pair": {"path": str(files["b"]), "capabilities": 0.5, "small": str(files["a"]),
                 "steps": "small"},
    }  # fmt: skip
    with Pool({"models": models}, memory="1GiB", energy=0.5, **SHARED) as pool:
        alone = pool.generate("a b c", model="alone", max_tokens=12)
        pair = pool.generate("a b c", model="pair", max_tokens=12)
        stats: Any = pool.stats()["models"]
        assert {each["place"] for each in stats.values()} == {"alone"}
        assert sum(each["opened"] for each in stats.values()) == 2  # the same one, told twice
    assert not alone.stats.steps
    assert pair.stats.steps and {part.model for part in pair.stats.steps} == {"small"}
    assert alone.text != pair.text
