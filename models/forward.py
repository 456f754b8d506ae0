"""Run a model over batches: shapes to graphs, numbers into inputs, logits out."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import Hparams, Model
from edgeroute.models.blocks import output_norm
from edgeroute.models.embedder import Embedder
from edgeroute.models.feeding import Feeder, fill_lora
from edgeroute.models.pruning import fill_choice, n_described
from edgeroute.models.standins import fill_switches
from edgeroute.models.steps import build_step
from edgeroute.models.stream import Stream
from edgeroute.runtime.batch_shape import BatchShape, Segment, Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import Region, round_cells
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.graph_inputs import Inputs
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.lora import (
    LoraRow,
    LoraShape,
    LoraSlots,
    lora_shape,
)
from edgeroute.runtime.plain_weights import WIDE_FROM, PlainWeights
from edgeroute.runtime.tensor import (
    F32,
    get_bytes,
    host_view,
    set_bytes,
)
from edgeroute.runtime.token_choice import BY_ATTENTION, TokenRule
from edgeroute.runtime.weights import Weights

NODES_PER_LAYER, NODES_PER_SEGMENT, NODES_BASE = 72, 12, 64
NODES_PER_MOE, NODES_PER_EXPERT = 40, 2  # more than a dense layer has; per expert used
NODES_PER_LORA, NODES_PER_SLOT = 60, 20  # more with adapters; per slot that a token uses
Part = TypeVar("Part", bound=Hashable)
EMBEDDINGS = "embeddings"
"""The input of graphs that are given token embeddings."""


class Branch(NamedTuple):
    """Where a token is kept that is one of several for its position, and what it sees.

    Cells count from the first of the sequence's region.

    Attributes:
        cell: its own.
        n_shared: leading cells that all branches see.
        above: cells behind those that it sees, in rising order, all before its own.
    """

    cell: int
    n_shared: int
    above: tuple[int, ...]


class Piece(NamedTuple):
    """New tokens of one sequence: ids, the position of the first, and where its cells are.

    `n_out` of the last tokens get logits; `lora` is what an adapter adds to all of them. A token
    with a `branch` is alone; others have the cell of their position, and see all before it.
    """

    tokens: Sequence[int]
    pos: int
    region: Region
    n_out: int = 1
    lora: LoraRow | None = None
    branch: Branch | None = None

    @property
    def cell(self) -> int:
        """Where its first token is kept, from the region's first cell on."""
        return self.pos if self.branch is None else self.branch.cell


class Forward:
    """One model on one device with its weights and KV pool.

    Not thread-safe: one thread owns it. Lifetime: close it before `kv` and `weights`.
    """

    plain: PlainWeights | None = None
    """What passes of WIDE_FROM tokens and more multiply with, where weights are repacked."""

    def __init__(self, model: Model, device: Device, weights: Weights, kv: KvCache) -> None:
        self.model = model
        self.device = device
        self.weights = weights
        self.kv = kv
        self.graphs = GraphCache(device)
        self.embedder: Embedder | None = None
        """Looks token embeddings up where `device` does not; graphs are built for it."""
        self.lora: LoraSlots | None = None
        self.lora_width = 1
        """Slots that one adapter takes at most."""
        self.standins: Weights | None = None
        """Stand-ins of the plans that may be run, by the names in models/standins.py."""
        self.token_rule: TokenRule = BY_ATTENTION
        """Which tokens a step computes that keeps a part of a prompt. Graphs are built for it:
        clear them after a change."""
        self.whole = self.spans(all_run(range(model.hparams.n_layer)))
        self._feeder = Feeder(kv.n_cells, model.n_swa)
        self._stream: Stream | None = None

    @staticmethod
    def spans(steps: Sequence[Step], plan: str = "") -> tuple[Span, ...]:
        """Return what `run` takes to compute a whole pass in these steps, in one graph."""
        return (Span(tuple(steps), embed=True, output=True, plan=plan),)

    def by_layer(self) -> tuple[Span, ...]:
        """Split the whole model into one span per layer, embedding and head apart."""
        return split_steps(self.whole[0])

    def headless(self) -> tuple[Span, ...]:
        """Split the whole model before its head: what `residual` then gives is the last layer's."""
        return self.whole[0]._replace(output=False), Span((), embed=False, output=True)

    def normed(self) -> tuple[Span, ...]:
        """Compute the whole model but for its head, and of all tokens.

        What `residual` then gives are final hidden states, behind the output norm.
        """
        return (self.whole[0]._replace(output=False, norm=True),)

    def reserve(self, n_tokens: int, n_kv: int, n_out: int = 1) -> None:
        """Size the compute buffer for `n_tokens` that see `n_kv` cells, and `n_out` logits.

        Raises:
            CapacityError: no memory for it.
        """
        shape = shape_of(n_tokens, round_cells(n_kv), n_out=n_out)._replace(lora=self.widest_lora)
        self._graph(self.whole[0], shape)
        self.graphs.clear()

    def device_of(self, name: str) -> Device:
        """Return the device that computes with a weight."""
        return self.device

    @property
    def widest_lora(self) -> LoraShape | None:
        """What a batch with one adapter takes at most; memory is sized for it.

        A mixture may take more: the compute buffer grows then, and is entered as it is.
        """
        return None if self.lora is None else LoraShape(self.lora_width, weighted=True)

    def embed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Look token embeddings up: F32 (n, n_embd)."""
        if self.embedder is not None:
            return self.embedder.look_up(tokens)
        span, shape = Span((), embed=True, output=False), shape_of(len(tokens), 0, n_out=0)
        b = self.builder(span, shape, 0)
        with self.graphs.passing(b.finish(self.model.embed(b))) as graph:
            set_bytes(b.tokens(), np.array(tokens, np.int32))
            if not self.device.compute(graph.pointer):
                raise ComputeError("looking token embeddings up was stopped")
            found = np.empty((len(tokens), self.model.hparams.n_embd), np.float32)
            get_bytes(graph.output, found)
        return found

    def run(
        self,
        pieces: Sequence[Piece],
        spans: Sequence[Span] | None = None,
        *,
        borrow: bool = False,
    ) -> npt.NDArray[np.float32] | None:
        """Compute a batch and write its keys and values.

        Args:
            pieces: tokens within a piece see those before them. Several of one sequence, one
                token each and in the order of their cells, have the bits of as many runs: keys of
                all are stored before any of them attends.
            spans: what to compute, in order; None is the whole model in one graph.
            borrow: return the device's own memory where the host can read it; those logits
                are valid until the next run. A copy of them costs 1 % of a decode step.

        Returns:
            Logits F32 (n_out over all pieces, n_vocab), in the order of `pieces`; None when
            the device's abort callback stopped it. Cells of these pieces are undefined then.

        Raises:
            ComputeError: ggml failed, or a piece lies outside its region.
        """
        shape = self.shape(pieces)
        graph: Graph | None = None
        ends = False
        for span in self.whole if spans is None else spans:
            graph, ends = self._graph(span, shape), span.output
            self._fill(graph, pieces, shape)
            if not self.device.compute(graph.pointer):
                return None
        if graph is None or not ends or not shape.n_out:
            return np.empty((0, self.model.hparams.n_vocab), np.float32)
        return self.logits(graph, shape, borrow)

    @staticmethod
    def shape(pieces: Sequence[Piece]) -> BatchShape:
        """Return what graphs for these pieces depend on.

        Raises:
            ComputeError: a piece lies outside its region.
        """
        return BatchShape(
            tuple([_segment(piece) for piece in pieces]),
            sum([piece.n_out for piece in pieces]),
            lora_shape([(piece.lora, piece.n_out) for piece in pieces]),
        )

    def logits(self, graph: Graph, shape: BatchShape, borrow: bool) -> npt.NDArray[np.float32]:
        """Read what a graph that ends in the head computed: see `run`."""
        if borrow and graph.host_output is not None:
            return graph.host_output
        logits = np.empty((shape.n_out, self.model.hparams.n_vocab), np.float32)
        get_bytes(graph.output, logits)
        self.device.check()
        return logits

    def residual(self, n_tokens: int) -> npt.NDArray[np.float32]:
        """Return what the last span without output left: F32 (n_tokens, n_embd), a copy.

        Raises:
            ComputeError: no such span has run with so many tokens.
        """
        if self._stream is None or self._stream.n_tokens < n_tokens:
            raise ComputeError(f"no span has left a residual stream of {n_tokens} tokens yet")
        found = np.empty((n_tokens, self.model.hparams.n_embd), np.float32)
        get_bytes(self._stream.tensor, found)
        self.device.check()
        return found

    def set_residual(self, states: npt.NDArray[np.float32]) -> None:
        """Let the next span without embedding begin with these states, as `residual` gives them.

        Raises:
            ComputeError: they are of another shape, or no span has left so many tokens yet.
        """
        n_embd = self.model.hparams.n_embd
        held = 0 if self._stream is None else self._stream.n_tokens
        if states.ndim != 2 or states.shape[1] != n_embd or len(states) > held:
            raise ComputeError(
                f"states {states.shape} do not fit a stream of {held} tokens of {n_embd} values"
            )
        if self._stream is not None:
            set_bytes(self._stream.tensor, np.ascontiguousarray(states, np.float32))

    def move(self, region: Region, cell: int, to: int) -> None:
        """Move a token of a region to the cell of its position, once its branch is the answer."""
        source, target = (Region(region.start + at, 1) for at in (cell, to))
        self.kv.copy(source, target, 1)

    def close(self) -> None:
        """Free graphs and the compute buffer; safe to call twice."""
        self.graphs.close()
        if self.plain is not None:
            self.plain.close()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _graph(self, span: Span, shape: BatchShape) -> Graph:
        return self._find_or_build(span, shape, self._build, ends=span.output)

    def _find_or_build(
        self, part: Part, shape: BatchShape, build: Callable[[Part, BatchShape], Graph], *,
        ends: bool,
    ) -> Graph:  # fmt: skip
        """Return the graph of a part of the model for a batch; `ends` in logits or not."""
        alike, start = shape.anywhere()
        key = (part, alike)
        graph = self.graphs.find(key, start)
        if graph is None:
            graph = self.graphs.add(key, build(part, shape))
            if ends and shape.n_out:
                ne = (shape.n_out, self.model.hparams.n_vocab)
                graph.host_output = host_view(graph.output, ne)
        return graph

    def _build(self, span: Span, shape: BatchShape) -> Graph:
        b = self.builder(span, shape, n_described(span.steps))
        x = self._begin(b) if span.embed else self._stream_view(b)
        x = self.pass_layers(b, span.steps, x, narrow=span.output)
        if span.output:
            return b.finish(self.model.head(b, b.select_outputs(x)))
        if span.norm:
            x = output_norm(b, x, self.model.hparams.norm_rms_eps)
        return b.finish(b.g.ggml_cpy(b.ctx, x, self._stream_view(b)))

    def pass_layers(self, b: Builder, steps: Sequence[Step], x: Tensor, *, narrow: bool) -> Tensor:
        """Build steps over the residual stream `x`: F32 [n_embd, n].

        With `narrow` the last of them drops the tokens whose logits nobody wants.
        """
        for i, step in enumerate(steps, 1):
            x = build_step(b, self.model, step, x, last=narrow and i == len(steps))
        return x

    def _begin(self, b: Builder) -> Tensor:
        """Begin with token embeddings, F32 [n_embd, n_tokens]: looked up in the graph, or given."""
        if self.embedder is None:
            return self.model.embed(b)
        return b.more(EMBEDDINGS, F32, self.model.hparams.n_embd, b.n_tokens)

    def builder(self, span: Span, shape: BatchShape, n_layer: int, n_passes: int = 1) -> Builder:
        """Begin a graph with room for `n_passes` passes over `n_layer` layers."""
        n_nodes = n_passes * room_for_nodes(self.model.hparams, n_layer, shape)
        plain = self.plain if shape.n_tokens >= WIDE_FROM else None
        b = Builder(span, shape, plain or self.weights, self.kv, n_nodes)
        b.standins = self.standins
        b.token_rule = self.token_rule
        if self.lora is not None:
            b.adapt(self.lora)
        return b

    def reserve_stream(self, n_tokens: int) -> Stream:
        """Make room for what spans hand on of up to `n_tokens`.

        Raises:
            CapacityError: no memory for it.
        """
        if self._stream is None or self._stream.n_tokens < n_tokens:
            if self._stream is not None:
                self.graphs.clear()
                self._stream.close()
                self._stream = None
            self._stream = Stream(self.device, self.model.hparams.n_embd, n_tokens)
        return self._stream

    def _stream_view(self, b: Builder, n: int | None = None) -> Tensor:
        """View the residual stream that spans hand on, of n tokens or all: F32 [n_embd, n]."""
        n_embd, stream = self.model.hparams.n_embd, self.reserve_stream(b.n_tokens)
        n = b.n_tokens if n is None else n
        return ggml().ggml_view_2d(b.ctx, stream.tensor, n_embd, n, n_embd * 4, 0)

    def _fill(self, graph: Graph, pieces: Sequence[Piece], shape: BatchShape) -> None:
        """Write a batch's numbers into a graph's inputs."""
        self.write_inputs(graph.inputs, pieces, shape)

    def write_inputs(self, inputs: Inputs, pieces: Sequence[Piece], shape: BatchShape) -> None:
        """Write a batch's numbers into inputs of its shape."""
        self._feeder.write(inputs, pieces, shape.segments)
        if inputs.more:
            self._fill_more(inputs, pieces, shape)

    def _fill_more(self, inputs: Inputs, pieces: Sequence[Piece], shape: BatchShape) -> None:
        """Write what only some graphs ask for."""
        if self.embedder is not None and (given := inputs.more.get(EMBEDDINGS)) is not None:
            set_bytes(given, self.embedder.look_up([t for piece in pieces for t in piece.tokens]))
        if shape.lora is not None:
            fill_lora(inputs, pieces, shape.lora)
        places = [(p.pos, len(p.tokens), p.n_out) for p in pieces]
        fill_switches(inputs, places)
        fill_choice(inputs, places, self.token_rule)


def split_steps(span: Span) -> tuple[Span, ...]:
    """Split a whole pass into a span per step, the embedding apart, the head with the last."""
    *most, last = span.steps
    middle = [span._replace(steps=(step,), embed=False, output=False) for step in most]
    return (span._replace(steps=(), output=False), *middle,
            span._replace(steps=(last,), embed=False))  # fmt: skip


def room_for_nodes(hparams: Hparams, n_layer: int, shape: BatchShape) -> int:
    """Bound the operations, inputs and views of a graph over `n_layer` layers."""
    per_layer = NODES_PER_LAYER + NODES_PER_SEGMENT * len(shape.segments)
    if shape.lora is not None:
        per_layer += len(shape.segments) * (NODES_PER_LORA + NODES_PER_SLOT * shape.lora.n_used)
    if hparams.moe is not None:
        per_layer += NODES_PER_MOE + NODES_PER_EXPERT * hparams.moe.n_expert_used
    return NODES_BASE + n_layer * per_layer


def shape_of(n_tokens: int, n_kv: int, *, n_out: int) -> BatchShape:
    """Return the shape of a batch of one sequence that sees `n_kv` cells."""
    return BatchShape((Segment(0, n_kv, n_tokens),), n_out)


def _segment(piece: Piece) -> Segment:
    n_tokens, region, cell = len(piece.tokens), piece.region, piece.cell
    end = cell + n_tokens
    if not 0 < n_tokens >= piece.n_out or end > region.n_cells:
        raise ComputeError(f"tokens {cell} to {end} do not fit {region}")
    return Segment(region.start, round_cells(end), n_tokens)
