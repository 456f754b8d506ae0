"""Trains depth routers on the paths that `tools/router_search` found; needs `edgeroute[train]`.

Focal loss with weights by effective numbers, after Dr.LLM (arXiv 2510.12773). With the paper's
beta of 0.999 every count beyond a few thousand has the same effective number, so that nothing is
rebalanced; here beta follows from the largest count. Rebalanced networks skip and repeat more
often than they should: two biases, set on questions held out, restore the rates that are wanted.
Defaults are for some hundred questions, which the paper's 25 epochs at 1e-3 learn by heart.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.depth_routing import MODEL, stamp_of
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.depth import Steps
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.depth_router import (
    CHOICES,
    N_HIDDEN,
    N_WINDOWS,
    DepthRouter,
    Floats,
    LayerRouter,
    RouterLimits,
    legal,
    steps_of,
    to_arrays,
)
from edgeroute.tools.depth_work import write_whole
from edgeroute.tools.router_search import path_of, read_records

Labels = npt.NDArray[np.int64]
SKIP, RUN, REPEAT = range(3)

MIN_EXAMPLES: Final = 20
_SMALLEST_DEVIATION: Final = 1e-3
_BIAS_RANGE, _BISECTIONS = 12.0, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterParams:
    """How to train.

    Attributes:
        limits: of the routers; only layers that they allow get one.
        executed: share of the layers that is to run on average, repetitions counted; it is met
            on the questions held out.
        n_hidden: of each network.
        n_epochs, n_batch, lr, weight_decay: of AdamW, whose rate rises for a tenth of the steps
            and then falls as a cosine.
        gamma: of the focal loss.
        held_out: share of the questions by which the best epoch and the biases are chosen.
        seed: of first values, order and the questions held out.
    """

    limits: RouterLimits
    executed: float = 0.93
    n_hidden: int = N_HIDDEN
    n_epochs: int = 12
    n_batch: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.01
    gamma: float = 2.0
    held_out: float = 0.2
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Questions with a path: x F32 (n, n_layer, N_WINDOWS, n_embd), y (n, n_layer) of CHOICES."""

    x: Floats
    y: Labels

    def take(self, rows: npt.NDArray[np.int64]) -> "Examples":
        """Return some of them."""
        return Examples(x=self.x[rows], y=self.y[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """What came of it, judged on the questions held out, over the layers that have a router.

    Attributes:
        n_trained, n_held_out: questions.
        counts: labels of the layers that are trained, by choice.
        weights: of the choices in the loss.
        epoch: the one that was kept.
        loss: held-out loss of it.
        accuracy: share of labels met, with the biases.
        always_run: share of labels that are `run`: what no router at all would meet.
        macro_f1: mean F1 over the choices that occur, with the biases.
        macro_f1_raw: the same without them.
        executed: share of layers that would run.
    """

    n_trained: int
    n_held_out: int
    counts: dict[str, int]
    weights: dict[str, float]
    epoch: int
    loss: float
    accuracy: float
    always_run: float
    macro_f1: float
    macro_f1_raw: float
    executed: float


def load_examples(folder: Path) -> Examples:
    """Read what a search has left.

    Raises:
        UsageError: too little of it.
    """
    xs, ys = [], []
    for key, found in read_records(folder).items():
        path = folder / "states" / f"{key}.npy"
        if not found.path or not path.exists():
            continue
        states = np.load(path, allow_pickle=False)
        if states.ndim != 3 or states.shape[:2] != (len(found.path), N_WINDOWS):
            raise UsageError(f"{path} holds {states.shape}, not the states of a path")
        xs.append(states.astype(np.float32))
        ys.append([CHOICES.index(choice) for choice in path_of(found.path)])
    if len(xs) < MIN_EXAMPLES or len({x.shape for x in xs}) > 1:
        raise UsageError(f"{folder} holds {len(xs)} questions with a path; at least "
                         f"{MIN_EXAMPLES} of one model are needed: search more")  # fmt: skip
    return Examples(x=np.stack(xs), y=np.array(ys, np.int64))


def class_weights(counts: Sequence[int]) -> Floats:
    """Weigh choices by one over their effective number, F32 (3,); labels weigh 1 on average.

    The effective number of n labels is (1 - beta^n) / (1 - beta), beta is 1 - 1 / (the largest
    n). A choice without labels weighs nothing.
    """
    beta = 1 - 1 / max(*counts, 2)
    raw = [(1 - beta) / (1 - beta**n) if n else 0.0 for n in counts]
    mean = sum(w * n for w, n in zip(raw, counts, strict=True)) / sum(counts)
    return np.array([w / mean for w in raw], np.float32)


def train(examples: Examples, params: RouterParams) -> tuple[DepthRouter, RouterReport]:
    """Train routers and judge them on the questions held out.

    Raises:
        UsageError: the limits leave no layer, or the settings make no sense.
    """
    n, n_layer = examples.y.shape
    layers = [il for il in range(n_layer) if params.limits.allows(il, n_layer)]
    if not layers or not 0 < params.held_out < 1 or not 0 < params.executed <= 1:
        raise UsageError(f"cannot train routers of {n_layer} layers with {params}")
    order = np.random.default_rng(params.seed).permutation(n)
    n_kept = max(1, round(params.held_out * n))
    held, used = examples.take(order[:n_kept]), examples.take(order[n_kept:])
    counts = [int((used.y[:, layers] == choice).sum()) for choice in range(3)]
    weights = class_weights(counts)
    found, epoch, loss = _fit((used, held), layers, weights, params)
    raw = _router(found, layers, params.limits, examples)
    scores = score_all(raw, held.x)
    biases = _biases(scores, held.y, params)
    router = _router(_biased(found, biases), layers, params.limits, examples)
    chosen = decide_all(scores + biases, params.limits)
    wanted, plain = held.y[:, layers], decide_all(scores, params.limits)[:, layers]
    report = RouterReport(
        n_trained=len(used.y), n_held_out=len(held.y), epoch=epoch, loss=loss,
        counts=dict(zip(CHOICES, counts, strict=True)),
        weights=dict(zip(CHOICES, weights.tolist(), strict=True)),
        accuracy=float((chosen[:, layers] == wanted).mean()),
        always_run=float((wanted == RUN).mean()),
        macro_f1=macro_f1(wanted, chosen[:, layers]), macro_f1_raw=macro_f1(wanted, plain),
        executed=executed_of(chosen),
    )  # fmt: skip
    return router, report


def macro_f1(wanted: Labels, found: Labels) -> float:
    """Return the mean F1 over the choices that occur in either."""
    scores = []
    for choice in range(3):
        hits = int(((wanted == choice) & (found == choice)).sum())
        total = int((wanted == choice).sum() + (found == choice).sum())
        if total:
            scores.append(2 * hits / total)
    return sum(scores) / len(scores)


def executed_of(chosen: Labels) -> float:
    """Return passes over layers as a share of the layers, from choices (n, n_layer)."""
    return float(chosen.mean())  # a skip is 0 passes, a run 1, a repeat 2


def score_all(router: DepthRouter, x: Floats) -> Floats:
    """Score every layer of questions, F32 (n, n_layer, 3); layers without a router choose run."""
    found = np.zeros((len(x), router.n_layer, 3), np.float32)
    found[:, :, RUN] = 1e9
    for il, layer in router.layers.items():
        found[:, il] = [layer.scores(windows) for windows in x[:, il]]
    return found


def decide_all(scores: Floats, limits: RouterLimits) -> Labels:
    """Choose as the engine does, layer by layer within the limits: (n, n_layer)."""
    n_layer = scores.shape[1]
    found = np.full(scores.shape[:2], RUN, np.int64)
    for row, question in enumerate(scores):
        taken: Steps = ()
        for il in range(n_layer):
            allowed = legal(limits, il, n_layer, taken)
            best = max(question[il][CHOICES.index(choice)] for choice in allowed)
            choice = next(c for c in allowed if question[il][CHOICES.index(c)] == best)
            found[row, il] = CHOICES.index(choice)
            taken += steps_of(il, choice, taken)
    return found


def _biases(scores: Floats, wanted: Labels, params: RouterParams) -> Floats:
    """Find what to add to the scores of skip and repeat for the rates that are wanted: (3,).

    Repetitions come as often as in the labels, or less often where that is not reached.
    """
    biases = np.zeros(3, np.float32)
    repeats = float((wanted == REPEAT).mean())
    for _ in range(3):  # either changes the other's rate a little
        biases[REPEAT] = _bisect(
            lambda value: (
                float((_decided(scores, biases, REPEAT, value, params) == REPEAT).mean()) <= repeats
            )
        )
        biases[SKIP] = _bisect(
            lambda value: (
                executed_of(_decided(scores, biases, SKIP, value, params)) >= params.executed
            )
        )
    return biases


def _decided(
    scores: Floats, biases: Floats, choice: int, value: float, params: RouterParams
) -> Labels:
    added = biases.copy()
    added[choice] = value
    return decide_all(scores + added, params.limits)


def _bisect(holds: Any) -> float:
    """Return the largest bias for which `holds`, which more of it ends."""
    low, high = -_BIAS_RANGE, _BIAS_RANGE
    for _ in range(_BISECTIONS // 2):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _biased(found: Mapping[str, Floats], biases: Floats) -> dict[str, Floats]:
    return {**found, "b2": found["b2"] + biases}


def _router(
    found: Mapping[str, Floats], layers: Sequence[int], limits: RouterLimits, examples: Examples
) -> DepthRouter:
    nets = {
        il: LayerRouter(**{part: np.ascontiguousarray(found[part][i]) for part in found})
        for i, il in enumerate(layers)
    }
    return DepthRouter(layers=MappingProxyType(nets), limits=limits, n_layer=examples.y.shape[1],
                       n_embd=examples.x.shape[3])  # fmt: skip


def _fit(
    parts: tuple[Examples, Examples], layers: Sequence[int], weights: Floats, params: RouterParams
) -> tuple[dict[str, Floats], int, float]:
    """Fit all layers' networks at once; return the best epoch's, as LayerRouter's by layer."""
    import torch  # of the extra `train`; what else is here does without it

    torch.manual_seed(params.seed)
    used = parts[0]
    mean = used.x[:, layers].mean(axis=(0, 2))
    deviation = np.maximum(used.x[:, layers].std(axis=(0, 2)), _SMALLEST_DEVIATION)
    data = [
        (torch.from_numpy((part.x[:, layers] - mean[:, None]) / deviation[:, None]),
         torch.from_numpy(part.y[:, layers]))
        for part in parts
    ]  # fmt: skip
    net = _first_values(len(layers), used.x.shape[3], params.n_hidden)
    optimiser = torch.optim.AdamW(net.values(), lr=params.lr, weight_decay=params.weight_decay)
    per_epoch = math.ceil(len(used.y) / params.n_batch)
    total = params.n_epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total))
    scale = torch.from_numpy(weights)
    best: tuple[float, int, dict[str, Any]] = (math.inf, 0, {})
    for epoch in range(params.n_epochs):
        for rows in torch.randperm(len(used.y)).split(params.n_batch):
            optimiser.zero_grad()
            loss = _loss(net, (data[0][0][rows], data[0][1][rows]), scale, params.gamma)
            loss.backward()
            optimiser.step()
            schedule.step()
        with torch.inference_mode():
            now = float(_loss(net, data[1], scale, params.gamma))
        if now < best[0]:
            best = now, epoch + 1, {name: value.detach().clone() for name, value in net.items()}
    loss_kept, epoch_kept, kept = best
    if not kept:
        raise UsageError("training diverged: no epoch had a finite loss; lower the rate")
    found = {name: value.numpy() for name, value in kept.items()}
    found["w1"] = found["w1"] / deviation[:, None].astype(np.float32)  # takes states as they come
    found["b1"] = found["b1"] - np.einsum("lhd,ld->lh", found["w1"], mean)
    return found, epoch_kept, loss_kept


def _first_values(n: int, n_embd: int, n_hidden: int) -> dict[str, Any]:
    """Return n networks: Xavier's values, biases zero. Source: Dr.LLM."""
    import torch

    shapes = {"w1": (n_hidden, n_embd), "w2": (3, n_hidden)}
    net = {}
    for name, shape in shapes.items():
        values = torch.empty(n, *shape)
        for each in values:
            torch.nn.init.xavier_uniform_(each)
        net[name] = values
    net |= {"b1": torch.zeros(n, n_hidden), "b2": torch.zeros(n, 3)}
    return {name: values.requires_grad_() for name, values in net.items()}


def _loss(net: Mapping[str, Any], batch: tuple[Any, Any], weights: Any, gamma: float) -> Any:
    """Focal loss over all layers of a batch: x (n, n_layer, n_windows, n_embd), y (n, n_layer)."""
    import torch
    import torch.nn.functional as F

    x, y = batch
    hidden = torch.einsum("nlwd,lhd->nlwh", x, net["w1"]) + net["b1"][:, None]
    hidden = F.gelu(hidden, approximate="tanh")
    scores = (torch.einsum("nlwh,lch->nlwc", hidden, net["w2"]) + net["b2"][:, None]).mean(dim=2)
    logs = torch.log_softmax(scores, dim=-1).gather(2, y[..., None])[..., 0]
    return (-weights[y] * (1 - logs.exp()) ** gamma * logs).mean()


def _rate(step: int, total: int) -> float:
    warm = max(1, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


def save_routers(path: Path, router: DepthRouter, model: str) -> None:
    """Write routers as `edgeroute.depth_routing.load_router` reads them, whole or not at all.

    `model` is the fingerprint of the model file that they were trained on.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:  # a path would be given the ending .npz
            np.savez(file, **to_arrays(router), **{MODEL: stamp_of(model)})  # type: ignore[arg-type]

    write_whole(path, write)


@click.command()
@click.argument("found", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--executed", default=0.93, show_default=True, help="Share of layers to run.")
@click.option("--first", default=2, show_default=True, help="Layers at the start that always run.")
@click.option("--last", default=2, show_default=True, help="Layers at the end that always run.")
@click.option("--most", default=3, show_default=True, help="Layers skipped at most.")
@click.option("--repeats", default=1, show_default=True, help="Layers repeated at most.")
@click.option("--epochs", default=12, show_default=True, type=click.IntRange(1, 1000))
@click.option("--lr", default=3e-4, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=1, show_default=True)
def main(
    found: Path, model: Path, out: Path, executed: float, first: int, last: int, most: int,
    repeats: int, epochs: int, lr: float, seed: int,
) -> None:  # fmt: skip
    """Train routers on the folder FOUND that a search of MODEL has left; write OUT (.npz).

    Beside MODEL as NAME.router.npz, `--depth routed` finds them.
    """
    try:
        params = RouterParams(limits=RouterLimits(first, last, most, repeats), executed=executed,
                              n_epochs=epochs, lr=lr, seed=seed)  # fmt: skip
        router, report = train(load_examples(found), params)
        with GGUFFile.open(model) as file:
            save_routers(out, router, fingerprint(file))
    except (EdgerouteError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"out": str(out), **asdict(report)}))


if __name__ == "__main__":
    main()
