"""Built graphs by key: kept, found again, and dropped when their memory moves."""

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Final

from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_ops import lacking
from edgeroute.runtime.errors import CapacityError, UnsupportedModelError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.units import format_bytes

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
        self._device = device
        self._galloc = self._new_galloc()
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._latest: tuple[Hashable, Graph] | None = None
        """What was found or added last: an answer asks for the same graph token by token, and to
        hash the steps of all layers costs more than to see that they are the same."""
        self._described_bytes = 0
        self._n_built = 0

    def _new_galloc(self) -> int:
        galloc = ggml().ggml_gallocr_new(self._device.buffer_type)
        if galloc is None:
            raise CapacityError("ggml could not create a graph allocator")
        return galloc

    @property
    def n_bytes(self) -> int:
        """Bytes of the compute buffer as it is now."""
        return ggml().ggml_gallocr_get_buffer_size(self._galloc, 0)

    @property
    def n_built(self) -> int:
        """Graphs that were given memory so far."""
        return self._n_built

    def find(self, key: Hashable, start: int = 0) -> Graph | None:
        """Return the graph of `key`, or None if it is not kept.

        Args:
            key: what the graph was added under.
            start: cell with which its first sequence's region begins, see `BatchShape.anywhere`.
        """
        latest = self._latest
        if latest is not None and latest[0] == key:
            graph = latest[1]
        else:
            found = self._graphs.get(key)
            if found is None:
                return None
            graph = found
            self._graphs.move_to_end(key)
            self._latest = key, graph
        graph.cells.move(start)
        return graph

    def add(self, key: Hashable, graph: Graph) -> Graph:
        """Give a newly built graph its memory and keep it.

        Raises:
            CapacityError: no memory for the compute buffer; the cache stays usable.
        """
        self._place(graph)
        self._graphs[key] = graph
        self._latest = key, graph
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
        self._check_operations(graph)
        before = self.n_bytes
        if not ggml().ggml_gallocr_alloc_graph(self._galloc, graph.pointer):
            n_nodes = ggml().ggml_graph_n_nodes(graph.pointer)
            graph.free()
            self.renew()  # what was there has gone with the attempt, and no graph may use it
            self._device.check()
            raise CapacityError(
                f"device {self._device.info.name} has no memory for a compute buffer: a graph of "
                f"{n_nodes} operations wants more than the {format_bytes(before)} it had; lower "
                "n_ctx or n_ubatch, or give the device less to hold"
            )
        graph.settle()
        if self.n_bytes != before:
            self.clear()
        self._n_built += 1

    def _check_operations(self, graph: Graph) -> None:
        """Refuse a graph that the device cannot compute: ggml would end the process.

        A device of another machine says yes to everything, and the processor can do everything.
        """
        device = self._device
        if device.is_cpu or device.link is not None:
            return
        if names := lacking(device, graph.pointer):
            graph.free()
            raise UnsupportedModelError(
                f"device {device.info.name} cannot compute {', '.join(names)}; take another device"
            )

    def renew(self) -> None:
        """Drop every graph and give the buffer back; graphs that are added get a new one."""
        self.close()
        self._galloc = self._new_galloc()

    def clear(self) -> None:
        """Drop every graph; the buffer stays."""
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._latest = None
        self._described_bytes = 0

    def close(self) -> None:
        """Drop every graph and the buffer; safe to call twice."""
        self.clear()
        if self._galloc:
            ggml().ggml_gallocr_free(self._galloc)
            self._galloc = 0
