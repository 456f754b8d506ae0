"""Adapters on a device of another process: the processor's bits, alone and mixed in a pass."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime
from edgeroute.models.forward import Piece
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device.equal_lab import SETTINGS, ask, both, ids, together
from tests.edgeroute.adapter_lab import Model, make

pytestmark = pytest.mark.usefixtures("same_kernels")
SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1, "n_embd_head": 32}
MOE = {"n_layer": 2, "n_expert": 8, "n_expert_used": 3, "n_ff_exp": 32}
TWO = {"n_layer": 2}
SPECS = {"llama": TWO, "qwen2": TWO, "gemma3": {}, "qwen2moe": MOE, "qwen3moe": MOE}
MIXTURES: list[dict[str, float]] = [
    {}, {"a": 1.0}, {"wide": 1.0}, {"a": 0.5, "b": 0.25}, {"a": -1.0, "b": 2.0, "wide": 0.3},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rpc-adapters")


@functools.cache
def library(folder: Path, arch: str) -> tuple[Path, Path]:
    """A small model, and a folder of adapters of ranks that take one slot and three."""
    path, adapters = folder / f"{arch}.gguf", folder / f"{arch}-adapters"
    synth.write(
        replace(synth.ARCHITECTURES[arch], **{**SMALL, **SPECS[arch], "weight_type": "Q8_0"}), path
    )
    adapters.mkdir()
    for seed, name in enumerate("ab"):
        make(adapters / f"{name}.gguf", path, rank=8, seed=seed, delta=0.6)
    make(adapters / "wide.gguf", path, rank=20, alpha=30.0, seed=9, delta=0.6)
    return path, adapters


@pytest.mark.parametrize("arch", SPECS)
def test_logits_have_the_processors_bits(arch: str, rpc: RpcServer, folder: Path) -> None:
    path, adapters = library(folder, arch)
    found = []
    for device in ("cpu", rpc.name):
        with Model(path, sorted(adapters.iterdir()), device=device, repack_experts=False) as model:
            found.append([model.logits(mixture) for mixture in MIXTURES])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert not np.array_equal(found[0][0], found[0][1])


def test_sequences_with_and_without_adapters_share_passes(rpc: RpcServer, folder: Path) -> None:
    """Prompts of all in one pass, then single tokens of all."""
    path, adapters = library(folder, "llama")
    found = []
    for device in ("cpu", rpc.name):
        with contextlib.ExitStack() as own:
            model = own.enter_context(
                Model(path, sorted(adapters.iterdir()), device=device, repack_experts=False)
            )
            rows = [None] + [own.enter_context(model.leased(each)).row for each in MIXTURES[1:]]
            regions = [model.loaded.kv.allocate(256) for _ in rows]
            rng = np.random.default_rng(5)
            for n, pos in ((20, 0), (1, 20), (1, 21)):
                pieces = [
                    Piece(rng.integers(4, 380, n).tolist(), pos, region, 1, row)
                    for region, row in zip(regions, rows, strict=True)
                ]
                logits = model.forward.run(pieces)
                assert logits is not None
                found.append(logits.copy())
    assert all(np.array_equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
    assert len({row.tobytes() for row in found[0]}) == len(MIXTURES)


def test_requests_over_a_library(rpc: RpcServer, folder: Path) -> None:
    """Alone, together, swapped through few slots, and chosen by the runtime itself."""
    path, adapters = library(folder, "llama")
    names: list[Any] = [None, "a", "b", "wide", {"a": 0.5, "wide": 1.5}]

    def scenario(runtime: Runtime) -> Any:
        alone = [ask(runtime, text=i, adapter=name) for i, name in enumerate(names)]
        mixed = together(runtime, [{"text": i, "adapter": name} for i, name in enumerate(names)])
        assert mixed == alone
        again = [ask(runtime, text=i, adapter=name) for i, name in [*enumerate(names)][::-1]]
        assert again[::-1] == alone
        return alone

    both(rpc, path, scenario, adapters=str(adapters), adapter_state="off")


def test_adapters_that_come_and_go(rpc: RpcServer, folder: Path, tmp_path: Path) -> None:
    """Slots are made, zeroed and written while the device is in use."""
    path, _ = library(folder, "qwen2")
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    make(one, path, rank=4, seed=1, delta=0.6)
    make(two, path, rank=11, seed=2, delta=0.6, targets=("ffn_down", "attn_q"))

    def scenario(runtime: Runtime) -> Any:
        found = [ask(runtime)]
        for file in (one, two, one):
            name = runtime.add_adapter(file)
            found += [ask(runtime, adapter=name), ask(runtime)]
            runtime.remove_adapter(name)
        assert len(set(map(repr, found))) == 3  # plain, one, two
        return found

    both(rpc, path, scenario, adapters=(), adapter_slots=4, adapter_state="off")


@pytest.fixture
def chooser(rpc: RpcServer, folder: Path) -> Iterator[Runtime]:
    path, adapters = library(folder, "llama")
    with Runtime(path, device=rpc.name, adapters=str(adapters), adapter_state="off",
                 **SETTINGS) as runtime:  # fmt: skip
        yield runtime


def test_the_runtime_chooses_an_adapter(chooser: Runtime) -> None:
    """What it asks the model for a choice comes from the device too."""
    found = chooser.generate(prompt_ids=ids(30), max_tokens=4, adapter="auto")
    assert len(found.token_ids) == 4 and found.stats.adapters is not None
