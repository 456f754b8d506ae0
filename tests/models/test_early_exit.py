"""Leaving in the middle: the bits of the plan that it amounts to, whoever leaves."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edgeroute.models.early_exit import EarlyExit, Logits
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.registry import describe
from edgeroute.runtime.cells import Region
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.synth import make

N_LAYER, LAYER = 4, 2
PLAIN = all_run(range(N_LAYER))
LEFT = (*PLAIN[:LAYER], *(Step(il, "skip", "skip", store=True) for il in range(LAYER, N_LAYER)))


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forward]:
    path: Path = tmp_path_factory.mktemp("exits") / "model.gguf"
    make("gemma3", path, n_layer=N_LAYER)
    with ExitStack() as own:
        file = own.enter_context(GGUFFile.open(path))
        model = describe(file)
        device = own.enter_context(Device.open("cpu"))
        device.set_threads(1)
        weights = ResidentWeights(file, device, model.specs())
        own.callback(weights.close)
        weights.load()
        hp = model.hparams
        shape = KvShape(n_layer=hp.n_layer, n_embd_k_gqa=hp.n_embd_k_gqa,
                        n_embd_v_gqa=hp.n_embd_v_gqa, n_embd_head=hp.n_embd_head_k)  # fmt: skip
        kv = KvCache(device, shape, 1024)
        own.callback(kv.close)
        made = Forward(model, device, weights, kv)
        own.callback(made.close)
        yield made


def prompt(forward: Forward) -> Region:
    region = forward.kv.allocate(256)
    assert region is not None
    forward.run([Piece(list(range(1, 20)), 0, region)])
    return region


class Judge:
    """Says what it is told to, and counts what it is shown."""

    def __init__(self, leaves: bool) -> None:
        self.leaves = leaves
        self.seen: list[int] = []

    def __call__(self, logits: Logits) -> bool:
        self.seen.append(len(logits))
        return self.leaves


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_has_the_bits_of_its_plans(forward: Forward, seed: int) -> None:
    """Each token's logits, and what later ones see of it: stored keys or those of all layers."""
    leaving = np.random.default_rng(seed).random(12) < 0.5
    exits = EarlyExit(forward, LAYER)
    ours, theirs = prompt(forward), prompt(forward)
    for i, leaves in enumerate(leaving):
        judge = Judge(bool(leaves))
        found = exits.decode(Piece([30 + i], 19 + i, ours), judge)
        wanted = forward.run([Piece([30 + i], 19 + i, theirs)],
                             forward.spans(LEFT if leaves else PLAIN))  # fmt: skip
        assert found is not None and wanted is not None
        assert found[1] == leaves and judge.seen == [forward.model.hparams.n_vocab]
        assert np.array_equal(found[0], wanted)
    forward.kv.release(ours)
    forward.kv.release(theirs)


def test_a_stop_ends_the_token(forward: Forward) -> None:
    region = prompt(forward)
    forward.device.stop_flag.set()
    forward.device.watch_stop_flag(True)
    try:
        assert EarlyExit(forward, LAYER).decode(Piece([1], 19, region), lambda _: True) is None
    finally:
        forward.device.watch_stop_flag(False)
        forward.device.stop_flag.clear()
        forward.kv.release(region)


@pytest.mark.parametrize("layer", [0, N_LAYER, -1])
def test_a_layer_outside_the_model_is_refused(forward: Forward, layer: int) -> None:
    with pytest.raises(UsageError, match="4 layers"):
        EarlyExit(forward, layer)
