"""Trains one adapter for each task and records how every adapter answers every task.

One command, which goes on where it stopped: data, adapters and each adapter's outcomes are
files that are whole once they are there. The outcomes are what routers are replayed on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from safetensors.numpy import load

from edgeroute.models.pull import resolve
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.whole_file import replacing
from edgeroute.tools.adapter_outcomes import Outcomes, load_outcomes
from edgeroute.tools.adapter_tasks import TASKS, Example, examples, task, write_jsonl
from edgeroute.tools.adapter_train import TrainParams, TrainStep, open_base, reproducible, train
from edgeroute.tools.adapter_train_peft import CONFIG_FILE, MODULES, WEIGHTS_FILE, permute
from edgeroute.tools.torch_llama import LowRank, TorchLlama, greedy

BASE: Final = "base"
"""Name of the arm that is no adapter."""

MAX_ANSWER: Final = 24
ANSWERED_AT_ONCE: Final = 48
_SETTINGS_FILE: Final = "suite.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteParams:
    """What a suite is made of.

    Attributes:
        tasks: keys of TASKS, in order.
        n_train: examples drawn for one adapter.
        n_test: test prompts of one task.
        base_name, n_steps, n_batch, lr, stop_nats, rank, targets, seed: as TrainParams.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    base_name: str | None = None
    n_train: int = 800
    n_test: int = 30
    n_steps: int = 120
    n_batch: int = 8
    lr: float = 5e-3
    stop_nats: float = 0.01
    rank: int = 8
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 1

    def training(self, name: str, threads: int) -> TrainParams:
        """Return how a task's adapter is trained."""
        return TrainParams(
            rank=self.rank, alpha=2.0 * self.rank, targets=self.targets, n_steps=self.n_steps,
            n_batch=self.n_batch, lr=self.lr, n_warmup=self.n_steps // 20, seed=self.seed,
            stop_nats=self.stop_nats, n_held_out=0, threads=threads,
            about=task(name).summary, base_name=self.base_name,
        )  # fmt: skip


def train_all(model: Path, out: Path, params: SuiteParams, threads: int = 1) -> None:
    """Draw data and train what is not there yet, an adapter for each task.

    Raises:
        UsageError: `out` holds a suite of other settings.
        Errors of `train`.
    """
    _settle(out, params)
    for name in params.tasks:
        data = out / "data"
        data.mkdir(exist_ok=True)
        write_jsonl(data / f"{name}.jsonl", examples(name, params.n_train, "train", params.seed))
        tests = examples(name, params.n_test, "test", params.seed)
        write_jsonl(data / f"{name}.test.jsonl", tests)
        folder = out / name
        if (folder / CONFIG_FILE).is_file():
            click.echo(f"{name}: trained already", err=True)
            continue
        report = train(
            model, data / f"{name}.jsonl", folder, params.training(name, threads), _tell(name)
        )
        times = {"seconds": round(report.seconds, 1), "n_bytes": report.n_bytes}
        click.echo(json.dumps({"task": name} | times | {"loss": report.losses[-1]}))


def answer_all(model: Path, out: Path, params: SuiteParams, threads: int = 1) -> Outcomes:
    """Answer every task's test prompts with the base and every adapter, and score them.

    Arms that were recorded before are not answered again.
    """
    tests = [(name, example) for name in params.tasks
             for example in examples(name, params.n_test, "test", params.seed)]  # fmt: skip
    recorded = out / f"outcomes-{params.n_test}"
    recorded.mkdir(exist_ok=True)
    arms = (BASE, *params.tasks)
    columns = []
    with GGUFFile.open(model) as file, Tokenizer.open(file) as tokenizer, reproducible(threads):
        base = open_base(file)
        ids = [tokenizer.encode(e.prompt, add_special=True, parse_special=False) for _, e in tests]
        contexts = np.stack([base.embed(torch.tensor(row)).mean(0).numpy() for row in ids])
        for arm in arms:
            path = recorded / f"{arm}.json"
            if path.is_file():
                columns.append(json.loads(path.read_text(encoding="utf-8")))
                continue
            adapter = None if arm == BASE else read_adapter(base, out / arm)
            answers = _answers(base, tokenizer, ids, adapter)
            pairs = zip(tests, answers, strict=True)
            columns.append([task(name).verify(e, answer) for (name, e), answer in pairs])
            with replacing(path) as part:
                part.write_text(json.dumps(columns[-1]), encoding="utf-8")
            click.echo(f"{arm}: mean score {np.mean(columns[-1]):.3f} over all tasks", err=True)
    return Outcomes(
        arms=arms, contexts=contexts.astype(np.float32),
        scores=np.array(columns, np.float32).T, tasks=params.tasks,
        labels=np.array([params.tasks.index(name) for name, _ in tests]),
        prompts=tuple(example.prompt for _, example in tests),
    )  # fmt: skip


def read_adapter(base: TorchLlama, folder: Path) -> LowRank:
    """Read a folder that `train` wrote, for the base that it was trained on.

    Raises:
        UsageError: it has not the tensors of an adapter of this base.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        stored = load((folder / WEIGHTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the adapter {folder}: {error}") from error
    pairs = {}
    for il in range(base.hparams.n_layer):
        for part, module in MODULES.items():
            stem = f"base_model.model.model.layers.{il}.{module}"
            a, b = stored.get(f"{stem}.lora_A.weight"), stored.get(f"{stem}.lora_B.weight")
            if a is None or b is None:
                continue
            n_in, n_out = base.width(part)
            if a.shape != (config["r"], n_in) or b.shape != (n_out, config["r"]):
                raise UsageError(f"{stem} of {folder} has shapes {a.shape} and {b.shape}; "
                                 f"the base is {n_in} by {n_out}")  # fmt: skip
            rows = permute(b.astype(np.float32), part, base.hparams)
            pairs[il, part] = (torch.from_numpy(a.astype(np.float32)), torch.from_numpy(rows))
    if 2 * len(pairs) != len(stored):
        raise UsageError(f"{folder} has {len(stored)} tensors, {2 * len(pairs)} of which belong "
                         "to the base")  # fmt: skip
    return LowRank(config["lora_alpha"] / config["r"], pairs)


def table(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Compare, task by task, the base, the task's own adapter and the best of the others.

    `exact_*` are shares of answers with the full score, `score_*` means.
    """
    rows = []
    for number, name in enumerate(outcomes.tasks):
        scores = outcomes.scores[outcomes.labels == number]
        own = outcomes.arms.index(name)
        others = [at for at in range(1, len(outcomes.arms)) if at != own]
        means = scores.mean(axis=0)
        row: dict[str, Any] = {
            "task": name, "n": len(scores),
            "exact_base": float((scores[:, 0] == 1).mean()),
            "exact_own": float((scores[:, own] == 1).mean()),
            "score_base": float(means[0]), "score_own": float(means[own]),
        }  # fmt: skip
        if others:
            best = max(others, key=lambda at: float(means[at]))
            row |= {"best_other": outcomes.arms[best], "score_other": float(means[best])}
        rows.append(row)
    return rows


def _answers(
    base: TorchLlama, tokenizer: Tokenizer, ids: Sequence[Sequence[int]], adapter: LowRank | None
) -> list[str]:
    """Answer prompts, those of like length together."""
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    found: dict[int, str] = {}
    for start in range(0, len(order), ANSWERED_AT_ONCE):
        part = order[start : start + ANSWERED_AT_ONCE]
        answers = greedy(base, [ids[at] for at in part], MAX_ANSWER, tokenizer.eog_ids, adapter)
        found |= {at: tokenizer.decode(answer) for at, answer in zip(part, answers, strict=True)}
    return [found[at] for at in range(len(ids))]


def _settle(out: Path, params: SuiteParams) -> None:
    """Note the settings in a new folder, or refuse one that was made with others."""
    out.mkdir(parents=True, exist_ok=True)
    path, mine = out / _SETTINGS_FILE, json.loads(json.dumps(asdict(params)))
    del mine["n_test"]  # outcomes of another number of prompts lie in a folder of their own
    if path.is_file():
        old: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in mine if old.get(key) != mine[key])
        if differing:
            raise UsageError(f"{out} holds a suite with other {', '.join(differing)}; "
                             "name another folder")  # fmt: skip
        return
    path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


def _tell(name: str) -> Any:
    def report(step: TrainStep) -> None:
        if step.loss is not None and (step.n_done % 20 == 0 or step.n_done == step.n_total):
            click.echo(f"{name}: step {step.n_done}, loss {step.loss:.3f}", err=True)

    return report


@click.command()
@click.option("--model", required=True, help="Path or catalogue name of the base.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--base-name", help="The base as owner/name, for PEFT; default: what the file says.")
@click.option("--tasks", default=",".join(TASKS), help="Tasks, by commas; default: all.")
@click.option("--steps", "n_steps", default=120, show_default=True, type=click.IntRange(1))
@click.option("--batch", "n_batch", default=8, show_default=True, type=click.IntRange(1, 4096))
@click.option("--lr", default=5e-3, show_default=True)
@click.option(
    "--stop", "stop_nats", default=0.01, show_default=True, help="Loss that ends training early."
)
@click.option("--test", "n_test", default=30, show_default=True, type=click.IntRange(1, 1000))
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 512))
def main(model: str, out: Path, tasks: str, threads: int, **options: Any) -> None:
    """Train an adapter for each task, then record how each answers the test prompts of all.

    Run it again to go on where it stopped. Writes outcomes.npz and table.json into OUT.
    """
    params = SuiteParams(tasks=tuple(task(name).name for name in tasks.split(",")), **options)
    path = resolve(model)
    train_all(path, out, params, threads)
    outcomes = answer_all(path, out, params, threads)
    outcomes.save(out / "outcomes.npz")
    rows = table(outcomes)
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        click.echo(json.dumps(row))


if __name__ == "__main__":
    main()


__all__ = ["BASE", "Example", "Outcomes", "SuiteParams", "answer_all", "load_outcomes", "main",
           "read_adapter", "table", "train_all"]  # fmt: skip
