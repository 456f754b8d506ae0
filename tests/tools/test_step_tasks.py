"""Tasks with right answers: files of them as hostile input, how answers are judged, our own."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.step_tasks import digest, own_tasks, read_tasks


def test_tasks_are_read_and_judged(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "2 + 2 =", "answer": "4", "form": "contains", "max_tokens": 5},
        {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
        {"prompt": "say yes", "answer": "yes", "form": "exact"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    some, last, exact = read_tasks(path, 10)
    assert len(read_tasks(path, 2)) == 2
    assert some.max_tokens == 5 and last.messages == ({"role": "user", "content": "2 + 2?"},)
    assert some.is_right("it is 14") and not some.is_right("5")
    assert last.is_right("2 + 2\n\nAnswer: 4.\n") and last.is_right("so\n4")
    assert not last.is_right("4\nno") and not last.is_right("") and not last.is_right("Answer: 14")
    assert exact.is_right(" yes\n") and not exact.is_right("yes.")
    assert digest([some, last]) != digest([last, some])


def test_our_own_tasks_are_reasoned_questions() -> None:
    tasks = own_tasks(12)
    assert len({task.question.text for task in tasks if task.question}) == 12
    task = tasks[0]
    assert task.messages is not None and task.is_right(f"So.\n\nAnswer: {task.answer}")
    assert not task.is_right(f"So.\n\n{task.answer}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "a list of 0, but a JSON object is wanted"),
        ("{", "is not JSON"),
        ('{"prompt": "a", "answer": "b", "more": 1}', "unknown key 'more'"),
        ('{"answer": "b"}', "has neither of messages and prompt"),
        ('{"prompt": "a", "messages": [], "answer": "b"}', "has both of messages and prompt"),
        ('{"messages": [], "answer": "b"}', "line 1 of tasks.jsonl: messages must be"),
        ('{"prompt": "a", "answer": 4}', "answer of line 1 .* got '4'"),
        ('{"prompt": " ", "answer": "b"}', "prompt of line 1 .* not all blank"),
        ('{"prompt": "a", "answer": "b", "form": ["x"]}', "form of line 1"),
        ('{"prompt": "a", "answer": "b", "max_tokens": true}', "max_tokens of line 1"),
        ('{"prompt": "a", "answer": "b", "max_tokens": 99999}', "1 to 16384"),
        ('{"prompt": "\\ud800", "answer": "b"}', "half a character"),
        ("", "holds no tasks"),
        (" " * (1 << 20) + "x", "more than 1048576 bytes"),
        ("[" * 5000, "too deeply|not JSON"),
    ],
)  # fmt: skip
def test_lines_that_are_no_tasks_are_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=words):
        read_tasks(path, 10)


def test_a_file_of_tasks_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_tasks(tmp_path / "no.jsonl", 10)
