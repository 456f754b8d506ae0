"""Small tasks with exact verifiers, drawn from seeded generators, to train and judge adapters.

Prompts are short texts that end in a line break, answers at most 24 tokens of SmolLM2's
vocabulary. Whether a prompt may be trained on is decided by a hash of its text, so no seed
ever puts a prompt of the test side into training.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from edgeroute.runtime.errors import UsageError
from edgeroute.tools import adapter_task_forms, adapter_task_words
from edgeroute.tools.adapter_task_records import Example, Task

__all__ = ["TASKS", "Example", "Split", "Task", "examples", "is_test", "task", "write_jsonl"]

Split = Literal["train", "test"]

TEST_ONE_IN: Final = 5
MAX_DRAWS_PER_EXAMPLE: Final = 400
"""Draws after which a task is taken to have no further prompt of a side."""

TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {task.name: task for task in (*adapter_task_forms.TASKS, *adapter_task_words.TASKS)}
)


def task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in TASKS:
        raise UsageError(f"no task is called {name[:60]!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def is_test(prompt: str) -> bool:
    """Whether a prompt is on the test side, whatever the seed."""
    return hashlib.sha256(prompt.encode()).digest()[0] % TEST_ONE_IN == 0


def examples(name: str, n_examples: int, split: Split, seed: int) -> list[Example]:
    """Draw examples of one side of a task.

    Args:
        name: a key of TASKS.
        n_examples: how many. Test prompts are all different; prompts to train on may come
            again, as small tasks have few.
        split: the side.
        seed: same seed, same examples; both sides and all tasks have streams of their own.

    Raises:
        UsageError: no such task, or it has not so many different test prompts.
    """
    found: list[Example] = []
    seen: set[str] = set()
    make = task(name).make
    rng = random.Random(f"{name} {split} {seed}")
    for _ in range(MAX_DRAWS_PER_EXAMPLE * n_examples):
        if len(found) == n_examples:
            break
        example = make(rng)
        if is_test(example.prompt) != (split == "test"):
            continue
        if split == "test" and example.prompt in seen:
            continue
        seen.add(example.prompt)
        found.append(example)
    if len(found) < n_examples:
        raise UsageError(f"task {name} gives only {len(found)} different {split} prompts, "
                         f"{n_examples} were asked for; ask for fewer")  # fmt: skip
    return found


def write_jsonl(path: Path, drawn: Sequence[Example]) -> None:
    """Write examples as `edgeroute adapters train` reads them."""
    lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in drawn]
    path.write_text("".join(lines), encoding="utf-8")
