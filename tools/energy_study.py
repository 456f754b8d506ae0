"""Does a pool that weighs accuracy against energy beat its best model? Measured answers, replayed.

`measure` has every model answer the same questions and notes for each whether it was right and what
it took. `study` then plays streams of those questions to a pool's learner, which sees the text
and nothing of its kind, and to others. Regret is the reward that the best model for each question
would have had beyond what was got.

    python -m edgeroute.tools.energy_study measure answers.jsonl small.gguf large.gguf --n 280
    python -m edgeroute.tools.energy_study study answers.jsonl

Source: GreenServ, which replays a table of 16 models' answers in the same way, but tells its bandit
the task of each query.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.engine import Runtime
from edgeroute.offload.linucb import LinUCB
from edgeroute.pool_config import PoolParams, Profile
from edgeroute.pool_learning import PoolLearner
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.skippers.pool_choice import DIMENSIONS, rank_by_worth
from edgeroute.tools.questions import Draw, is_right, key_of, make_questions

Matrix = npt.NDArray[np.float64]

FIELDS: Final = {"key": str, "kind": str, "text": str, "model": str, "right": bool,
                 "joules_per_token": float, "s_per_token": float, "estimated": bool}  # fmt: skip
MAX_ANSWERS: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One answer: to which question, by whom, whether it was right, what it took per token."""

    key: str
    kind: str
    text: str
    model: str
    right: bool
    joules_per_token: float
    s_per_token: float
    estimated: bool


def measure(
    path: Path, models: Sequence[Path], n: int, seed: int, *, seconds: float | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> int:  # fmt: skip
    """Add answers to a file, those that it has left out; return how many are missing still.

    Args:
        path: of the file, a line of JSON an answer.
        models: files.
        n, seed: questions, see `make_questions`; short ones, of the side for tests.
        seconds: after which to stop.
        report: hears of progress.
    """
    questions = make_questions(n, seed, draw=Draw(split="test"))
    done = {(each.key, each.model) for each in read_answers(path)} if path.exists() else set()
    began, missing = time.monotonic(), 0
    for model in models:
        left = [each for each in questions if (key_of(each), model.stem) not in done]
        if not left:
            continue
        with Runtime(model, threads=1, n_ctx=512) as runtime, path.open("a") as file:
            for i, question in enumerate(left):
                if seconds is not None and time.monotonic() - began > seconds:
                    missing += len(left) - i
                    break
                found = runtime.generate(question.prompt, max_tokens=question.max_tokens,
                                         stop=question.stop, prefix="off")  # fmt: skip
                stats, energy = found.stats, found.stats.energy or {}
                n_tokens = max(1, stats.n_generated)
                line = Measured(
                    key=key_of(question), kind=question.kind, text=question.prompt,
                    model=model.stem, right=is_right(question, found.text),
                    joules_per_token=_number(energy.get("joules")) / n_tokens,
                    s_per_token=(stats.prefill_s + stats.decode_s) / n_tokens,
                    estimated=energy.get("estimated") is True,
                )  # fmt: skip
                file.write(json.dumps(asdict(line)) + "\n")
                if i % 20 == 0:
                    report(f"{model.stem}: {i} of {len(left)}")
    return missing


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def read_answers(path: Path) -> list[Measured]:
    """Read a file of `measure`.

    Raises:
        UsageError: a line is none of its; the message names it.
    """
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                each: Any = json.loads(line)
            except ValueError:
                each = None
            right = isinstance(each, dict) and each.keys() == FIELDS.keys() and all(
                isinstance(each[name], kind) for name, kind in FIELDS.items()
            )  # fmt: skip
            if not right or number > MAX_ANSWERS:
                raise UsageError(f"{path}, line {number}: no answer that `measure` wrote")
            found.append(Measured(**each))
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Answers of all models to the same questions.

    Attributes:
        models, kinds, texts: names of models; kinds and texts of questions.
        right: F64 (n_questions, n_models), 0 or 1.
        joules, seconds: F64 (n_questions, n_models), per token.
        estimated: whether any joule is.
    """

    models: tuple[str, ...]
    kinds: tuple[str, ...]
    texts: tuple[str, ...]
    right: Matrix
    joules: Matrix
    seconds: Matrix
    estimated: bool

    def rewards(self, weight: float) -> Matrix:
        """Return (1 - w) right + w (1 - joules per token against the dearest), as right."""
        shares = self.joules.mean(axis=0) / self.joules.mean(axis=0).max()
        found: Matrix = (1 - weight) * self.right + weight * (1 - shares)
        return found


def tabulate(answers: Sequence[Measured]) -> Table:
    """Take the questions that every model has answered.

    Raises:
        UsageError: there is none, or but one model.
    """
    models = tuple(dict.fromkeys(each.model for each in answers))
    found: dict[str, dict[str, Measured]] = {}
    for each in answers:
        found.setdefault(each.key, {})[each.model] = each
    rows = [row for row in found.values() if len(row) == len(models)]
    if len(models) < 2 or not rows:
        raise UsageError(f"{len(models)} models have {len(rows)} answers to the same questions; "
                         "measure two at least")  # fmt: skip

    def column(name: str) -> Matrix:
        return np.array([[getattr(row[m], name) for m in models] for row in rows], dtype=float)

    first = [next(iter(row.values())) for row in rows]
    return Table(
        models=models, kinds=tuple(each.kind for each in first),
        texts=tuple(each.text for each in first), right=column("right"),
        joules=column("joules_per_token"), seconds=column("s_per_token"),
        estimated=any(each.estimated for each in answers),
    )  # fmt: skip


class Learner:
    """Chooses and hears what came of it. Numbers are places in a Table."""

    def choose(self, question: int) -> int:
        """Name a model for a question."""
        raise NotImplementedError

    def learn(self, question: int, model: int, reward: float) -> None:
        """Hear the reward of an answer; it may look up what the answer took."""


class Fixed(Learner):
    """Always the same model, or a random one for None."""

    def __init__(self, table: Table, model: int | None, seed: int) -> None:
        self._n, self._model = len(table.models), model
        self._rng = np.random.default_rng(seed)

    def choose(self, question: int) -> int:
        """Name a model."""
        return int(self._rng.integers(self._n)) if self._model is None else self._model


class Bandit(Learner):
    """LinUCB on the whole reward; of a query it knows the kind, or what a pool sees of its text.

    Source: GreenServ: disjoint LinUCB, ridge 0.05, one-hot task.
    """

    def __init__(self, table: Table, alpha: float, contexts: Matrix, ridge: float = 0.05) -> None:
        self._alpha, self._contexts, self._names = alpha, contexts, table.models
        self._bandit = LinUCB(contexts.shape[1], ridge)
        for name in table.models:
            self._bandit.add(name)

    def choose(self, question: int) -> int:
        """Name the model of the greatest upper bound."""
        means, widths = self._bandit.score(self._contexts[question])
        return int(np.argmax(means + self._alpha * widths))

    def learn(self, question: int, model: int, reward: float) -> None:
        """Enter a reward."""
        self._bandit.learn(self._names[model], self._contexts[question], reward)


class PoolChoice(Learner):
    """What a pool does: learns accuracy from what was right, and energy from every answer."""

    def __init__(self, table: Table, learner: PoolLearner, weight: float) -> None:
        self._table, self._learner, self._weight = table, learner, weight
        self._queries = [learner.look(text) for text in table.texts]
        self._costs = dict(zip(table.models, table.seconds.mean(axis=0), strict=True))

    def choose(self, question: int) -> int:
        """Name the model whose answer is worth most."""
        energies = self._learner.energies(self._costs)
        found = self._learner.candidates(self._queries[question], self._costs, energies)
        return self._table.models.index(rank_by_worth(found, self._weight)[0][0].name)

    def learn(self, question: int, model: int, reward: float) -> None:
        """Enter whether an answer was right, and what it took."""
        name = self._table.models[model]
        joules = float(self._table.joules[question, model])
        self._learner.used(name, {"joules": joules, "source": "table"}, 1)
        self._learner.learn(
            name, self._queries[question], float(self._table.right[question, model])
        )


def kinds_told(table: Table) -> Matrix:
    """Return contexts that tell the kind of every question, F64 (n_questions, n_kinds)."""
    kinds = sorted(set(table.kinds))
    return np.eye(len(kinds))[[kinds.index(kind) for kind in table.kinds]]


def kinds_predicted(table: Table, learner: PoolLearner) -> Matrix:
    """Return contexts made of the texts alone, F64 (n_questions, d)."""
    return np.array([learner.look(text).x for text in table.texts])


def pool_learner(
    table: Table, file: Path, capabilities: Sequence[float], alpha: float | None = None
) -> PoolLearner:
    """Make a pool's learner; `file` stands in for the models', a capability is for all queries."""
    models = {
        name: Profile(name=name, path=file, capabilities=np.full(len(DIMENSIONS), each))
        for name, each in zip(table.models, capabilities, strict=True)
    }
    params = PoolParams(models=models, source="study", weights=np.ones(len(DIMENSIONS)))
    return PoolLearner(params) if alpha is None else PoolLearner(params, alpha=alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a learner got of a stream."""

    regret: float
    accuracy: float
    joules_per_token: float
    shares: tuple[float, ...]
    """Of questions, by model."""


def play(table: Table, learner: Learner, weight: float, n: int, seed: int) -> Played:
    """Put n questions, drawn with a seed, to a learner."""
    rewards, rng = table.rewards(weight), np.random.default_rng(seed)
    asked = rng.integers(len(table.texts), size=n)
    chosen = np.empty(n, dtype=int)
    for i, question in enumerate(asked):
        chosen[i] = learner.choose(int(question))
        reward = float(rewards[question, chosen[i]])
        learner.learn(int(question), int(chosen[i]), reward)
    got = rewards[asked, chosen]
    return Played(
        regret=float((rewards[asked].max(axis=1) - got).sum()),
        accuracy=float(table.right[asked, chosen].mean()),
        joules_per_token=float(table.joules[asked, chosen].mean()),
        shares=tuple(np.bincount(chosen, minlength=len(table.models)) / n),
    )


def _bandit(table: Table, alpha: float, contexts: Matrix, seed: int) -> Learner:
    """Make a Bandit, which draws nothing."""
    return Bandit(table, alpha, contexts)


def _pool(table: Table, file: Path, how: tuple[float, float], seed: int) -> Learner:
    """Make a PoolChoice that knows nothing of its models, by weight and alpha."""
    weight, alpha = how
    equal = [0.5] * len(table.models)
    return PoolChoice(table, pool_learner(table, file, equal, alpha), weight)


def players(table: Table, file: Path, weight: float) -> dict[str, Callable[[int], Learner]]:
    """Return what is compared, by name; each makes a learner for a seed."""
    equal = [0.5] * len(table.models)
    seen = kinds_predicted(table, pool_learner(table, file, equal))
    told = kinds_told(table)
    found: dict[str, Callable[[int], Learner]] = {
        f"always {name}": partial(Fixed, table, i) for i, name in enumerate(table.models)
    }
    found["at random"] = partial(Fixed, table, None)
    for alpha in (0.1, 1.0):
        found[f"LinUCB {alpha:g}, kind told"] = partial(_bandit, table, alpha, told)
        found[f"LinUCB {alpha:g}, from text"] = partial(_bandit, table, alpha, seen)
    for alpha in (0.1, 0.2, 0.5, 1.0):
        found[f"pool {alpha:g}, from text"] = partial(_pool, table, file, (weight, alpha))
    return found


def study(
    table: Table, file: Path, weight: float, *, n: int = 2000, n_seeds: int = 5
) -> dict[str, dict[str, Any]]:
    """Play the same streams to every player; return means over seeds, by player."""
    found: dict[str, dict[str, Any]] = {}
    for name, make in players(table, file, weight).items():
        runs = [play(table, make(seed), weight, n, seed) for seed in range(n_seeds)]
        regrets = [run.regret for run in runs]
        found[name] = {
            "regret": float(np.mean(regrets)),
            "regret_sd": float(np.std(regrets)),
            "accuracy": float(np.mean([run.accuracy for run in runs])),
            "joules_per_token": float(np.mean([run.joules_per_token for run in runs])),
            "shares": [float(each) for each in np.mean([run.shares for run in runs], axis=0)],
        }
    return found


@click.group(help=__doc__)
def main() -> None:
    """Measure answers, or play them."""


@main.command("measure")
@click.argument("answers", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--n", default=280, show_default=True, help="Questions.")
@click.option("--seed", default=1, show_default=True, help="Of the questions.")
def measure_command(answers: Path, models: tuple[Path, ...], n: int, seed: int) -> None:
    """Have models answer questions; one that was stopped goes on where it was."""
    try:
        measure(answers, models, n, seed, report=lambda line: click.echo(line, err=True))
    except EdgerouteError as error:
        raise click.ClickException(str(error)) from error


@main.command("study")
@click.argument("answers", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--weight", default=0.5, show_default=True, help="Of energy.")
@click.option("--n", default=2000, show_default=True, help="Queries of a stream.")
@click.option("--seeds", default=5, show_default=True, help="Streams.")
def study_command(answers: Path, weight: float, n: int, seeds: int) -> None:
    """Play streams of answered questions to learners, and print their regrets."""
    try:
        table = tabulate(read_answers(answers))
    except EdgerouteError as error:
        raise click.ClickException(str(error)) from error
    found = study(table, answers, weight, n=n, n_seeds=seeds)
    how = "estimated" if table.estimated else "measured"
    click.echo(f"{len(table.texts)} questions, energy {how}, weight {weight:g}, {n} queries")
    for name, each in sorted(found.items(), key=lambda item: float(item[1]["regret"])):
        shares = " ".join(f"{share:4.0%}" for share in each["shares"])
        regret = f"regret {each['regret']:7.1f} ± {each['regret_sd']:5.1f}"
        joules = f"{each['joules_per_token']:7.3f} J/token"
        click.echo(f"{name:24s} {regret}  accuracy {each['accuracy']:5.1%}  {joules}  {shares}")
    click.echo(json.dumps({"models": table.models, "weight": weight, "players": found}))


if __name__ == "__main__":
    main()
