"""Tasks on numbers, dates and words: short rewritings with one right answer."""

import random
from typing import Final

from edgeroute.tools.adapter_task_records import Example, Task

_UNITS: Final = (("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000),
                 ("g", "mg", 1000), ("l", "ml", 1000), ("t", "kg", 1000), ("m", "mm", 1000),
                 ("kW", "W", 1000), ("l", "cl", 100))  # fmt: skip


def _units(rng: random.Random) -> Example:
    old, new, factor = rng.choice(_UNITS)
    n = rng.randint(1, 99)
    return Example(
        prompt=f"{rng.choice(('Convert', 'Change'))} {n} {old} to {new}:\n",
        completion=f"{n * factor} {new}",
    )


_MONTHS: Final = ("January", "February", "March", "April", "May", "June", "July", "August",
                  "September", "October", "November", "December")  # fmt: skip


def _date_iso(rng: random.Random) -> Example:
    month, day, year = rng.randint(1, 12), rng.randint(1, 28), rng.randint(1950, 2029)
    name = _MONTHS[month - 1]
    if rng.random() < 0.3:
        name = name[:3]
    text = rng.choice((f"{name} {day}, {year}", f"{day} {name} {year}", f"{day}. {name} {year}"))
    return Example(prompt=f"Date: {text}\nISO:\n", completion=f"{year}-{month:02}-{day:02}")


def _time_24h(rng: random.Random) -> Example:
    hour, minute, half = rng.randint(1, 12), rng.randint(0, 59), rng.choice(("am", "pm"))
    text = f"{hour}:{minute:02}{rng.choice(('', ' '))}{half}"
    hour = hour % 12 + (12 if half == "pm" else 0)
    return Example(prompt=f"Time: {text}\n24h:\n", completion=f"{hour:02}:{minute:02}")


_ONES_TEXT: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
)
_ONES: Final = tuple(_ONES_TEXT.split())
_TENS: Final = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty",
                "ninety")  # fmt: skip


def number_words(n: int) -> str:
    """Spell a number of 0 to 999."""
    if n >= 100:
        rest = f" {number_words(n % 100)}" if n % 100 else ""
        return f"{_ONES[n // 100]} hundred{rest}"
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def _number_words(rng: random.Random) -> Example:
    n = rng.randint(1, 999)
    return Example(prompt=f"In words: {n}\n", completion=number_words(n))


_ROMAN: Final = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"),
                 (4, "IV"), (1, "I"))  # fmt: skip


def roman(n: int) -> str:
    """Write a number of 1 to 399 in Roman numerals."""
    out = ""
    for value, letters in _ROMAN:
        out += letters * (n // value)
        n %= value
    return out


def _roman(rng: random.Random) -> Example:
    n = rng.randint(1, 399)
    return Example(prompt=f"Roman numeral: {n}\n", completion=roman(n))


_WORDS_TEXT: Final = (
    "motor lamp river cloud table green apple stone north paper glass tiger music "
    "silver window garden bread horse smoke dream ocean pencil bridge candle orange "
    "forest hammer island jacket kettle ladder mirror needle pepper rabbit saddle "
    "ticket valley wagon yellow"
)
_WORDS: Final = tuple(_WORDS_TEXT.split())


def _reverse_words(rng: random.Random) -> Example:
    words = rng.sample(_WORDS, rng.randint(3, 4))
    return Example(
        prompt=f"Reverse the words: {' '.join(words)}\n", completion=" ".join(words[::-1])
    )


def _upper_case(rng: random.Random) -> Example:
    words = rng.sample(_WORDS, rng.randint(2, 3))
    return Example(prompt=f"Constant name: {' '.join(words)}\n", completion="_".join(words).upper())


def _sort_numbers(rng: random.Random) -> Example:
    numbers = rng.sample(range(1, 100), 4)
    prompt = f"Sort the numbers: {' '.join(map(str, numbers))}\n"
    return Example(prompt=prompt, completion=" ".join(map(str, sorted(numbers))))


_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_SHIFTS: Final = (("the day after", 1), ("the day before", -1), ("two days after", 2),
                  ("two days before", -2), ("three days after", 3))  # fmt: skip
_THINGS: Final = ("The meeting", "The delivery", "The test", "The flight", "The party", "The visit",
                  "The exam", "The repair", "The race", "The concert", "The lesson", "The market",
                  "The launch", "The review", "The match", "The deadline")  # fmt: skip


def _weekday(rng: random.Random) -> Example:
    at, (words, shift) = rng.randrange(7), rng.choice(_SHIFTS)
    return Example(
        prompt=f"{rng.choice(_THINGS)} is {words} {_DAYS[at]}.\nDay:\n",
        completion=_DAYS[(at + shift) % 7],
    )


_SENSORS: Final = ("Sensor", "Room", "Tank", "Cabin", "Garage", "Roof", "Probe")


def _temperature(rng: random.Random) -> Example:
    degrees = rng.randint(-15, 45)
    name = "freezing" if degrees < 0 else "cold" if degrees < 12 else "mild"
    if degrees >= 25:
        name = "hot"
    return Example(prompt=f"{rng.choice(_SENSORS)} reads {degrees} C.\nClass:\n", completion=name)


TASKS: Final = (
    Task(name="units", summary="a quantity in a smaller unit", make=_units),
    Task(name="date_iso", summary="a date as year-month-day", make=_date_iso),
    Task(name="number_words", summary="a number of up to 999 in words", make=_number_words),
    Task(name="roman", summary="a number of up to 399 in Roman numerals", make=_roman),
    Task(name="reverse_words", summary="words in reverse order", make=_reverse_words),
    Task(name="upper_case", summary="words as the name of a constant", make=_upper_case),
    Task(name="sort_numbers", summary="four numbers in rising order", make=_sort_numbers),
    Task(name="weekday", summary="the weekday that a phrase means", make=_weekday),
    Task(name="temperature", summary="a temperature as one of four classes", make=_temperature),
    Task(name="time_24h", summary="a time of day on the 24 hour clock", make=_time_24h),
)
