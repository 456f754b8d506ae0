"""Questions on short programs, lists, times and orders, each with one exact answer."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Final

from edgeroute.tools.question_records import Kind, Problem, pick
from edgeroute.tools.question_words import NAMES

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORD_LIST: Final = ("apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer",
                    "island", "jacket", "kitten", "ladder", "mirror", "needle", "orange", "pencil",
                    "rocket", "silver", "table", "window", "yellow", "zebra", "planet",
                    "summer")  # fmt: skip
_ORDINALS: Final = ("first", "second", "third", "fourth", "fifth")
_RELATIONS: Final = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"),
                     ("faster", "fastest", "slowest"),
                     ("richer", "richest", "poorest"))  # fmt: skip

_UNITS: Final = (("hours", "minutes", 60), ("minutes", "seconds", 60), ("weeks", "days", 7),
                 ("days", "hours", 24), ("years", "months", 12), ("meters", "centimeters", 100),
                 ("kilometers", "meters", 1000), ("kilograms", "grams", 1000),
                 ("liters", "milliliters", 1000), ("centuries", "years", 100))  # fmt: skip

Draw = Callable[[random.Random], Problem]


def _problem(text: str, answer: object, cue: str) -> Problem:
    return Problem(text=text, answer=str(answer), cue=cue)


# programs: the text is asked about, the answer is worked out beside it, never by running it


def _prints(code: str, answer: object) -> Problem:
    return _problem(f"What does this Python code print?\n{code}", answer, "It prints")


def _expression(rng: random.Random) -> Problem:
    a, b, c = rng.randint(2, 30), rng.randint(2, 12), rng.randint(2, 9)
    sums = ((f"{a} + {b} * {c}", a + b * c), (f"({a} + {b}) * {c}", (a + b) * c),
            (f"{a * c} // {c} + {b}", a + b), (f"{a} % {b}", a % b),
            (f"{a} - {b} + {c}", a - b + c))  # fmt: skip
    code, value = rng.choice(sums)
    return _prints(f"print({code})", value)


def _small_sum(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 40), rng.randint(2, 20)
    sums = ((f"{a} + {b}", a + b), (f"{a + b} - {b}", a), (f"{a % 12} * {b}", a % 12 * b))
    code, value = rng.choice(sums)
    if rng.random() < 0.5:
        return _prints(f"print({code})", value)
    return _prints(f"x = {code}\nprint(x)", value)


def _element(rng: random.Random) -> Problem:
    values = [rng.randint(1, 30) for _ in range(rng.randint(3, 5))]
    i = rng.randrange(len(values))
    asked = ((f"a[{i}]", values[i]), ("max(a)", max(values)), ("len(a)", len(values)))
    code, value = rng.choice(asked)
    return _prints(f"a = {values}\nprint({code})", value)


def _variables(rng: random.Random) -> Problem:
    a, b, c = rng.randint(2, 40), rng.randint(2, 20), rng.randint(2, 6)
    if rng.random() < 0.5:
        return _prints(f"x = {a}\nx += {b}\nprint(x)", a + b)
    return _prints(f"x = {a}\ny = x + {b}\nprint(y * {c})", (a + b) * c)


def _text_code(rng: random.Random) -> Problem:
    word, k = rng.choice(WORD_LIST), rng.randint(0, 4)
    asked = ((f"len('{word}')", len(word)), (f"'{word}'[{k}]", word[k]),
             (f"'{word}'.count('e')", word.count("e")),
             (f"len('{word}') * {k + 2}", len(word) * (k + 2)))  # fmt: skip
    code, value = rng.choice(asked)
    return _prints(f"print({code})", value)


def _index(rng: random.Random) -> Problem:
    values = [rng.randint(1, 30) for _ in range(rng.randint(3, 5))]
    i = rng.randrange(len(values))
    asked = ((f"a[{i}]", values[i]), (f"a[{i}] + a[-1]", values[i] + values[-1]),
             ("max(a)", max(values)), ("sum(a)", sum(values)), ("len(a)", len(values)))  # fmt: skip
    code, value = rng.choice(asked)
    return _prints(f"a = {values}\nprint({code})", value)


def _loop(rng: random.Random) -> Problem:
    start, n, step = rng.randint(0, 20), rng.randint(2, 6), rng.randint(2, 9)
    if rng.random() < 0.5:
        code, value = f"x += {step}", start + n * step
    else:
        code, value = "x += i", start + n * (n - 1) // 2
    return _prints(f"x = {start}\nfor i in range({n}):\n    {code}\nprint(x)", value)


def _guarded_loop(rng: random.Random) -> Problem:
    n, m, start = rng.randint(4, 9), rng.randint(2, 3), rng.randint(0, 9)
    hits = range(0, n, m)
    code, value = rng.choice((("x += i", start + sum(hits)), ("x += 1", start + len(hits))))
    return _prints(
        f"x = {start}\nfor i in range({n}):\n    if i % {m} == 0:\n        {code}\nprint(x)", value
    )


def _function(rng: random.Random) -> Problem:
    a, b, c = rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 12)
    inner = a * c + b
    code = f"def f(x):\n    return {a} * x + {b}\n"
    if rng.random() < 0.6:
        return _prints(f"{code}print(f({c}))", inner)
    return _prints(f"{code}print(f({c}) - f(0))", inner - b)


# lists and texts


def _numbers(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(1, 60), n)


def _extreme(rng: random.Random) -> Problem:
    values = _numbers(rng, rng.randint(4, 7))
    asked = (("largest", max(values)), ("smallest", min(values)), ("first", values[0]),
             ("last", values[-1]))  # fmt: skip
    name, value = rng.choice(asked)
    return _problem(f"What is the {name} number in {values}?", value, f"The {name} number is")


def _member(rng: random.Random) -> Problem:
    values = _numbers(rng, rng.randint(3, 6))
    asked = rng.choice(values) if rng.random() < 0.5 else rng.randint(1, 60)
    return _problem(f"Is {asked} one of the numbers in {values}? Yes or no?",
                    "Yes" if asked in values else "No", "")  # fmt: skip


def _letter(rng: random.Random) -> Problem:
    word, k = rng.choice(WORD_LIST), rng.randint(0, 4)
    if rng.random() < 0.7:
        return _problem(f"What is the {_ORDINALS[k]} letter of '{word}'?", word[k],
                        f"The {_ORDINALS[k]} letter is")  # fmt: skip
    return _problem(f"How many letters does '{word}' have?", len(word), "The number is")


def _ranked(rng: random.Random) -> Problem:
    values = _numbers(rng, rng.randint(4, 6))
    ordered = sorted(values)
    name, value = rng.choice((("second largest", ordered[-2]), ("second smallest", ordered[1])))
    return _problem(f"What is the {name} number in {values}?", value, f"The {name} number is")


def _above(rng: random.Random) -> Problem:
    values, limit = _numbers(rng, rng.randint(4, 7)), rng.randint(10, 50)
    if rng.random() < 0.5:
        n = sum(value > limit for value in values)
        return _problem(f"How many numbers in {values} are greater than {limit}?", n,
                        "The number is")  # fmt: skip
    n = sum(value % 2 == 0 for value in values)
    return _problem(f"How many numbers in {values} are even?", n, "The number is")


def _sum_of(rng: random.Random) -> Problem:
    values = [rng.randint(1, 20) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.5:
        return _problem(f"What is the sum of the numbers in {values}?", sum(values), "The sum is")
    odd = sum(value for value in values if value % 2)
    return _problem(f"What is the sum of the odd numbers in {values}?", odd, "The sum is")


def _word_at(rng: random.Random) -> Problem:
    words = rng.sample(WORD_LIST, rng.randint(3, 5))
    listed = ", ".join(words)
    if rng.random() < 0.5:
        return _problem(f"Which of these words comes first in the alphabet: {listed}?", min(words),
                        "The word is")  # fmt: skip
    k = rng.randrange(len(words))
    return _problem(f"What is the {_ORDINALS[k]} word of: {listed}?", words[k], "The word is")


# times and units


def _whole_units(rng: random.Random) -> Problem:
    few, many, factor = rng.choice(_UNITS)
    n = rng.randint(2, 30)
    return _problem(f"How many {many} are {n} {few}?", n * factor, f"The number of {many} is")


def _mixed_units(rng: random.Random) -> Problem:
    few, many, factor = rng.choice((("hours", "minutes", 60), ("weeks", "days", 7),
                                    ("meters", "centimeters", 100)))  # fmt: skip
    n, more = rng.randint(2, 9), rng.randint(2, factor)
    return _problem(f"How many {many} are {n} {few} and {more} {many} in all?", n * factor + more,
                    f"The total number of {many} is")  # fmt: skip


def _weekday(rng: random.Random) -> Problem:
    today, n = rng.randrange(7), rng.randint(1, 12)
    days = "day" if n == 1 else "days"
    if rng.random() < 0.5:
        asked, cue, there = f"will it be in {n} {days}", "It will be", (today + n) % 7
    else:
        asked, cue, there = f"was it {n} {days} ago", "It was", (today - n) % 7
    return _problem(f"Today is {DAYS[today]}. Which weekday {asked}?", DAYS[there], cue)


def _clock(rng: random.Random) -> Problem:
    hour, minute, more = rng.randint(1, 21), rng.choice(range(0, 60, 5)), rng.randrange(5, 120, 5)
    end = hour * 60 + minute + more
    text = rng.choice(("A film starts at {} and lasts {} minutes. When does it end?",
                       "What time is it {1} minutes after {0}?"))  # fmt: skip
    return _problem(text.format(f"{hour:02}:{minute:02}", more),
                    f"{end // 60:02}:{end % 60:02}", "The time is")  # fmt: skip


# orders


def _order(rng: random.Random, n: int, shuffled: bool) -> Problem:
    people = rng.sample(NAMES, n)
    more, most, least = rng.choice(_RELATIONS)
    facts = [f"{a} is {more} than {b}." for a, b in itertools.pairwise(people)]
    if shuffled:
        rng.shuffle(facts)
    asked, value = rng.choice(((most, people[0]), (least, people[-1])))
    return _problem(f"{' '.join(facts)} Who is the {asked}?", value,
                    f"The {asked} is")  # fmt: skip


def _orders(n: int, shuffled: bool) -> Draw:
    return lambda rng: _order(rng, n, shuffled)


def _kind(name: str, *levels: Sequence[Draw]) -> Kind:
    table = {level: tuple(draws) for level, draws in enumerate(levels, 1)}
    return Kind(name=name, n_levels=len(levels), make=lambda rng, at: pick(rng, table, at))


CODE: Final = _kind("code", [_small_sum, _element], [_expression, _variables, _text_code, _index],
                    [_loop, _guarded_loop, _function])  # fmt: skip
LISTS: Final = _kind("lists", [_extreme, _member], [_ranked, _letter, _above], [_sum_of, _word_at])
UNITS: Final = _kind("units", [_whole_units], [_mixed_units, _weekday], [_clock])
LOGIC: Final = _kind("logic", [_orders(2, False), _orders(3, False)], [_orders(3, True)],
                     [_orders(4, True)])  # fmt: skip
