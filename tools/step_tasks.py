"""Tasks with one right answer each, by which policies of step routing are measured.

From a file of JSON lines, read as hostile input, or the stepwise questions of our generators.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf_metadata import quote
from edgeroute.runtime.template import check_messages
from edgeroute.runtime.untrusted_json import parse_object
from edgeroute.tools.questions import Draw, Question, is_right, make_questions

AnswerForm = Literal["exact", "last_line", "contains"]
"""What makes an answer right. `exact`: it is the wanted text, blanks around it aside.
`last_line`: its last line that is not blank is, alone or behind `Answer:`, a full stop allowed.
`contains`: the wanted text is in it."""

ANSWER_FORMS: Final[tuple[AnswerForm, ...]] = get_args(AnswerForm)
MAX_FILE_BYTES: Final = 32 << 20
MAX_LINE_BYTES: Final = 1 << 20
MAX_TASKS: Final = 10_000
MAX_ANSWER_CHARS: Final = 4096
MAX_TOKENS: Final = 1 << 14
DEFAULT_MAX_TOKENS: Final = 256
_KEYS: Final = frozenset({"messages", "prompt", "answer", "form", "max_tokens"})
_LABEL: Final = "Answer:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        prompt: text to continue; None where there are `messages`.
        messages: a chat; None where there is a `prompt`.
        answer: what a right answer says.
        form: how an answer is compared with it.
        max_tokens: of an answer.
        stop: text that ends an answer.
        question: the question of our generators that it puts, which judges its answers then.
    """

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answer: str
    form: AnswerForm = "last_line"
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    question: Question | None = None

    def is_right(self, text: str) -> bool:
        """Tell whether what was written is the right answer."""
        if self.question is not None:
            return is_right(self.question, text)
        if self.form == "contains":
            return self.answer in text
        if self.form == "exact":
            return text.strip() == self.answer.strip()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        last = last.removeprefix(_LABEL).strip()
        return self.answer.strip() in (last, last.removesuffix("."))


def digest(tasks: Sequence[Task]) -> str:
    """Return the sha256 of tasks: of all that an answer is asked and judged by."""
    plain = [[task.prompt, task.messages, task.answer, task.form, task.max_tokens, task.stop,
              task.question is not None] for task in tasks]  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def own_tasks(n: int, seed: int = 1) -> list[Task]:
    """Return tasks of our generators: questions that are reasoned in steps, of the training side.

    Raises:
        UsageError: they have not so many.
    """
    questions = make_questions(n, seed, draw=Draw(split="train", form="steps"))
    return [
        Task(messages=tuple(question.messages), answer=question.answer,
             max_tokens=question.max_tokens, stop=(question.stop,), question=question)
        for question in questions
    ]  # fmt: skip


def read_tasks(path: Path, most: int) -> list[Task]:
    """Read the first tasks of a file, one JSON object a line; blank lines do not count.

    Args:
        path: of the file.
        most: tasks wanted.

    Raises:
        UsageError: it cannot be read, is too large, or a line is no task; it names the line.
    """
    tasks: list[Task] = []
    try:
        with path.open("rb") as file:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UsageError(f"{path} has more than {MAX_FILE_BYTES} bytes; take fewer tasks")
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    raise UsageError(f"line {number} of {path} has more than {MAX_LINE_BYTES} "
                                     "bytes; shorten it")  # fmt: skip
                if line.strip() and len(tasks) < most:
                    tasks.append(_task(line, f"line {number} of {path.name}"))
    except OSError as error:
        raise UsageError(f"tasks {path} cannot be read: {error.strerror}") from error
    if not tasks:
        raise UsageError(f"{path} holds no tasks; write one JSON object a line, such as "
                         '{"prompt": "2 + 2 =", "answer": "4", "form": "contains"}')  # fmt: skip
    return tasks


def _task(line: bytes, name: str) -> Task:
    try:
        value = parse_object(line, name, UsageError)
    except UsageError as error:
        raise UsageError(f"{error}; write one JSON object a line") from error
    unknown = sorted(key for key in value if key not in _KEYS)
    if unknown:
        raise UsageError(f"{name} has the unknown key {quote(unknown[0])}; known are "
                         f"{', '.join(sorted(_KEYS))}")  # fmt: skip
    if ("messages" in value) == ("prompt" in value):
        both = "both" if "prompt" in value else "neither"
        raise UsageError(f"{name} has {both} of messages and prompt; give one of them")
    form = value.get("form", "last_line")
    if form not in ANSWER_FORMS:
        raise UsageError(f"form of {name} is {quote(str(form))}; it must be one of "
                         f"{', '.join(ANSWER_FORMS)}")  # fmt: skip
    n = value.get("max_tokens", DEFAULT_MAX_TOKENS)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_TOKENS:
        raise UsageError(f"max_tokens of {name} must be a whole number from 1 to {MAX_TOKENS}, "
                         f"got {quote(str(n))}")  # fmt: skip
    return Task(
        prompt=_text(value, "prompt", MAX_LINE_BYTES, name) if "prompt" in value else None,
        messages=_messages(value, name), max_tokens=n, form=form,
        answer=_text(value, "answer", MAX_ANSWER_CHARS, name),
    )  # fmt: skip


def _text(value: dict[str, object], key: str, most: int, name: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found.strip() or len(found) > most:
        raise UsageError(f"{key} of {name} must be a text of 1 to {most} characters, not all "
                         f"blank, got {quote(str(found))}")  # fmt: skip
    if any("\ud800" <= character <= "\udfff" for character in found):
        raise UsageError(f"{key} of {name} holds half a character (a lone surrogate); remove it")
    return found


def _messages(value: dict[str, object], name: str) -> tuple[dict[str, Any], ...] | None:
    if "messages" not in value:
        return None
    try:
        return tuple(check_messages(value["messages"]))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
