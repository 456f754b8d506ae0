"""Adapters chosen live against replay: the recorded outcomes, and the same through generate().

`table` turns a suite's outcomes into what `polar_replay` reads, with the features that this
engine gives its router and the load times that it measured. `live` asks `adapter="auto"` for
prompts of the table, verifies the answers, and compares rewards with those recorded.
"""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from edgeroute.config import merge_settings
from edgeroute.engine import Runtime
from edgeroute.loaded import LoadedModel
from edgeroute.models.pull import resolve
from edgeroute.offload.polar import PolarParams
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.adapter_outcomes import Outcomes, load_outcomes
from edgeroute.tools.adapter_task_records import Example
from edgeroute.tools.adapter_tasks import TASKS, examples, task
from edgeroute.tools.polar_replay import RouterPolicy
from edgeroute.tools.polar_streams import OutcomeTable, make_stream, table_of, write_table

MAX_ANSWER = 24
POLL_S = 0.001
N_RESIDENT = 4


def make_table(model: Path, adapters: Path, recorded: Outcomes) -> OutcomeTable:
    """Measure contexts and load times with this engine, and join them to the outcomes."""
    settings = {"adapters": _paths(adapters, recorded), "adapter_state": "off",
                "adapter_slots": 1, "n_ctx": 512}  # fmt: skip
    with closing(LoadedModel(model, merge_settings(settings))) as loaded:
        assert loaded.adapters is not None
        routing, store = loaded.adapters.routing, loaded.adapters.store
        contexts = [routing.context(loaded.encode(prompt)) for prompt in recorded.prompts]
        load_s = []
        for name in recorded.arms[1:]:
            began = time.perf_counter()
            lease = store.lease({name: 1.0})
            assert lease is not None
            while not store.ready(lease):
                time.sleep(POLL_S)
            load_s.append(time.perf_counter() - began)
            store.release(lease)
    scores = recorded.scores.astype(np.float64)
    return table_of(
        contexts=np.array(contexts), outcomes=scores[:, 1:], load_s=np.array(load_s),
        tasks=recorded.labels, base=scores[:, 0],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReport:
    """What live requests earned.

    Attributes:
        live_reward: mean reward of the answers.
        recorded_reward: mean of what the table has for the same prompts and adapters.
        same_reward: share of requests for which the two are equal.
        hit_ratio: share that found their adapter in memory.
    """

    n_requests: int
    live_reward: float
    recorded_reward: float
    same_reward: float
    hit_ratio: float


def run_live(model: Path, adapters: Path, recorded: Outcomes, rows: Sequence[int]) -> LiveReport:
    """Ask for the prompts of `rows` with adapter="auto", four adapters and a transient resident."""
    answers = _answers(recorded)
    live, table, hits = [], [], 0
    settings = {"adapters": _paths(adapters, recorded), "adapter_state": "off"}
    with Runtime(model, adapter_slots=N_RESIDENT + 1, n_ctx=512, **settings) as runtime:  # type: ignore[arg-type]
        for row in rows:
            prompt = recorded.prompts[row]
            found = runtime.generate(prompt, max_tokens=MAX_ANSWER, stop=["\n"], adapter="auto")
            example = Example(prompt=prompt, completion=answers[prompt])
            kind = task(recorded.tasks[recorded.labels[row]])
            reward = kind.verify(example, found.text)
            runtime.feedback(found.id, reward)
            arm = 0 if found.adapter is None else recorded.arms.index(found.adapter)
            live.append(reward)
            table.append(float(recorded.scores[row, arm]))
            hits += bool(found.stats.adapters and found.stats.adapters["hit"])
    return LiveReport(
        n_requests=len(rows), live_reward=float(np.mean(live)),
        recorded_reward=float(np.mean(table)),
        same_reward=float(np.mean(np.isclose(live, table))), hit_ratio=hits / len(rows),
    )  # fmt: skip


def replay_reward(table: OutcomeTable, rows: Sequence[int]) -> float:
    """Return the mean reward of the same router over the same prompts, by the table."""
    params = PolarParams(d=table.contexts.shape[1])
    policy = RouterPolicy(table, params, N_RESIDENT, 1)
    earned = []
    for row in rows:
        x = table.contexts[row]
        column, _, _ = policy.choose(x)
        assert table.base is not None
        reward = float(table.base[row] if column < 0 else table.outcomes[row, column])
        policy.learn(x, column, reward)
        earned.append(reward)
    return float(np.mean(earned))


def _answers(recorded: Outcomes) -> dict[str, str]:
    """Return the right answer to each recorded prompt, from the tasks' generators."""
    wanted = set(recorded.prompts)
    found: dict[str, str] = {}
    for name in sorted(set(recorded.tasks) & set(TASKS)):
        n = recorded.tasks.index(name)
        for example in examples(name, int((recorded.labels == n).sum()), "test", 1):
            if example.prompt in wanted:
                found[example.prompt] = example.completion
    missing = wanted - found.keys()
    if missing:
        raise UsageError(f"no task makes the prompt {min(missing)!r}; record the outcomes anew")
    return found


def _paths(adapters: Path, recorded: Outcomes) -> list[str]:
    return [str(adapters / name) for name in recorded.arms[1:]]


@click.group()
def main() -> None:
    """Adapters chosen live, against replay of what a suite recorded.

    \b
    Example:
      python -m edgeroute.tools.polar_live table -m smollm2-135m-instruct s/outcomes.npz t.npz
      python -m edgeroute.tools.polar_live live -m smollm2-135m-instruct s/outcomes.npz
    """


@main.command("table")
@click.argument("outcomes", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", "-m", required=True, help="Base model of the adapters.")
def table_command(outcomes: Path, out: Path, model: str) -> None:
    """Write OUT, which polar_replay reads, from a suite's OUTCOMES."""
    recorded = load_outcomes(outcomes)
    table = make_table(resolve(model), outcomes.parent, recorded)
    write_table(out, table)
    click.echo(json.dumps({"prompts": len(table.tasks), "load_s": table.load_s.tolist()}))


@main.command("live")
@click.argument("outcomes", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", "-m", required=True, help="Base model of the adapters.")
@click.option("--requests", default=200, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--seed", default=1, show_default=True)
def live_command(outcomes: Path, model: str, requests: int, seed: int) -> None:
    """Ask for prompts of OUTCOMES with adapter="auto" and compare with the records."""
    recorded, path = load_outcomes(outcomes), resolve(model)
    table = make_table(path, outcomes.parent, recorded)
    stream = make_stream(table, "stationary", requests, np.random.default_rng(seed))
    rows = [int(row) for row in stream.rows]
    found = asdict(run_live(path, outcomes.parent, recorded, rows))
    click.echo(json.dumps(found | {"replay_reward": replay_reward(table, rows)}))


if __name__ == "__main__":
    main()
