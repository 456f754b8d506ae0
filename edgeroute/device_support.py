"""Which layers a device can compute: those whose every operation it says it has."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from edgeroute.models.base import Model
from edgeroute.models.forward import room_for_nodes, shape_of
from edgeroute.models.steps import build_step
from edgeroute.runtime.batch_shape import BatchShape, Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import CELL_BUCKET
from edgeroute.runtime.depth import Step
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_ops import lacking, lying_on
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.lora_graph import adapters_lack
from edgeroute.runtime.tensor import F32
from edgeroute.runtime.weights import ResidentWeights, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What graphs of a model's layers depend on: its file, its KV cells, and how it is run.

    `kv` is what `edgeroute.loaded.kv_shape` gives, `n_ubatch` that of RunParams; `adapters` says
    whether layers may have some.
    """

    file: GGUFFile
    model: Model
    kv: KvShape
    n_ubatch: int
    adapters: bool = False


def unsupported(device: Device, probe: Probe) -> dict[int, set[str]]:
    """List what a device lacks, by layer; the head counts as layer `n_layer`.

    One graph per layer is described for one token and one for a part of a prompt; no weights are
    allocated and nothing is computed. Layers that lack nothing are not in the answer, so that
    it is empty for a device that can do everything (and, unasked, for the processor).

    Returns:
        For each such layer the operations, such as `MUL_MAT with weights of q4_K`.
    """
    if device.is_cpu:
        return {}
    found: dict[int, set[str]] = {}
    with _described(device, probe) as (weights, kv):
        for n_tokens in (1, probe.n_ubatch):
            shape = shape_of(n_tokens, CELL_BUCKET, n_out=1)
            for il in range(probe.model.hparams.n_layer + 1):
                graph = layer_graph(probe.model, il, shape, weights, kv)
                names = lacking(device, graph.pointer)
                graph.free()
                if names:
                    found.setdefault(il, set()).update(names)
    if probe.adapters and (names := adapters_lack(device)):
        for il in range(probe.model.hparams.n_layer):
            found.setdefault(il, set()).update(names)
    return found


def layer_graph(model: Model, il: int, shape: BatchShape, weights: Weights, kv: KvCache) -> Graph:
    """Build layer `il` alone, or the head as layer `n_layer`, from a residual stream given to it.

    The stream is the graph's input `x` in `Inputs.more`: F32 [n_embd, n_tokens], of the head
    [n_embd, n_out].
    """
    hparams = model.hparams
    span = Span((Step(il),), embed=False, output=False)
    b = Builder(span, shape, weights, kv, room_for_nodes(hparams, 1, shape))
    if il == hparams.n_layer:
        return b.finish(model.head(b, b.more("x", F32, hparams.n_embd, shape.n_out)))
    x = b.more("x", F32, hparams.n_embd, shape.n_tokens)
    return b.finish(build_step(b, model, Step(il), x, last=False))


@contextlib.contextmanager
def _described(device: Device, probe: Probe) -> Iterator[tuple[Weights, KvCache]]:
    """Describe weights and a small KV pool as if they lay on the device."""
    with contextlib.ExitStack() as own:
        kv = KvCache(own.enter_context(Device.open("cpu")), probe.kv, CELL_BUCKET)
        own.callback(kv.close)
        weights = ResidentWeights(probe.file, device, probe.model.specs())
        own.callback(weights.close)
        tensors = [*kv.k, *kv.v, *map(weights.__getitem__, weights.infos)]
        tensors += {each for pair in kv.rotations for each in pair if each is not None}
        own.enter_context(lying_on(device, tensors))
        yield weights, kv
