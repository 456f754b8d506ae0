"""Token embeddings looked up by the processor, for devices that should not hold their table.

The table is the file's own pages, of which a token touches one row; few devices look rows of
quantised tables up, and a row is little to send.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import Model
from edgeroute.runtime.batch_shape import BatchShape, Segment, Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.device import Device
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.tensor import get_bytes, set_ids
from edgeroute.runtime.weights import Weights

_N_NODES = 16


class Embedder:
    """Looks embeddings up as the model's own graphs would: the same operations, the same bits.

    Not thread-safe: one thread owns it. Lifetime: close it before `weights`.
    """

    def __init__(self, model: Model, device: Device, weights: Weights, kv: KvCache) -> None:
        """Take what graphs are made of.

        A backend of its own computes them, which no stop flag stops: they are over at once.

        Args:
            model: says how embeddings are made of rows.
            device: the processor.
            weights: have the table, in memory that `device` reads.
            kv: the model's, which these graphs do not touch.
        """
        self._model = model
        self._device = Device(device.info)
        self._device.set_threads(1)
        self._weights = weights
        self._kv = kv
        try:
            self._graphs = GraphCache(self._device)
        except BaseException:
            self._device.close()
            raise

    @property
    def n_bytes(self) -> int:
        """Bytes of the compute buffer as it is now."""
        return self._graphs.n_bytes

    def look_up(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the embeddings of tokens: F32 (n, n_embd), a copy."""
        n = len(tokens)
        graph = self._graphs.find(n) or self._graphs.add(n, self._build(n))
        if graph.inputs.tokens is not None:
            set_ids(graph.inputs.tokens, tokens)
        self._device.compute(graph.pointer)
        found = np.empty((n, self._model.hparams.n_embd), np.float32)
        get_bytes(graph.output, found)
        return found

    def _build(self, n_tokens: int) -> Graph:
        shape = BatchShape((Segment(0, 0, n_tokens),), 0)
        span = Span((), embed=True, output=False)
        b = Builder(span, shape, self._weights, self._kv, _N_NODES)
        return b.finish(self._model.embed(b))

    def close(self) -> None:
        """Free graphs and the compute buffer; safe to call twice."""
        self._graphs.close()
        self._device.close()
