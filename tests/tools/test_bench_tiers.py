"""`bench tiers`: what it takes, what it says, and one run over a slow link."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.commands.bench import command
from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.tools import synth
from edgeroute.tools.bench import tiers
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.bench.rpc_servers import rpc_server
from edgeroute.tools.bench.tiers_report import Found, Life, make_report, reconciles

PARAMS = BenchParams(path=Path("m.gguf"), name="m", threads=2, reps=1)
GATE = {"state": "compute", "upload": {"fixed_s": 0.001, "each_s": 0.02, "n": 4},
        "compute": None, "n_trials": 2, "n_changes": 1}  # fmt: skip


def layer(**other: int) -> dict[str, int]:
    counts = {"hits": 6, "misses": 4, "uploaded": 1, "away": 3, "dram_hits": 2, "dram_late": 1,
              "disk_reads": 1}  # fmt: skip
    return counts | other


def life(*layers: dict[str, int], state: str = "compute") -> Life:
    device = {"n_slots": 5, "n_pages": 50, "host_experts": GATE | {"state": state},
              "layers": {"decode": list(layers), "prefill": [layer()]}}  # fmt: skip
    return Life.of({"device": device, "n_slots": 10, "n_pages": 40})


def series(*values: float) -> Series:
    return Series(values=values, others=tuple(0.0 for _ in values))


def found(**speeds: float) -> Found:
    return Found(link_bytes_s=100_000_000, same_answers=True,
                 first_s={mode: 1.5 for mode in speeds},
                 series={mode: series(speed) for mode, speed in speeds.items()},
                 lives={mode: life(layer()) for mode in speeds})  # fmt: skip


def test_shares_and_policies() -> None:
    assert tiers.parse_share("25%") == 0.25
    assert tiers.parse_policies(None) == ()
    assert tiers.parse_policies("all") == tuple(POLICIES)
    assert tiers.parse_policies("lru, lfru") == ("lru", "lfru")
    with pytest.raises(UsageError, match="write 25%"):
        tiers.parse_share("a%")


@pytest.mark.parametrize("bad", [
    {"links_bytes_s": ()}, {"links_bytes_s": (0,)}, {"dram_ratio": 0.0}, {"device_ratio": 1.1},
    {"dram_ratio": tiers.parse_share("25")}, {"policies": ("fifo2",)},
])  # fmt: skip
def test_what_cannot_be_measured(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        tiers.TiersParams(**{"links_bytes_s": (1,)} | bad)


def test_counts_that_do_not_reconcile() -> None:
    assert reconciles(layer())
    assert not reconciles(layer(disk_reads=2)) and not reconciles(layer(uploaded=2))
    assert life(layer(), layer(away=4)).n_broken == 1
    assert life(layer()).cells == ("60.0%", "75.0%", "2", "75.0%", "compute")


def test_the_table_names_the_better_choice_and_what_missed() -> None:
    good, bad = found(off=2.0, on=10.0, auto=9.8), found(off=2.0, on=10.0, auto=9.0)
    report = make_report(PARAMS, [good], {"lru": life(layer())}, 1.05)
    assert report.met and good.better == "on"
    assert report.rows[0][:4] == ("100 MB/s", "off", "2.00 [2.00 to 2.00]", "5.000")
    assert report.rows[3][1] == "policy lru" and len({len(row) for row in report.rows}) == 1
    assert "uploading 1.00 ms and 20.00 ms per expert" in report.notes[1]
    json.dumps(report.to_dict())
    assert not make_report(PARAMS, [bad], {}, 1.05).met
    assert not make_report(PARAMS, [replace(good, same_answers=False)], {}, 1.05).met
    broken = {"lru": life(layer(misses=5))}
    assert not make_report(PARAMS, [good], broken, 1.05).met


def test_a_model_without_experts(tiny_path: Path) -> None:
    with pytest.raises(UsageError, match="has no experts"):
        tiers.read_experts(tiny_path)


class Here:
    """A worker that is no process."""

    def __init__(self, factory: Any, *args: Any) -> None:
        self._engine = factory(*args)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()

    def call(self, method: str, *args: object) -> Any:
        return getattr(self._engine, method)(*args)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tiers") / "moe.gguf"
    synth.make("qwen3moe", path)
    yield path
    path.unlink()


@pytest.mark.skipif(ggml().ggml_backend_reg_by_name(b"RPC") is None, reason="no RPC in this ggml")
def test_a_run(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way answers alike, and every tier's counts reconcile; times are whatever they are."""
    monkeypatch.setattr(tiers, "Worker", Here)
    with rpc_server() as server:  # one for all: what is in this process shares its connection
        monkeypatch.setattr(tiers, "rpc_server", lambda **_: contextlib.nullcontext(server))
        check_a_run(moe)


def check_a_run(moe: Path) -> None:
    result = CliRunner().invoke(command, [
        "tiers", "--model", str(moe), "--link", "1GB", "--tokens", "8", "--warm", "8",
        "--reps", "1", "--threads", "1", "--policy", "lru", "--dram", "50%", "--device", "30%",
        "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    one, policy = told["results"]
    assert one["same_answers"] and one["link_bytes_s"] == 1_000_000_000
    ways = one["ways"]
    assert ways["on"]["away"] > 0 == ways["off"]["away"]
    assert all(way["misses"] > 0 == way["n_broken"] for way in ways.values())
    assert policy["policy"] == "lru" and policy["n_broken"] == 0
    assert [each["limit"] for each in told["criteria"]] == [1.05, 0, 0]
