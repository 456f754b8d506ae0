"""Outcome tables and the request streams drawn from them, for the routing simulator.

A table says what each adapter would earn on each of many prompts: recorded by running them
all once, or generated. A stream says which prompt comes when.
"""

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime.errors import UsageError

Vector = NDArray[np.float64]
Index = NDArray[np.int64]
MAX_TABLE_BYTES: Final = 1 << 30
MAX_REQUESTS: Final = 1_000_000
_BLOCK: Final = 40  # requests of a burst, on average
_ZIPF: Final = 1.1
_N_DRIFTS: Final = 8
_MEMBERS: Final = {"contexts", "outcomes", "load_s"}
_OPTIONAL: Final = {"base", "tasks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeTable:
    """What every adapter earns on every prompt.

    Attributes:
        contexts: features, F64 (n_prompts, d).
        outcomes: rewards 0 to 1, F64 (n_prompts, n_adapters).
        load_s: seconds that paging each adapter takes, F64 (n_adapters,).
        tasks: kind of each prompt, I64 (n_prompts,); streams make some kinds popular.
        expected: means of which `outcomes` are draws, like them; regret is counted in these.
        base: rewards of the base model without adapter, F64 (n_prompts,), and their means.

    Raises:
        UsageError: shapes or values contradict each other.
    """

    contexts: Vector
    outcomes: Vector
    load_s: Vector
    tasks: Index
    expected: Vector
    base: Vector | None = None
    base_expected: Vector | None = None

    def __post_init__(self) -> None:
        n, n_adapters = self.outcomes.shape if self.outcomes.ndim == 2 else (0, 0)
        shapes_fit = (
            n > 0
            and n_adapters > 0
            and self.contexts.ndim == 2
            and len(self.contexts) == len(self.tasks) == n
            and self.tasks.ndim == 1
            and self.expected.shape == self.outcomes.shape
            and self.load_s.shape == (n_adapters,)
            and all(b is None or b.shape == (n,) for b in (self.base, self.base_expected))
        )
        if not shapes_fit:
            raise UsageError("the outcome table's arrays do not have shapes that fit each other")
        rewards = [a for a in (self.outcomes, self.expected, self.base) if a is not None]
        if not all(bool(np.all((a >= 0) & (a <= 1))) for a in rewards):
            raise UsageError("the outcome table has rewards outside 0 to 1")
        if not (np.isfinite(self.contexts).all() and np.all(self.load_s >= 0)
                and np.isfinite(self.load_s).all()):  # fmt: skip
            raise UsageError("the outcome table has contexts or load times that are no numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Which prompt comes when, I64 (n,), and where a phase of it begins.

    `columns` gives per phase which outcome column each adapter then has: where they change,
    adapters have become better or worse at what they do.
    """

    rows: Index
    starts: tuple[int, ...]
    columns: tuple[Index, ...]


def table_of(
    contexts: Vector, outcomes: Vector, load_s: Vector, tasks: Index | None = None,
    base: Vector | None = None,
) -> OutcomeTable:  # fmt: skip
    """Make a table of recorded outcomes.

    What is expected of a recorded outcome is the mean of its kind of prompt. Without kinds,
    a prompt's kind is the adapter with the best linear fit there, and what is expected is
    that fit, clipped to 0..1.

    Raises:
        UsageError: the arrays do not fit each other.
    """
    both = outcomes if base is None else np.column_stack([outcomes, base])
    if contexts.ndim != 2 or both.ndim != 2 or len(contexts) != len(both):
        raise UsageError("the outcome table's arrays do not have shapes that fit each other")
    if tasks is None:
        fit = np.linalg.lstsq(contexts, both, rcond=1e-6)[0]
        expected = np.clip(contexts @ fit, 0.0, 1.0)
        tasks = expected[:, : outcomes.shape[1]].argmax(axis=1).astype(np.int64)
    else:
        expected = np.zeros_like(both)
        for task in np.unique(tasks):
            expected[tasks == task] = both[tasks == task].mean(axis=0)
    return OutcomeTable(
        contexts=contexts, outcomes=outcomes, load_s=load_s, tasks=tasks, base=base,
        expected=expected[:, : outcomes.shape[1]],
        base_expected=None if base is None else expected[:, -1],
    )  # fmt: skip


def read_table(path: Path) -> OutcomeTable:
    """Read a table from an .npz with `contexts`, `outcomes`, `load_s` and, where recorded,
    `base` and `tasks`.

    Raises:
        UsageError: it is no such file, or larger than MAX_TABLE_BYTES.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        names = {info.filename.removesuffix(".npy") for info in infos}
        if not names >= _MEMBERS or names - _MEMBERS - _OPTIONAL or len(infos) != len(names):
            raise UsageError(f"{path} has not the arrays {sorted(_MEMBERS)} and at most "
                             f"{sorted(_OPTIONAL)}, but {sorted(names)[:8]}")  # fmt: skip
        n_bytes = sum(info.file_size for info in infos)
        if n_bytes > MAX_TABLE_BYTES:
            raise UsageError(f"{path} holds {n_bytes} bytes; {MAX_TABLE_BYTES} are the most")
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: np.asarray(found[name]) for name in names}
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub":
                raise UsageError(f"{path}: {name} is of type {array.dtype}, not of numbers")
        floats = {name: a.astype(np.float64) for name, a in arrays.items() if name != "tasks"}
        tasks = arrays["tasks"].astype(np.int64) if "tasks" in arrays else None
        return table_of(**floats, tasks=tasks)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is no outcome table: {str(error)[:120]}") from error


def write_table(path: Path, table: OutcomeTable) -> None:
    """Write what was recorded, so that `read_table` reads it."""
    arrays = {"contexts": table.contexts, "outcomes": table.outcomes, "load_s": table.load_s,
              "tasks": table.tasks}  # fmt: skip
    if table.base is not None:
        arrays["base"] = table.base
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldParams:
    """A generated table's size.

    `binary` outcomes are 0 or 1 with the expected mean; otherwise the mean ± 0.1.
    """

    n_adapters: int = 15
    d: int = 8
    n_tasks: int = 6
    n_prompts: int = 8000
    load_s: float = 1.5
    binary: bool = False

    def __post_init__(self) -> None:
        if min(self.n_adapters, self.n_tasks, self.n_prompts) < 1 or self.d < 2:
            raise UsageError(f"a world has at least one of each and two features: {self}")
        if self.n_adapters > 4096 or self.n_prompts > MAX_REQUESTS or self.d > 32:
            raise UsageError(f"a world of this size would not fit memory or the router: {self}")


def linear_world(params: WorldParams, rng: np.random.Generator) -> OutcomeTable:
    """Generate a table whose expected rewards are linear in the context.

    Contexts lie around `n_tasks` centres; each adapter has a random direction.
    """
    contexts, tasks, _ = _contexts(params, rng)
    theta = rng.standard_normal((params.d, params.n_adapters))
    theta[-1] = 0.0
    theta /= np.linalg.norm(theta, axis=0)
    expected = np.clip(0.45 + 0.5 * contexts @ theta, 0.0, 1.0)
    return _drawn(params, contexts, tasks, expected, rng)


def specialist_world(params: WorldParams, rng: np.random.Generator) -> OutcomeTable:
    """Generate a table of specialists: each adapter is good at one kind of prompt.

    Adapters beyond the number of kinds duplicate earlier ones, a little worse: ranking by
    mean reward would keep duplicates. Rewards are no linear function of the context.
    """
    contexts, tasks, _ = _contexts(params, rng)
    skill = np.clip(0.15 + 0.1 * rng.standard_normal((params.n_tasks, params.n_adapters)), 0, 0.5)
    for i in range(params.n_adapters):
        skill[i % params.n_tasks, i] = 0.9 - 0.05 * (i // params.n_tasks)
    expected = np.clip(skill[tasks], 0.0, 1.0)
    return _drawn(params, contexts, tasks, expected, rng)


def _contexts(params: WorldParams, rng: np.random.Generator) -> tuple[Vector, Index, Vector]:
    """Unit vectors around unit centres, with a bias as last feature."""
    centres = rng.standard_normal((params.n_tasks, params.d - 1))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    tasks = rng.integers(params.n_tasks, size=params.n_prompts)
    spread = 0.3 / math.sqrt(params.d - 1)
    points = centres[tasks] + spread * rng.standard_normal((params.n_prompts, params.d - 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return np.column_stack([points, np.ones(params.n_prompts)]), tasks, centres


def _drawn(
    params: WorldParams, contexts: Vector, tasks: Index, expected: Vector,
    rng: np.random.Generator,
) -> OutcomeTable:  # fmt: skip
    if params.binary:
        outcomes = (rng.random(expected.shape) < expected).astype(np.float64)
    else:
        outcomes = np.clip(expected + 0.1 * rng.standard_normal(expected.shape), 0.0, 1.0)
    return OutcomeTable(
        contexts=contexts, outcomes=outcomes, tasks=tasks, expected=expected,
        load_s=np.full(params.n_adapters, params.load_s),
    )  # fmt: skip


WORLDS: Final[dict[str, Callable[[WorldParams, np.random.Generator], OutcomeTable]]] = {
    "linear": linear_world,
    "specialists": specialist_world,
}


def stationary(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """Prompts drawn evenly."""
    return _plain(table, rng.integers(len(table.tasks), size=n))


def zipf(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """The r-th most popular kind of prompt comes r^-1.1 as often as the first."""
    return _plain(table, _rows(table, _zipf_tasks(_shuffled(table, rng), n, rng), rng))


def shift(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """Zipf; halfway the popularity order is turned round."""
    order, half = _shuffled(table, rng), n // 2
    tasks = np.concatenate([_zipf_tasks(order, half, rng), _zipf_tasks(order[::-1], n - half, rng)])
    return _phased(table, _rows(table, tasks, rng), (0, half))


def drifting(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """Zipf whose popularity order moves on by one place, eight times."""
    order = _shuffled(table, rng)
    starts = tuple(n * i // _N_DRIFTS for i in range(_N_DRIFTS))
    ends = (*starts[1:], n)
    parts = [_zipf_tasks(np.roll(order, i), end - start, rng)
             for i, (start, end) in enumerate(zip(starts, ends, strict=True))]  # fmt: skip
    return _phased(table, _rows(table, np.concatenate(parts), rng), starts)


def bursty(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """Bursts of one kind of prompt, forty long on average, kinds evenly popular."""
    order = _shuffled(table, rng)
    fresh = rng.random(n) < 1 / _BLOCK
    fresh[0] = True
    drawn = rng.integers(len(order), size=int(fresh.sum()))
    return _plain(table, _rows(table, order[drawn[np.cumsum(fresh) - 1]], rng))


def adversarial(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """All kinds in turn, over and over: recency always evicts what comes next."""
    order = _shuffled(table, rng)
    return _plain(table, _rows(table, order[np.arange(n) % len(order)], rng))


def reshuffle(table: OutcomeTable, n: int, rng: np.random.Generator) -> Stream:
    """Evenly drawn; halfway the adapters change places: what was learned is wrong."""
    n_adapters = table.outcomes.shape[1]
    columns = (np.arange(n_adapters), np.roll(np.arange(n_adapters), 1))
    rows = rng.integers(len(table.tasks), size=n)
    return Stream(rows=rows, starts=(0, n // 2), columns=columns)


STREAMS: Final[dict[str, Callable[[OutcomeTable, int, np.random.Generator], Stream]]] = {
    "stationary": stationary,
    "zipf": zipf,
    "shift": shift,
    "drifting": drifting,
    "bursty": bursty,
    "adversarial": adversarial,
    "reshuffle": reshuffle,
}


def make_stream(table: OutcomeTable, kind: str, n: int, rng: np.random.Generator) -> Stream:
    """Draw a stream of n requests of a registered kind.

    Raises:
        UsageError: no such kind, or n is not 8 to MAX_REQUESTS.
    """
    if kind not in STREAMS:
        raise UsageError(f"there is no stream {kind!r}; there are {', '.join(STREAMS)}")
    if not _N_DRIFTS <= n <= MAX_REQUESTS:
        raise UsageError(f"a stream has {_N_DRIFTS} to {MAX_REQUESTS} requests, not {n}")
    return STREAMS[kind](table, n, rng)


def _shuffled(table: OutcomeTable, rng: np.random.Generator) -> Index:
    return rng.permutation(np.unique(table.tasks))


def _zipf_tasks(order: Index, n: int, rng: np.random.Generator) -> Index:
    weights = 1.0 / np.arange(1, len(order) + 1) ** _ZIPF
    return rng.choice(order, size=n, p=weights / weights.sum())


def _rows(table: OutcomeTable, tasks: Index, rng: np.random.Generator) -> Index:
    """A prompt of each of the given kinds."""
    rows = np.zeros(len(tasks), dtype=np.int64)
    for task in np.unique(tasks):
        places = np.flatnonzero(tasks == task)
        rows[places] = rng.choice(np.flatnonzero(table.tasks == task), size=len(places))
    return rows


def _plain(table: OutcomeTable, rows: Index) -> Stream:
    return _phased(table, rows, (0,))


def _phased(table: OutcomeTable, rows: Index, starts: tuple[int, ...]) -> Stream:
    same = np.arange(table.outcomes.shape[1])
    return Stream(rows=rows, starts=starts, columns=tuple(same for _ in starts))
