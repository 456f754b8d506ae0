"""Questions with exact answers from seeded generators, and a strict judge of answers.

A hash of a problem's text decides whether it is for training, for tests or for a last look, so
no seed ever puts a problem on two sides. Used to measure what a lever costs in accuracy, to
search plans that answer rightly with fewer layers, and to route the steps of an answer.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.question_forms import CODE, LISTS, LOGIC, UNITS
from edgeroute.tools.question_records import Form, Kind, Question
from edgeroute.tools.question_steps import TOTALS, TRACE
from edgeroute.tools.question_words import WORDS

__all__ = [
    "KINDS", "Draw", "Form", "Question", "Split", "ends_answer", "is_right", "is_settled", "key_of",
    "make_questions", "split_of",
]  # fmt: skip

Split = Literal["train", "test", "final"]

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
_SHARES: Final = (("train", 154), ("test", 205), ("final", 256))
"""First byte of a text's hash, up to which a problem is on a side: 60, 20 and 20 %."""

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {kind.name: kind for kind in (WORDS, CODE, LISTS, UNITS, LOGIC, TRACE, TOTALS)}
)
MAX_QUESTIONS: Final = 100_000
MAX_DRAWS_PER_QUESTION: Final = 200
"""Draws after which a kind is taken to have no further problem of a side."""

_ENDS: Final = re.compile(r"[ \t]*(\.(?!\S)|\n|\r|$)")
"""What may follow an answer: the end of its sentence or line."""
_ANSWER_LINE: Final = re.compile(r"^Answer:[ \t]*(.*?)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What is drawn.

    Attributes:
        split: the side; see `split_of`.
        form: see `Form`; a kind has one or both.
        levels: difficulties, from 1; None is all that a kind has.
    """

    split: Split = "train"
    form: Form = "short"
    levels: tuple[int, ...] | None = None


def split_of(text: str) -> Split:
    """Return the side that a problem is on, whatever the seed."""
    first = hashlib.sha256(text.encode()).digest()[0]
    return next(split for split in SPLITS for name, end in _SHARES if name == split and first < end)


def make_questions(
    n: int, seed: int, kinds: Sequence[str] | None = None, draw: Draw | None = None
) -> list[Question]:
    """Draw questions, all with different texts, equally many of each kind as far as n allows.

    Args:
        n: how many.
        seed: same seed, same questions. A longer list begins with the shorter one.
        kinds: keys of KINDS; None is all that have the form.
        draw: side, form and levels; None is short questions to train on.

    Raises:
        UsageError: an unknown kind, split or level, or a kind has not so many questions.
    """
    draw = draw or Draw()
    if not 0 < n <= MAX_QUESTIONS:
        raise UsageError(f"{n} questions were asked for; ask for 1 to {MAX_QUESTIONS}")
    chosen = _kinds(kinds, draw)
    streams = [random.Random(f"{kind.name} {draw.split} {seed}") for kind in chosen]
    found: list[Question] = []
    seen: set[str] = set()
    for i in range(n):
        kind, rng = chosen[i % len(chosen)], streams[i % len(chosen)]
        question = _draw_one(kind, rng, draw, seen)
        if question is None:
            raise UsageError(
                f"kind {kind.name} gives only {i // len(chosen)} different {draw.split} questions "
                f"of these levels, {n} were asked for over {len(chosen)} kinds; ask for fewer"
            )
        seen.add(question.text)
        found.append(question)
    return found


def _draw_one(kind: Kind, rng: random.Random, draw: Draw, seen: set[str]) -> Question | None:
    for _ in range(MAX_DRAWS_PER_QUESTION):
        level = rng.choice(draw.levels or tuple(range(1, kind.n_levels + 1)))
        problem = kind.make(rng, level)
        if problem.text not in seen and split_of(problem.text) == draw.split:
            return Question(kind=kind.name, level=level, form=draw.form, text=problem.text,
                            answer=problem.answer, cue=problem.cue, steps=problem.steps,
                            example=kind.example)  # fmt: skip
    return None


def _kinds(names: Sequence[str] | None, draw: Draw) -> list[Kind]:
    if draw.split not in SPLITS:
        raise UsageError(f"no split is called {draw.split!r}; there are {', '.join(SPLITS)}")
    if draw.form not in get_args(Form):
        raise UsageError(f"no form is called {draw.form!r}; there are {', '.join(get_args(Form))}")
    able = {
        name: kind for name, kind in KINDS.items()
        if (kind.short if draw.form == "short" else kind.stepwise)
    }  # fmt: skip
    chosen = list(dict.fromkeys(able if names is None else names))
    for name in chosen:
        if name not in able:
            raise UsageError(f"no kind of {draw.form} questions is called {name[:60]!r}; there "
                             f"are {', '.join(able)}")  # fmt: skip
    for level in draw.levels or ():
        if not all(1 <= level <= able[name].n_levels for name in chosen):
            raise UsageError(f"level {level} is not one that all of {', '.join(chosen)} have")
    if not chosen or draw.levels == ():
        raise UsageError("no kind or no level was given; name at least one, or leave it out")
    return [able[name] for name in chosen]


def is_right(question: Question, text: str) -> bool:
    """Tell whether what a model wrote is the right answer, in the form that was asked for.

    Short: the text begins with the answer, which a full stop or the end of its line follows;
    what comes then does not count. Steps: every line that begins with `Answer:` holds the answer
    alone, and there is one. A full stop after the answer is allowed, and blanks around it.
    """
    if question.form == "short":
        begin = text.lstrip(" \t")
        return begin.startswith(question.answer) and ends_answer(begin[len(question.answer) :])
    answers = _ANSWER_LINE.findall(text.replace("\r", ""))
    return bool(answers) and all(_same(answer, question.answer) for answer in answers)


def is_settled(question: Question, text: str) -> bool:
    """Tell whether nothing that may follow `text` changes what `is_right` says of it.

    Of short answers only; a reasoned one is settled where the model ends it.
    """
    if question.form != "short":
        return False
    begin, answer = text.lstrip(" \t"), question.answer
    if len(begin) <= len(answer):
        return not answer.startswith(begin)
    return not begin.startswith(answer) or begin[len(answer) :].lstrip(" \t") not in ("", ".")


def key_of(question: Question) -> str:
    """Name a question in files of results."""
    return hashlib.sha256(question.prompt.encode()).hexdigest()[:16]


def ends_answer(rest: str) -> bool:
    """Tell whether a short answer ends before `rest`, what the model wrote behind it."""
    return _ENDS.match(rest) is not None


def _same(found: str, answer: str) -> bool:
    return found.strip(" \t\r").removesuffix(".") == answer
