"""Problems that are reasoned in steps: traced programs, and lists that change.

The level is the number of steps. A worked solution writes every sum out, as the example of its
kind does.
"""

import itertools
import random
from typing import Final

from edgeroute.tools.question_records import Example, Kind, Problem

_MAX_VALUE: Final = 300
_VARIABLES: Final = "abcdxyz"


def _problem(text: str, answer: object, steps: list[str]) -> Problem:
    return Problem(text=text, answer=str(answer), cue="The answer is", steps=tuple(steps))


# programs: one assignment a line, and a sentence for what it gives


def _done(rng: random.Random, value: int) -> tuple[str, int]:
    """Draw what is done to a value: the sign with its operand, and what that gives."""
    a, more = rng.randint(3, 9), rng.randint(11, 48)
    able = [(f"+ {more}", value + more)]
    if value > more:
        able.append((f"- {more}", value - more))
    if value * a <= _MAX_VALUE:
        able.append((f"* {a}", value * a))
    if value >= 2 * a:
        able.append(rng.choice(((f"// {a}", value // a), (f"% {a}", value % a))))
    return rng.choice(able)


def _trace(rng: random.Random, n_steps: int) -> Problem:
    names = rng.sample(_VARIABLES, 2)
    first = rng.randint(12, 60)
    lines, values, steps = [f"{names[0]} = {first}"], {names[0]: first}, []
    last = names[0]
    for _ in range(n_steps):
        target, source = rng.choice(names), last
        other = next((name for name in values if name != source), None)
        value = values[source]
        if other is not None and rng.random() < 0.35:
            done, found = f"+ {values[other]}", value + values[other]
            shown = f"{source} + {other}"
        else:
            done, found = _done(rng, value)
            shown = f"{source} {done}"
        lines.append(f"{target} = {shown}")
        steps.append(f"The line {target} = {shown} sets {target} to {value} {done} = {found}.")
        values[target] = found
        last = target
    code = "\n".join(lines)
    return _problem(f"What is the value of {last} after this Python code?\n{code}",
                    values[last], steps)  # fmt: skip


# lists: one instruction a step, and the list as it is then


def _doubled(rng: random.Random, values: list[int]) -> tuple[str, list[int]]:
    return "double every number", [2 * value for value in values]


def _more(rng: random.Random, values: list[int]) -> tuple[str, list[int]]:
    a = rng.randint(2, 5)
    return f"add {a} to every number", [value + a for value in values]


def _without_largest(rng: random.Random, values: list[int]) -> tuple[str, list[int]]:
    at = values.index(max(values))
    return "remove the largest number", values[:at] + values[at + 1 :]


def _without_smallest(rng: random.Random, values: list[int]) -> tuple[str, list[int]]:
    at = values.index(min(values))
    return "remove the smallest number", values[:at] + values[at + 1 :]


_SHRINKING: Final = (_without_largest, _without_smallest)
_CHANGES: Final = (*_SHRINKING, _doubled, _more)


def _totals(rng: random.Random, n_steps: int) -> Problem:
    start = values = rng.sample(range(2, 16), 4)
    asked, steps = [], []
    for _ in range(n_steps - 1):
        able = _CHANGES if len(values) > 2 else tuple(c for c in _CHANGES if c not in _SHRINKING)
        instruction, values = rng.choice(able)(rng, values)
        asked.append(instruction)
        steps.append(f"We {instruction} and have {values}.")
    sums = [
        f"{a} + {b} = {a + b}"
        for a, b in zip(itertools.accumulate(values), values[1:], strict=False)
    ]
    steps.append(f"The sum is {', and '.join(sums)}.")
    total = sum(values)
    first = "".join(f"{instruction}, then " for instruction in asked)
    return _problem(f"Start with the list {start}. In this order: {first}add all the numbers up. "
                    "What is the sum?", total, steps)  # fmt: skip


TRACE: Final = Kind(
    name="trace", n_levels=4, short=False, stepwise=True,
    make=lambda rng, level: _trace(rng, level),
    example=Example(
        problem="What is the value of k after this Python code?\nm = 14\nk = m * 3\nm = k - 25\n"
        "k = m + k",
        steps=("The line k = m * 3 sets k to 14 * 3 = 42.",
               "The line m = k - 25 sets m to 42 - 25 = 17.",
               "The line k = m + k sets k to 17 + 42 = 59.", "Answer: 59"),
    ),
)  # fmt: skip
TOTALS: Final = Kind(
    name="totals", n_levels=4, short=False, stepwise=True,
    make=lambda rng, level: _totals(rng, level),
    example=Example(
        problem="Start with the list [7, 12, 5, 20]. In this order: remove the largest number, "
        "then add 3 to every number, then add all the numbers up. What is the sum?",
        steps=("We remove the largest number and have [7, 12, 5].",
               "We add 3 to every number and have [10, 15, 8].",
               "The sum is 10 + 15 = 25, and 25 + 8 = 33.", "Answer: 33"),
    ),
)  # fmt: skip
