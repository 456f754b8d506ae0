"""Routing and caching policies replayed over an outcome table, against an oracle.

Every policy starts knowing nothing with nothing resident, sees the same requests, pays for
every load (a bypass, or one that its resident set asks for), and learns the reward of what
it chose. The oracle knows what is expected of every adapter on every prompt and keeps the
greedy resident set of each phase of the stream. Regret is counted in expected rewards.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from edgeroute.offload.linucb import Arm, LinUCB
from edgeroute.offload.polar import AdapterRouter, PolarParams
from edgeroute.offload.polar_controller import EpochParams, RecentContexts, SetProblem, greedy_set
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.polar_streams import (
    MAX_REQUESTS,
    STREAMS,
    WORLDS,
    OutcomeTable,
    Stream,
    WorldParams,
    make_stream,
    read_table,
)

Vector = NDArray[np.float64]
Chosen = tuple[int, bool, int]
"""The adapter's column (-1: the base model), whether it was a hit, and loads for residency."""

_EPOCH: Final = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayParams:
    """What every policy is run with; `epochs` are POLAR+'s own."""

    n_resident: int = 4
    utility_per_s: float = 0.1
    alpha: float = 0.7
    ridge: float = 1.0
    epochs: EpochParams = field(default_factory=EpochParams)


class Policy(Protocol):
    """A router with its resident set."""

    def choose(self, x: Vector) -> Chosen: ...
    def learn(self, x: Vector, column: int, reward: float) -> None: ...


class RouterPolicy:
    """The runtime's own router, its plans carried out at once."""

    def __init__(self, table: OutcomeTable, params: PolarParams, n_resident: int, seed: int):
        self.router = AdapterRouter(params, (), n_resident, seed)
        for i, load_s in enumerate(table.load_s):  # an engine knows bytes and bandwidth
            self.router.add(str(i), float(load_s))
        self._load_s = table.load_s
        self._resident: frozenset[str] = frozenset()

    def choose(self, x: Vector) -> Chosen:
        plan = self.router.wanted()
        if plan is not None:
            self._resident = frozenset(plan.names)
        choice = self.router.choose(x, self._resident)
        if choice.bypass and choice.arm is not None:
            self.router.paid(choice.arm, float(self._load_s[int(choice.arm)]))
        n_loads = 0 if plan is None else len(plan.load)
        return (-1 if choice.arm is None else int(choice.arm)), choice.resident, n_loads

    def learn(self, x: Vector, column: int, reward: float) -> None:
        self.router.learn(x, None if column < 0 else str(column), reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A baseline: `plan` is lru (a miss takes the oldest's place), never, mean or greedy."""

    plan: str
    cost_aware: bool


class Baseline:
    """LinUCB under one of the simpler rules, written apart from the runtime's router."""

    def __init__(self, table: OutcomeTable, params: ReplayParams, rule: Rule) -> None:
        n, self._d = len(table.load_s), table.contexts.shape[1]
        self._params, self._rule = params, rule
        self._bandit = LinUCB(self._d, params.ridge)
        self._columns: dict[Arm, int] = {str(i): i for i in range(n)}
        for name in self._columns:
            self._bandit.add(name)
        if table.base is not None:
            self._bandit.add(None)
            self._columns[None] = n
        self._n = n
        self._cost = np.append(np.minimum(table.load_s * params.utility_per_s, 1.0), 0.0)
        self._cost = self._cost[: len(self._columns)]
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._contexts = RecentContexts(2 * _EPOCH, self._d)
        self._t = 0

    def choose(self, x: Vector) -> Chosen:
        loads = self._replan() if self._t % _EPOCH == 0 else 0
        self._t += 1
        self._contexts.add(x)
        means, widths = self._bandit.score(x)
        values = means + self._params.alpha * widths
        if self._rule.cost_aware:
            values = values - self._missing()
        column = int(values.argmax())
        if column == self._n:
            return -1, True, loads
        hit = column in self._resident
        if self._rule.plan == "lru":
            self._resident[column] = None
            self._resident.move_to_end(column)
            if len(self._resident) > self._params.n_resident:
                self._resident.popitem(last=False)
        return column, hit, loads

    def _missing(self) -> Vector:
        costs = self._cost.copy()
        costs[list(self._resident)] = 0.0
        return costs

    def _replan(self) -> int:
        if self._rule.plan == "lru" or (self._rule.plan == "never" and self._t):
            return 0
        n_resident = min(self._params.n_resident, self._n)
        chosen = list(range(n_resident))
        if self._t:
            means = np.clip(self._bandit.means(self._contexts.rows()), 0.0, 1.0)
            if self._rule.plan == "mean":
                chosen = [int(i) for i in np.argsort(-means[:, : self._n].mean(axis=0))]
                chosen = chosen[:n_resident]
            else:
                chosen = greedy_set(self._problem(means))
                chosen += [i for i in self._resident if i not in chosen]
        fresh = OrderedDict.fromkeys(chosen[:n_resident])
        loads = len(fresh.keys() - self._resident.keys())
        self._resident = fresh
        return loads

    def _problem(self, means: Vector) -> SetProblem:
        n = self._n
        floor = means[:, n] if means.shape[1] > n else np.zeros(len(means))
        return SetProblem(
            utilities=means[:, :n], floor=floor, costs=self._cost[:n], loads=self._missing()[:n],
            n_resident=self._params.n_resident, horizon=_EPOCH,
        )  # fmt: skip

    def learn(self, x: Vector, column: int, reward: float) -> None:
        self._bandit.learn(None if column < 0 else str(column), x, reward)


Maker = Callable[[OutcomeTable, ReplayParams, int], Policy]


def _router(epochs: EpochParams | None) -> Maker:
    def make(table: OutcomeTable, params: ReplayParams, seed: int) -> Policy:
        polar = PolarParams(
            d=table.contexts.shape[1], alpha=params.alpha, ridge=params.ridge,
            utility_per_s=params.utility_per_s, base_arm=table.base is not None,
            epochs=params.epochs if epochs is None else epochs,
        )  # fmt: skip
        return RouterPolicy(table, polar, params.n_resident, seed)

    return make


def _baseline(plan: str, cost_aware: bool) -> Maker:
    rule = Rule(plan=plan, cost_aware=cost_aware)
    return lambda table, params, seed: Baseline(table, params, rule)


POLICIES: Final[dict[str, Maker]] = {
    "polar+": _router(None),
    "polar": _router(EpochParams.fixed(_EPOCH)),
    "lru+linucb": _baseline("lru", False),
    "fixed set": _baseline("never", True),
    "cost-blind": _baseline("greedy", False),
    "top-k by mean": _baseline("mean", True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One policy over one stream.

    Attributes:
        regret: cumulative, in rewards, at the end.
        slope: of regret against requests, both logarithmic, from a quarter to the end: 1 is
            linear; None where either regret is not positive.
        net: mean of reward - paging cost as drawn, not as expected.
        hit_ratio: requests served without paging / requests.
        n_loads: bypasses and loads for residency.
    """

    regret: float
    slope: float | None
    net: float
    hit_ratio: float
    n_loads: int


def oracle_values(table: OutcomeTable, stream: Stream, params: ReplayParams) -> Vector:
    """Expected reward less cost of each request under the oracle, F64 (n,)."""
    cost = np.minimum(table.load_s * params.utility_per_s, 1.0)
    values = np.zeros(len(stream.rows))
    resident: list[int] = []
    ends = (*stream.starts[1:], len(stream.rows))
    for start, end, columns in zip(stream.starts, ends, stream.columns, strict=True):
        expected = table.expected[stream.rows[start:end]][:, columns]
        base = table.base_expected
        floor = np.zeros(end - start) if base is None else base[stream.rows[start:end]]
        loads = cost.copy()
        loads[resident] = 0.0
        chosen = greedy_set(SetProblem(
            utilities=expected, floor=floor, costs=cost, loads=loads,
            n_resident=params.n_resident, horizon=end - start,
        ))  # fmt: skip
        chosen = [*chosen, *(i for i in resident if i not in chosen)][: params.n_resident]
        missing = cost.copy()
        missing[chosen] = 0.0
        values[start:end] = np.maximum(floor if base is not None else -1.0,
                                       (expected - missing).max(axis=1))  # fmt: skip
        values[start] -= cost[[i for i in chosen if i not in resident]].sum()
        resident = chosen
    return values


def run(policy: Policy, table: OutcomeTable, stream: Stream, params: ReplayParams) -> RunResult:
    """Replay a stream through a policy."""
    n, n_hits, n_loads = len(stream.rows), 0, 0
    cost = np.minimum(table.load_s * params.utility_per_s, 1.0)
    mean_cost = float(cost.mean())  # of a load for residency: which adapter's is not told apart
    earned, drawn = np.zeros(n), 0.0
    phase = 0
    for t, row in enumerate(stream.rows):
        if phase + 1 < len(stream.starts) and t == stream.starts[phase + 1]:
            phase += 1
        x = table.contexts[row]
        column, hit, loads = policy.choose(x)
        reward, expected = _outcome(table, int(row), column, stream.columns[phase])
        policy.learn(x, column, reward)
        spent = loads * mean_cost + (0.0 if hit else float(cost[column]))
        earned[t] = expected - spent
        drawn += reward - spent
        n_hits += hit
        n_loads += loads + (not hit)
    regret = np.cumsum(oracle_values(table, stream, params) - earned)
    return RunResult(regret=float(regret[-1]), slope=_slope(regret), net=drawn / n,
                     hit_ratio=n_hits / n, n_loads=n_loads)  # fmt: skip


def _outcome(
    table: OutcomeTable, row: int, column: int, columns: NDArray[np.int64]
) -> tuple[float, float]:
    """Drawn and expected reward of an adapter (-1: the base model) on a prompt."""
    if column < 0 and table.base is not None and table.base_expected is not None:
        return float(table.base[row]), float(table.base_expected[row])
    actual = columns[column]
    return float(table.outcomes[row, actual]), float(table.expected[row, actual])


def _slope(regret: Vector) -> float | None:
    early, late = regret[len(regret) // 4 - 1], regret[-1]
    if early <= 0 or late <= 0:
        return None
    return math.log(late / early) / math.log(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A policy over several seeds: means, and the standard error of the regret."""

    policy: str
    stream: str
    n_seeds: int
    regret: float
    regret_error: float
    slope: float | None
    net: float
    hit_ratio: float
    n_loads: float


def shuffled(table: OutcomeTable, seed: int) -> OutcomeTable:
    """The table with its adapters in another order: no policy may gain by theirs."""
    order = np.random.default_rng([seed, 7]).permutation(len(table.load_s))
    return replace(table, outcomes=table.outcomes[:, order], expected=table.expected[:, order],
                   load_s=table.load_s[order])  # fmt: skip


def compare(
    tables: Sequence[OutcomeTable], kind: str, n: int, params: ReplayParams,
    policies: Sequence[str] = tuple(POLICIES),
) -> list[Summary]:  # fmt: skip
    """Run policies over streams of a kind, one seed per table, all policies on the same.

    Raises:
        UsageError: no such stream or policy, or no table.
    """
    unknown = [name for name in policies if name not in POLICIES]
    if unknown or not tables:
        raise UsageError(f"policies are {', '.join(POLICIES)}, not {unknown}; or no table given")
    found: dict[str, list[RunResult]] = {name: [] for name in policies}
    for seed, given in enumerate(tables):
        table = shuffled(given, seed)
        stream = make_stream(table, kind, n, np.random.default_rng([seed, 11]))
        for name in policies:
            policy = POLICIES[name](table, params, seed)
            found[name].append(run(policy, table, stream, params))
    return [_summary(name, kind, results) for name, results in found.items()]


def _summary(name: str, kind: str, results: Sequence[RunResult]) -> Summary:
    regrets = np.array([result.regret for result in results])
    slopes = [result.slope for result in results if result.slope is not None]
    error = float(regrets.std(ddof=1)) / math.sqrt(len(regrets)) if len(regrets) > 1 else 0.0
    return Summary(
        policy=name, stream=kind, n_seeds=len(results), regret=float(regrets.mean()),
        regret_error=error, slope=float(np.mean(slopes)) if slopes else None,
        net=float(np.mean([result.net for result in results])),
        hit_ratio=float(np.mean([result.hit_ratio for result in results])),
        n_loads=float(np.mean([result.n_loads for result in results])),
    )  # fmt: skip


def show(rows: Sequence[Summary], console: Console) -> None:
    """Print a table of summaries."""
    table = Table(title=f"{rows[0].stream}: mean of {rows[0].n_seeds} seeds")
    for head in ("policy", "regret", "±", "slope", "reward - cost", "hits", "loads"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for row in rows:
        slope = "-" if row.slope is None else f"{row.slope:.2f}"
        table.add_row(row.policy, f"{row.regret:.1f}", f"{row.regret_error:.1f}", slope,
                      f"{row.net:.4f}", f"{row.hit_ratio:.1%}", f"{row.n_loads:.0f}")  # fmt: skip
    console.print(table)


@click.command()
@click.option("--table", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Recorded .npz: contexts, outcomes, load_s; base and tasks if any.")  # fmt: skip
@click.option("--world", default="linear", show_default=True, type=click.Choice(list(WORLDS)),
              help="What to generate where no table is given.")  # fmt: skip
@click.option("--stream", "kinds", multiple=True, type=click.Choice(list(STREAMS)),
              default=["stationary"], show_default=True)  # fmt: skip
@click.option("--requests", default=4000, show_default=True, type=click.IntRange(8, MAX_REQUESTS))
@click.option("--seeds", default=10, show_default=True, type=click.IntRange(1, 100))
@click.option("--resident", default=4, show_default=True, type=click.IntRange(0, 4096))
@click.option("--alpha", default=ReplayParams().alpha, show_default=True,
              type=click.FloatRange(0, 100))  # fmt: skip
@click.option("--utility-per-s", default=0.1, show_default=True, type=click.FloatRange(0, 1e6))
def main(
    path: Path | None, world: str, kinds: Sequence[str], requests: int, seeds: int,
    resident: int, alpha: float, utility_per_s: float,
) -> None:  # fmt: skip
    """Compare adapter routers by their regret; the last line printed is JSON.

    \b
    Example:
      python -m edgeroute.tools.polar_replay --stream stationary --stream shift \\
          --requests 4000 --seeds 10 --resident 4
    """
    params = ReplayParams(n_resident=resident, alpha=alpha, utility_per_s=utility_per_s)
    try:
        tables = tables_of(path, world, seeds)
        console, found = Console(), []
        for kind in kinds:
            rows = compare(tables, kind, requests, params)
            show(rows, console)
            found += [asdict(row) for row in rows]
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    click.echo(json.dumps({"params": asdict(params), "requests": requests, "runs": found}))


def tables_of(path: Path | None, world: str, n_seeds: int) -> list[OutcomeTable]:
    """One table per seed: the recorded one each time, or worlds generated by the seed.

    Raises:
        UsageError: the file is no outcome table.
    """
    if path is not None:
        return [read_table(path)] * n_seeds
    shape = WorldParams(binary=world == "specialists")
    return [WORLDS[world](shape, np.random.default_rng([seed, 3])) for seed in range(n_seeds)]


if __name__ == "__main__":
    main()
