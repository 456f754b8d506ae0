"""The routing simulator: its accounts, its files, and the order of policies on small streams."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.polar_replay import (
    POLICIES,
    ReplayParams,
    compare,
    main,
    oracle_values,
    run,
    shuffled,
    tables_of,
)
from edgeroute.tools.polar_streams import (
    STREAMS,
    WORLDS,
    WorldParams,
    make_stream,
    read_table,
    table_of,
    write_table,
)

SMALL = WorldParams(n_prompts=500)


def _world(seed: int = 0, name: str = "linear"):
    return WORLDS[name](SMALL, np.random.default_rng(seed))


class _Fixed:
    """Serves every request by one adapter, resident or not."""

    def __init__(self, column: int, hit: bool) -> None:
        self.column, self.hit, self.learned = column, hit, []

    def choose(self, x):
        return self.column, self.hit, 0

    def learn(self, x, column, reward) -> None:
        self.learned.append(reward)


def test_the_accounts_add_up() -> None:
    table = _world()
    stream = make_stream(table, "stationary", 64, np.random.default_rng(0))
    params = ReplayParams()
    oracle = oracle_values(table, stream, params)
    for hit in (True, False):
        policy = _Fixed(3, hit)
        found = run(policy, table, stream, params)
        spent = 0.0 if hit else 0.15
        assert policy.learned == table.outcomes[stream.rows, 3].tolist()
        assert found.net == pytest.approx(np.mean(policy.learned) - spent)
        expected = table.expected[stream.rows, 3] - spent
        assert found.regret == pytest.approx((oracle - expected).sum())
        assert found.hit_ratio == hit and found.n_loads == (0 if hit else 64)


def test_the_oracle_is_beaten_by_no_single_adapter_and_pays_its_loads() -> None:
    for name in WORLDS:
        table = _world(1, name)
        for kind in STREAMS:
            stream = make_stream(table, kind, 400, np.random.default_rng(1))
            values = oracle_values(table, stream, ReplayParams())
            for column in range(15):
                assert run(_Fixed(column, False), table, stream, ReplayParams()).regret > 0
            free = oracle_values(table, stream, ReplayParams(utility_per_s=0.0))
            assert values[0] < free[0] - 0.14  # at least one load, at the first request
            if kind != "reshuffle":
                assert np.allclose(free, table.expected[stream.rows].max(axis=1))


def test_the_base_model_is_a_candidate_where_it_was_recorded() -> None:
    x = np.ones((40, 2))
    table = table_of(x, np.full((40, 3), 0.2), np.ones(3), base=np.full(40, 0.9))
    for found in compare([table], "stationary", 400, ReplayParams(n_resident=1)):
        assert found.net > 0.8, found.policy
    stream = make_stream(table, "stationary", 40, np.random.default_rng(0))
    assert run(_Fixed(-1, True), table, stream, ReplayParams()).net == pytest.approx(0.9)


@pytest.mark.parametrize("kind", list(STREAMS))
def test_streams_have_their_shape(kind: str) -> None:
    table = _world()
    rng = np.random.default_rng(4)
    stream = make_stream(table, kind, 2400, rng)
    again = make_stream(table, kind, 2400, np.random.default_rng(4))
    assert np.array_equal(stream.rows, again.rows)
    assert len(stream.rows) == 2400 and stream.rows.min() >= 0 and stream.rows.max() < 500
    assert len(stream.starts) == len(stream.columns) and stream.starts[0] == 0
    tasks = table.tasks[stream.rows]
    first, last = (np.bincount(half, minlength=6) for half in (tasks[:1200], tasks[1200:]))
    same = (tasks[1:] == tasks[:-1]).mean()
    if kind == "shift":
        assert first.argmax() == last.argmin() and last.argmax() == first.argmin()
    elif kind == "zipf":
        assert first.max() > 3 * first.min() and first.argmax() == last.argmax()
    elif kind == "bursty":
        assert same > 0.9
    elif kind == "adversarial":
        assert same == 0
    elif kind == "reshuffle":
        assert not np.array_equal(*stream.columns)


def test_a_recorded_table_survives_its_file(tmp_path: Path) -> None:
    world = _world()
    table = table_of(world.contexts, world.outcomes, world.load_s, world.tasks, np.ones(500) / 2)
    write_table(tmp_path / "t.npz", table)
    again = read_table(tmp_path / "t.npz")
    for name in ("contexts", "outcomes", "load_s", "tasks", "expected", "base", "base_expected"):
        assert np.array_equal(getattr(again, name), getattr(table, name)), name
    rows = table.tasks == 2
    assert np.allclose(table.expected[rows], table.outcomes[rows].mean(axis=0))


def test_without_kinds_the_best_linear_fit_is_what_is_expected() -> None:
    world = _world()
    table = table_of(world.contexts, world.outcomes, world.load_s)
    assert np.abs(table.expected - world.expected).mean() < 0.05
    assert np.array_equal(table.tasks, table.expected.argmax(axis=1))


@pytest.mark.parametrize("case", ["text", "pickle", "missing", "strings", "shapes", "rewards",
                                  "nan", "large", "twice"])  # fmt: skip
def test_hostile_tables_are_refused(tmp_path: Path, case: str, monkeypatch) -> None:
    path = tmp_path / "t.npz"
    good = {"contexts": np.ones((9, 2)), "outcomes": np.ones((9, 3)), "load_s": np.ones(3)}
    changed: dict[str, dict[str, np.ndarray]] = {
        "pickle": {"load_s": np.array([{}, {}, {}], dtype=object)},
        "strings": {"load_s": np.array(["a", "b", "c"])},
        "shapes": {"load_s": np.ones(4)},
        "rewards": {"outcomes": np.full((9, 3), 1.5)},
        "nan": {"outcomes": np.full((9, 3), np.nan)},
    }
    np.savez(path, **{**good, **changed.get(case, {})})
    if case == "text":
        path.write_text("contexts")
    elif case == "missing":
        np.savez(path, contexts=good["contexts"])
    elif case == "large":
        monkeypatch.setattr("edgeroute.tools.polar_streams.MAX_TABLE_BYTES", 100)
    elif case == "twice":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("load_s", archive.read("load_s.npy"))
    with pytest.raises(UsageError):
        read_table(path)


def test_what_cannot_be_replayed_is_refused() -> None:
    table = _world()
    with pytest.raises(UsageError, match="no stream 'x'"):
        make_stream(table, "x", 100, np.random.default_rng(0))
    with pytest.raises(UsageError, match="not 1000001"):
        make_stream(table, "zipf", 1_000_001, np.random.default_rng(0))
    with pytest.raises(UsageError, match="policies are"):
        compare([table], "zipf", 100, ReplayParams(), ["best"])
    with pytest.raises(UsageError):
        WorldParams(n_adapters=5000)
    with pytest.raises(UsageError):
        WorldParams(d=1)


def test_adapters_are_in_another_order_for_each_seed() -> None:
    table = _world()
    one, two = shuffled(table, 0), shuffled(table, 1)
    assert not np.array_equal(one.outcomes, two.outcomes)
    assert np.array_equal(np.sort(one.expected, axis=1), np.sort(two.expected, axis=1))


def test_a_run_can_be_repeated_exactly() -> None:
    tables = tables_of(None, "specialists", 1)
    for name in POLICIES:
        once, again = (compare(tables, "zipf", 600, ReplayParams(), [name]) for _ in range(2))
        assert once == again


def test_polar_plus_has_the_least_regret_where_it_should() -> None:
    """The claim of the method, on four fixed worlds, with room for chance."""
    tables = tables_of(None, "linear", 4)
    locked = {r.policy: r for r in compare(tables, "stationary", 2500, ReplayParams(alpha=0.1))}
    found = {r.policy: r for r in compare(tables, "stationary", 2500, ReplayParams())}
    best = found["polar+"]
    assert best.slope is not None and best.slope < 0.6
    assert best.regret < 0.5 * locked["polar"].regret
    for name in ("lru+linucb", "fixed set", "cost-blind"):
        assert best.regret < 0.9 * found[name].regret, name
        assert locked["polar+"].regret < 0.6 * locked[name].regret, name


def test_polar_plus_survives_a_shift_of_popularity() -> None:
    tables = tables_of(None, "linear", 4)
    names = ["polar+", "lru+linucb"]
    found = {r.policy: r for r in compare(tables, "shift", 2500, ReplayParams(), names)}
    assert found["polar+"].net > found["lru+linucb"].net


def test_the_command_prints_tables_and_one_json_line() -> None:
    done = CliRunner().invoke(
        main, ["--requests", "64", "--seeds", "2", "--stream", "zipf", "--stream", "bursty"]
    )
    assert done.exit_code == 0, done.output
    line = json.loads(done.output.splitlines()[-1])
    assert [r["stream"] for r in line["runs"]] == ["zipf"] * len(POLICIES) + ["bursty"] * len(
        POLICIES
    )
    assert "polar+" in done.output.splitlines()[4]
    assert "Example" in CliRunner().invoke(main, ["--help"]).output
