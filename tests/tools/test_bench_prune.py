"""The benchmark of pruned prompts on a random model, and the questions that it asks."""

from pathlib import Path

import pytest

from edgeroute.tools.bench import prune
from edgeroute.tools.bench.prune_texts import Messages, long_questions
from edgeroute.tools.bench.report import BenchParams


def words(messages: Messages) -> int:
    return sum(len(each["content"].split()) for each in messages)


@pytest.mark.parametrize("n_tokens", [200, 900])
def test_questions_are_answered_by_their_texts(n_tokens: int) -> None:
    found = list(long_questions(12, 3, n_tokens, words))
    assert found == list(long_questions(12, 3, n_tokens, words))
    assert [each.kind for each in found[:4]] == ["code", "count", "name", "sum"]
    for each in found:
        content = each.messages[1]["content"]
        assert n_tokens - 30 < words(each.messages) <= n_tokens
        if each.kind == "sum":
            few = [int(s.split()[-2]) for s in content.split(".") if " has " in s]
            assert str(sum(few)) == each.answer
        else:
            assert content.count(f" {each.answer} ") + content.count(f" {each.answer}.") == 1
    assert len({each.messages[1]["content"] for each in found}) == 12


def test_every_rule_answers_every_question(tiny_path: Path) -> None:
    params = BenchParams(path=tiny_path, name="tiny", threads=1, reps=1, warmup=1, pause_s=0)
    lines: list[str] = []
    wanted = prune.PruneParams(keep=30, first=1, n_questions=2, n_tokens=1400, n_ubatch=512)
    found = prune.run(params, lines.append, wanted).to_dict()
    results = found["results"]
    assert isinstance(results, list)
    assert [each["rule"] for each in results] == ["full", "attention", "position", "random"]
    assert [each["keep"] for each in results] == [100, 30, 30, 30]
    assert all(each["n"] == 2 for each in results)
    assert results[0]["kl_nats"] == 0 < min(each["kl_nats"] for each in results[1:])
    assert [each["prefill_s"] is None for each in results] == [False, False, True, True]
    assert sum("question" in line for line in lines) == 2
