"""`edgeroute plan` of a model that is not here, and for machines that this one is not."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.cli import cli
from edgeroute.commands import plan_forecast
from edgeroute.tools import synth
from edgeroute.tools.forecast import plan as planning
from edgeroute.tools.forecast.records import Speeds, StoragePoint
from tests.models import hub_server
from tests.models.hub_server import SPEC

SPEEDS = Speeds(
    name="this machine", memory_bytes=8 << 30, available_bytes=6 << 30,
    weight_bytes_s={"F32": 4e9, "Q4_K": 3e9}, prefill_flops_s={"F32": 5e10, "Q4_K": 5e10},
    kv_bytes_s=4e9, graph_s=0.001, layer_s=1e-5, paged_layer_s=1e-4,
    storage=(StoragePoint(read_bytes=1 << 20, depth=1, bytes_s=1e8),), threads=2,
    origins={"weight_bytes_s": "measured"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan_forecast, "calibrate", lambda *_: SPEEDS)
    monkeypatch.setattr(planning, "PROGRAM_BYTES", 0)  # larger than the model
    monkeypatch.setattr("edgeroute.tools.forecast.scale.memory_bandwidth", _no_measuring)
    with hub_server.isolated(tmp_path, monkeypatch):
        yield


def _no_measuring(*_: object) -> Any:
    from edgeroute.tools.measure import MemoryBandwidth

    return MemoryBandwidth(read_bytes_s=8e9, copy_bytes_s=8e9, n_threads=2, array_bytes=1, passes=2)


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 80 MiB whose header is far below a fiftieth of it."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    spec = replace(
        synth.ARCHITECTURES["qwen3moe"], n_layer=8, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
        n_head_kv=1, n_embd_head=64, n_expert=48, n_expert_used=3,
    )  # fmt: skip
    synth.write(spec, path)
    return path


def plan(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["plan", *arguments, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("budget", ["1MiB", "60MiB", "1GiB"])
def test_a_remote_header_forecasts_what_the_file_does(
    moe_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """REFUSED, PAGES and FITS: all figures are equal, and little of the file was read."""
    options = ("--memory", budget, "--n-ctx", "256")
    code = 4 if budget == "1MiB" else 0
    local = plan(str(moe_path), *options, code=code)
    with hub_server.serving(hub_server.Behaviour(body=moe_path.read_bytes())) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        remote = plan(SPEC, *options, code=code)
        source = remote.pop("source")
        assert source["kind"] == "header" and source["path"] is None
        n_bytes = source["fetched_bytes"]
        assert n_bytes < 0.02 * source["size_bytes"]
        while hub.n_sent < n_bytes:  # it counts a piece after we have it
            time.sleep(0.001)
        assert hub.n_sent == n_bytes
    assert local.pop("source")["size_bytes"] == source["size_bytes"]
    assert (remote.pop("model"), local.pop("model")) == (SPEC, str(moe_path))
    for found in (remote, local):
        found.pop("available_bytes")  # of this machine, at that moment
    assert remote == local
    verdicts = {"1MiB": "REFUSED", "60MiB": "PAGES", "1GiB": "FITS"}
    assert remote["verdict"] == verdicts[budget]
    assert (remote["forecast"]["decode_tok_s"] is None) == (budget == "1MiB")


def test_a_file_that_is_here_is_not_fetched(moe_path: Path, tmp_path: Path) -> None:
    place = tmp_path / "models/hf/owner/repo/main/sub/tiny-q4.gguf"
    place.parent.mkdir(parents=True)
    place.hardlink_to(moe_path)
    assert plan(SPEC)["source"]["kind"] == "file"  # and no hub is running


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (SPEC, "header cannot be fetched either: Hugging Face owner/repo cannot be reached"),
        ("qwen2.5-coder-0.5b-instruct", "edgeroute pull qwen2.5-coder-0.5b-instruct"),
        ("gemma3-270m", "edgeroute pull gemma3-270m"),
    ],
)
def test_what_cannot_be_fetched_is_told(name: str, words: str) -> None:
    result = CliRunner().invoke(cli, ["plan", name])
    assert result.exit_code == 3 and words in result.stderr


def test_a_device_brings_its_memory_and_its_speeds(moe_path: Path) -> None:
    here = plan(str(moe_path), "--n-ctx", "256")
    board = plan(str(moe_path), "--n-ctx", "256", "--device", "orin-nano-8gb")
    assert board["machine"] == "orin-nano-8gb" != here["machine"]
    assert board["budget_bytes"] < 8 << 30
    assert board["forecast"]["decode_tok_s"] != here["forecast"]["decode_tok_s"]
    assert board["forecast"]["joules_token"]["likely"] > 0
    assert any("decoding at" in note for note in board["machine_notes"])
    given = plan(str(moe_path), "--device", "orin-nano-8gb", "--memory", "2GiB")
    assert given["budget_bytes"] == 2 << 30


def test_wrong_devices_and_modes_are_refused_with_the_right_ones(moe_path: Path) -> None:
    for options, words in (
        (("--device", "orin-nanno"), "did you mean"),
        (("--device", "orin-nano-8gb", "--power-mode", "9kW"), "power mode"),
        (("--power-mode", "15W"), "name it by --device"),
    ):
        result = CliRunner().invoke(cli, ["plan", str(moe_path), *options])
        assert result.exit_code == 2 and words in result.stderr, result.output
    listed = CliRunner().invoke(cli, ["plan", str(moe_path), "--device", "list"])
    assert listed.exit_code == 0 and "orin-nano-8gb" in listed.stdout
