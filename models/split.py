"""Run a model whose layers are on several devices: a graph per stretch of layers on one of them.

The residual stream goes from one device to the next through host memory. The operations and
their order are those of the whole graph, so that devices with the same kernels give the same bits.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import Model
from edgeroute.models.blocks import output_norm
from edgeroute.models.embedder import Embedder
from edgeroute.models.forward import Forward, Piece, shape_of
from edgeroute.models.pruning import n_described
from edgeroute.models.stream import Stream
from edgeroute.runtime.batch_shape import BatchShape, Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_group import DeviceGroup
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.lora import LoraSlots
from edgeroute.runtime.placed_weights import Homes, PlacedWeights
from edgeroute.runtime.placement import Placement
from edgeroute.runtime.token_choice import TokenRule
from edgeroute.runtime.weights import Weights

CUTS_KEPT = 64
_LAYER = re.compile(r"(?:.*/)?blk\.(\d+)\.")


def homes_of(placement: Placement) -> Homes:
    """Say which devices need a weight: its layer's, the head's, the processor, or all.

    Knows a model's tensors and those of its stand-ins, by their names.
    """
    head = placement.device(len(placement.of_layer))

    def homes(name: str) -> Sequence[Device]:
        if (layer := _LAYER.match(name)) is not None:
            return (placement.device(int(layer[1])),)
        if name.startswith("token_embd."):
            return (placement.cpu,)
        return (head,) if name.startswith("output") else placement.devices

    return homes


class _Part(NamedTuple):
    """What one graph computes: see Span.

    `lane` is the number of its device. A part that is `narrow_after` leaves only the tokens whose
    logits are wanted, and one that is `narrow_before` begins with them: a head by itself.
    """

    span: Span
    lane: int
    narrow_before: bool = False
    narrow_after: bool = False


class _Lane(Forward):
    """The part of a model that is on one device."""

    def graph_of(self, part: _Part, shape: BatchShape) -> tuple[Graph, bool]:
        """Return the graph of a part, and whether it was built just now."""
        n_built = self.graphs.n_built
        graph = self._find_or_build(part, shape, self._build_part, ends=part.span.output)
        return graph, self.graphs.n_built > n_built

    def _build_part(self, part: _Part, shape: BatchShape) -> Graph:
        span = part.span
        b = self.builder(span, shape, n_described(span.steps))
        n_before = shape.n_out if part.narrow_before else None
        x = self._begin(b) if span.embed else self._stream_view(b, n_before)
        x = self.pass_layers(b, span.steps, x, narrow=span.output or part.narrow_after)
        if span.output:
            return b.finish(self.model.head(b, b.select_outputs(x)))
        if span.norm:
            x = output_norm(b, x, self.model.hparams.norm_rms_eps)
        n_after = shape.n_out if part.narrow_after else None
        return b.finish(b.g.ggml_cpy(b.ctx, x, self._stream_view(b, n_after)))

    def feed(self, graph: Graph, pieces: Sequence[Piece], shape: BatchShape) -> None:
        """Write a batch's numbers into a graph's inputs."""
        self._fill(graph, pieces, shape)


class _Graphs(GraphCache):
    """The graphs of all lanes, seen as one cache."""

    def __init__(self, lanes: Sequence[_Lane], embedder: Embedder) -> None:
        # Not GraphCache's own: each lane has a compute buffer, and here is none.
        self._lanes, self._embedder = lanes, embedder

    @property
    def n_bytes(self) -> int:
        """Bytes of compute buffers in this machine's memory; other devices have their own."""
        mine = (lane.graphs.n_bytes for lane in self._lanes if lane.device.is_cpu)
        return sum(mine) + self._embedder.n_bytes

    @property
    def n_built(self) -> int:
        """Graphs that were given memory so far."""
        return sum(lane.graphs.n_built for lane in self._lanes)

    def clear(self) -> None:
        """Drop every graph; the buffers stay."""
        for lane in self._lanes:
            lane.graphs.clear()

    def close(self) -> None:
        """Drop every graph and buffer; safe to call twice."""
        for lane in self._lanes:
            lane.graphs.close()


Grown = Callable[[Device, int], None]
"""Told that a device's compute buffer has another size now; may raise CapacityError."""


class SplitForward(Forward):
    """One model, its layers on several devices, or all of them on one that is not the processor.

    Not thread-safe: one thread owns it. Lifetime: close it before `kv` and `weights`.

    Attributes:
        placement: which device has what.
        grown: asked whenever a compute buffer of a device has grown.
    """

    def __init__(
        self, model: Model, group: DeviceGroup, placement: Placement, weights: PlacedWeights,
        kv: KvCache,
    ) -> None:  # fmt: skip
        """Join what is on each device.

        Args:
            model: what is computed.
            group: all devices of `placement`, the processor among them.
            placement: where the layers are.
            weights: have each weight where `homes_of` says.
            kv: has each layer's row on that layer's device.

        Raises:
            CapacityError: no memory for a graph allocator.
        """
        # Not Forward's own: what it allocates on its one device, each lane does on its own.
        self.model, self.device, self.placement = model, group, placement
        self.group = group
        self.weights, self.kv = weights, kv
        self.grown: Grown = lambda _device, _n_bytes: None
        self.lora_width = 1
        self.embedder = Embedder(model, placement.cpu, weights.on[placement.cpu], kv)
        self._lanes: list[_Lane] = []
        try:
            for device in placement.devices:
                lane = _Lane(model, device, weights.on[device], kv)
                lane.embedder = self.embedder
                self._lanes.append(lane)
        except BaseException:
            self.close()
            raise
        self.graphs: GraphCache = _Graphs(self._lanes, self.embedder)
        self.whole = self.spans(all_run(range(model.hparams.n_layer)))
        self._homes = homes_of(placement)
        self._held = self._lanes[placement.of_layer[0]]  # has the latest residual stream
        self._parts_of: dict[tuple[Span, ...], list[_Part]] = {}

    @property
    def lora(self) -> LoraSlots | None:
        """Slots of adapters, on the devices of their weights."""
        return self._lanes[0].lora

    @lora.setter
    def lora(self, slots: LoraSlots | None) -> None:
        for lane in self._lanes:
            lane.lora = slots

    @property
    def standins(self) -> Weights | None:
        """Stand-ins of the plans that may be run, on the devices of their layers."""
        return self._lanes[0].standins

    @standins.setter
    def standins(self, weights: Weights | None) -> None:
        for lane in self._lanes:
            lane.standins = weights

    @property
    def token_rule(self) -> TokenRule:
        """Which tokens a step computes that keeps a part of a prompt: see Forward."""
        return self._lanes[0].token_rule

    @token_rule.setter
    def token_rule(self, rule: TokenRule) -> None:
        for lane in self._lanes:
            lane.token_rule = rule

    def device_of(self, name: str) -> Device:
        """Return the device that computes with a weight."""
        return self._homes(f"{name}.weight")[0]

    def compute_bytes(self, device: Device) -> int:
        """Bytes of a device's compute buffer as it is now."""
        return sum(lane.graphs.n_bytes for lane in self._lanes if lane.device is device)

    def reserve(self, n_tokens: int, n_kv: int, n_out: int = 1) -> None:
        """Size compute buffers for `n_tokens` that see `n_kv` cells, and `n_out` logits.

        Raises:
            CapacityError: a device has no memory for it.
        """
        shape = shape_of(n_tokens, round_cells(n_kv), n_out=n_out)._replace(lora=self.widest_lora)
        self.embed([0] * n_tokens)
        self.reserve_stream(n_tokens)
        for part in self._parts(self.whole):
            self._graph_of(part, shape)
        self.graphs.clear()

    def embed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Look token embeddings up: F32 (n, n_embd)."""
        assert self.embedder is not None
        return self.embedder.look_up(tokens)

    def run(
        self, pieces: Sequence[Piece], spans: Sequence[Span] | None = None, *, borrow: bool = False
    ) -> npt.NDArray[np.float32] | None:
        """Compute a batch, as `Forward.run` does.

        Raises:
            DeviceLostError: a device is gone.
            CapacityError: a device has no memory for the compute buffer that this batch needs.
        """
        shape = self.shape(pieces)
        graph: Graph | None = None
        lane, ends = self._held, False
        for part in self._parts(self.whole if spans is None else tuple(spans)):
            if part.narrow_before and not shape.n_out:
                break  # the keys are written, and no logits are wanted
            if self.group.stopped:
                return None
            lane, ends = self._lanes[part.lane], part.span.output
            if not part.span.embed:
                lane.reserve_stream(shape.n_tokens)
                self._hand_on(lane, shape.n_out if part.narrow_before else shape.n_tokens)
            graph = self._graph_of(part, shape)
            lane.feed(graph, pieces, shape)
            if not lane.device.compute(graph.pointer):
                return None
            if not ends:
                self._held = lane
        if graph is None or not ends or not shape.n_out:
            return np.empty((0, self.model.hparams.n_vocab), np.float32)
        return lane.logits(graph, shape, borrow)

    def residual(self, n_tokens: int) -> npt.NDArray[np.float32]:
        """Return what the last span without output left: see Forward.

        Undefined behind a span with output whose layers or head are on several devices.
        """
        return self._held.residual(n_tokens)

    def set_residual(self, states: npt.NDArray[np.float32]) -> None:
        """Let the next span without embedding begin with these states: see Forward."""
        self._held.set_residual(states)

    def reserve_stream(self, n_tokens: int) -> Stream:
        """Make room on every device for what spans hand on of up to `n_tokens`.

        Raises:
            CapacityError: no memory for it.
        """
        return [lane.reserve_stream(n_tokens) for lane in self._lanes][-1]

    def close(self) -> None:
        """Free graphs and buffers; safe to call twice."""
        for lane in self._lanes:
            lane.close()
        assert self.embedder is not None
        self.embedder.close()

    def _graph_of(self, part: _Part, shape: BatchShape) -> Graph:
        """Return the graph of a part; a buffer that grew for it is accounted for first."""
        lane = self._lanes[part.lane]
        graph, is_new = lane.graph_of(part, shape)
        if is_new:
            try:
                self.grown(lane.device, lane.graphs.n_bytes)
            except CapacityError:
                lane.graphs.renew()
                raise
        return graph

    def _hand_on(self, lane: _Lane, n_tokens: int) -> None:
        """Bring the residual stream of some tokens to a lane's device."""
        if lane is not self._held:
            lane.set_residual(self._held.residual(n_tokens))
            self._held = lane

    def _parts(self, spans: tuple[Span, ...]) -> list[_Part]:
        """Cut spans where the device changes."""
        parts = self._parts_of.get(spans)
        if parts is None:
            if len(self._parts_of) >= CUTS_KEPT:
                self._parts_of.clear()
            parts = self._parts_of[spans] = [part for span in spans for part in self._cut(span)]
        return parts

    def _cut(self, span: Span) -> Iterator[_Part]:
        """Cut one span; the head, and the norm before it, are computed where their weights are."""
        of_layer, head = self.placement.of_layer, self.placement.of_head
        groups: list[tuple[int, list[Step]]] = []
        idle: list[Step] = []  # need no device: computed with what follows, or with what was before
        for step in span.steps:
            at = of_layer[step.il] if step.reads or step.approximates else None
            if at is None and not groups:
                idle.append(step)
            elif at is None or (groups and groups[-1][0] == at):
                groups[-1][1].append(step)
            else:
                groups.append((at, [*idle, step]))
                idle = []
        if not groups:
            groups = [(head if span.output or span.norm else of_layer[0], idle)]
        ends = span.output or span.norm
        apart = ends and groups[-1][0] != head
        n = len(groups)
        for i, (at, steps) in enumerate(groups):
            last = i == n - 1 and not apart
            part = span._replace(steps=tuple(steps), embed=span.embed and i == 0,
                                 output=span.output and last, norm=span.norm and last)  # fmt: skip
            yield _Part(part, at, narrow_after=span.output and apart and i == n - 1)
        if apart:
            yield _Part(span._replace(steps=(), embed=False), head, narrow_before=span.output)
