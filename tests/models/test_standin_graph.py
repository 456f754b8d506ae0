"""What stand-ins compute: gate and up as one product, and nothing at position 0."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import DepthFile, fingerprint
from edgeroute.models.standins import tensor_name
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.joints import Joint
from edgeroute.runtime.weights import ResidentWeights, Weights, apart
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.depth_probe import Floats, Probe
from edgeroute.tools.standin_records import StandInTensor
from edgeroute.tools.synth import make

N_LAYER, N_EMBD, IL = 3, 256, 1
TOKENS = [int(t) for t in np.random.default_rng(2).integers(4, 300, 12)]


class _Apart:
    """Weights that are never joined."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def get(self, name: str) -> Tensor | None:
        return self._weights.get(name)

    def joints(self, names: Sequence[str]) -> list[Joint]:
        return apart(self, names)


@pytest.fixture(params=["Q8_0", "Q4_K", "F16"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Probe, DepthPlan, ResidentWeights]]:
    """A model whose second feed-forward has a stand-in of 512 neurons."""
    path, width = tmp_path / "llama.gguf", 512
    make("llama", path, n_layer=N_LAYER)
    rng, kind = np.random.default_rng(1), GGMLQuantizationType[request.param]
    tensors = {tensor_name("x", IL, "ffn", "norm"): StandInTensor.vector(np.ones(N_EMBD))} | {
        tensor_name("x", IL, "ffn", name): StandInTensor.matrix(rng.normal(0, 0.1, ne), kind)
        for name, ne in {
            "gate": (width, N_EMBD), "up": (width, N_EMBD), "down": (N_EMBD, width),
        }.items()
    }  # fmt: skip
    layers = [LayerDepth()] * N_LAYER
    layers[IL] = LayerDepth(ffn="approximate")
    plan = DepthPlan(name="x", layers=tuple(layers), compute=0.9)
    settings = RunParams(n_ctx=256, n_ubatch=256, n_kv=256, threads=2, speculate="off")
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(contextlib.closing(LoadedModel(path, settings)))
        out = tmp_path / "x.depth"
        write_depth_file(out, DepthContent(model=fingerprint(loaded.file), data="0" * 64,
                                           plans=[plan], tensors=tensors))  # fmt: skip
        file = stack.enter_context(DepthFile(out, loaded.file, loaded.model.hparams))
        probe = stack.enter_context(contextlib.closing(Probe(loaded)))
        yield probe, plan, stack.enter_context(probe.standing_in(file, [plan]))


def logits(probe: Probe, plan: DepthPlan, weights: Weights) -> Floats:
    probe.graphs.clear()
    probe.standins = weights
    found = probe.resume(probe.window(TOKENS), plan.steps(), plan.name)
    return np.array(found)


def test_gate_and_up_are_one_product_with_the_bits_of_two(
    opened: tuple[Probe, DepthPlan, ResidentWeights],
) -> None:
    probe, plan, weights = opened
    names = [tensor_name("x", IL, "ffn", name) for name in ("gate", "up")]
    assert [joint.names for joint in weights.joints(names)] == [tuple(names)]
    assert np.array_equal(logits(probe, plan, weights), logits(probe, plan, _Apart(weights)))


def test_at_position_0_it_adds_nothing(opened: tuple[Probe, DepthPlan, ResidentWeights]) -> None:
    probe, plan, weights = opened
    layers = list(plan.layers)
    layers[IL] = LayerDepth(ffn="skip")
    skipped = DepthPlan(name="y", layers=tuple(layers), compute=0.9)
    near, none = logits(probe, plan, weights), logits(probe, skipped, weights)
    assert np.array_equal(near[0], none[0])
    assert not np.array_equal(near[1], none[1])
