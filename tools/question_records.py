"""What a question with one exact answer is, and the forms in which it is put."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Form = Literal["short", "steps"]
"""`short`: the answer follows at once, a few tokens. `steps`: reasoned in steps with a blank
line between them and a last line `Answer: N`."""

EXAMPLE_PROBLEM: Final = (
    "A baker fills 4 trays with 12 rolls each and burns 9 rolls. He sells the rest for 2 euros "
    "each. How many euros does he get?"
)
EXAMPLE_STEPS: Final = (
    "The baker fills 4 * 12 = 48 rolls.",
    "After burning 9 there are 48 - 9 = 39 rolls.",
    "He gets 39 * 2 = 78 euros.",
    "Answer: 78",
)
"""Both models of the pair ignore an instruction without an example in most of their answers."""


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
    """

    kind: str
    level: int
    form: Form
    text: str
    answer: str
    cue: str
    steps: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """Text for a model to continue, no chat template around it.

        Short ones begin the sentence that the answer ends: without that, the models of the pair
        begin to reason or to talk in most of their answers.
        """
        if self.form == "short":
            return f"Question: {self.text}\nAnswer: {self.cue}".rstrip()
        return f"{self.messages[0]['content']}\n\n"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The same as a chat."""
        if self.form == "short":
            content = f"{self.text}\nReply with the answer only, no words around it."
        else:
            shown = "\n\n".join(EXAMPLE_STEPS)
            content = (
                "Solve the problem in short steps, one sentence each, with a blank line between "
                "steps. Write the last line as in the example.\n\n"
                f"Problem: {EXAMPLE_PROBLEM}\n\n{shown}\n\nProblem: {self.text}"
            )
        return [{"role": "user", "content": content}]

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
    """A generator of problems, its levels counted from 1, and whether they can be reasoned."""

    name: str
    n_levels: int
    make: Make
    stepwise: bool = False


def pick(rng: random.Random, table: Mapping[int, tuple[Callable[[random.Random], Problem], ...]],
         level: int) -> Problem:  # fmt: skip
    """Draw from one of a level's templates."""
    return rng.choice(table[level])(rng)
