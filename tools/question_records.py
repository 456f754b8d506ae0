"""What a question with one exact answer is, and the forms in which it is put."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Form = Literal["short", "steps"]
"""`short`: the answer follows at once, a few tokens. `steps`: reasoned in steps with a blank
line between them and a last line `Answer: N`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A worked problem that shows how a kind is reasoned.

    Both models of the pair ignore an instruction without an example in most of their answers,
    and one of another kind in many.
    """

    problem: str
    steps: tuple[str, ...]


BAKER: Final = Example(
    problem="A baker fills 4 trays with 12 rolls each and burns 9 rolls. He sells the rest for "
    "2 euros each. How many euros does he get?",
    steps=(
        "The baker fills 4 * 12 = 48 rolls.",
        "After burning 9 there are 48 - 9 = 39 rolls.",
        "He gets 39 * 2 = 78 euros.",
        "Answer: 78",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem as a generator draws it.

    Attributes:
        text: what is asked, without any instruction.
        answer: the one right answer, as it must be written.
        cue: how a sentence begins that the answer ends.
        steps: a worked solution, a sentence per step; only of kinds that are reasoned.
    """

    text: str
    answer: str
    cue: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A problem in the form in which a model sees it.

    Attributes:
        kind: name of the generator.
        level: difficulty, from 1; for word problems the number of steps.
        form: see `Form`.
        text: the problem alone, by which questions are told apart.
        answer: the one right answer.
        cue: how a sentence begins that the answer ends.
        steps: a worked solution, where the generator has one.
        example: what a reasoned one shows first.
    """

    kind: str
    level: int
    form: Form
    text: str
    answer: str
    cue: str
    steps: tuple[str, ...] = ()
    example: Example = BAKER

    @property
    def prompt(self) -> str:
        """Text for a model to continue, no chat template around it.

        Short ones begin the sentence that the answer ends: without that, the models of the pair
        begin to reason or to talk in most of their answers.
        """
        if self.form == "short":
            return f"Question: {self.text}\nAnswer: {self.cue}".rstrip()
        return "".join(f"{message['content']}\n\n" for message in self.messages)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The same as a chat; of reasoned ones the example is a turn of its own.

        Within one turn with the problem, the smaller model of the pair leaves the last line out
        in most of its answers.
        """
        if self.form == "short":
            content = f"{self.text}\nReply with the answer only, no words around it."
            return [{"role": "user", "content": content}]
        asked = (
            "Solve the problem in short steps, one sentence each, with a blank line between "
            "steps. Write the answer in the last line.\n\n"
            f"Problem: {self.example.problem}"
        )
        return [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "\n\n".join(self.example.steps)},
            {"role": "user", "content": f"Problem: {self.text}"},
        ]

    @property
    def stop(self) -> str:
        """Text that ends an answer of this form, where the model does not end it itself."""
        return "\n" if self.form == "short" else "Problem:"

    @property
    def max_tokens(self) -> int:
        """Tokens that a right answer of this form needs at most."""
        return 10 if self.form == "short" else 200


Make = Callable[[random.Random, int], Problem]
"""Draws a problem of a level; the same state of the generator gives the same one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A generator of problems.

    Attributes:
        name: of it.
        n_levels: difficulties, counted from 1.
        make: see Make.
        short, stepwise: the forms that its problems can be put in.
        example: a worked problem of the kind, for reasoned ones.
    """

    name: str
    n_levels: int
    make: Make
    short: bool = True
    stepwise: bool = False
    example: Example = BAKER


def pick(rng: random.Random, table: Mapping[int, tuple[Callable[[random.Random], Problem], ...]],
         level: int) -> Problem:  # fmt: skip
    """Draw from one of a level's templates."""
    return rng.choice(table[level])(rng)
