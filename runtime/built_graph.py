"""What a Builder leaves: a graph's inputs, its output, and the descriptors that keep them alive."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.cell_views import CellViews
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph_inputs import Inputs
from edgeroute.runtime.tensor import Descriptors, host_bytes, host_view, is_on_host, shape


@dataclass(slots=True)
class Pass:
    """One of several passes that a graph makes, each over tokens that the one before chose."""

    inputs: Inputs
    logits: Tensor  # F32 [n_vocab, n_out]
    tokens: Tensor | None = None  # I32 [n_out], the strongest; the last pass chooses none
    host_logits: npt.NDArray[np.float32] | None = None
    host_tokens: npt.NDArray[np.int32] | None = None

    def settle(self) -> None:
        """Look where inputs and results of a placed graph are."""
        self.inputs.settle()
        n_vocab, n_out, _, _ = shape(self.logits)
        self.host_logits = host_view(self.logits, (n_out, n_vocab))
        if self.tokens is not None and is_on_host(self.tokens):
            self.host_tokens = host_bytes(self.tokens).view(np.int32)


@dataclass(slots=True)
class Graph:
    """A built graph. Lifetime: valid until `free`, and only while its memory is not moved."""

    pointer: int
    inputs: Inputs
    output: Tensor
    descriptors: Descriptors
    cells: CellViews
    host_output: npt.NDArray[np.float32] | None = None
    passes: list[Pass] = field(default_factory=list)
    """Of a graph that makes several."""

    def settle(self) -> None:
        """Look where inputs are, once the graph is placed."""
        for each in self.passes:
            each.settle()
        if not self.passes:
            self.inputs.settle()

    def free(self) -> None:
        """Free the descriptors; safe to call twice."""
        self.descriptors.free()
