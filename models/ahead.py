"""Several tokens of every sequence in one graph: each the strongest after the one before it.

Between two passes the host reads logits, chooses, and feeds the next; a small model waits for that
a twentieth of its time. Here ggml's argmax chooses within the graph, and the host, which reads all
logits afterwards, does its part for several tokens at once. The operations of each token are those
of a pass of its own, so that the bits are the same.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.models.pruning import n_described
from edgeroute.runtime.batch_shape import BatchShape
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.tensor import F32_BYTES

WISHES: Final = 16
"""After which a graph is built: until then so many runs have lost what building it costs."""
WISHES_KEPT: Final = 64


class Computed(NamedTuple):
    """What one of several passes gave: logits F32 (n, n_vocab); what the next was fed, I32 (n,).

    Lifetime: until the next run.
    """

    logits: npt.NDArray[np.float32]
    fed: npt.NDArray[np.int32] | None


class Ahead:
    """Makes several passes of a model at once. Not thread-safe: one thread owns it."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._wishes: OrderedDict[Hashable, int] = OrderedDict()

    @staticmethod
    def can(forward: Forward) -> bool:
        """Whether one graph of this model computes logits from token ids, in the host's memory."""
        return type(forward) is Forward and forward.device.is_cpu and forward.embedder is None

    def ready(self, pieces: Sequence[Piece], n_passes: int) -> bool:
        """Whether it pays to compute so many tokens of each sequence, which is asked every time.

        Not where the later ones see more cells than the first, where the logits do not fit beside
        what a prompt takes, nor before it has been asked for often enough to build a graph for it.
        """
        for piece in pieces:
            end = piece.pos + n_passes
            if end > piece.region.n_cells or round_cells(end) != round_cells(piece.pos + 1):
                return False
        key, start = self._key(self._forward.shape(pieces), n_passes)
        if self._forward.graphs.find(key, start) is not None:
            return True
        n_bytes = n_passes * len(pieces) * self._forward.model.hparams.n_vocab * F32_BYTES
        if 2 * n_bytes > self._forward.graphs.n_bytes:
            return False
        wishes = self._wishes.pop(key, 0) + 1
        if wishes > WISHES:
            return True
        self._wishes[key] = wishes
        if len(self._wishes) > WISHES_KEPT:
            self._wishes.popitem(last=False)
        return False

    def run(self, pieces: Sequence[Piece], n_passes: int) -> list[Computed] | None:
        """Compute `n_passes` tokens of each sequence and write their keys and values.

        Args:
            pieces: one token each, with logits. The first pass computes these, each other what
                the one before found strongest: of equal logits the last, see `Computed.fed`.
            n_passes: see `ready`.

        Returns:
            Logits of all passes, in the device's own memory; None when it was stopped.

        Raises:
            ComputeError: ggml failed, or a piece lies outside its region.
        """
        shape = self._forward.shape(pieces)
        graph = self._graph(shape, n_passes)
        for i, each in enumerate(graph.passes):
            moved = [piece._replace(pos=piece.pos + i) for piece in pieces] if i else pieces
            self._forward.write_inputs(each.inputs, moved, shape)
        if not self._forward.device.compute(graph.pointer):
            return None
        found = []
        for each in graph.passes:
            if each.host_logits is None:
                raise ComputeError("the host cannot read what several passes computed")
            found.append(Computed(each.host_logits, each.host_tokens))
        return found

    def _key(self, shape: BatchShape, n_passes: int) -> tuple[Hashable, int]:
        alike, start = shape.anywhere()
        return ("ahead", n_passes, alike), start

    def _graph(self, shape: BatchShape, n_passes: int) -> Graph:
        key, start = self._key(shape, n_passes)
        graphs = self._forward.graphs
        return graphs.find(key, start) or graphs.add(key, self._build(shape, n_passes))

    def _build(self, shape: BatchShape, n_passes: int) -> Graph:
        forward, model = self._forward, self._forward.model
        (span,) = forward.whole
        b = forward.builder(span, shape, n_described(span.steps), n_passes)
        for i in range(n_passes):
            if i:
                b = b.following()
            x = forward.pass_layers(b, span.steps, model.embed(b), narrow=True)
            logits = model.head(b, b.select_outputs(x))
            b.end_pass(logits)
        return b.finish(logits)
