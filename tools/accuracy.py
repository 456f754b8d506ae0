"""Share of questions that a model answers rightly under a plan, with intervals and pairings.

Greedy, one question at a time, each prompt computed afresh. Results go to a file line by line,
so that a run that was stopped goes on where it was.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.depth_routing import load_router
from edgeroute.runtime.depth import Step, Steps
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.skippers.depth_router import (
    RouterLimits,
    executed_ratio,
    legal,
    steps_from,
    steps_of,
)
from edgeroute.tools.answerer import MAX_REPEATS, Answerer, Plan, open_answerer
from edgeroute.tools.questions import Draw, Question, is_right, key_of, make_questions

Z_95: Final = 1.96
RESAMPLES: Final = 10_000
_BATCH: Final = 500
_DRAWS: Final = 2000
Doubles = npt.NDArray[np.float64]


# judging


def wilson(n_right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson interval of a share.

    Raises:
        UsageError: there were no questions, or more right answers than questions.
    """
    if not 0 <= n_right <= n or not n:
        raise UsageError(f"{n_right} right answers of {n} questions have no interval")
    share, square = n_right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    statistic: Callable[[npt.NDArray[np.int64]], Doubles], n: int, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of a statistic over resampled questions.

    Args:
        statistic: given numbers of questions, I64 (k, n), returns F64 (k,).
        n: questions.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    values = np.concatenate([
        statistic(rng.integers(0, n, (_BATCH, n))) for _ in range(RESAMPLES // _BATCH)
    ])  # fmt: skip
    low, high = np.quantile(values, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two runs over the same questions.

    Attributes:
        n: questions that both answered.
        wins, losses: right in the first only, right in the second only.
        difference: share of right answers, first less second.
        p: of so uneven wins and losses if both were equally good; exact, two-sided.
    """

    n: int
    wins: int
    losses: int
    difference: float
    p: float


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> Paired:
    """Compare two runs, each as whether a question was answered rightly, by question.

    Raises:
        UsageError: they have no question in common.
    """
    common = first.keys() & second.keys()
    if not common:
        raise UsageError("the two runs have no question in common; compare runs of one seed")
    wins = sum(first[key] and not second[key] for key in common)
    losses = sum(second[key] and not first[key] for key in common)
    return Paired(n=len(common), wins=wins, losses=losses, p=sign_test(wins, losses),
                  difference=(wins - losses) / len(common))  # fmt: skip


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided probability of a split at least so uneven by chance."""
    n, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / (1 << n)))


# plans


def random_steps(like: Sequence[Step], n_layer: int, limits: RouterLimits, seed: str) -> Steps:
    """Draw steps that skip and repeat as many layers as others do, others of those allowed.

    Raises:
        UsageError: the limits allow no such plan.
    """
    n_skips = sum(not step.reads for step in like)
    n_again = sum(step.repeat > 0 for step in like)
    inner = [il for il in range(n_layer) if limits.allows(il, n_layer)]
    rng = random.Random(seed)
    if n_skips + n_again <= len(inner):
        for _ in range(_DRAWS):
            changed = rng.sample(inner, n_skips + n_again)
            skips, again = set(changed[:n_skips]), set(changed[n_skips:])
            steps: Steps = ()
            for il in range(n_layer):
                choice = "skip" if il in skips else "repeat" if il in again else "run"
                if choice not in legal(limits, il, n_layer, steps):
                    break
                steps += steps_of(il, choice, steps)
            else:
                return steps
    raise UsageError(f"no plan of {n_layer} layers has {n_skips} skips and {n_again} repeats "
                     f"within {limits}")  # fmt: skip


def skip_steps(layers: Sequence[int], n_layer: int) -> Steps:
    """Return the steps of a plan that leaves some layers out.

    Raises:
        UsageError: a layer is not there, or none is left.
    """
    if any(not 0 <= il < n_layer for il in layers) or len(set(layers)) >= n_layer:
        raise UsageError(f"cannot skip {list(layers)} of {n_layer} layers")
    return steps_from(["skip" if il in set(layers) else "run" for il in range(n_layer)])


# runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One question of a run.

    Attributes:
        key: of the question.
        kind: its generator.
        right: whether the answer is.
        executed: passes over layers, as a share of the model's layers.
        steps: letters per pass: R a layer, S a skipped one, T a repetition.
        text: what the model wrote.
    """

    key: str
    kind: str
    right: bool
    executed: float
    steps: str
    text: str


def run(
    answerer: Answerer, questions: Sequence[Question], plan_of: Callable[[Question], Plan],
    name: str, out: Path | None = None,
) -> Iterator[Result]:  # fmt: skip
    """Answer questions, giving results as they come.

    Args:
        answerer: the model.
        questions: what to ask.
        plan_of: the plan for a question.
        name: of the run; a file of another name is not continued.
        out: file of results, a JSON object a line; what it holds already is not asked again.

    Raises:
        UsageError: `out` holds another run.
    """
    known = {} if out is None else read_results(out, name)
    if out is not None and not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"run": name}) + "\n", encoding="utf-8")
    for question in questions:
        result = known.get(key_of(question))
        if result is None:
            answer = answerer.answer(question, plan_of(question))
            result = Result(
                key=key_of(question), kind=question.kind, right=is_right(question, answer.text),
                executed=executed_ratio(answer.steps, answerer.n_layer),
                steps="".join("T" if s.repeat else "R" if s.reads else "S" for s in answer.steps),
                text=answer.text,
            )  # fmt: skip
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
        yield result


def read_results(path: Path, name: str | None = None) -> dict[str, Result]:
    """Read a run's results by question; a last line that was cut off is left out.

    Raises:
        UsageError: the file holds no results, or those of another run than `name`.
    """
    if not path.exists():
        return {}
    head, *lines = path.read_text(encoding="utf-8").split("\n")
    try:
        found_name = json.loads(head)["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no results of questions") from error
    if name is not None and found_name != name:
        raise UsageError(f"{path} holds the run {found_name!r}, not {name!r}; give another file")
    found = {}
    for line in lines[:-1]:  # what follows the last line break is empty, or was cut off
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} holds a line that is no result: {line[:60]!r}") from error
        found[result.key] = result
    if lines and lines[-1]:
        path.write_text("\n".join([head, *lines[:-1], ""]), encoding="utf-8")
    return found


def steps_from_letters(letters: str) -> Steps:
    """Return the steps that `Result.steps` stands for."""
    steps: Steps = ()
    il = -1
    for letter in letters:
        il += letter != "T"
        if letter == "T":
            steps += steps_of(il, "repeat", steps)[1:]
        else:
            steps += steps_of(il, "skip" if letter == "S" else "run", steps)
    return steps


def summary(results: Sequence[Result]) -> dict[str, object]:
    """Sum a run up: accuracy with its interval, passes over layers, and accuracy by kind."""
    n, n_right = len(results), sum(result.right for result in results)
    low, high = wilson(n_right, n)
    kinds = {
        kind: [result.right for result in results if result.kind == kind]
        for kind in sorted({result.kind for result in results})
    }
    return {
        "n": n, "accuracy": n_right / n, "low": low, "high": high,
        "executed": sum(result.executed for result in results) / n,
        "unchanged": sum(set(result.steps) == {"R"} for result in results) / n,
        "skips": sum(result.steps.count("S") for result in results) / n,
        "repeats": sum(result.steps.count("T") for result in results) / n,
        "kinds": {kind: sum(right) / len(right) for kind, right in kinds.items()},
    }  # fmt: skip


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-n", "n_questions", default=300, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--seed", default=1, show_default=True)
@click.option("--split", default="test", type=click.Choice(["train", "test", "final"]))
@click.option("--form", default="short", type=click.Choice(["short", "steps"]))
@click.option("--levels", default=None, help="Difficulties as 1,2; default: all.")
@click.option("--skip", default=None, help="Layers to leave out of all answers, as 9,10.")
@click.option("--router", default=None, type=click.Path(exists=True, path_type=Path),
              help="Depth routers that decide per question.")  # fmt: skip
@click.option("--random-like", default=None, type=click.Path(exists=True, path_type=Path),
              help="Skip and repeat as many layers as in these results, at random.")  # fmt: skip
@click.option("--draw", default=1, show_default=True, help="Which draw of random layers.")
@click.option("--first", default=2, show_default=True, help="Layers at the start, not drawn.")
@click.option("--last", default=2, show_default=True, help="Layers at the end, not drawn.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="File of results.")
@click.option("--against", multiple=True, type=click.Path(exists=True, path_type=Path),
              help="Results to compare with.")  # fmt: skip
def main(**options: object) -> None:
    """Ask MODEL questions; the last line printed is one JSON object."""
    try:
        _main(_Options(**options))  # type: ignore[arg-type]
    except (EdgerouteError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    model: Path
    n_questions: int
    seed: int
    split: str
    form: str
    levels: str | None
    skip: str | None
    router: Path | None
    random_like: Path | None
    draw: int
    first: int
    last: int
    out: Path | None
    against: tuple[Path, ...]


def _main(options: _Options) -> None:
    levels = options.levels and tuple(int(level) for level in options.levels.split(","))
    draw = Draw(split=options.split, form=options.form, levels=levels or None)  # type: ignore[arg-type]
    questions = make_questions(options.n_questions, options.seed, draw=draw)
    name = json.dumps({key: str(getattr(options, key)) for key in (
        "model", "skip", "router", "random_like", "draw")})  # fmt: skip
    with open_answerer(options.model) as answerer:
        plan_of = _plans(options, answerer)
        results = []
        for result in run(answerer, questions, plan_of, name, options.out):
            results.append(result)
            n_right = sum(each.right for each in results)
            click.echo(f"{len(results)}/{len(questions)} right {n_right}", err=True)
    found = summary(results)
    mine = {result.key: result.right for result in results}
    for path in options.against:
        theirs = {key: result.right for key, result in read_results(path).items()}
        found[f"against {path.name}"] = asdict(compare(mine, theirs))
    click.echo(json.dumps(found))


def _plans(options: _Options, answerer: Answerer) -> Callable[[Question], Plan]:
    n_layer = answerer.n_layer
    if options.router is not None:
        router = load_router(options.router, n_layer, answerer.n_embd)
        return lambda question: router
    if options.random_like is not None:
        like = read_results(options.random_like)
        limits = RouterLimits(options.first, options.last, n_layer, MAX_REPEATS)
        return lambda question: random_steps(
            steps_from_letters(like[key_of(question)].steps), n_layer, limits,
            f"{options.draw} {key_of(question)}",
        )  # fmt: skip
    skipped = [int(il) for il in options.skip.split(",")] if options.skip else []
    steps = skip_steps(skipped, n_layer)
    return lambda question: steps


if __name__ == "__main__":
    main()
