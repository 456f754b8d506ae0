"""Answers written by two models on a device of another process: the processor's answers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.small import small_devices
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device.equal_lab import SETTINGS, balanced, both, told
from tests.edgeroute.test_step_routing import PROMPTS, SAMPLED, check_sums, shorten

pytestmark = pytest.mark.usefixtures("same_kernels")
POLICIES = ["small", "large", "random:0.5", "glimpse:5.0", "query:5.0", "judge:4.5",
            "verify:-5.5:-6.2", "verify:-5.5:-6.2:0:1", "agree:0:20", "target:0.4"]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rpc-pair")
    llama, qwen2 = synth.ARCHITECTURES["llama"], synth.ARCHITECTURES["qwen2"]
    synth.write(replace(llama, n_layer=3), folder / "large.gguf")
    synth.write(replace(qwen2, n_layer=2, pre=llama.pre), folder / "small.gguf")
    return folder / "large.gguf", folder / "small.gguf"


def test_every_policy(rpc: RpcServer, pair: tuple[Path, Path]) -> None:
    """What both models wrote, read, and were asked for; greedy and drawn."""
    large, small = pair

    def scenario(runtime: Runtime) -> Any:
        shorten(runtime)
        found = []
        for spec in POLICIES:
            for options in SAMPLED[:2]:
                answer = runtime.generate(PROMPTS[0], max_tokens=24, steps=spec, prefix="off",
                                          **({"seed": 1} | options))  # fmt: skip
                check_sums(answer)
                parts = [replace(part, seconds=0.0) for part in answer.stats.steps or ()]
                found.append((spec, told(answer), parts))
        return found

    both(rpc, large, scenario, small=small, speculate="off", steps_state="off")


@pytest.fixture
def opened(rpc: RpcServer, pair: tuple[Path, Path]) -> Iterator[Runtime]:
    with Runtime(pair[0], small=pair[1], device=rpc.name, speculate="off", **SETTINGS) as runtime:
        yield shorten(runtime)


def test_both_models_share_the_device(opened: Runtime, rpc: RpcServer) -> None:
    """Each writes there what it writes alone on it."""
    scheduler = opened._scheduler
    assert opened._loaded.device.info.name == rpc.name
    assert scheduler.steps is not None and opened._loaded.small is not None
    assert rpc.name in small_devices(opened._loaded.small)
    wanted = [told(opened.generate(PROMPTS[2], max_tokens=12, steps=who, prefix="off"))
              for who in ("large", "small")]  # fmt: skip
    assert wanted[0] != wanted[1]
    assert balanced(opened)["running"] == 0
