"""Policies in played answers, and the texts that name them."""

import math
import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_policies import N_SURE, parse_steps
from edgeroute.skippers.steps import Glance, Judge, StepPart, StepPolicy, StepRun, Verify, Who

SPECS = (
    "small", "large", "random:0.3", "glimpse:1.25", "glimpse:inf", "glimpse20:0", "query:1.5",
    "verify:-0.5:-4", "verify:-inf:-inf", "verify:-0.5:-4:64", "verify:-0.5:-4:0:8", "judge:7",
    "margin:0.5:2", "target:0.3", "pace:0.05", "accuracy:0.9",
)  # fmt: skip


def seen(entropy: float, top: float = 0.0, index: int = 0) -> Glance:
    return Glance(index=index, position=0, entropy=entropy, top_entropy=top, margin=1.0)


def wrote(model: Who, n_tokens: int = 10) -> StepPart:
    return StepPart(index=0, model=model, n_tokens=n_tokens)


def gap(nats: float) -> npt.NDArray[np.float32]:
    """Logits with such a margin."""
    return np.array([0.0, nats, -5.0], np.float32)


def writers(run: StepRun, entropies: list[float]) -> list[Who]:
    found = []
    for index, entropy in enumerate(entropies):
        found.append(run.choose(seen(entropy, index=index) if run.looks else None))
        run.note(wrote(found[-1]))
    return found


# texts


@pytest.mark.parametrize("spec", SPECS)
def test_a_text_is_what_its_policy_writes(spec: str) -> None:
    policy = parse_steps(spec)
    assert policy.spec == spec
    run = policy.begin(1)
    assert run.choose(seen(1.0) if run.looks else None) in ("small", "large")
    assert not run.wants_hidden and run.watches == spec.startswith("margin")


@given(st.floats(0, 1e300), st.floats(-1e300, 0))
def test_numbers_survive_their_text(high: float, low: float) -> None:
    for spec in (f"glimpse:{high!r}", f"verify:{low!r}:{low!r}", f"margin:{high!r}:{high!r}"):
        found = parse_steps(spec).spec
        assert parse_steps(found).spec == found
        assert [float(each) for each in found.split(":")[1:]] == [
            float(each) for each in spec.split(":")[1:]
        ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("glimps:1", "did you mean 'glimpse'"),
        ("", "there are small, large, random"),
        ("auto", "no step policy 'auto'"),
        ("Small", "did you mean 'small'"),
        ("small:1", "takes 0 numbers, 'small:1' has 1"),
        ("glimpse", "takes 1 number, .* for example steps='glimpse:1.2'"),
        ("verify:-1", "takes 2 or 3 or 4 numbers"),
        ("judge:7:7", "takes 1 number"),
        ("glimpse:-1", "entropy in nats .* from 0 to inf, got '-1'"),
        ("glimpse:nan", "got 'nan'"),
        ("glimpse:", "got ''"),
        ("glimpse:1_0", "got '1_0'"),
        ("glimpse: 1", "got ' 1'"),
        ("glimpse:\u0661", "got '\u0661'"),
        ("random:1.01", "share of the tokens .* from 0 to 1, got '1.01'"),
        ("verify:0.5:4", "mean log-probability in nats .* from -inf to 0, got '0.5'"),
        ("verify:-1:-1:2.5", "a whole number from 0 to 4096, got '2.5'"),
        ("verify:-1:-1:9999", "a whole number from 0 to 4096"),
        ("judge:10", "mark .* from 0 to 9, got '10'"),
        ("pace:0", "seconds per token .* from 1e-06 to 3600"),
        ("learned:0.5", "no steps file holds any for this pair"),
        ("x" * 100_000, "no step policy"),
    ],
)  # fmt: skip
def test_what_is_no_policy_is_told_why(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        parse_steps(spec)
    assert len(str(raised.value)) < 600


def test_only_texts_are_read() -> None:
    with pytest.raises(UsageError, match="a step policy is a text"):
        parse_steps(7)  # type: ignore[arg-type]


# decisions


def test_one_model_writes_everything() -> None:
    for who in ("small", "large"):
        run = parse_steps(who).begin(1)
        assert not run.looks and run.check is None
        assert writers(run, [0.0, 9.0]) == [who, who]
        assert run.at_token("large", gap(0)) == "large"


def test_a_glimpse_at_or_above_the_threshold_is_for_the_large_model() -> None:
    run = parse_steps("glimpse:1").begin(1)
    assert run.looks and writers(run, [0.5, 1.0, 2.0]) == ["small", "large", "large"]
    top = parse_steps("glimpse20:1").begin(1)
    assert [top.choose(seen(9.0, 0.9)), top.choose(seen(0.0, 1.0))] == ["small", "large"]
    assert writers(parse_steps("glimpse:inf").begin(1), [9.0]) == ["small"]
    assert writers(parse_steps("glimpse:0").begin(1), [0.0]) == ["large"]
    with pytest.raises(UsageError, match="was given none"):
        run.choose(None)


def test_the_first_step_decides_for_the_answer() -> None:
    policy = parse_steps("query:1")
    for first, who in ((0.5, "small"), (1.5, "large")):
        run = policy.begin(1)
        assert run.looks
        assert writers(run, [first, 9.0, 0.0]) == [who] * 3
        assert not run.looks


def test_drafts_are_the_small_models_and_checked() -> None:
    checks = {
        "verify:-0.5:-4": Verify(mean=-0.5, least=-4.0),
        "verify:-0.5:-4:32": Verify(mean=-0.5, least=-4.0, defer=32),
        "verify:-0.5:-4:0:8": Verify(mean=-0.5, least=-4.0, fix=8),
        "judge:6.5": Judge(least=6.5),
    }
    for spec, check in checks.items():
        run = parse_steps(spec).begin(1)
        assert run.check == check and not run.looks
        run.note(wrote("large"))
        assert run.choose(None) == "small"


def test_margin_escalates_and_hands_back_with_hysteresis() -> None:
    run = parse_steps("margin:0.5:2").begin(1)
    assert run.watches and not run.looks and run.choose(None) == "small"
    assert run.at_token("small", gap(0.6)) == "small"
    assert run.at_token("small", gap(0.4)) == "large"
    sure, unsure = gap(2.0), gap(1.9)
    for _ in range(N_SURE - 1):
        assert run.at_token("large", sure) == "large"
    assert run.at_token("large", unsure) == "large"  # the row begins anew
    for _ in range(N_SURE - 1):
        assert run.at_token("large", sure) == "large"
    run.note(wrote("large"))
    assert run.choose(None) == "large"  # whoever wrote last
    assert run.at_token("large", sure) == "small"
    run.note(wrote("large"))
    run.note(wrote("small"))
    assert run.choose(None) == "small"


def test_margin_starts_a_row_anew_for_every_escalation() -> None:
    run = parse_steps("margin:0.5:2").begin(1)
    for _ in range(2):
        assert run.at_token("small", gap(0.0)) == "large"
        found = [run.at_token("large", gap(3.0)) for _ in range(N_SURE)]
        assert found == ["large"] * (N_SURE - 1) + ["small"]


def test_margin_follows_who_really_wrote() -> None:
    run = parse_steps("margin:0.5:2").begin(1)
    assert run.at_token("small", gap(0.0)) == "large"
    run.note(StepPart(index=0, model="small", n_tokens=5, reason="fallback"))
    run.note(StepPart(index=0, model="large", n_tokens=0))
    assert run.choose(None) == "small"


# random


def play(policy: StepPolicy, n_answers: int, n_steps: int, n_tokens: Callable[[Who], int]) -> float:
    """Return the share of tokens that the large model wrote."""
    total: dict[Who, int] = {"small": 0, "large": 0}
    for seed in range(n_answers):
        run = policy.begin(seed)
        for _ in range(n_steps):
            who = run.choose(None)
            n = n_tokens(who)
            run.note(wrote(who, n))
            total[who] += n
    return total["large"] / sum(total.values())


@pytest.mark.parametrize("longer", [1.0, 1.5])
@pytest.mark.parametrize("n_steps", [4, 30])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_random_holds_its_share_of_tokens(share: float, n_steps: int, longer: float) -> None:
    """Also in answers of few steps, of any lengths, and where one model's steps are longer."""
    rng = random.Random(3)
    lengths = {"small": 1.0, "large": longer}
    found = play(parse_steps(f"random:{share}"), 24_000 // n_steps, n_steps,
                 lambda who: int(lengths[who] * rng.choice([6, 7, 14, 16, 19, 60])))  # fmt: skip
    assert found == pytest.approx(share, abs=0.02)


def test_random_stays_random_and_gives_a_seed_its_decisions_again() -> None:
    policy = parse_steps("random:0.5")
    first = {seed: writers(policy.begin(seed), [0.0] * 20) for seed in range(50)}
    assert len({tuple(each) for each in first.values()}) == 50
    for seed in range(50):
        run = policy.begin(seed + 1000)
        run.note(wrote(run.choose(None), 500))  # what is known of lengths changes
    assert {seed: writers(policy.begin(seed), [0.0] * 20) for seed in range(50)} == first
    assert writers(parse_steps("random:0.5").begin(0), [0.0] * 20) == first[0]


def test_no_decision_is_certain_for_long() -> None:
    """Two steps of one writer follow each other about as often as by coin."""
    policy, same, total = parse_steps("random:0.5"), 0, 0
    for seed in range(300):
        found = writers(policy.begin(seed), [0.0] * 10)
        same += sum(a == b for a, b in pairwise(found))
        total += 9
    assert math.isclose(same / total, 0.47, abs_tol=0.05)
