"""Run a dense model of which not all layers are there: a graph per streamed layer.

Layers that are always there are computed between them, several to a graph. The operations
and their order are those of the whole graph, so that the logits are the same bits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import Model
from edgeroute.models.forward import Forward, Piece, shape_of
from edgeroute.models.standins import fill_before
from edgeroute.runtime.batch_shape import BatchShape, Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import Region, round_cells
from edgeroute.runtime.depth import Step
from edgeroute.runtime.device import Device
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.rooms import LayerPager

SHAPES_KEPT = 4


class _Step(NamedTuple):
    """What one graph computes, the streamed units that it reads, and those read no more."""

    span: Span
    units: tuple[int, ...]
    done: tuple[int, ...]


class Crossing(NamedTuple):
    """How the layers that stay draft by themselves: over `block` by a stand-in, on from `end`."""

    block: frozenset[int]
    end: int
    spans: tuple[Span, ...]


class LayeredForward(Forward):
    """A dense model on one device, some of its layers behind a pager.

    Not thread-safe: one thread owns it. Lifetime: close it before `kv` and `pager`.
    """

    def __init__(self, model: Model, device: Device, pager: LayerPager, kv: KvCache) -> None:
        super().__init__(model, device, pager, kv)
        self._pager = pager
        self._steps_of: dict[tuple[Span, ...], list[_Step]] = {}
        self._left: tuple[int, Sequence[Piece]] = -1, ()
        """What the stream holds: the layer that it is before, and whose tokens' states."""
        self._moved: dict[int, int] = {}
        """Cells of these tokens that were moved since, to where from."""
        self._before = np.zeros(model.hparams.n_embd, np.float32)
        self.bridge: Crossing | None = None
        """Serves while just its block streams."""
        self._keep_graphs()

    def _keep_graphs(self) -> None:
        self._cut_for = self._pager.streamed
        self.graphs.max_graphs = SHAPES_KEPT * len(self._steps(self.whole))

    def reserve(self, n_tokens: int, n_kv: int, n_out: int = 1) -> None:
        """Size the compute buffer for `n_tokens` that see `n_kv` cells, and `n_out` logits.

        Raises:
            CapacityError: no memory for it.
        """
        shape = shape_of(n_tokens, round_cells(n_kv), n_out=n_out)._replace(lora=self.widest_lora)
        for step in self._steps(self.whole):
            self._graph(step.span, shape)
        self.graphs.clear()

    def run(
        self, pieces: Sequence[Piece], spans: Sequence[Span] | None = None, *, borrow: bool = False
    ) -> npt.NDArray[np.float32] | None:
        """Compute a batch, as `Forward.run` does; a layer that no span names is not read.

        Raises:
            ModelFileError: a layer cannot be read.
        """
        shape = self.shape(pieces)
        self._left = -1, ()
        self._moved.clear()
        self._pager.reconsider()
        if self._pager.streamed is not self._cut_for:  # other layers stream than at the last pass
            self.graphs.clear()
            self._steps_of.clear()
            self._keep_graphs()
        steps = self._steps(self.whole if spans is None else tuple(spans))
        units = [unit for step in steps for unit in step.units]
        self._pager.begin(units, prefill=shape.n_tokens > len(pieces))
        graph: Graph | None = None
        for step in steps:
            graph = self._graph(step.span, shape)  # built and fed while its layer is on its way
            self._fill(graph, pieces, shape)
            if not self._pager.hold(step.units) or not self.device.compute(graph.pointer):
                return None
            self._pager.release(step.done)
        last = steps[-1].span if steps else self.whole[0]
        if last.output and last.steps and not last.embed:
            self._left = last.steps[0].il, pieces
        if graph is None or not steps[-1].span.output or not shape.n_out:
            return np.empty((0, self.model.hparams.n_vocab), np.float32)
        return self.logits(graph, shape, borrow)

    def state_before(self, il: int, region: Region, cell: int) -> npt.NDArray[np.float32] | None:
        """Return the residual stream before layer `il` of a token of the last pass: F32 (n_embd,).

        None where the last pass had no such token, or did not begin a graph at that layer.

        Args:
            il: the layer.
            region: the token's.
            cell: where it is kept, from the region's first on.
        """
        left, pieces = self._left
        row, cell = 0, self._moved.get(cell, cell)
        for piece in pieces if left == il else ():
            if piece.region == region and 0 <= cell - piece.cell < len(piece.tokens):
                states = self.residual(row + cell - piece.cell + 1)
                return states[len(states) - 1 :].reshape(-1)
            row += len(piece.tokens)
        return None

    def move(self, region: Region, cell: int, to: int) -> None:
        """Move a token of a region, and remember whose state is whose."""
        super().move(region, cell, to)
        self._moved[to] = cell

    def go_on_from(self, state: npt.NDArray[np.float32]) -> None:
        """Tell bridges of the next pass what was behind their block at the token before."""
        self._before = state

    def _fill(self, graph: Graph, pieces: Sequence[Piece], shape: BatchShape) -> None:
        super()._fill(graph, pieces, shape)
        fill_before(graph.inputs, self._before, shape.n_tokens)

    def _steps(self, spans: tuple[Span, ...]) -> list[_Step]:
        """Cut spans where streamed layers begin and end."""
        steps = self._steps_of.get(spans)
        if steps is None:
            if len(self._steps_of) >= SHAPES_KEPT:
                self._steps_of.clear()
            cut = [part for span in spans for part in self._cut(span)]
            last_use = {unit: i for i, (_, units) in enumerate(cut) for unit in units}
            steps = self._steps_of[spans] = [
                _Step(part, units, tuple(unit for unit in units if last_use[unit] == i))
                for i, (part, units) in enumerate(cut)
            ]
        return steps

    def _cut(self, span: Span) -> Iterator[tuple[Span, tuple[int, ...]]]:
        """Cut one span. The head stays with the last layer, which drops unwanted tokens for it."""
        streamed, head = self._pager.streamed, self.model.hparams.n_layer
        head_streams = span.output and head in streamed
        groups: list[list[Step]] = []
        before_streams = False
        for i, step in enumerate(span.steps):
            streams = step.il in streamed and step.reads
            alone = streams or (head_streams and i == len(span.steps) - 1)
            if not groups or alone or before_streams:
                groups.append([])
            groups[-1].append(step)
            before_streams = streams
        groups = groups or [[]]
        for i, group in enumerate(groups):
            output = span.output and i == len(groups) - 1
            units = [step.il for step in group if step.il in streamed and step.reads]
            if output and head_streams:
                units.append(head)
            embed = span.embed and i == 0
            norm = span.norm and i == len(groups) - 1
            part = span._replace(steps=tuple(group), embed=embed, output=output, norm=norm)
            yield part, tuple(units)
