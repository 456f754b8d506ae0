"""Paths found by search, and routers trained on them: signals learned, runs taken up again."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.models.forward import Piece
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.depth_router import RouterLimits, steps_from
from edgeroute.tools.answerer import Answerer, open_answerer
from edgeroute.tools.question_records import Question
from edgeroute.tools.questions import make_questions
from edgeroute.tools.router_search import (
    Effects,
    SearchParams,
    Trials,
    is_legal,
    moves,
    path_of,
    read_records,
    run_search,
    saved,
    search,
)
from edgeroute.tools.train_depth_router import (
    RUN,
    Examples,
    RouterParams,
    class_weights,
    decide_all,
    load_examples,
    macro_f1,
    score_all,
    train,
)

N_LAYER, N_EMBD = 8, 12


@pytest.fixture(scope="module")
def answerer(tiny_path: Path) -> Iterator[Answerer]:
    with open_answerer(tiny_path) as opened:
        yield opened


def question(answer: str = "5") -> Question:
    (found,) = make_questions(1, 3, ["words"])
    return dataclasses.replace(found, answer=answer)


# --- search -------------------------------------------------------------------------------


def test_a_trial_equals_a_pass_in_one_piece(answerer: Answerer) -> None:
    """Whatever was tried before: shared beginnings leave nothing behind."""
    trials = Trials(answerer, question())
    margins = {text: trials.margin(path_of(text)) for text in ("RRR", "RSR", "RTR", "RRR", "RSR")}
    tokens = answerer.encode(question())
    answer = answerer.encode_text(" 5")
    for text, margin in margins.items():
        piece = Piece(tokens=[*tokens, *answer], pos=0, region=answerer.region,
                      n_out=len(answer) + 1)  # fmt: skip
        steps = steps_from(path_of(text))
        logits = answerer.forward.run([piece], answerer.forward.spans(steps))
        assert logits is not None
        leads = [row[token] - np.delete(row, token).max() for row, token in
                 zip(logits, answer, strict=False)]  # fmt: skip
        ends = logits[-1]
        others = np.delete(ends, answerer.ends)
        assert margin == pytest.approx(min(*leads, ends[answerer.ends].max() - others.max()))
    assert trials.n_trials == 5 and trials.n_prompt == len(tokens)


class FakeTrials:
    """A question that a rule answers, instead of a model."""

    def __init__(self, n_layer: int, needed: set[int]) -> None:
        self.n_layer, self.needed, self.n_trials = n_layer, needed, 0

    def margin(self, path: tuple[str, ...]) -> float:
        self.n_trials += 1
        lost = sum(il in self.needed for il, choice in enumerate(path) if choice == "skip")
        return 2.0 - 3.0 * lost - 0.1 * path.count("skip") - 0.5 * path.count("repeat")


def test_the_search_finds_layers_that_are_not_needed() -> None:
    limits, effects = RouterLimits(2, 2, 3, 1), Effects()
    params = SearchParams(n_trials=40, limits=limits)
    for _ in range(3):
        trials: Any = FakeTrials(12, needed={2, 3, 5, 6, 8, 9})
        found, path = search(trials, effects, params)
        effects.add(found)
        assert path is not None and is_legal(path, limits)
        assert found.n_trials == trials.n_trials <= 40
    assert saved(path) == 2 and found.path == "RRRRSRRSRRRR", "the two that are not needed"
    hopeless: Any = FakeTrials(12, needed=set())
    hopeless.margin = lambda path: -9.0
    assert search(hopeless, effects, params)[1] is None


def test_moves_and_legal_paths() -> None:
    limits = RouterLimits(2, 2, 3, 1)
    every = moves(limits, 8)
    assert {move.name for move in every} == {
        *(f"S{il}" for il in range(2, 6)), *(f"T{il}" for il in range(2, 6)), "S2+", "S3+", "S4+"
    }  # fmt: skip
    assert not is_legal(path_of("RRSSSRRR"), limits)
    assert not is_legal(path_of("RRTRTRRR"), limits)
    assert is_legal(path_of("RRSSRSRR"), limits)


def test_a_search_goes_on_where_it_was(answerer: Answerer, tmp_path: Path) -> None:
    params = SearchParams(n_trials=3, limits=RouterLimits(1, 1, 1, 1), hopeless=-1e9,
                          least_margin=-1e9)  # fmt: skip
    questions = make_questions(4, 2)
    first = list(run_search(answerer, questions[:2], tmp_path, params))
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('{"key": "cut')
    every = list(run_search(answerer, questions, tmp_path, params))
    assert every[:2] == first and list(read_records(tmp_path).values()) == every
    states = [np.load(path) for path in (tmp_path / "states").iterdir()]
    assert len(states) == 4
    assert {each.shape for each in states} == {(answerer.n_layer, 8, answerer.n_embd)}
    with pytest.raises(UsageError, match="at least 20"):
        load_examples(tmp_path)
    (tmp_path / "found.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(UsageError, match="no record"):
        read_records(tmp_path)


# --- training -----------------------------------------------------------------------------


def test_weights_rebalance_at_any_size() -> None:
    """With the paper's beta, 0.999, its own counts give 0.92, 0.91 and 1.18."""
    for scale in (1, 10, 1000):
        skip, run, repeat = class_weights([44 * scale, 1210 * scale, 15 * scale])
        assert skip / run > 10 and repeat / skip > 2
        assert (skip * 44 + run * 1210 + repeat * 15) / 1269 == pytest.approx(1)
    assert class_weights([0, 10, 10])[0] == 0


def test_macro_f1() -> None:
    wanted, found = np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]])
    assert macro_f1(wanted, found) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert macro_f1(wanted, np.full((1, 4), RUN)) == pytest.approx((0 + 2 / 3 + 0) / 3)


def planted(n: int, seed: int = 5) -> Examples:
    """Layer 3 is not needed where value 1 is high, layer 4 is repeated where value 2 is."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, N_LAYER, 8, N_EMBD)).astype(np.float32)
    y = np.full((n, N_LAYER), RUN, np.int64)
    y[x[:, 3, :, 1].mean(axis=1) > 0.25, 3] = 0
    y[x[:, 4, :, 2].mean(axis=1) > 0.35, 4] = 2
    return Examples(x=x, y=y)


def test_a_planted_signal_is_learned() -> None:
    pytest.importorskip("torch")
    limits = RouterLimits(2, 1, 3, 1)
    params = RouterParams(limits=limits, executed=0.99, n_hidden=16, n_epochs=15, lr=5e-3)
    router, report = train(planted(300), params)
    assert report.n_held_out == 60 and sum(report.counts.values()) == 240 * 5
    assert report.macro_f1 > 0.6 and report.accuracy > report.always_run - 0.02
    assert abs(report.executed - 0.99) < 0.02
    fresh = planted(100, seed=6)
    chosen = decide_all(score_all(router, fresh.x), limits)
    skipped = chosen[:, 3] == 0
    high = fresh.x[:, 3, :, 1].mean(axis=1)
    assert skipped.any() and high[skipped].mean() > high[~skipped].mean() + 0.3
    short = dataclasses.replace(params, n_epochs=1)
    first, second = (train(planted(40), short)[0] for _ in range(2))
    assert all(np.array_equal(first.layers[il].w1, second.layers[il].w1) for il in first.layers)


def test_what_cannot_be_trained_is_refused() -> None:
    for changes in ({"executed": 0.0}, {"held_out": 1.0}, {"limits": RouterLimits(4, 4, 1, 1)}):
        params = dataclasses.replace(RouterParams(limits=RouterLimits()), **changes)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="cannot train"):
            train(planted(30), params)
