"""Built graphs by key: kept, found again, and dropped when their memory moves."""

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Final

from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.graph import Graph

MAX_BYTES: Final = 48 << 20
"""Of the descriptors of all graphs kept. One of a pass of 16 sequences over 30 layers takes 3 MiB,
and a server meets many shapes."""
KEPT_AT_LEAST: Final = 4


class GraphCache:
    """Graphs by key, least recently used out first, all sharing one compute buffer.

    Only one graph runs at a time, so they may overlap in memory. When the buffer has to
    grow it moves, and every graph built before is dropped.
    """

    def __init__(self, device: Device, max_graphs: int = 48) -> None:
        galloc = ggml().ggml_gallocr_new(device.buffer_type)
        if galloc is None:
            raise CapacityError("ggml could not create a graph allocator")
        self._galloc = galloc
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._described_bytes = 0
        self.n_built = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the compute buffer as it is now."""
        return ggml().ggml_gallocr_get_buffer_size(self._galloc, 0)

    def find(self, key: Hashable) -> Graph | None:
        """Return the graph of `key`, or None if it is not kept."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def add(self, key: Hashable, graph: Graph) -> Graph:
        """Give a newly built graph its memory and keep it.

        Raises:
            CapacityError: no memory for the compute buffer; the cache stays usable.
        """
        self._place(graph)
        self._graphs[key] = graph
        self._described_bytes += graph.descriptors.n_bytes
        while len(self._graphs) > self.max_graphs or (
            self._described_bytes > MAX_BYTES and len(self._graphs) > KEPT_AT_LEAST
        ):
            oldest = self._graphs.popitem(last=False)[1]
            self._described_bytes -= oldest.descriptors.n_bytes
            oldest.free()
        return graph

    @contextlib.contextmanager
    def passing(self, graph: Graph) -> Iterator[Graph]:
        """Give a graph of a shape that will hardly come again its memory, and free it after.

        Raises:
            CapacityError: no memory for the compute buffer; the cache stays usable.
        """
        self._place(graph)
        try:
            yield graph
        finally:
            graph.free()

    def _place(self, graph: Graph) -> None:
        """Give a new graph its memory; if the buffer had to grow, all others are dropped."""
        before = self.n_bytes
        if not ggml().ggml_gallocr_alloc_graph(self._galloc, graph.pointer):
            graph.free()
            raise CapacityError("no memory for a compute buffer; lower n_ctx or n_ubatch")
        graph.inputs.forget_unread()
        if self.n_bytes != before:
            self.clear()
        self.n_built += 1

    def clear(self) -> None:
        """Drop every graph; the buffer stays."""
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._described_bytes = 0

    def close(self) -> None:
        """Drop every graph and the buffer; safe to call twice."""
        self.clear()
        if self._galloc:
            ggml().ggml_gallocr_free(self._galloc)
            self._galloc = 0
