"""The learned glimpse finds what spoils answers in played data, and trusts no file."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_learned import FEATURES, MAX_PROJECTION, LearnedGlimpse, fit
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.steps import Floats, Glance

N_EMBD = 12


def glances(n: int, seed: int = 1, hidden: bool = True) -> list[Glance]:
    rng = np.random.default_rng(seed)
    return [
        Glance(
            index=int(rng.integers(0, 8)), position=int(rng.integers(0, 120)),
            entropy=float(rng.exponential(1.0)), top_entropy=float(rng.exponential(0.7)),
            margin=float(rng.exponential(2.0)),
            hidden=rng.normal(size=N_EMBD).astype(np.float32) * 50 if hidden else None,
        )
        for _ in range(n)
    ]  # fmt: skip


def outcomes(seen: list[Glance], score: Callable[[Glance], float], seed: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    return np.array([rng.random() < 1 / (1 + math.exp(-score(each))) for each in seen])


def auc(model: LearnedGlimpse, seen: list[Glance], harmful: Any) -> float:
    values = np.array([model.probability(each) for each in seen])
    bad, good = values[harmful], values[~harmful]
    return float((bad[:, None] > good[None]).mean() + 0.5 * (bad[:, None] == good[None]).mean())


def projection() -> Floats:
    return np.eye(N_EMBD, 3, dtype=np.float32)


def by_margin(glance: Glance) -> float:
    return 1.5 - 1.5 * glance.margin + 0.8 * glance.entropy


def by_hidden(glance: Glance) -> float:
    assert glance.hidden is not None
    return float(glance.hidden[1]) / 20


def test_it_learns_what_spoils_an_answer() -> None:
    train, test = glances(1500), glances(600, 7)
    model = fit(train, outcomes(train, by_margin))
    harmful = outcomes(test, by_margin, 8)
    best = np.array([by_margin(each) for each in test])
    possible = float((best[harmful][:, None] > best[~harmful][None]).mean())
    assert auc(model, test, harmful) > possible - 0.02
    mean = float(np.mean([model.probability(each) for each in test]))
    assert mean == pytest.approx(float(harmful.mean()), abs=0.05)


def test_a_hidden_state_helps_where_it_knows_more() -> None:
    train, test = glances(1500), glances(600, 7)
    labels, harmful = outcomes(train, by_hidden), outcomes(test, by_hidden, 8)
    blind, seeing = fit(train, labels), fit(train, labels, projection=projection())
    assert not blind.wants_hidden and seeing.wants_hidden
    assert auc(blind, test, harmful) < 0.6 < 0.8 < auc(seeing, test, harmful)


def test_the_fit_is_the_minimum() -> None:
    """At the solution the loss's slope is 0, weight by weight."""
    seen = glances(300)
    labels = outcomes(seen, by_margin)
    model = fit(seen, labels, 2.0)
    rows = (np.stack([model.features(each) for each in seen]) - model.mean) / model.scale
    wrong = np.array([model.probability(each) for each in seen]) - labels
    assert np.allclose(rows.T @ wrong + 2.0 * model.weights, 0, atol=1e-4)
    assert abs(float(wrong.sum())) < 1e-4


def test_equal_input_gives_equal_weights() -> None:
    seen = glances(200)
    labels = outcomes(seen, by_margin)
    assert fit(seen, labels).to_dict() == fit(seen, labels).to_dict()


def test_what_separates_completely_or_never_changes_is_no_trouble() -> None:
    seen = [Glance(index=0, position=0, entropy=float(i), top_entropy=1.0, margin=2.0)
            for i in range(40)]  # fmt: skip
    model = fit(seen, np.arange(40) >= 20, 1e-3)
    assert model.probability(seen[0]) < 0.01 and model.probability(seen[-1]) > 0.99
    alike = fit(seen[:1] * 40, np.arange(40) >= 30)
    assert alike.probability(seen[0]) == pytest.approx(0.25)


@pytest.mark.parametrize("seed", [30, 59, 267, 658])
def test_a_step_that_goes_too_far_is_halved(seed: int) -> None:
    """Few glances, some of them far out: Newton's whole step would leave for infinity."""
    rng = np.random.default_rng(seed)
    entropies, margins = (np.abs(rng.standard_t(1.2, size=31)) for _ in range(2))
    seen = [Glance(index=0, position=0, entropy=float(h), top_entropy=0.0, margin=float(m))
            for h, m in zip(entropies, margins, strict=True)]  # fmt: skip
    model = fit(seen, rng.random(31) < 0.9, 1e-4)
    assert all(0 <= model.probability(each) <= 1 for each in seen)


def test_a_probability_is_always_one() -> None:
    model = fit(glances(300), outcomes(glances(300), by_margin), projection=projection())
    for value in (0.0, 1e300):
        far = Glance(index=10**9, position=10**9, entropy=value, top_entropy=value, margin=value,
                     hidden=np.full(N_EMBD, 1e30, np.float32))  # fmt: skip
        assert 0 <= model.probability(far) <= 1
    for bad in (math.nan, math.inf):
        broken = Glance(index=0, position=0, entropy=1.0, top_entropy=1.0, margin=1.0,
                        hidden=np.full(N_EMBD, bad, np.float32))  # fmt: skip
        with np.errstate(invalid="ignore"):
            assert model.probability(broken) == 1.0


def test_what_cannot_be_learned_from_is_refused() -> None:
    seen = glances(30)
    labels = np.arange(30) < 10
    for given, wrong in ((seen[:-1], labels), (seen, labels & False), (seen, labels | True)):
        with pytest.raises(UsageError, match="cannot be learned from"):
            fit(given, wrong)
    for l2 in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="l2 must be"):
            fit(seen, labels, l2)
    odd = Glance(index=0, position=0, entropy=math.nan, top_entropy=1.0, margin=1.0)
    with pytest.raises(UsageError, match="not a number in every feature"):
        fit([*seen[:-1], odd], labels)
    with pytest.raises(UsageError, match="hidden state of 12 values, got None"):
        fit(glances(30, hidden=False), labels, projection=projection())


def trained(hidden: bool = True) -> LearnedGlimpse:
    seen = glances(200)
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(N_EMBD, 3)).astype(np.float32) if hidden else None
    return fit(seen, outcomes(seen, by_margin), projection=matrix)


@pytest.mark.parametrize("hidden", [True, False])
def test_it_survives_its_dict(hidden: bool) -> None:
    model = trained(hidden)
    again = LearnedGlimpse.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again.to_dict() == model.to_dict()
    assert [again.probability(each) for each in glances(20, 3)] == [
        model.probability(each) for each in glances(20, 3)
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": math.nan}, "has nan in bias"),
        ({"bias": "1"}, "a value of type str in bias"),
        ({"bias": True}, "has True in bias"),
        ({"bias": 10**400}, "a value of type int in bias"),
        ({"bias": 1e7}, "has 10000000.0 in bias"),
        ({"weights": [0.0]}, "a list of 13 numbers for weights"),
        ({"weights": "0" * 13}, "a list of 13 numbers for weights"),
        ({"mean": [math.inf] * 13}, "has inf in mean"),
        ({"scale": [0.0] * 13}, "has 0.0 in scale"),
        ({"scale": [-1.0] * 13}, "has -1.0 in scale"),
        ({"features": ["entropy"]}, "is for other features"),
        ({"n_embd": 0}, "has 0 for n_embd"),
        ({"n_embd": 2.0}, "has 2.0 for n_embd"),
        ({"n_embd": 1 << 16, "rank": 256}, f"{MAX_PROJECTION} are allowed"),
        ({"n_embd": 13}, "a list of 39 numbers for projection"),
        ({"rank": 257}, "has 257 for rank"),
        ({"projection": [math.nan] * 36}, "has nan in projection"),
        ({"more": 1}, "missing or too many: more"),
    ],
)
def test_a_hostile_file_is_refused(change: dict[str, object], words: str) -> None:
    assert len(FEATURES) + 3 == 13
    with pytest.raises(UsageError, match=words):
        LearnedGlimpse.from_dict(trained().to_dict() | change)


def test_missing_keys_are_named() -> None:
    given = trained().to_dict()
    for key in ("weights", "rank"):
        with pytest.raises(UsageError, match=f"missing or too many: {key}"):
            LearnedGlimpse.from_dict({k: v for k, v in given.items() if k != key})


def test_the_policy_asks_the_weights() -> None:
    model = trained()
    policy = parse_steps("learned:0.4", model.to_dict())
    assert policy.spec == "learned:0.4"
    run = policy.begin(1)
    assert run.looks and run.wants_hidden
    assert not parse_steps("learned:0.4", trained(hidden=False)).begin(1).wants_hidden
    for each in glances(50, 9):
        assert run.choose(each) == ("large" if model.probability(each) >= 0.4 else "small")
    assert parse_steps("learned:0", model).begin(1).choose(glances(1)[0]) == "large"
    with pytest.raises(UsageError, match="another small model"):
        run.choose(Glance(index=0, position=0, entropy=1.0, top_entropy=1.0, margin=1.0,
                          hidden=np.ones(3, np.float32)))  # fmt: skip
