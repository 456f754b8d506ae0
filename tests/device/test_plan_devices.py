"""`edgeroute plan --on`: what would go where is what then goes there."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edgeroute
from edgeroute.cli import cli
from edgeroute.commands import plan_forecast
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.edgeroute.speeds_lab import SPEEDS


@pytest.fixture(autouse=True)
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_forecast, "calibrate", lambda *_: SPEEDS)


def plan(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli, ["plan", *arguments, "--n-ctx", "256"])
    assert result.exit_code == code, result.output
    return result


def test_what_is_planned_is_what_is_loaded(rpc: RpcServer, tiny_path: Path) -> None:
    found = json.loads(plan(str(tiny_path), "--on", rpc.name, "--json").stdout)["on"]
    (device,) = found["devices"]
    assert device["name"] == rpc.name and device["layers"] == [0, 2] and device["head"]
    assert 0 < device["n_bytes"] <= device["budget_bytes"] and not found["experts"]
    with edgeroute.Runtime(tiny_path, device=rpc.name, n_ctx=256, threads=1) as runtime:
        loaded: Any = runtime.stats()["devices"]
    assert loaded[rpc.name]["layers"] == [0, 1, 2]
    shown = plan(str(tiny_path), "--on", rpc.name).stdout
    assert f"{rpc.name}  layers 0 to 2 and the head, " in shown


def test_a_small_device_gets_fewer(rpc: RpcServer, tiny_path: Path) -> None:
    whole = json.loads(plan(str(tiny_path), "--on", rpc.name, "--json").stdout)["on"]
    few = str(whole["devices"][0]["n_bytes"] * 2 // 3)
    found = json.loads(
        plan(str(tiny_path), "--on", rpc.name, "--device-memory", few, "--json").stdout
    )["on"]
    assert {each["name"] for each in found["devices"]} == {rpc.name, "CPU"}
    layers = [each["layers"] for each in found["devices"] if each["layers"]]
    assert sum(last - first + 1 for first, last in layers) == 3
    refused = plan(str(tiny_path), "--on", rpc.name, "--device-memory", "4096", code=4)
    assert "one layer" in refused.output


def test_nothing_changes_without_it(tiny_path: Path) -> None:
    assert "on" not in json.loads(plan(str(tiny_path), "--json").stdout)
    shown = plan(str(tiny_path), "--on", "auto").stdout
    assert "everything: no other device" in shown
    plan(str(tiny_path), "--on", "nowhere", code=2)
