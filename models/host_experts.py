"""Experts that the processor computes because the device has not got them: no upload, no slot.

Their weights lie in host memory, in the slots of the DRAM tier. The operations and their order are
those of the device's own graphs, so that equal kernels give equal bits whoever computes a pair.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import MoeModel
from edgeroute.models.forward import room_for_nodes, shape_of
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.joints import Joint
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.tensor import F32, I32, get_bytes, set_bytes
from edgeroute.runtime.weights import ResidentWeights, Weights, apart

GRAPHS_PER_LAYER: Final = 8
"""Numbers of pairs, per layer, whose graphs are kept."""
MOST_KEPT: Final = 64
"""Pairs of which a graph is kept: a prompt's numbers hardly come again."""

Told = Callable[[int, int, float], None]
"""Learns of experts, pairs of token and expert, and seconds, each time some were computed."""


class HostWeights(Closing):
    """What the processor needs of a model to compute its experts, in host memory.

    Expert tensors are those of `slots`, biases are the file's own. Nothing else is here: what
    `slots` answers beside may lie on a device. Lifetime: close it before `slots` and `file`.
    """

    def __init__(self, model: MoeModel, file: GGUFFile, cpu: Device, slots: Weights) -> None:
        """Map the biases, where the family has any.

        Raises:
            CapacityError: no memory for them.
        """
        layers = range(model.hparams.n_layer)
        self._paged = {name for il in layers for name in model.expert_tensors(il)}
        self._slots = slots
        biases = {f"{name.removesuffix('.weight')}.bias" for name in self._paged}
        specs = [spec for spec in model.specs() if spec.name in biases]
        self._biases = ResidentWeights(file, cpu, specs)
        try:
            if specs:
                self._biases.load()
        except BaseException:
            self.close()
            raise

    @property
    def n_bytes(self) -> int:
        """Bytes of the biases."""
        return self._biases.plan.mapped_bytes + self._biases.plan.copied_bytes

    def __getitem__(self, name: str) -> Tensor:
        return self._slots[name] if name in self._paged else self._biases[name]

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None where no such one is in host memory."""
        return self._slots[name] if name in self._paged else self._biases.get(name)

    def joints(self, names: Sequence[str]) -> list[Joint]:
        """See Weights; nothing here is joined."""
        return apart(self, names)

    def close(self) -> None:
        """Let the biases go; safe to call twice."""
        self._biases.close()


class HostExperts(Closing):
    """Computes pairs of token and expert on this machine's processor.

    Not thread-safe: one thread owns it, and nobody else computes on `cpu` meanwhile. Lifetime:
    it owns `weights`; close it before what those stand on, and before `cpu`.

    Attributes:
        told: learns what was computed, and in what time.
        n_experts: experts of a layer computed so far, counted each time; `n_pairs` pairs of
            token and expert, in `seconds`.
    """

    def __init__(self, model: MoeModel, cpu: Device, weights: HostWeights, kv: KvCache) -> None:
        """Take what is needed; `kv` is what the model's graphs are built with, and not touched."""
        self._model, self._cpu, self._weights, self._kv = model, cpu, weights, kv
        self._graphs = GraphCache(cpu, GRAPHS_PER_LAYER * model.hparams.n_layer)
        self.told: Told | None = None
        self.n_experts = self.n_pairs = 0
        self.seconds = 0.0

    @property
    def n_bytes(self) -> int:
        """Bytes of the compute buffer and of what is in host memory for this alone."""
        return self._graphs.n_bytes + self._weights.n_bytes

    def reserve(self, n_pairs: int) -> None:
        """Size the compute buffer for so many pairs.

        Raises:
            CapacityError: no memory for it.
        """
        layers = range(self._model.hparams.n_layer)
        il = next(il for il in layers if self._model.is_moe(il))
        with self._graphs.passing(self._build(il, n_pairs)):
            pass
        self._graphs.clear()

    def prepare(self, il: int, n_pairs: int) -> None:
        """Have the graph for so many pairs of a layer built, where it will be kept."""
        if n_pairs <= MOST_KEPT:
            self._kept(il, n_pairs)

    def _kept(self, il: int, n_pairs: int) -> Graph:
        key = il, n_pairs
        return self._graphs.find(key) or self._graphs.add(key, self._build(il, n_pairs))

    def compute(
        self, il: int, h: npt.NDArray[np.float32], experts: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32] | None:  # fmt: skip
        """Compute pairs.

        Args:
            il: layer.
            h: normed input of each pair's token, F32 (n_pairs, n_embd).
            experts: number of each pair's expert, I32 (n_pairs,).
            slots: where it is in the slot tensors, I32 (n_pairs,).

        Returns:
            Outputs, not weighted, F32 (n_pairs, n_embd); None if that was stopped.

        Raises:
            ComputeError: ggml failed.
        """
        if len(experts) <= MOST_KEPT:
            return self._compute(self._kept(il, len(experts)), h, experts, slots)
        with self._graphs.passing(self._build(il, len(experts))) as graph:
            return self._compute(graph, h, experts, slots)

    def _compute(
        self, graph: Graph, h: npt.NDArray[np.float32], experts: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32] | None:  # fmt: skip
        more = graph.inputs.more
        set_bytes(more["h"], np.ascontiguousarray(h))
        set_bytes(more["slots"], np.ascontiguousarray(slots))
        if "ids" in more:  # of families whose experts have biases
            set_bytes(more["ids"], np.ascontiguousarray(experts))
        if not self._cpu.compute(graph.pointer):
            return None
        found = np.empty((len(experts), self._model.hparams.n_embd), np.float32)
        get_bytes(graph.output, found)
        return found

    def book(self, n_experts: int, n_pairs: int, seconds: float) -> None:
        """Enter what pairs of so many experts took, rows carried to and fro."""
        self.n_experts += n_experts
        self.n_pairs += n_pairs
        self.seconds += seconds
        if self.told is not None:
            self.told(n_experts, n_pairs, seconds)

    def close(self) -> None:
        """Free graphs, the compute buffer and the weights; safe to call twice."""
        self._graphs.close()
        self._weights.close()

    def _build(self, il: int, n_pairs: int) -> Graph:
        batch = shape_of(1, round_cells(1), n_out=1)
        span = Span((), embed=False, output=False)
        n_nodes = room_for_nodes(self._model.hparams, 0, batch)
        b = Builder(span, batch, self._weights, self._kv, n_nodes)
        h = b.more("h", F32, self._model.hparams.n_embd, 1, n_pairs)
        slots, ids = b.more("slots", I32, 1, n_pairs), b.more("ids", I32, 1, n_pairs)
        return b.finish(self._model.experts(b, il, h, ids, slots))
