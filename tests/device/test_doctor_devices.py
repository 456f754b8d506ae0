"""The doctor on devices: this machine's, a fake GPU, and those at addresses."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.cli import cli
from edgeroute.commands import doctor_devices, doctor_probe
from edgeroute.commands.doctor_device_rows import device_rows
from edgeroute.commands.doctor_devices import local_devices, rpc_devices
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device import fake_backend as fakes


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with little."""
    monkeypatch.setattr(doctor_probe, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(doctor_probe, "_SHARE_S", 0.0)
    monkeypatch.setattr(doctor_probe, "_MOST_ROWS", 64)
    monkeypatch.setattr(doctor_probe, "_PROMPT_ROWS", 64)


def text(local: list[dict[str, Any]], rpc: list[dict[str, Any]] | None = None) -> str:
    return "\n".join(f"{a} {b}" for a, b in device_rows({"local": local, "rpc": rpc or []}))


def check_figures(measured: dict[str, Any]) -> None:
    assert min(measured[k] for k in ("upload_bytes_s", "download_bytes_s", "round_trip_s")) > 0
    assert set(measured["products"]) == {"Q4_K", "Q8_0", "F16"}
    for each in measured["products"].values():
        assert each["decode_bytes_s"] > 0 and each["prefill_flops_s"] > 0


def test_the_processor_lacks_nothing() -> None:
    cpu = local_devices(1)[0]
    assert cpu["kind"] == "cpu" and cpu["lacks"] == [] and cpu["unified"]
    assert cpu["buffer_types"][0] == "CPU"
    check_figures(cpu["measured"])
    shown = text([cpu])
    for words in ("the processor", "the system's own", "has every operation", "TFLOP/s", "upload"):
        assert words in shown
    assert "measured" not in local_devices(None)[0]


def test_a_gpu_is_described_and_measured() -> None:
    with fakes.fake_device(fakes.Fake(refuses=frozenset({"SOFT_MAX", "CUMSUM"}))) as device:
        gpu = next(each for each in local_devices(1) if each["name"] == "fake0")
        assert device.n_live == 0 and device.n_instances == 0 and not device.misuse
    assert (gpu["kind"], gpu["unified"], gpu["host_pointers"]) == ("gpu", False, False)
    assert gpu["asynchronous"] and gpu["events"] and gpu["pinned"]
    assert {each.partition(" ")[0] for each in gpu["lacks"]} == {"SOFT_MAX", "CUMSUM"}
    check_figures(gpu["measured"])
    shown = text([gpu])
    for words in ("queues work, events, pinned host memory", "lacks ", "computed by the processor"):
        assert words in shown


def test_a_device_without_products_or_memory() -> None:
    with fakes.fake_device(fakes.Fake(refuses=frozenset({"MUL_MAT"}))):
        gpu = local_devices(1)[1]
    assert set(map(str, gpu["measured"]["products"].values())) == {
        "{'decode_bytes_s': None, 'prefill_flops_s': None}"
    }
    with fakes.fake_device(fakes.Fake(memory_bytes=1 << 16)):
        gpu = local_devices(1)[1]
    assert "could not allocate" in gpu["measured"]["error"]
    assert "not measured: " in text([gpu])


def test_many_lacking_operations_are_counted() -> None:
    with fakes.fake_device(fakes.Fake(refuses=frozenset({"MUL_MAT_ID"}))):
        shown = text([local_devices(None)[1]])
    assert "MUL_MAT_ID with weights of f32" in shown and "and 7 more" in shown


def test_devices_at_addresses(rpc: RpcServer) -> None:
    found, nobody = rpc_devices([rpc.name, "127.0.0.1:9"], measured=True)
    assert found["private"] and found["memory_total_bytes"] > 0 and "error" not in found
    check_figures(found["measured"])
    assert "does not answer" in nobody["error"]
    shown = text([], [found, nobody])
    for words in ("on another machine", "round trip", "yes to every operation", "does not answer"):
        assert words in shown


def test_an_address_that_everybody_may_reach_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_devices, "is_private", lambda host: False)
    (found,) = rpc_devices(["127.0.0.1:9"], measured=False)
    assert "neither authentication nor encryption" in found["warning"]
    assert found["tunnel"].startswith("ssh -N -L 127.0.0.1:9:127.0.0.1:9 127.0.0.1 ")
    assert "WARNING: " in text([], [found]) and found["tunnel"] in text([], [found])


def test_the_command_shows_them(rpc: RpcServer) -> None:
    address = rpc.name.removeprefix("rpc:")
    result = CliRunner().invoke(cli, ["doctor", "--no-measure", "--rpc", address, "--json"])
    found = json.loads(result.stdout)["devices"]
    assert [each["name"] for each in found["rpc"]] == [rpc.name]
    assert found["local"][0]["name"] == "CPU" and "measured" not in found["rpc"][0]
    assert CliRunner().invoke(cli, ["doctor", "--rpc", "no address"]).exit_code == 2
