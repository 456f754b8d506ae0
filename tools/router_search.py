"""Searches, question by question, for layers that a right answer does not need.

What depth routers are trained on. A trial is one pass over the question and its right answer:
the answer counts as given when every token of it is the likeliest one. Plans that begin alike
share the residual stream up to where they part, which halves a trial's work.

The paper searches by MCTS with a reward of 0 or 1. Here a trial gives a margin in logits, so
that the next trial is the one whose margin is expected to stay positive with most layers saved,
where what a move costs is taken from this question's trials, or from earlier questions'.
Source of the moves: Dr.LLM (arXiv 2510.12773), section 3.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cells import Region
from edgeroute.runtime.depth import Step
from edgeroute.runtime.errors import ComputeError, EdgerouteError, UsageError
from edgeroute.runtime.whole_file import replacing
from edgeroute.skippers.depth_router import (
    CHOICES,
    MAX_IN_A_ROW,
    N_WINDOWS,
    Choice,
    Floats,
    RouterLimits,
    pool,
)
from edgeroute.tools.answerer import Answerer, open_answerer
from edgeroute.tools.questions import Draw, Question, key_of, make_questions

Path_ = tuple[Choice, ...]
"""A choice per layer."""

RECORDS: Final = "found.jsonl"
LETTERS: Final = dict(zip(CHOICES, "SRT", strict=True))
_CHOICE_OF: Final[dict[str, Choice]] = dict(zip("SRT", CHOICES, strict=True))


_LIMITS: Final = RouterLimits()
_CLIP, _CURIOSITY = 5.0, 0.5  # logits


class Move(NamedTuple):
    """A change of one layer, or a skip of two neighbours."""

    il: int
    n: int
    choice: Choice

    @property
    def saves(self) -> int:
        """Passes over layers that it saves; negative for a repetition."""
        return self.n if self.choice == "skip" else -1

    def apply(self, path: Path_) -> Path_:
        """Return a path with this change."""
        return (*path[: self.il], *[self.choice] * self.n, *path[self.il + self.n :])

    @property
    def name(self) -> str:
        """A short text for records."""
        return f"{LETTERS[self.choice]}{self.il}{'+' if self.n == 2 else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """How to search.

    Attributes:
        n_trials: passes per question at most.
        limits: what paths may not do.
        least_margin: logits by which a right answer must be ahead for a path to be learned from;
            what is right by a hair is right by chance.
        hopeless: margin of the whole model below which a question is not searched: paths that
            turn an answer so wrong into a right one were not met.
        per_layer: logits that a saved layer is worth while trials are chosen.
    """

    n_trials: int = 24
    limits: RouterLimits = _LIMITS
    least_margin: float = 0.5
    hopeless: float = -1.0
    per_layer: float = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of one question.

    Attributes:
        margin_full: of the whole model; the answer is right where it is positive.
        path: the best path, a letter per layer (S, R, T); empty where none is right.
        margin: of that path.
        changes: what each move that was tried did to the margin, on average, in logits.
        n_trials: passes made.
    """

    margin_full: float
    path: str
    margin: float
    changes: dict[str, float]
    n_trials: int


@dataclass(slots=True)
class Effects:
    """What moves did to margins of the questions so far: sum and count by move."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        """Enter a question's moves; none counts for more than a few logits."""
        for name, change in found.changes.items():
            self.sums[name] = self.sums.get(name, 0.0) + min(max(change, -_CLIP), _CLIP)
            self.counts[name] = self.counts.get(name, 0) + 1

    def expected(self, name: str) -> float:
        """Return what to hope for of a move: its mean, and more the less often it was tried."""
        n = self.counts.get(name, 0)
        return self.sums.get(name, 0.0) / max(1, n) + _CURIOSITY / math.sqrt(1 + n)


class Trials:
    """Passes over one question and its answer, by path; what begins alike is computed once.

    Takes the forward's cells of `region`.
    """

    def __init__(self, answerer: Answerer, question: Question) -> None:
        self._forward: Forward = answerer.forward
        self._region: Region = answerer.region
        self._ends = answerer.ends
        prompt = answerer.encode(question)
        self._answer = answerer.encode_text(f" {question.answer}")
        self.n_prompt = len(prompt)
        self._tokens = [*prompt, *self._answer]
        self._states: dict[Path_, Floats] = {}
        self.n_trials = 0
        self.n_layer = self._forward.model.hparams.n_layer
        self._pass(Span((), embed=True, output=False), 0)
        self._states[()] = self._forward.residual(len(self._tokens))

    def margin(self, path: Path_) -> float:
        """Return the least lead, in logits, of a right token over the best wrong one."""
        known = next(n for n in range(len(path), -1, -1) if path[:n] in self._states)
        self._forward.set_residual(self._states[path[:known]])
        for il in range(known, self.n_layer):
            steps = (Step(il),) * CHOICES.index(path[il])  # none, one or two
            if steps:
                # Both passes may share cells: the first's keys are read before they are replaced.
                self._pass(Span(steps, embed=False, output=False), 0)
            self._states[path[: il + 1]] = self._forward.residual(len(self._tokens))
        logits = self._pass(Span((), embed=False, output=True), len(self._answer) + 1)
        self.n_trials += 1
        return self._lead(logits)

    def entering(self, path: Path_, il: int) -> Floats:
        """Return the prompt's states that enter a layer of a path that was tried."""
        return self._states[path[:il]][: self.n_prompt]

    def _pass(self, span: Span, n_out: int) -> Floats:
        piece = Piece(tokens=self._tokens, pos=0, region=self._region, n_out=n_out)
        logits = self._forward.run([piece], [span])
        if logits is None:
            raise ComputeError("the computation was stopped")
        return logits

    def _lead(self, logits: Floats) -> float:
        rows = np.arange(len(self._answer))
        right = logits[rows, self._answer].copy()
        logits[rows, self._answer] = -np.inf
        leads = right - logits[:-1].max(axis=1)
        ends = logits[-1][self._ends].max()
        logits[-1][self._ends] = -np.inf
        return float(min(leads.min(initial=np.inf), ends - logits[-1].max()))


def moves(limits: RouterLimits, n_layer: int) -> list[Move]:
    """Return every move that limits allow."""
    inner = [il for il in range(n_layer) if limits.allows(il, n_layer)]
    found = [Move(il, 1, "skip") for il in inner]
    found += [Move(il, 2, "skip") for il in inner[:-1]]
    return found + [Move(il, 1, "repeat") for il in inner if limits.max_repeats]


def is_legal(path: Path_, limits: RouterLimits) -> bool:
    """Tell whether a path keeps to the limits, and skips no more neighbours than it may."""
    text = "".join(LETTERS[choice] for choice in path)
    return (
        text.count("S") <= limits.max_skips
        and text.count("T") <= limits.max_repeats
        and "S" * (MAX_IN_A_ROW + 1) not in text
    )


def saved(path: Sequence[Choice]) -> int:
    """Return the passes over layers that a path saves."""
    return path.count("skip") - path.count("repeat")


def search(trials: Trials, effects: Effects, params: SearchParams) -> tuple[Found, Path_ | None]:
    """Look for the path that saves most layers and still answers rightly.

    Returns:
        What was found, and its path; None where no path is right.
    """
    full = path_of("R" * trials.n_layer)
    margins = {full: trials.margin(full)}
    seen: dict[str, list[float]] = {}
    every = moves(params.limits, trials.n_layer)
    while trials.n_trials < params.n_trials and margins[full] >= params.hopeless:
        hopes = {
            move: float(np.mean(seen[move.name])) if move.name in seen
            else effects.expected(move.name)
            for move in every
        }  # fmt: skip
        best = _next(margins, hopes, params)
        if best is None:
            break
        path, move = best
        new = move.apply(path)
        margins[new] = trials.margin(new)
        seen.setdefault(move.name, []).append(margins[new] - margins[path])
    chosen = _best(margins, full, params.least_margin)
    text = "" if chosen is None else "".join(LETTERS[choice] for choice in chosen)
    changes = {name: float(np.mean(each)) for name, each in seen.items()}
    found = Found(margin_full=margins[full], path=text, changes=changes, n_trials=trials.n_trials,
                  margin=0.0 if chosen is None else margins[chosen])  # fmt: skip
    return found, chosen


def _next(
    margins: dict[Path_, float], hopes: dict[Move, float], params: SearchParams
) -> tuple[Path_, Move] | None:
    """Return the path tried before and the move whose result is worth most, if all is hoped for."""
    best: tuple[Path_, Move] | None = None
    best_value = -math.inf
    for path, margin in margins.items():
        worth = margin + params.per_layer * saved(path)
        for move, hope in hopes.items():
            value = worth + hope + params.per_layer * move.saves
            if value <= best_value:
                continue
            new = _changed(path, move, params.limits)
            if new is not None and new not in margins:
                best, best_value = (path, move), value
    return best


def _changed(path: Path_, move: Move, limits: RouterLimits) -> Path_ | None:
    """Apply a move where the layers still run once and the result is legal."""
    if any(choice != "run" for choice in path[move.il : move.il + move.n]):
        return None
    new = move.apply(path)
    return new if is_legal(new, limits) else None


def _best(margins: dict[Path_, float], full: Path_, least: float) -> Path_ | None:
    """Return the shortest path that is clearly right, the clearest of equals; else the full one."""
    right = [path for path, margin in margins.items() if margin >= least]
    if right:
        return max(right, key=lambda path: (saved(path), margins[path]))
    return full if margins[full] > 0 else None


# the run over many questions


def pooled_states(trials: Trials, path: Path_) -> npt.NDArray[np.float16]:
    """Return what routers see along a path: F16 (n_layer, N_WINDOWS, n_embd).

    Raises:
        UsageError: the prompt is too short to fill the windows.
    """
    if trials.n_prompt <= N_WINDOWS:
        raise UsageError(f"a prompt needs more than {N_WINDOWS} tokens to train routers by, "
                         f"one has {trials.n_prompt}")  # fmt: skip
    pooled = [pool(trials.entering(path, il)) for il in range(trials.n_layer)]
    return np.stack(pooled).astype(np.float16)


def read_records(out: Path) -> dict[str, Found]:
    """Read what a search has written so far, by question; a cut last line is left out.

    Raises:
        UsageError: a line is no record.
    """
    path, found = out / RECORDS, dict[str, Found]()
    if not path.exists():
        return found
    *lines, cut = path.read_text(encoding="utf-8").split("\n")
    for line in lines:
        try:
            value = json.loads(line)
            key = value.pop("key")
            found[key] = Found(**value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} holds a line that is no record: {line[:60]!r}") from error
    if cut:  # the process ended while it wrote; the question is searched again
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return found


def path_of(text: str) -> Path_:
    """Return the path that a record's letters mean."""
    return tuple(_CHOICE_OF[letter] for letter in text)


def run_search(
    answerer: Answerer, questions: Sequence[Question], out: Path, params: SearchParams
) -> Iterator[Found]:
    """Search question by question, into `out`; what is there already is not searched again."""
    (out / "states").mkdir(parents=True, exist_ok=True)
    known, effects = read_records(out), Effects()
    for found in known.values():
        effects.add(found)
    for question in questions:
        key = key_of(question)
        if key in known:
            yield known[key]
            continue
        trials = Trials(answerer, question)
        found, path = search(trials, effects, params)
        effects.add(found)
        if path is not None:
            states = out / "states" / f"{key}.npy"
            with replacing(states) as part, part.open("wb") as stream:
                np.save(stream, pooled_states(trials, path))
        with (out / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(found)}) + "\n")
        yield found


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("-n", "n_questions", default=200, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--trials", default=24, show_default=True, type=click.IntRange(2, 10_000))
@click.option("--levels", default="1", show_default=True, help="Difficulties, from 1.")
@click.option("--seed", default=1, show_default=True)
@click.option("--first", default=2, show_default=True, help="Layers at the start that always run.")
@click.option("--last", default=2, show_default=True, help="Layers at the end that always run.")
@click.option("--most", default=3, show_default=True, help="Layers skipped at most.")
@click.option("--seconds", default=3600.0, show_default=True, help="Stop after so long.")
def main(
    model: Path, out: Path, n_questions: int, trials: int, levels: str, seed: int, first: int,
    last: int, most: int, seconds: float,
) -> None:  # fmt: skip
    """Search paths through MODEL that still answer questions to train on, into the folder OUT."""
    try:
        asked = tuple(int(level) for level in levels.split(","))
        questions = make_questions(n_questions, seed, draw=Draw(levels=asked))
        params = SearchParams(n_trials=trials, limits=RouterLimits(first, last, most))
        began = time.monotonic()
        with open_answerer(model) as answerer:
            done = right = labelled = 0
            n_saved = 0
            for found in run_search(answerer, questions, out, params):
                done += 1
                right += found.margin_full > 0
                labelled += bool(found.path)
                n_saved += saved(path_of(found.path))
                line = f"{done}/{n_questions} right {right} labelled {labelled} saved {n_saved}"
                click.echo(line, err=True)
                if time.monotonic() - began > seconds:
                    break
    except (EdgerouteError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"questions": done, "right": right, "labelled": labelled,
                           "saved_layers": n_saved}))  # fmt: skip


if __name__ == "__main__":
    main()
