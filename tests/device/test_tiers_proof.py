"""The long proof of three tiers, cut short: it holds, and it can fail."""

from pathlib import Path
from typing import Any

import pytest

from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.upload import Uploader
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from edgeroute.tools.bench.tiers_proof import DEVICE_RATIO, DRAM_RATIO, MODEL, prove


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("proof") / "model.gguf"
    synth.write(MODEL, found)
    return found


@pytest.mark.parametrize("policy", ["auto", "lfu"])
def test_it_holds(policy: str, path: Path, rpc: RpcServer) -> None:
    with Device.open(rpc.name) as device:
        found = prove(path, device, policy, 24)
    n_pages = MODEL.n_layer * MODEL.n_expert
    assert found["dram_slots"] == DRAM_RATIO * n_pages
    assert found["device_slots"] == int(DEVICE_RATIO * n_pages)
    decode = found["decode"]
    assert decode["hits"] + decode["misses"] == 24 * MODEL.n_layer * MODEL.n_expert_used
    assert decode["misses"] == decode["dram_hits"] + decode["dram_late"] + decode["disk_reads"]


def test_bytes_that_did_not_come_are_noticed(
    path: Path, rpc: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, n_sent = Uploader.send, 0

    def forget(uploader: Uploader, *args: Any) -> None:
        nonlocal n_sent
        n_sent += 1
        if n_sent <= 300:
            send(uploader, *args)

    monkeypatch.setattr(Uploader, "send", forget)
    with Device.open(rpc.name) as device, pytest.raises(UsageError, match="other logits"):
        prove(path, device, "lfu", 40)
