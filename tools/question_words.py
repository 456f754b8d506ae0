"""Arithmetic word problems of one to four steps; the level is the number of steps."""

import random
import re
from typing import Final

from edgeroute.tools.question_records import Kind, Problem, pick

NAMES: Final = ("Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Ivan",
                "Julia", "Karl", "Laura", "Martin", "Nina", "Oscar", "Paula")  # fmt: skip
THINGS: Final = ("pens", "coins", "nuts", "stamps", "cards", "shells", "apples", "marbles",
                 "books", "beads", "stones", "keys")  # fmt: skip


_ASKED: Final = re.compile(r"How many ([a-z]+)")


def _solved(text: str, answer: int, *steps: str) -> Problem:
    things = _ASKED.findall(text)[-1]
    return Problem(text=text, answer=str(answer), cue=f"The number of {things} is", steps=steps)


def _who(rng: random.Random) -> tuple[str, str]:
    return rng.choice(NAMES), rng.choice(THINGS)


def _gain(rng: random.Random) -> Problem:
    (name, things), a, b = _who(rng), rng.randint(3, 40), rng.randint(2, 20)
    text = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
    return _solved(text, a + b, f"{name} has {a} + {b} = {a + b} {things}.")


def _loss(rng: random.Random) -> Problem:
    (name, things), b, left = _who(rng), rng.randint(2, 12), rng.randint(2, 20)
    a = b + left
    text = f"{name} had {a} {things} and lost {b}. How many {things} are left?"
    return _solved(text, left, f"{name} has {a} - {b} = {left} {things}.")


def _times(rng: random.Random) -> Problem:
    things, a, b = rng.choice(THINGS), rng.randint(2, 12), rng.randint(2, 10)
    text = f"A box holds {a} {things}. How many {things} do {b} boxes hold?"
    return _solved(text, a * b, f"The boxes hold {b} * {a} = {a * b} {things}.")


def _share(rng: random.Random) -> Problem:
    things, a, b = rng.choice(THINGS), rng.randint(2, 15), rng.randint(2, 9)
    text = (
        f"{a * b} {things} are shared equally among {b} children. "
        f"How many {things} does each child get?"
    )
    return _solved(text, a, f"Each child gets {a * b} / {b} = {a} {things}.")


def _bags_less(rng: random.Random) -> Problem:
    (name, things), a, b = _who(rng), rng.randint(3, 12), rng.randint(2, 9)
    c = rng.randint(1, a * b - 1)
    text = f"{name} buys {b} bags of {a} {things} and loses {c}. How many {things} are left?"
    return _solved(text, a * b - c, f"{name} buys {b} * {a} = {a * b} {things}.",
                   f"After the loss {a * b} - {c} = {a * b - c} {things} are left.")  # fmt: skip


def _price(rng: random.Random) -> Problem:
    a, b, n = rng.randint(2, 12), rng.randint(3, 30), rng.randint(2, 9)
    text = f"A pen costs {a} euros and a cap {b} euros. How many euros do {n} pens and a cap cost?"
    return _solved(text, n * a + b, f"The pens cost {n} * {a} = {n * a} euros.",
                   f"With the cap it is {n * a} + {b} = {n * a + b} euros.")  # fmt: skip


def _together(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    things, a, k = rng.choice(THINGS), rng.randint(3, 20), rng.randint(2, 6)
    text = (
        f"{name} has {a} {things}. {other} has {k} times as many. How many {things} do they "
        "have together?"
    )
    return _solved(text, a + k * a, f"{other} has {k} * {a} = {k * a} {things}.",
                   f"Together they have {a} + {k * a} = {a + k * a} {things}.")  # fmt: skip


def _rest_shared(rng: random.Random) -> Problem:
    name, things = _who(rng)
    each, b, c = rng.randint(2, 12), rng.randint(2, 8), rng.randint(2, 20)
    a = each * b + c
    text = (
        f"{name} has {a} {things}, keeps {c} and shares the rest equally among {b} friends. "
        f"How many {things} does each friend get?"
    )
    return _solved(text, each, f"There are {a} - {c} = {a - c} {things} to share.",
                   f"Each friend gets {a - c} / {b} = {each} {things}.")  # fmt: skip


def _doubled(rng: random.Random) -> Problem:
    (name, things), a, b = _who(rng), rng.randint(5, 40), rng.randint(3, 30)
    c = rng.randint(1, a + b - 1)
    now = a + b - c
    text = (
        f"{name} has {a} {things}, finds {b}, gives away {c} and then doubles what is left. "
        f"How many {things} does {name} have now?"
    )
    return _solved(text, 2 * now, f"After finding there are {a} + {b} = {a + b} {things}.",
                   f"After giving away {a + b} - {c} = {now} are left.",
                   f"Doubled this is {now} * 2 = {2 * now} {things}.")  # fmt: skip


def _change(rng: random.Random) -> Problem:
    name, n, p, cap = rng.choice(NAMES), rng.randint(2, 6), rng.randint(2, 9), rng.randint(5, 25)
    left = rng.randint(1, 30)
    spent = n * p + cap
    text = (
        f"{name} has {spent + left} euros and buys {n} pens for {p} euros each and a cap for "
        f"{cap} euros. How many euros are left?"
    )
    return _solved(text, left, f"The pens cost {n} * {p} = {n * p} euros.",
                   f"With the cap it is {n * p} + {cap} = {spent} euros.",
                   f"There are {spent + left} - {spent} = {left} euros left.")  # fmt: skip


def _three_days(rng: random.Random) -> Problem:
    things, a, k = rng.choice(THINGS), rng.randint(4, 20), rng.randint(2, 4)
    b = rng.randint(1, k * a - 1)
    tuesday, wednesday = k * a, k * a - b
    total = a + tuesday + wednesday
    text = (
        f"A shop sells {a} {things} on Monday, {k} times as many on Tuesday and {b} fewer on "
        f"Wednesday than on Tuesday. How many {things} does it sell in the three days?"
    )
    return _solved(text, total, f"On Tuesday it sells {k} * {a} = {tuesday} {things}.",
                   f"On Wednesday it sells {tuesday} - {b} = {wednesday} {things}.",
                   f"In all it is {a} + {tuesday} + {wednesday} = {total} {things}.")  # fmt: skip


def _two_orders(rng: random.Random) -> Problem:
    things, a, b = rng.choice(THINGS), rng.randint(3, 9), rng.randint(2, 9)
    c, d = rng.randint(3, 9), rng.randint(2, 9)
    total = a * b + c * d
    text = (
        f"A school orders {a} boxes of {b} {things} and {c} boxes of {d} {things}. How many "
        f"{things} are that in all?"
    )
    return _solved(text, total, f"The first boxes hold {a} * {b} = {a * b} {things}.",
                   f"The second boxes hold {c} * {d} = {c * d} {things}.",
                   f"In all there are {a * b} + {c * d} = {total} {things}.")  # fmt: skip


def _tank(rng: random.Random) -> Problem:
    rate, minutes, leak = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20)
    size = rng.randint(2, 10)
    cans = rate * minutes // size + rng.randint(1, 10)
    start = cans * size + leak - rate * minutes
    full = start + rate * minutes
    text = (
        f"A tank holds {start} litres. A pump adds {rate} litres a minute for {minutes} minutes, "
        f"then {leak} litres leak out. The rest fills cans of {size} litres. How many cans?"
    )
    return _solved(text, cans, f"The pump adds {rate} * {minutes} = {rate * minutes} litres.",
                   f"The tank then holds {start} + {rate * minutes} = {full} litres.",
                   f"After the leak there are {full} - {leak} = {full - leak} litres.",
                   f"They fill {full - leak} / {size} = {cans} cans.")  # fmt: skip


def _wage(rng: random.Random) -> Problem:
    name, hours, days = rng.choice(NAMES), rng.randint(2, 8), rng.randint(2, 6)
    wage = rng.randint(4, 12)
    earned = hours * days * wage
    half = rng.randint(1, earned // 2 - 1)
    rent = earned - 2 * half
    text = (
        f"{name} works {hours} hours a day for {days} days at {wage} euros an hour, pays {rent} "
        "euros of rent and spends half of the rest. How many euros are left?"
    )
    return _solved(text, half, f"{name} works {hours} * {days} = {hours * days} hours.",
                   f"That earns {hours * days} * {wage} = {earned} euros.",
                   f"After rent there are {earned} - {rent} = {2 * half} euros.",
                   f"Half of it is {2 * half} / 2 = {half} euros.")  # fmt: skip


def _farm(rng: random.Random) -> Problem:
    rows, trees, kilos = rng.randint(2, 8), rng.randint(2, 9), rng.randint(2, 6)
    picked = rows * trees * kilos
    kept, price = rng.randint(1, picked - 1), rng.randint(2, 5)
    text = (
        f"A farm has {rows} rows of {trees} trees. Each tree gives {kilos} kilos of fruit. The "
        f"farmer keeps {kept} kilos and sells the rest for {price} euros a kilo. How many euros "
        "does he get?"
    )
    sold = picked - kept
    return _solved(text, sold * price, f"There are {rows} * {trees} = {rows * trees} trees.",
                   f"They give {rows * trees} * {kilos} = {picked} kilos.",
                   f"He sells {picked} - {kept} = {sold} kilos.",
                   f"He gets {sold} * {price} = {sold * price} euros.")  # fmt: skip


_LEVELS: Final = {
    1: (_gain, _loss, _times, _share),
    2: (_bags_less, _price, _together, _rest_shared),
    3: (_doubled, _change, _three_days, _two_orders),
    4: (_tank, _wage, _farm),
}

WORDS: Final = Kind(name="words", n_levels=4, stepwise=True,
                    make=lambda rng, level: pick(rng, _LEVELS, level))  # fmt: skip
