"""Tasks for adapters: right answers by another route, verifiers that can fail, sides apart."""

import datetime
import json
import random
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools.adapter_task_records import Example
from edgeroute.tools.adapter_task_words import number_words, roman
from edgeroute.tools.adapter_tasks import TASKS, examples, is_test, task, write_jsonl
from edgeroute.tools.adapter_train_data import read_jsonl

N_DRAWN = 60


def drawn(name: str) -> list[Example]:
    return examples(name, N_DRAWN, "train", 5) + examples(name, 30, "test", 5)


@pytest.mark.parametrize("name", TASKS)
def test_only_the_right_answer_scores_one(name: str) -> None:
    found = drawn(name)
    verify = task(name).verify
    assert len({e.completion for e in found}) > 1
    for example, other in zip(found, found[1:] + found[:1], strict=True):
        assert verify(example, example.completion) == 1
        assert verify(example, f" {example.completion}\n") == 1
        for wrong in ("", example.completion + " x", example.completion[:-1], "{}", "[" * 5000):
            assert 0 <= verify(example, wrong) < 1
        same = example.completion == other.completion
        assert (verify(example, other.completion) == 1) == same


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_examples_and_another_seed_others(name: str) -> None:
    assert drawn(name) == drawn(name)
    assert examples(name, 30, "train", 5) != examples(name, 30, "train", 6)
    first = task(name).prompt(random.Random(3))
    assert first == task(name).prompt(random.Random(3))


@pytest.mark.parametrize("name", TASKS)
def test_no_seed_trains_on_a_test_prompt(name: str) -> None:
    trained = {e.prompt for seed in range(4) for e in examples(name, 200, "train", seed)}
    tests = [e.prompt for e in examples(name, 60, "test", 9)]
    assert len(set(tests)) == len(tests)
    assert not trained & set(tests)
    assert all(is_test(prompt) for prompt in tests)


def test_there_are_fifteen_tasks_and_none_repeats_another() -> None:
    assert len(TASKS) >= 15
    prompts = {name: {e.prompt for e in drawn(name)} for name in TASKS}
    for name, mine in prompts.items():
        assert not any(mine & theirs for other, theirs in prompts.items() if other != name)
        assert re.fullmatch(r"[a-z0-9_]+", name)
    with pytest.raises(UsageError, match="no task is called 'robot'"):
        task("robot")


def test_more_test_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"roman gives only \d+ .* 500 were asked for"):
        examples("roman", 500, "test", 1)


def test_answers_are_short_for_the_default_model(smollm2_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file, Tokenizer.open(file) as tokenizer:
        for name in TASKS:
            for e in drawn(name):
                ids = [tokenizer.encode(text, add_special=False, parse_special=False)
                       for text in (e.prompt, e.completion)]  # fmt: skip
                assert len(ids[0]) <= 50 and len(ids[1]) <= 23, e  # one more ends the turn
                joined = tokenizer.encode(
                    e.prompt + e.completion, add_special=False, parse_special=False
                )
                assert joined == ids[0] + ids[1], "no token may cross into the answer"


def test_scores_between_count_fields() -> None:
    e = Example(prompt="", completion='{"do":"move","dir":"left","n":3}')
    robot = task("robot_json").verify
    assert robot(e, '{"do":"move","dir":"right","n":3}') == pytest.approx(2 / 3)
    assert robot(e, '{"n": 3, "dir": "left", "do": "move"}') == 1, "order and spaces are free"
    assert robot(e, '{"do":"move","dir":"left","n":3,"x":1}') == pytest.approx(3 / 4)
    assert robot(e, '{"do":"move","dir":"left","n":"3"}') == pytest.approx(2 / 3)
    assert robot(e, '{"do":"move","dir":"left","n":true}') == pytest.approx(2 / 3)
    assert robot(e, "move left 3") == robot(e, "[1]") == robot(e, "{" * 100_000) == 0
    log = Example(prompt="", completion="level=INFO;unit=arm;msg=ready")
    assert task("log_fields").verify(log, "level=INFO;unit=arm;msg=full") == pytest.approx(0.5)


def _by_date(prompt: str) -> str:
    text = prompt.split(": ", 1)[1].split("\n")[0].replace(",", "").replace(".", "")
    for form in ("%B %d %Y", "%d %B %Y", "%b %d %Y", "%d %b %Y"):
        try:
            return datetime.datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    raise AssertionError(prompt)


def _by_clock(prompt: str) -> str:
    text = re.sub(r"\s?([ap]m)", r" \1", prompt.split(": ", 1)[1].split("\n")[0])
    return datetime.datetime.strptime(text, "%I:%M %p").strftime("%H:%M")


def _by_calendar(prompt: str) -> str:
    days = [datetime.date(2024, 1, 1 + n) for n in range(7)]  # a Monday first
    at = next(day for day in days if day.strftime("%A") in prompt)
    n_days = next((n for word, n in (("two", 2), ("three", 3)) if f" {word} days" in prompt), 1)
    shift = datetime.timedelta(days=-n_days if " before " in prompt else n_days)
    return (at + shift).strftime("%A")


def _by_query(prompt: str) -> str:
    """Ask a table of numbers in words; the answer is checked by running both."""
    verb = re.compile(r"(?:show|list|get) the (\w+) of (\w+) with (\w+) (.+) (\d+)")
    match = verb.search(prompt)
    assert match is not None
    sign = {"above": ">", "over": ">", "greater than": ">"}.get(match[4], "<")
    return f"SELECT {match[1]} FROM {match[2]} WHERE {match[3]} {sign} {match[5]};"


def _by_digits(prompt: str) -> str:
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    return " ".join(f"{n}" for n in sorted(numbers))


def _by_row(prompt: str) -> str:
    head, row = prompt.removeprefix("CSV: ").split("\n")[:2]
    pairs = zip(head.split(","), row.split(","), strict=True)
    return json.dumps({k: int(v) if v.isdigit() else v for k, v in pairs}, separators=(",", ":"))


ROUTES: dict[str, Callable[[str], str]] = {
    "date_iso": _by_date,
    "time_24h": _by_clock,
    "weekday": _by_calendar,
    "sql": _by_query,
    "sort_numbers": _by_digits,
    "csv_json": _by_row,
    "email": lambda prompt: re.findall(r"[\w.]+@[\w.]+\.\w+", prompt)[0],
    "config": lambda prompt: "\n".join(
        f"{k}={v}" for k, v in re.findall(r"(\w+) to (\w+)", prompt)
    ),
    "reverse_words": lambda prompt: " ".join(reversed(prompt.split(": ")[1].split())),
    "upper_case": lambda prompt: prompt.split(": ")[1].strip().replace(" ", "_").upper(),
}


@pytest.mark.parametrize("name", ROUTES)
def test_answers_are_right_by_another_route(name: str) -> None:
    for example in drawn(name):
        assert ROUTES[name](example.prompt) == example.completion, example


def test_the_queries_run() -> None:
    with sqlite3.connect(":memory:") as db:
        for e in drawn("sql"):
            table = re.findall(r"FROM (\w+)", e.completion)[0]
            columns = ", ".join(re.findall(r"SELECT (\w+)|WHERE (\w+)", e.completion)[0][:1])
            measure = re.findall(r"WHERE (\w+)", e.completion)[0]
            db.execute(f"DROP TABLE IF EXISTS {table}")
            db.execute(f"CREATE TABLE {table} ({columns}, {measure})")
            assert db.execute(e.completion).fetchall() == []
    db.close()


def test_numbers_are_spelled_and_written_as_they_should_be() -> None:
    assert [number_words(n) for n in (0, 13, 40, 99, 100, 507, 820, 999)] == [
        "zero", "thirteen", "forty", "ninety-nine", "one hundred", "five hundred seven",
        "eight hundred twenty", "nine hundred ninety-nine",
    ]  # fmt: skip
    assert [roman(n) for n in (1, 4, 9, 14, 40, 90, 399)] == [
        "I", "IV", "IX", "XIV", "XL", "XC", "CCCXCIX",
    ]  # fmt: skip
    assert len({number_words(n) for n in range(1000)}) == 1000
    assert len({roman(n) for n in range(1, 400)}) == 399


def test_a_file_of_examples_is_what_training_reads(tmp_path: Path) -> None:
    found = examples("config", 20, "train", 1)
    write_jsonl(tmp_path / "config.jsonl", found)
    pairs = read_jsonl(tmp_path / "config.jsonl")
    assert [(p.prompt, p.completion) for p in pairs] == [(e.prompt, e.completion) for e in found]
    assert [p.line for p in pairs] == list(range(1, 21))
