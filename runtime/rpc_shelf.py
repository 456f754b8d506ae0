"""Graphs that a server keeps: what was sent once need not be sent again."""

from edgeroute.runtime.rpc_frames import MOST_KEPT_BYTES, N_KEPT


class GraphShelf:
    """What stands in which slot of a server, by the graphs' bytes; the least recent leaves first.

    A model that is computed layer by layer has a graph for each, and each comes back with the
    next token.
    """

    def __init__(self, n_slots: int = N_KEPT) -> None:
        self._n_slots = n_slots
        self._slots: dict[bytes, int] = {}  # the least recent first

    def find(self, graph: bytes) -> int | None:
        """Return the slot of a graph that is there."""
        slot = self._slots.pop(graph, None)
        if slot is not None:
            self._slots[graph] = slot
        return slot

    def put(self, graph: bytes) -> int | None:
        """Return the slot for a graph that is not there; None where it is too large to keep."""
        if len(graph) > MOST_KEPT_BYTES:
            return None
        slot = len(self._slots)
        if slot == self._n_slots:
            slot = self._slots.pop(next(iter(self._slots)))
        self._slots[graph] = slot
        return slot
