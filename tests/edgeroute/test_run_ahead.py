"""Several tokens of an answer in one pass: the same answers, and off where it does not pay."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Generation, Runtime
from edgeroute.models import ahead
from edgeroute.models.ahead import Ahead, Computed
from edgeroute.models.forward import Piece
from edgeroute.run_ahead import (
    HOLD_TOKENS,
    TRIAL_TOKENS,
    TURN_TOKENS,
    Race,
    RunAhead,
)
from edgeroute.tools import synth
from tests.edgeroute.engine_lab import SETTINGS

PROMPTS = ("The sea is", "One, two,")
OPTIONS: dict[str, Any] = {"max_tokens": 30, "logit_bias": {}, "prefix": "off"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ahead") / "model.gguf"
    synth.make("llama", found, weight_type="Q8_0")
    return found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are built at the first wish, and it is done wherever it may be."""
    monkeypatch.setattr(ahead, "WISHES", 0)
    monkeypatch.setattr(Race, "several", True)


@pytest.fixture
def runtime(path: Path, eager: None) -> Iterator[Runtime]:
    with Runtime(path, **SETTINGS) as opened:
        yield opened


@pytest.fixture(scope="module")
def one_by_one(path: Path) -> Iterator[Runtime]:
    with Runtime(path, run_ahead="off", **SETTINGS) as opened:
        yield opened


def passes(runtime: Runtime) -> int:
    """How many passes have computed several tokens so far."""
    levers: Any = runtime.stats()["levers"]
    return int(levers["run_ahead"]["passes"])


def same(runtime: Runtime, other: Runtime, prompt: str, **options: Any) -> Generation:
    """Ask both; return the answer that they have in common."""
    one, two = (each.generate(prompt, **OPTIONS | options) for each in (runtime, other))
    assert one.token_ids == two.token_ids and one.text == two.text
    assert one.finish_reason == two.finish_reason
    return one


def test_answers_are_the_same(runtime: Runtime, one_by_one: Runtime) -> None:
    for prompt in PROMPTS:
        for n in (1, 2, 3, 4, 5, 9, 30):
            assert same(runtime, one_by_one, prompt, max_tokens=n).stats.n_generated <= n
    assert passes(runtime) > 0
    figures = runtime.stats()
    kept: Any = figures["kv_kept_cells"]
    assert figures["kv_free_cells"] + kept == figures["kv_cells"]


def test_levers_off_computes_one_token(path: Path) -> None:
    with Runtime(path, levers="off", **SETTINGS) as runtime:
        runtime.generate(PROMPTS[0], **OPTIONS)
        assert "run_ahead" not in runtime.stats()["levers"]  # type: ignore[operator]


def test_an_answer_ends_in_the_middle_of_a_pass(runtime: Runtime, one_by_one: Runtime) -> None:
    free = same(runtime, one_by_one, PROMPTS[0])
    ends = set()
    for at in range(4, 16):
        stop = free.text[at : at + 2]
        if stop.strip():
            cut = same(runtime, one_by_one, PROMPTS[0], stop=stop)
            assert cut.finish_reason == "stop"
            ends.add(len(cut.token_ids) % 4)
    assert len(ends) > 1
    # cells behind the end hold what nobody asked for; a continued text must not see it
    for n in (6, 7, 8):
        ids = [*range(40, 60), *free.token_ids[:n]]
        for each in (runtime, one_by_one):
            each.generate(prompt_ids=ids[:20], max_tokens=n)
        one, two = (each.generate(prompt_ids=ids, max_tokens=9) for each in (runtime, one_by_one))
        assert one.token_ids == two.token_ids


def test_streams_bring_every_token(runtime: Runtime) -> None:
    chunks = list(runtime.stream(PROMPTS[1], **OPTIONS))
    whole = chunks[-1].generation
    assert whole is not None and passes(runtime) > 0
    assert [i for chunk in chunks for i in chunk.token_ids] == list(whole.token_ids)
    assert "".join(chunk.text for chunk in chunks) == whole.text


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.8, "seed": 3}, {"logprobs": 2}, {"repeat_penalty": 1.1},
     {"logit_bias": {7: 1.0}}, {"grammar": "root ::= [a-z]+"}],
)  # fmt: skip
def test_what_is_not_just_the_strongest_token_is_computed_alone(
    runtime: Runtime, one_by_one: Runtime, options: dict[str, Any]
) -> None:
    same(runtime, one_by_one, PROMPTS[0], **options)
    assert passes(runtime) == 0


def test_answers_side_by_side_are_the_same(runtime: Runtime, one_by_one: Runtime) -> None:
    wanted = [one_by_one.generate(p, **OPTIONS | {"max_tokens": 40}) for p in PROMPTS]
    for _ in range(3):
        found: dict[int, Generation] = {}

        def ask(i: int) -> None:
            found[i] = runtime.generate(PROMPTS[i], **OPTIONS | {"max_tokens": 40})  # noqa: B023

        together(ask, len(PROMPTS))
        assert [found[i].token_ids for i in range(len(PROMPTS))] == [w.token_ids for w in wanted]
    assert passes(runtime) > 0


def together(ask: Callable[[int], None], n: int) -> None:
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_passes_over_another_token_than_was_chosen_are_dropped(
    runtime: Runtime, one_by_one: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal logits ggml takes the last, and the sampler the first."""
    run, n_wrong = Ahead.run, 0

    def misled(self: Ahead, pieces: Sequence[Piece], n_passes: int) -> list[Computed] | None:
        nonlocal n_wrong
        found = run(self, pieces, n_passes)
        if found is None:
            return None
        n_wrong += 1
        first, *later = found
        assert first.fed is not None
        wrong = [Computed(np.full_like(each.logits, np.nan), each.fed) for each in later]
        return [first._replace(fed=first.fed + 1), *wrong]

    monkeypatch.setattr(Ahead, "run", misled)
    for prompt in PROMPTS:
        same(runtime, one_by_one, prompt)
    assert n_wrong > 0


def test_logits_that_are_no_numbers_end_the_answer_with_a_sentence(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Ahead.run

    def broken(self: Ahead, pieces: Sequence[Piece], n_passes: int) -> list[Computed] | None:
        found = run(self, pieces, n_passes)
        assert found is not None
        found[1].logits[:] = np.nan
        return found

    monkeypatch.setattr(Ahead, "run", broken)
    with pytest.raises(Exception, match="not numbers"):
        runtime.generate(PROMPTS[0], **OPTIONS)
    monkeypatch.setattr(Ahead, "run", run)
    assert runtime.generate(PROMPTS[0], **OPTIONS).token_ids


def test_a_cancelled_answer_ends(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPTS[0], **OPTIONS | {"max_tokens": 400})
    next(stream)
    stream.close()
    assert runtime.generate(PROMPTS[1], **OPTIONS).token_ids


# whether it pays


def run(race: Race, seconds: dict[bool, float], n_tokens: int) -> list[bool]:
    """Let a race choose; passes of one and of four take this long a token."""
    chosen: list[bool] = []
    while len(chosen) < n_tokens:
        several = race.several
        n = 4 if several else 1
        race.took(n, n * seconds[several])
        chosen += [several] * n
    return chosen


def test_both_ways_take_turns_until_the_trial_is_decided() -> None:
    race = Race()
    chosen = run(race, {False: 1.0, True: 0.9}, 2 * TRIAL_TOKENS)
    turns = [several for several, _ in itertools.groupby(chosen)]
    assert len(turns) >= 2 * TRIAL_TOKENS / TURN_TOKENS - 1
    assert all(sum(1 for _ in group) == TURN_TOKENS
               for _, group in itertools.groupby(chosen[:-TURN_TOKENS]))  # fmt: skip


@pytest.mark.parametrize(("several_s", "wins"), [(0.98, True), (1.02, False)])
def test_the_winner_runs_until_it_is_tried_again(several_s: float, wins: bool) -> None:
    race = Race()
    seconds = {False: 1.0, True: several_s}
    run(race, seconds, 2 * TRIAL_TOKENS + TURN_TOKENS)
    assert race.ratio == pytest.approx(several_s) and race.lost != wins
    held = run(race, seconds, HOLD_TOKENS // 2)
    assert set(held) == {wins}
    run(race, seconds, HOLD_TOKENS // 2)
    again = run(race, {False: 1.0, True: 2.0 - several_s}, 3 * TRIAL_TOKENS)
    assert set(again) == {True, False}
    assert race.lost == wins  # it goes the other way now


def test_a_time_in_which_another_was_served_does_not_count() -> None:
    now = 0.0
    decide = RunAhead(Stub(), clock=lambda: now)  # type: ignore[arg-type]
    batch: Any = [Stub()]
    for pause in (1.0, 1.0, 0.0):
        now += pause
        assert decide.n_tokens_each([], batch) == 1
        now += 0.005
        decide.took(1, 1)
    assert decide._races[1].single_s == pytest.approx(0.005)


class Stub:
    """What RunAhead asks of a forward and of requests."""

    sampler = type("S", (), {"plain": True})
    depth = None
    n_left = 99


@pytest.mark.parametrize(
    ("seconds", "n_answers", "expected"),
    [(0.005, 1, 4), (0.014, 1, 4), (0.016, 1, 2), (0.031, 1, 1), (0.005, 2, 2), (0.005, 3, 1)],
)
def test_nobody_waits_long_for_tokens_that_come_together(
    seconds: float, n_answers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ahead, "ready", lambda *_: True)
    now = 0.0
    decide = RunAhead(Stub(), clock=lambda: now)  # type: ignore[arg-type]
    batch: Any = [Stub() for _ in range(n_answers)]
    assert decide.n_tokens_each([], batch) == 1  # nothing is known yet
    for _ in range(TURN_TOKENS):
        decide.took(n_answers, 1)
        assert decide.n_tokens_each([], batch) == 1
        now += seconds
    decide.took(n_answers, 1)
    assert decide.n_tokens_each([], batch) == expected
    batch[-1].n_left = 3
    assert decide.n_tokens_each([], batch) == (expected if expected <= 3 else 1)
