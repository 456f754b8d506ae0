"""Questions with exact answers: right by other means, on one side each, and judged hard."""

import contextlib
import io
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from edgeroute.runtime.depth import all_run
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.depth_router import RouterLimits, executed_ratio
from edgeroute.tools.accuracy import (
    Result,
    compare,
    random_steps,
    read_results,
    run,
    sign_test,
    skip_steps,
    steps_from_letters,
    summary,
    wilson,
)
from edgeroute.tools.answerer import open_answerer
from edgeroute.tools.questions import (
    KINDS,
    Draw,
    Form,
    Question,
    is_right,
    is_settled,
    key_of,
    make_questions,
    split_of,
)

N = 400
SHORT = {"words", "code", "lists", "units", "logic"}

# --- answers, worked out by other means ---------------------------------------------------

WORDS: list[tuple[str, Callable[..., float]]] = [
    (r"\w+ has (\d+) \w+ and gets (\d+) more\.", lambda a, b: a + b),
    (r"\w+ had (\d+) \w+ and lost (\d+)\.", lambda a, b: a - b),
    (r"A box holds (\d+) \w+\. How many \w+ do (\d+) boxes hold", lambda a, b: a * b),
    (r"(\d+) \w+ are shared equally among (\d+) children\.", lambda a, b: a / b),
    (r"\w+ buys (\d+) bags of (\d+) \w+ and loses (\d+)\.", lambda a, b, c: a * b - c),
    (r"A pen costs (\d+) euros and a cap (\d+) euros\. How many euros do (\d+) pens and a cap",
     lambda a, b, c: a * c + b),
    (r"\w+ has (\d+) \w+\. \w+ has (\d+) times as many\.", lambda a, b: a * (b + 1)),
    (r"\w+ has (\d+) \w+, keeps (\d+) and shares the rest equally among (\d+) friends",
     lambda a, b, c: (a - b) / c),
    (r"\w+ has (\d+) \w+, finds (\d+), gives away (\d+) and then doubles",
     lambda a, b, c: 2 * a + 2 * b - 2 * c),
    (r"\w+ has (\d+) euros and buys (\d+) pens for (\d+) euros each and a cap for (\d+) euros",
     lambda a, b, c, d: a - d - b * c),
    (r"A shop sells (\d+) \w+ on Monday, (\d+) times as many on Tuesday and (\d+) fewer",
     lambda a, b, c: a * (1 + 2 * b) - c),
    (r"A school orders (\d+) boxes of (\d+) \w+ and (\d+) boxes of (\d+)",
     lambda a, b, c, d: a * b + c * d),
    (r"A tank holds (\d+) litres\. A pump adds (\d+) litres a minute for (\d+) minutes, then "
     r"(\d+) litres leak out\. The rest fills cans of (\d+) litres",
     lambda a, b, c, d, e: (a + b * c - d) / e),
    (r"\w+ works (\d+) hours a day for (\d+) days at (\d+) euros an hour, pays (\d+) euros",
     lambda a, b, c, d: (a * b * c - d) / 2),
    (r"A farm has (\d+) rows of (\d+) trees\. Each tree gives (\d+) kilos of fruit\. The farmer "
     r"keeps (\d+) kilos and sells the rest for (\d+) euros", lambda a, b, c, d, e:
     (a * b * c - d) * e),
]  # fmt: skip
FACTORS = {("hours", "minutes"): 60, ("weeks", "days"): 7, ("days", "hours"): 24,
           ("meters", "centimeters"): 100, ("kilometers", "meters"): 1000,
           ("minutes", "seconds"): 60, ("years", "months"): 12, ("kilograms", "grams"): 1000,
           ("liters", "milliliters"): 1000, ("centuries", "years"): 100}  # fmt: skip
ORDINALS = ["first", "second", "third", "fourth", "fifth"]


def words_answer(text: str) -> str:
    found = [(m, f) for pattern, f in WORDS if (m := re.match(pattern, text))]
    assert len(found) == 1, text
    match, formula = found[0]
    value = formula(*map(int, match.groups()))
    assert value == int(value) >= 0, text
    return str(int(value))


def code_answer(text: str) -> str:
    """Run it."""
    program = text.split("\n", 1)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    return printed.getvalue().removesuffix("\n")


def lists_answer(text: str) -> str:
    word = re.search(r"'(\w+)'", text)
    if word is not None:
        if text.startswith("How many letters"):
            return str(len(word[1]))
        return word[1][ORDINALS.index(text.split()[3])]
    if ":" in text:
        words = text.rstrip("?").split(": ")[1].split(", ")
        if "alphabet" in text:
            return sorted(words)[0]
        return words[ORDINALS.index(text.split()[3])]
    listed = re.search(r"\[([\d, ]+)\]", text)
    assert listed is not None, text
    values = [int(value) for value in listed[1].split(", ")]
    member = re.match(r"Is (\d+) one of", text)
    if member is not None:
        return "Yes" if int(member[1]) in values else "No"
    limit = re.search(r"greater than (\d+)", text)
    if limit is not None:
        return str(len([value for value in values if value > int(limit[1])]))
    low = sorted(values)
    for phrase, value in (
        ("second largest", low[-2]), ("second smallest", low[1]), ("largest", low[-1]),
        ("smallest", low[0]), ("the first", values[0]), ("the last", values[-1]),
        ("are even", len([v for v in values if not v & 1])),
        ("odd numbers", sum(v for v in values if v & 1)), ("sum of the numbers", sum(values)),
    ):  # fmt: skip
        if phrase in text:
            return str(value)
    raise AssertionError(text)


def units_answer(text: str) -> str:
    clock = re.search(r"(\d\d:\d\d)", text)
    numbers = [int(n) for n in re.findall(r"(?<![\d:])(\d+)(?![\d:])", text)]
    if clock is not None:
        start = datetime.strptime(clock[1], "%H:%M")
        return (start + timedelta(minutes=numbers[0])).strftime("%H:%M")
    today = re.match(r"Today is (\w+)\.", text)
    if today is not None:
        monday = datetime(2024, 1, 1)
        day = next(d for d in (monday + timedelta(i) for i in range(7)) if f"{d:%A}" == today[1])
        sign = -1 if text.endswith("ago?") else 1
        return f"{day + timedelta(sign * numbers[0]):%A}"
    match = re.match(r"How many (\w+) are \d+ (\w+)", text)
    assert match is not None, text
    return str(numbers[0] * FACTORS[match[2], match[1]] + sum(numbers[1:]))


def logic_answer(text: str) -> str:
    facts = re.findall(r"(\w+) is (?:taller|older|faster|richer) than (\w+)\.", text)
    people = {name for fact in facts for name in fact}
    most = re.search(r"the (tallest|oldest|fastest|richest)\?", text) is not None
    below = {b if most else a for a, b in facts}
    (answer,) = people - below
    return answer


def trace_answer(text: str) -> str:
    """Run it."""
    head, program = text.split("\n", 1)
    values: dict[str, int] = {}
    exec(program, {}, values)
    return str(values[head.split()[5]])


def totals_answer(text: str) -> str:
    listed = re.search(r"\[([\d, ]+)\]", text)
    assert listed is not None, text
    values = [int(value) for value in listed[1].split(", ")]
    for asked in text.split("In this order: ")[1].split(", then "):
        number = int(found[0]) if (found := re.findall(r"\d+", asked)) else 0
        if asked.startswith("remove"):
            values.remove(max(values) if "largest" in asked else min(values))
        elif asked.startswith("double") or asked.endswith("to every number"):
            values = [value * 2 if asked.startswith("double") else value + number
                      for value in values]  # fmt: skip
    return str(sum(values))


ORACLES = {"words": words_answer, "code": code_answer, "lists": lists_answer,
           "units": units_answer, "logic": logic_answer, "trace": trace_answer,
           "totals": totals_answer}  # fmt: skip
FORMS: dict[str, Form] = {
    name: "short" if kind.short else "steps" for name, kind in KINDS.items()
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_answers_are_right(kind: str) -> None:
    questions = make_questions(N, 11, [kind], Draw(form=FORMS[kind]))
    assert {question.level for question in questions} == set(range(1, KINDS[kind].n_levels + 1))
    for question in questions:
        assert question.answer == ORACLES[kind](question.text), question.text


def test_worked_steps_are_right_and_end_in_the_answer() -> None:
    for question in make_questions(N, 5, ["words"], Draw(form="steps")):
        assert len(question.steps) == question.level
        for step in question.steps:
            sums = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", step)
            assert len(sums) == 1, step
            assert eval(sums[0][0]) == int(sums[0][1]), step
        assert sums[0][1] == question.answer


def test_examples_are_right_and_of_their_kind() -> None:
    for name, kind in KINDS.items():
        if not kind.stepwise:
            continue
        (question,) = make_questions(1, 1, [name], Draw(form="steps"))
        shown, own = kind.example.problem, question.text
        assert kind.example.steps[-1].startswith("Answer: ")
        if not kind.short:
            answer = kind.example.steps[-1].removeprefix("Answer: ")
            assert answer == ORACLES[name](shown)
            assert shown.split()[0] == own.split()[0]
        assert shown in question.messages[0]["content"]


def test_worked_sums_of_every_stepwise_kind_are_right() -> None:
    n_sums = 0
    for question in make_questions(N, 5, None, Draw(form="steps")):
        assert question.answer in question.steps[-1]
        for step in question.steps:
            for left, right in re.findall(r"(\d+(?: (?:[-+*%/]|//) \d+)+) = (\d+)", step):
                assert eval(left) == int(right), step
                n_sums += 1
    assert n_sums > N


# --- drawing ------------------------------------------------------------------------------


def test_a_seed_gives_the_same_questions_and_another_gives_others() -> None:
    first = make_questions(100, 3)
    assert make_questions(100, 3) == first
    assert make_questions(40, 3) == first[:40]
    assert make_questions(100, 4) != first


def test_sides_never_overlap_whatever_the_seeds() -> None:
    sides = {
        split: {q.text for seed in range(4)
                for q in make_questions(150, seed, draw=Draw(split=split))}
        for split in ("train", "test", "final")
    }  # fmt: skip
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["final"]
    assert not sides["test"] & sides["final"]
    for split, texts in sides.items():
        assert all(split_of(text) == split for text in texts)


def test_enough_questions_of_each_side_and_form() -> None:
    for split in ("train", "test", "final"):
        steps = make_questions(300, 1, draw=Draw(split=split, form="steps", levels=(2, 3, 4)))
        assert len({question.text for question in steps}) == 300
        short = make_questions(300, 1, draw=Draw(split=split, levels=(1, 2)))
        assert {question.kind for question in short} == SHORT
        assert len({question.text for question in short}) == 300


def test_kinds_are_balanced() -> None:
    questions = make_questions(50, 9)
    assert [sum(q.kind == kind for q in questions) for kind in KINDS] == [
        10 * (kind in SHORT) for kind in KINDS
    ]


def test_hopeless_wishes_are_refused() -> None:
    for arguments in (
        (0, 1), (10, 1, ["cooking"]), (10, 1, []), (10, 1, None, Draw(levels=(9,))),
        (10, 1, None, Draw(levels=())), (10, 1, ["logic"], Draw(form="steps")),
        (10, 1, ["trace"]),
        (10, 1, None, Draw(split="exam")), (10, 1, None, Draw(form="verse")),  # type: ignore[arg-type]
        (5000, 1, ["units"], Draw(levels=(1,))),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            make_questions(*arguments)  # type: ignore[arg-type]


# --- judging ------------------------------------------------------------------------------


def question(answer: str, form: str = "short") -> Question:
    return Question(kind="words", level=1, form=form, text="?", answer=answer, cue="It is")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("25", " 25", True), ("25", " 25.", True), ("25", " 25. That is", True),
        ("25", "25\nQuestion: more", True), ("25", "\t25 \n", True),
        ("25", " 25.5", False), ("25", " 250", False), ("25", " 2 5", False), ("25", " -25", False),
        ("25", " 25 pens", False), ("25", " 5 + 20 = 25", False), ("25", "", False),
        ("25", "\n25", False), ("25", " 25, or 26", False), ("25", " '25'", False),
        ("25", " 25/1", False), ("Ivan", " ivan", False), ("Ivan", " Ivan.", True),
        ("Ivan", " Ivana", False), ("07:20", " 07:20", True), ("07:20", " 7:20", False),
    ],
)  # fmt: skip
def test_short_answers_are_judged_hard(answer: str, text: str, right: bool) -> None:
    assert is_right(question(answer), text) == right


def test_settled_answers_stay_as_they_are_judged() -> None:
    endings = ("", ".", "5", "25", " ", ". More", ".5", "\n", "x", " pens", "\n25", "..")
    for text in (
        "",
        " ",
        " 2",
        " 25",
        " 25 ",
        " 25.",
        " 25. ",
        " 25\n",
        " 26",
        "3",
        " 25x",
        " 25.5",
    ):
        verdicts = {is_right(question("25"), text + ending) for ending in endings}
        assert is_settled(question("25"), text) == (len(verdicts) == 1), text
    assert not is_settled(question("25", "steps"), "Answer: 26")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("He has 3 * 8 = 24.\n\nAnswer: 24", True), ("Answer: 24.\n", True),
        ("Answer:24\n\nAnswer: 24", True), ("Answer:  24 \r\n", True),
        ("Answer: 25\n\nAnswer: 24", False), ("24", False), ("Answer: N", False),
        ("Answer: 24 pens", False), ("The Answer: 24", False), ("answer: 24", False),
        ("Answer:", False), ("Answer: 24 or 25", False), ("Answer: 240", False), ("", False),
    ],
)  # fmt: skip
def test_reasoned_answers_are_judged_hard(text: str, right: bool) -> None:
    assert is_right(question("24", "steps"), text) == right


def test_prompts_show_the_form() -> None:
    (short,) = make_questions(1, 1, ["words"])
    assert short.prompt == f"Question: {short.text}\nAnswer: {short.cue}"
    (steps,) = make_questions(1, 1, ["words"], Draw(form="steps"))
    asked, shown, problem = steps.messages
    assert asked["content"].endswith(steps.example.problem)
    assert shown == {"role": "assistant", "content": "\n\n".join(steps.example.steps)}
    assert problem == {"role": "user", "content": f"Problem: {steps.text}"}
    assert steps.prompt.endswith(f"\n\nAnswer: 78\n\nProblem: {steps.text}\n\n")
    assert key_of(short) != key_of(steps)


# --- intervals and pairings ---------------------------------------------------------------


def test_intervals() -> None:
    """Values of the Wilson interval from its publication's table and by hand."""
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1
    for bad in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(UsageError):
            wilson(*bad)


def test_sign_test_against_counting() -> None:
    for n in range(9):
        splits = [bin(i).count("1") for i in range(2**n)]
        for wins in range(n + 1):
            far = sum(abs(2 * k - n) >= abs(2 * wins - n) for k in splits) / 2**n
            assert sign_test(wins, n - wins) == pytest.approx(far)
    assert sign_test(0, 3000) < 1e-300


def test_pairing_counts_common_questions_only() -> None:
    found = compare({"a": True, "b": True, "c": False, "x": True},
                    {"a": True, "b": False, "c": True, "y": False})  # fmt: skip
    assert (found.n, found.wins, found.losses, found.difference, found.p) == (3, 1, 1, 0, 1)
    with pytest.raises(UsageError, match="no question in common"):
        compare({"a": True}, {"b": True})


def test_random_plans_keep_the_rate_and_the_limits() -> None:
    limits = RouterLimits(2, 1, 12, 4)
    like = steps_from_letters("RRSSRTRSRRRRR")
    assert executed_ratio(like, 12) == 10 / 12
    plans = {random_steps(like, 12, limits, str(seed)) for seed in range(20)}
    assert len(plans) > 10
    for steps in plans:
        assert executed_ratio(steps, 12) == 10 / 12
        assert all(step.reads for step in steps if step.il in (0, 1, 11))
    with pytest.raises(UsageError, match="no plan"):
        random_steps(skip_steps(range(2, 8), 12), 9, limits, "1")
    with pytest.raises(UsageError, match="cannot skip"):
        skip_steps([0, 1], 2)


# --- runs ---------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was(tiny_path: Path, tmp_path: Path) -> None:
    questions = make_questions(4, 2, draw=Draw(levels=(1,), split="test"))
    out = tmp_path / "deep" / "run.jsonl"
    asked: list[str] = []
    with open_answerer(tiny_path) as answerer:
        full = all_run(range(answerer.n_layer))

        def plan_of(question: Question) -> tuple[object, ...]:
            asked.append(question.text)
            return full

        first = list(run(answerer, questions[:2], plan_of, "full", out))  # type: ignore[arg-type]
        with out.open("a") as file:
            file.write('{"key": "cut o')  # the process ended here
        every = list(run(answerer, questions, plan_of, "full", out))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="holds the run 'full'"):
            list(run(answerer, questions, plan_of, "other", out))  # type: ignore[arg-type]
    assert asked == [question.text for question in questions]
    assert every[:2] == first and len(every) == 4
    assert list(read_results(out).values()) == every
    assert all(result.executed == 1 and set(result.steps) == {"R"} for result in every)
    found = summary(every)
    assert found["n"] == 4 and found["unchanged"] == 1


def test_files_that_hold_no_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for text in ("", "[]\n", '{"run": "a"}\n{"key": 1}\n', '{"run": "a"}\nnothing\n'):
        path.write_text(text)
        with pytest.raises(UsageError):
            read_results(path)
    assert read_results(tmp_path / "none") == {}


def test_results_sum_up() -> None:
    results = [
        Result(key=str(i), kind="code" if i % 2 else "words", right=i < 3, executed=0.9,
               steps="RSRT", text="")
        for i in range(4)
    ]  # fmt: skip
    found = summary(results)
    assert found["accuracy"] == 0.75 and found["kinds"] == {"code": 0.5, "words": 1.0}
    assert (found["skips"], found["repeats"], found["unchanged"]) == (1, 1, 0)
