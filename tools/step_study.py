"""Lets two models answer questions under step policies, and keeps every step in a journal.

Several questions are answered at once, and those of a model share its passes. A run that was
stopped goes on where it was; two processes may share the questions (`--shard`), a journal each.
`tools/step_compare` makes the table.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.skippers.steps import Who
from edgeroute.tools.questions import Draw, Question, key_of, make_questions
from edgeroute.tools.step_play import Play, play
from edgeroute.tools.step_tree import Ask, Asked, Journal, Node, open_journal
from edgeroute.tools.step_tried import parse_tried
from edgeroute.tools.step_writers import StepWriter, open_writer

KINDS: Final = ("words", "trace", "totals")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A policy to be played on every question, by itself: what it learns of one is forgotten.

    Otherwise a play would depend on those before it, and could not be found again.

    Attributes:
        policy: its text, see `parse_tried`.
        sample: see Ask.
        draw: which of its random choices.
    """

    policy: str
    sample: int | None = None
    draw: int = 0


@dataclass(slots=True, kw_only=True)
class _Asked:
    """A question in a slot, and the policies that are left for it."""

    question: Question
    asked: Asked
    prompt: list[int]
    tasks: deque[Task]
    steps: Play | None = None


class Study:
    """Plays policies on questions, several at once, over one journal.

    Args:
        writers: the two models.
        journal: where nodes come from and go to.
        n_slots: questions at once; the writers have as many slots.
    """

    def __init__(self, writers: dict[Who, StepWriter], journal: Journal, n_slots: int) -> None:
        self._writers = writers
        self._journal = journal
        self._slots: list[_Asked | None] = [None] * n_slots
        self._asks: dict[tuple[Who, int], Ask] = {}
        self._n_head: dict[str, int] = {}
        self.n_done = 0

    def run(
        self, questions: Sequence[Question], tasks: Sequence[Task], told: Callable[[], None]
    ) -> None:
        """Answer all questions under all policies; `told` is called after each question."""
        waiting = deque(questions)
        while waiting or any(self._slots):
            for i, held in enumerate(self._slots):
                if held is None and waiting:
                    self._begin(i, waiting.popleft(), tasks)
            before = self.n_done
            for who, writer in self._writers.items():
                if writer.busy:
                    for i, node in writer.advance():
                        self._answered(who, i, node)
            if self.n_done > before:
                told()

    def _begin(self, i: int, question: Question, tasks: Sequence[Task]) -> None:
        writer = self._writers["large"]
        prompt = writer.encode(question)
        asked = Asked(
            key=key_of(question), kind=question.kind, level=question.level, text=question.text,
            answer=question.answer, n_own=len(prompt) - self._head(writer, question),
        )  # fmt: skip
        self._journal.begin(asked)
        self._slots[i] = _Asked(question=question, asked=asked, prompt=prompt, tasks=deque(tasks))
        self._go_on(i, None)

    def _head(self, writer: StepWriter, question: Question) -> int:
        """Tokens that all prompts of a kind begin with."""
        if question.kind not in self._n_head:
            one, two = (writer.encode(each) for each in make_questions(
                2, 1, [question.kind], Draw(form="steps")))  # fmt: skip
            pairs = enumerate(zip(one, two, strict=False))
            self._n_head[question.kind] = next((i for i, (a, b) in pairs if a != b), len(one))
        return self._n_head[question.kind]

    def _answered(self, who: Who, i: int, node: Node) -> None:
        held = self._slots[i]
        assert held is not None
        self._journal.add(held.asked.key, self._asks.pop((who, i)), node)
        self._go_on(i, node)

    def _go_on(self, i: int, node: Node | None) -> None:
        """Play a slot's question until a model has to compute something, or it is done."""
        held = self._slots[i]
        assert held is not None
        while True:
            ask = self._next_ask(held, node)
            if ask is None:
                self._slots[i] = None
                self.n_done += 1
                return
            node = self._journal.find(held.asked.key, ask)
            if node is None:
                self._asks[ask.who, i] = ask
                self._writers[ask.who].submit(i, held.question, held.prompt, ask)
                return

    def _next_ask(self, held: _Asked, node: Node | None) -> Ask | None:
        """Return what a question's policies ask next; None when all are done."""
        while True:
            if held.steps is not None:
                try:
                    return next(held.steps) if node is None else held.steps.send(node)
                except StopIteration:
                    held.steps = None
            if not held.tasks:
                return None
            task = held.tasks.popleft()
            held.steps, node = (
                play(held.asked, parse_tried(task.policy), task.sample, task.draw),
                None,
            )


@click.command()
@click.argument("small", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("large", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("policies", nargs=-1, required=True)
@click.option("-n", "n_questions", default=300, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--seed", default=1, show_default=True)
@click.option("--split", default="train", type=click.Choice(["train", "test", "final"]))
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--levels", default="2,3,4", show_default=True)
@click.option("--journal", required=True, type=click.Path(path_type=Path))
@click.option("--shard", default="0/1", show_default=True, help="Which part of how many.")
@click.option("--slots", default=16, show_default=True, type=click.IntRange(1, 64))
@click.option("--sample", default=None, type=int,
              help="Which random answer; default: the likeliest token.")  # fmt: skip
@click.option("--draws", default=1, show_default=True, help="Random choices of each policy.")
def main(**options: object) -> None:
    """Let the models SMALL and LARGE answer questions under POLICIES."""
    try:
        _main(_Options(**options))  # type: ignore[arg-type]
    except (EdgerouteError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    small: Path
    large: Path
    policies: tuple[str, ...]
    n_questions: int
    seed: int
    split: str
    kinds: str
    levels: str
    journal: Path
    shard: str
    slots: int
    sample: int | None
    draws: int


def _main(options: _Options) -> None:
    levels = tuple(int(level) for level in options.levels.split(","))
    draw = Draw(split=options.split, form="steps", levels=levels)  # type: ignore[arg-type]
    questions = make_questions(options.n_questions, options.seed, options.kinds.split(","), draw)
    mine, n_shards = (int(part) for part in options.shard.split("/"))
    if not 0 <= mine < n_shards:
        raise UsageError(f"shard {options.shard} is none of its number; count from 0")
    first, end = (i * len(questions) // n_shards for i in (mine, mine + 1))
    for text in options.policies:
        parse_tried(text)  # one that is none is refused before the models are loaded
    tasks = [Task(policy=text, sample=options.sample, draw=i)
             for text in options.policies for i in range(options.draws)]  # fmt: skip
    began = time.monotonic()
    with contextlib.ExitStack() as own:
        writers: dict[Who, StepWriter] = {
            "small": own.enter_context(open_writer(options.small, options.slots)),
            "large": own.enter_context(open_writer(options.large, options.slots)),
        }
        study = Study(writers, open_journal(options.journal), options.slots)

        def told() -> None:
            passes = ", ".join(f"{who} {w.n_tokens} in {w.n_passes}" for who, w in writers.items())
            click.echo(f"{time.monotonic() - began:.0f} s: {study.n_done}/{end - first} "
                       f"questions; tokens: {passes} passes", err=True)  # fmt: skip

        study.run(questions[first:end], tasks, told)


if __name__ == "__main__":
    main()
