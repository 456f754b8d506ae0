"""The study of pools that weigh energy: measuring, reading hostile tables, and playing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.energy_study import (
    Fixed,
    Measured,
    PoolChoice,
    main,
    measure,
    play,
    pool_learner,
    read_answers,
    tabulate,
)

TEXTS = {"sea": "Tell me about the sea, number {}.", "sum": "{} * 7 + 3 * 9 = how many in total?"}
RIGHT = {("sea", "small"): True, ("sea", "large"): True, ("sum", "small"): False,
         ("sum", "large"): True}  # fmt: skip


def answers(n: int = 20) -> list[Measured]:
    """Make answers of a small model that cannot count, and of a dear one that can."""
    return [
        Measured(key=f"{kind}{i}", kind=kind, text=text.format(i), model=model,
                 right=RIGHT[kind, model], joules_per_token=1.0 if model == "large" else 0.2,
                 s_per_token=0.1, estimated=True)
        for i in range(n) for kind, text in TEXTS.items() for model in ("small", "large")
    ]  # fmt: skip


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_regret_is_against_the_best_model_of_each_question() -> None:
    table = tabulate(answers())
    always = {name: play(table, Fixed(table, i, 0), 0.3, 400, 1)
              for i, name in enumerate(table.models)}  # fmt: skip
    n_sums = 400 * (1 - always["small"].accuracy)
    assert always["small"].regret == pytest.approx(n_sums * (0.7 - 0.3 * 0.8))
    assert always["large"].regret == pytest.approx((400 - n_sums) * 0.3 * 0.8)
    assert always["large"].joules_per_token == 1.0 and always["large"].shares == (0.0, 1.0)


def test_a_pool_that_is_told_no_kind_beats_both_models(tmp_path: Path) -> None:
    table, file = tabulate(answers()), written(tmp_path / "a", [])
    learner = PoolChoice(table, pool_learner(table, file, (0.5, 0.5)), 0.3)
    mine = play(table, learner, 0.3, 400, 1)
    fixed = [play(table, Fixed(table, i, 0), 0.3, 400, 1).regret for i in (0, 1)]
    assert mine.regret < 0.5 * min(fixed)


def test_questions_that_not_all_answered_are_left_out() -> None:
    table = tabulate(answers(3)[:-1])
    assert len(table.texts) == 5 and np.array_equal(table.right[0], [1, 1])
    for few in ([], answers(1)[:1], [answers(2)[0], answers(2)[3]]):
        with pytest.raises(UsageError, match="answers to the same"):
            tabulate(few)


@pytest.mark.parametrize("bad", ["x", [], {}, {"key": 1}, {"right": "yes"}, {"more": 1}])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, bad: Any) -> None:
    first = asdict(answers(1)[0])
    second = first | bad if isinstance(bad, dict) and bad else bad
    path = written(tmp_path / "a", [first, second])
    with pytest.raises(UsageError, match="line 2"):
        read_answers(path)


def test_models_are_measured_and_go_on_where_they_were(tmp_path: Path, tiny_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert measure(path, [tiny_path], 5, 1, seconds=0.0) == 5
    assert measure(path, [tiny_path], 5, 1) == 0
    assert measure(path, [tiny_path], 5, 1) == 0
    found = read_answers(path)
    assert len({each.key for each in found}) == len(found) == 5
    assert all(each.joules_per_token > 0 for each in found)


def test_the_command_prints_regrets_and_json(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [asdict(each) for each in answers(4)])
    done = CliRunner().invoke(main, ["study", str(path), "--n", "40", "--seeds", "1"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert {"always small", "pool 0.2, from text"} <= told["players"].keys()
    broken = CliRunner().invoke(main, ["study", str(written(tmp_path / "b", [1]))])
    assert broken.exit_code == 1 and "line 1" in broken.output
