"""Trains a route predictor from a recorded trace, and says whether it is worth having.

Ridge regression in closed form: a layer's choice from what the layers before chose, what the
layer itself chose for the last token, and its decayed mean. It has one setting, chosen on a
part kept apart, gives the same answer at each run, and needs no torch: on routes of a real
text, logistic regression by gradient found 0.4 and a network with a hidden layer 0.7 points
more. The last fifth of the trace is held out to judge it, beside those predictors that learn
while they run.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from edgeroute.offload.prefetch import MAX_GUESSES, Predictor, make_predictor
from edgeroute.offload.prefetch_learned import (
    N_BACK,
    N_PARTS,
    Array,
    History,
    Learned,
    RouteModel,
    check_shape,
    to_onnx,
)
from edgeroute.offload.trace import Trace, TraceMeta, TraceStep, read_trace
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.whole_file import replacing

Sums = npt.NDArray[np.float64]

BASELINES: Final = ("frequency", "eam")
RIDGES: Final = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Penalties on weights of features scaled to deviation 1, from which one is chosen."""
HELD_OUT_ONE_IN: Final = 5
MIN_TOKENS: Final = 100
MORE: Final = 1.5
"""The second budget at which recall is told, in experts that a token uses."""

_CHUNK: Final = 256
_SMALLEST_DEVIATION: Final = 1e-3


class Token(NamedTuple):
    """One token's choices, or those of one decode step of several sequences."""

    starts: bool
    chosen: list[tuple[int, list[int]]]


def tokens_of(trace: Trace) -> list[Token]:
    """Split prompts into their tokens; an ubatch of a prompt counts as a sequence's start.

    Where the last layer ran for a prompt's last token only, the others are without it.
    """
    found: list[Token] = []
    for step in trace.steps:
        if step.prefill:
            found += _prompt(step, trace.meta.n_expert_used)
        else:
            chosen = [(il, ids.tolist()) for il, ids in step.parts()]
            found.append(Token(False, chosen))
    return found


def _prompt(step: TraceStep, n_used: int) -> list[Token]:
    n_tokens = max(step.sizes) // n_used
    each: list[list[tuple[int, list[int]]]] = [[] for _ in range(n_tokens)]
    for il, ids in step.parts():
        rows = ids[: ids.size // n_used * n_used].reshape(-1, n_used).tolist()
        for token, row in zip(each[n_tokens - len(rows) :], rows, strict=True):
            token.append((il, row))
    return [Token(i == 0, chosen) for i, chosen in enumerate(each)]


def split(tokens: Sequence[Token]) -> tuple[Sequence[Token], Sequence[Token]]:
    """Keep the last fifth apart."""
    at = len(tokens) - len(tokens) // HELD_OUT_ONE_IN
    return tokens[:at], tokens[at:]


# training


class _Chunk(NamedTuple):
    """Of some tokens: features [n_layer, n, N_PARTS * n_expert + 1], of which the last is 1,
    choices [n_layer, n, n_expert], and 1 where a layer ran [n_layer, n]."""

    x: Array
    y: Array
    ran: Array


def shape_of(meta: TraceMeta) -> tuple[int, int]:
    """Return a predictor's layers and experts for a model, as the engine counts them."""
    return 1 + max(meta.layers), meta.n_expert


def _chunks(history: History, tokens: Sequence[Token]) -> Iterator[_Chunk]:
    n_layer, n_expert = history.now.shape
    for start in range(0, len(tokens), _CHUNK):
        some = tokens[start : start + _CHUNK]
        x = np.zeros((n_layer, len(some), N_PARTS * n_expert + 1), np.float32)
        y = np.zeros((n_layer, len(some), n_expert), np.float32)
        ran = np.zeros((n_layer, len(some)), np.float32)
        for i, token in enumerate(some):
            if token.starts:
                history.end_sequence()
            history.begin_token()
            x[:, i, :-1] = history.seen[:, 0]
            for il, ids in token.chosen:
                history.now[il, ids] = ran[il, i] = 1
            for back in range(1, min(N_BACK, n_layer - 1) + 1):
                x[back:, i, (back - 1) * n_expert : back * n_expert] = history.now[:-back]
            y[:, i] = history.now
        x[:, :, -1] = 1
        yield _Chunk(x, y, ran)


class Moments:
    """Sums of products, per layer, from which any ridge follows."""

    def __init__(self, n_layer: int, n_expert: int) -> None:
        n = N_PARTS * n_expert + 1
        self.xx: Sums = np.zeros((n_layer, n, n))
        self.xy: Sums = np.zeros((n_layer, n, n_expert))

    def add(self, chunk: _Chunk) -> None:
        """Enter some tokens."""
        weighed = (chunk.x * chunk.ran[:, :, None]).transpose(0, 2, 1)
        self.xx += weighed @ chunk.x
        self.xy += weighed @ chunk.y

    def solve(self, ridge: float) -> RouteModel:
        """Fit all layers; one that never ran scores 0."""
        n_layer, n, n_expert = self.xy.shape
        weight = np.zeros((n_layer, n - 1, n_expert), np.float32)
        bias = np.zeros((n_layer, 1, n_expert), np.float32)
        for il in range(n_layer):
            count = self.xx[il, -1, -1]
            if not count:
                continue
            mean = self.xx[il, -1] / count
            deviation = np.sqrt(np.maximum(self.xx[il].diagonal() / count - mean**2, 0))
            scale = 1 / np.maximum(deviation, _SMALLEST_DEVIATION)
            scale[-1] = 1  # of the constant, whose weight, the bias, is not held small
            left = self.xx[il] * scale * scale[:, None]
            left[np.arange(n - 1), np.arange(n - 1)] += ridge
            found = np.linalg.solve(left, self.xy[il] * scale[:, None]) * scale[:, None]
            weight[il], bias[il, 0] = found[:-1], found[-1]
        return RouteModel(weight=weight, bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A predictor, and the ridge that was chosen for it."""

    model: RouteModel
    ridge: float


def train(meta: TraceMeta, tokens: Sequence[Token]) -> Trained:
    """Fit to tokens; the ridge is what serves their last fifth best when fitted to the rest."""
    fitted, checked = split(tokens)
    n_layer, n_expert = shape_of(meta)
    history, moments = History(n_layer, n_expert), Moments(n_layer, n_expert)
    for chunk in _chunks(history, fitted):
        moments.add(chunk)
    models = {ridge: moments.solve(ridge) for ridge in RIDGES}
    right = dict.fromkeys(RIDGES, 0.0)
    for chunk in _chunks(history, checked):
        for ridge, model in models.items():
            right[ridge] += _count_right(model, chunk, meta.n_expert_used)
        moments.add(chunk)
    best = max(RIDGES, key=lambda ridge: right[ridge])
    return Trained(model=moments.solve(best), ridge=best)


def _count_right(model: RouteModel, chunk: _Chunk, n_pages: int) -> float:
    scores = chunk.x[:, :, :-1] @ model.weight + model.bias
    top = np.argpartition(-scores, n_pages - 1, axis=2)[:, :, :n_pages]
    return float(np.take_along_axis(chunk.y, top, axis=2)[1:].sum())


# judgement


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Needed experts that a predictor named / needed, by layer and in all.

    At as many guesses as a token uses experts, and at 1.5 times that, MAX_GUESSES at most.
    The first traced layer and those behind a layer without experts cannot be predicted and
    are not counted.
    """

    name: str
    recall: float
    recall_more: float
    layers: dict[int, tuple[float, float]]


def judge(
    predictor: Predictor, meta: TraceMeta, learnt: Sequence[Token], asked: Sequence[Token]
) -> Judged:
    """Let a predictor go through tokens in turn, and count its guesses in the later ones."""
    n_used, n_expert = meta.n_expert_used, meta.n_expert
    budgets = n_used, min(MAX_GUESSES, round(MORE * n_used))
    counts: dict[int, npt.NDArray[np.int64]] = {}
    for number, token in enumerate((*learnt, *asked)):
        if token.starts:
            predictor.end_sequence()
        predictor.begin_step()
        below, guessed = -1, list[int]()
        for il, ids in token.chosen:
            needed = set(ids)
            if number >= len(learnt) and 0 <= below == il - 1:
                row = counts.setdefault(il, np.zeros(3, np.int64))
                row += len(needed), *(len(needed.intersection(guessed[:n])) for n in budgets)
            ranked = predictor.predict(il, ids, None)
            below, guessed = il, [guess.page % n_expert for guess in ranked[: budgets[1]]]
    if not counts:
        raise UsageError("a predictor is judged by tokens of two layers in a row; there is none")
    needed_of, *right = np.sum(list(counts.values()), axis=0).tolist()
    layers = {il: (row[1] / row[0], row[2] / row[0]) for il, row in counts.items()}
    return Judged(name=predictor.name, recall=right[0] / needed_of,
                  recall_more=right[1] / needed_of, layers=layers)  # fmt: skip


def on_numpy(model: RouteModel) -> Learned:
    """Run a model without onnxruntime, to judge it."""
    return Learned(model, lambda seen: seen @ model.weight + model.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was learned from how much, and how it does beside the others, itself first."""

    trace_model: str
    n_trained: int
    n_held_out: int
    ridge: float
    n_bytes: int
    judged: tuple[Judged, ...]


def run(trace: Trace, held_out: Trace | None = None) -> tuple[RouteModel, Report]:
    """Train on a trace and judge by its last fifth, or by a second trace of the same model.

    Raises:
        UsageError: the traces are too short, of different models, or of one with too many
            experts.
    """
    meta, tokens = trace.meta, tokens_of(trace)
    check_shape(*shape_of(meta))
    if len(tokens) < MIN_TOKENS:
        raise UsageError(
            f"the trace has {len(tokens)} tokens; at least {MIN_TOKENS} are needed: record more"
        )
    learnt, asked = split(tokens)
    if held_out is not None:
        if shape_of(held_out.meta) != shape_of(meta):
            raise UsageError(
                f"the traces are of models of {shape_of(meta)} and {shape_of(held_out.meta)} "
                f"layers and experts; give two of one model"
            )
        learnt, asked = tokens, tokens_of(held_out)
    trained = train(meta, learnt)
    shape = shape_of(meta)
    rivals = [on_numpy(trained.model), *(make_predictor(name, *shape) for name in BASELINES)]
    judged = tuple(judge(each, meta, learnt, asked) for each in rivals)
    return trained.model, Report(
        trace_model=meta.model, n_trained=len(learnt), n_held_out=len(asked),
        ridge=trained.ridge, n_bytes=len(to_onnx(trained.model)), judged=judged,
    )  # fmt: skip


def check_worth(report: Report) -> None:
    """Refuse a predictor that names fewer needed experts than their popularity does.

    Raises:
        UsageError: it does.
    """
    by_name = {each.name: each for each in report.judged}
    mine, popular = by_name["learned"].recall, by_name["frequency"].recall
    if mine < popular:
        raise UsageError(
            f"the predictor finds {mine:.1%} of the needed experts, counting finds {popular:.1%}: "
            f"not written; record a longer trace, or give --force"
        )


def write(model: RouteModel, path: Path, replace: bool) -> None:
    """Write the predictor as an ONNX file, whole or not at all.

    Raises:
        UsageError: the file exists and `replace` is False, or it cannot be written.
    """
    if path.exists() and not replace:
        raise UsageError(f"{path} exists; give --force to replace it")
    try:
        with replacing(path) as part:
            part.write_bytes(to_onnx(model))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


# the command


def show(report: Report, console: Console) -> None:
    """Print recall, in all and by layer."""
    table = Table(title=f"{report.trace_model}: needed experts that were named, held-out tokens")
    table.add_column("layer", justify="right")
    for each in report.judged:
        table.add_column(each.name, justify="right")
        table.add_column(f"at {MORE} k", justify="right")
    table.add_row("all", *(f"{value:.1%}" for each in report.judged
                           for value in (each.recall, each.recall_more)))  # fmt: skip
    for il in sorted(report.judged[0].layers):
        table.add_row(str(il), *(f"{value:.1%}" for each in report.judged
                                 for value in each.layers[il]))  # fmt: skip
    console.print(table)


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--held-out", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Judge by this trace of the same model, on other text, and train on all of "
              "TRACE; default: judge by TRACE's last fifth.")  # fmt: skip
@click.option("--force", is_flag=True,
              help="Write it though it is worse than counting, and replace OUT.")  # fmt: skip
def main(trace: Path, out: Path, held_out: Path | None, force: bool) -> None:
    """Train a route predictor from TRACE and write it to OUT; the last line printed is JSON.

    TRACE is what `edgeroute generate --trace` records. OUT is used by `--prefetch learned:OUT`,
    with the same model only.

    \b
    Example:
      edgeroute generate -m moe.gguf --memory 2GiB --trace routes.trace -n 2000 "Once"
      python -m edgeroute.tools.train_routes routes.trace routes.onnx
      edgeroute generate -m moe.gguf --memory 2GiB --prefetch learned:routes.onnx "Once"
    """
    try:
        model, report = run(read_trace(trace), None if held_out is None else read_trace(held_out))
        show(report, Console())
        if not force:
            check_worth(report)
        write(model, out, force)
    except (EdgerouteError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"out": str(out), **asdict(report)}))


if __name__ == "__main__":
    main()
