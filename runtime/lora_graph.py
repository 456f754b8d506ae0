"""What adapters add to linear layers, as a part of a graph.

A x of a group of weights is one product, by the slots of each token (`ggml_mul_mat_id`). B's
rows are `rank` long, too short for ggml's vector instructions, so B lies transposed: each
sequence's slots are fetched once, as F32, and their columns, n_out long, summed by an outer
product. A token's bits do not depend on the tokens beside it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from edgeroute.runtime.device import Device
from edgeroute.runtime.device_ops import lacking, lying_on
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.lora import LoraPlace, LoraSlots, LoraTarget
from edgeroute.runtime.tensor import (
    F16,
    F32,
    F32_BYTES,
    I32,
    Descriptors,
    new_tensor,
    shape,
    strides,
)

_PROBE_NODES = 32


class LoraInputs(NamedTuple):
    """Which slots compute the n columns of an input.

    Attributes:
        ids: slots of each column, I32 [n_used, n].
        factors: factors on them, F32 [1, n_used, n]; None where all are 1.
        rows: slots of each sequence, I32 [n_used * n_sequences].
        runs: columns of each sequence, in order; a sequence may have none.
    """

    ids: Tensor
    factors: Tensor | None
    rows: Tensor
    runs: tuple[int, ...]


class Run(NamedTuple):
    """Sequences side by side with equally many columns each: `n` of `t`."""

    sequence: int
    column: int
    n: int
    t: int


class LoraUse:
    """What a Builder needs to add adapters to its linear layers."""

    def __init__(self, slots: LoraSlots) -> None:
        self.slots = slots
        self._down: dict[tuple[Tensor, Tensor, Tensor], Tensor] = {}
        self._up: dict[tuple[Tensor, Tensor], Tensor] = {}
        self._alike: dict[tuple[Tensor, Tensor, int, Run], Tensor] = {}

    def delta(self, ctx: int, place: LoraPlace, x: Tensor, inputs: LoraInputs) -> Tensor:
        """Build what the adapters add to one weight's product: F32 [n_out, n]."""
        g = ggml()
        down = self._products(ctx, place, x, inputs.ids)
        up = self._fetched(ctx, place, inputs.rows)
        parts = [self._part(ctx, place, down, up, inputs, run) for run in runs_of(inputs.runs)]
        whole = parts[0]
        for part in parts[1:]:
            whole = g.ggml_concat(ctx, whole, part, 1)
        return whole

    def _products(self, ctx: int, place: LoraPlace, x: Tensor, ids: Tensor) -> Tensor:
        """Build A x of a group's weights, once: F32 [n_targets * rank, n_used, n].

        Rounded to halves as ggml's product with B would do, for llama.cpp's bits.
        """
        key = (place.group.down, x, ids)
        if key not in self._down:
            g = ggml()
            n_in, n = shape(x)[:2]
            flat = g.ggml_reshape_3d(ctx, x, n_in, 1, n)
            found = g.ggml_mul_mat_id(ctx, place.group.down, flat, ids)
            self._down[key] = g.ggml_cast(ctx, g.ggml_cast(ctx, found, F16), F32)
        return self._down[key]

    def _fetched(self, ctx: int, place: LoraPlace, rows: Tensor) -> Tensor:
        """Fetch each sequence's B of a group's weights, once: F32 [row, n_used * n_sequences]."""
        key = (place.group.up, rows)
        if key not in self._up:
            self._up[key] = ggml().ggml_get_rows(ctx, place.group.up, rows)
        return self._up[key]

    def _part(
        self, ctx: int, place: LoraPlace, down: Tensor, up: Tensor, inputs: LoraInputs, run: Run
    ) -> Tensor:
        """Build B A x of some sequences: F32 [n_out, n * t]."""
        g, n_out = ggml(), place.target.n_out
        if shape(down)[1] > 1 or (run.n > 1 and run.t > 1):
            y = self._outer(ctx, place, range(place.part, place.part + 1), down, up, inputs, run)
            return g.ggml_reshape_2d(ctx, self._summed(ctx, y), n_out, run.n * run.t)
        alike = place.group.alike(place.part)
        key = (up, down, alike.start, run)
        if key not in self._alike:
            self._alike[key] = self._outer(ctx, place, alike, down, up, inputs, run)
        whole = self._alike[key]  # [n_out, t, parts, n], of which t or n is 1
        nb = strides(whole)
        at = (place.part - alike.start) * nb[2]
        return g.ggml_view_2d(ctx, whole, n_out, run.n * run.t, nb[3 if run.t == 1 else 1], at)

    def _outer(
        self, ctx: int, place: LoraPlace, parts: range, down: Tensor, up: Tensor,
        inputs: LoraInputs, run: Run,
    ) -> Tensor:  # fmt: skip
        """Build each slot's share: F32 [n_out, t, m, n], m slots of a part or parts of a slot."""
        g, rank, k = ggml(), self.slots.rank, shape(down)[1]
        n_out, row, nb = place.target.n_out, strides(up)[1], strides(down)
        size = n_out * rank * F32_BYTES
        m = max(k, len(parts))  # one of the two is 1
        b = g.ggml_view_4d(
            ctx, up, n_out, rank, m, run.n, n_out * F32_BYTES, row if k > 1 else size, k * row,
            run.sequence * k * row + place.first * F32_BYTES - (place.part - parts.start) * size,
        )  # fmt: skip
        ax = g.ggml_view_4d(
            ctx, down, rank, m, run.t, run.n, nb[1] if k > 1 else rank * F32_BYTES, nb[2],
            run.t * nb[2], run.column * nb[2] + parts.start * rank * F32_BYTES,
        )  # fmt: skip
        y = g.ggml_out_prod(ctx, b, g.ggml_permute(ctx, ax, 1, 2, 0, 3))
        if inputs.factors is None:
            return y
        nb = strides(inputs.factors)
        each = g.ggml_view_4d(
            ctx, inputs.factors, 1, k, run.t, run.n, nb[1], nb[2], run.t * nb[2],
            run.column * nb[2],
        )  # fmt: skip
        # where llama.cpp scales, for its bits
        return g.ggml_mul(ctx, y, g.ggml_permute(ctx, each, 0, 2, 1, 3))

    def _summed(self, ctx: int, y: Tensor) -> Tensor:
        """Add up what a token's slots give: F32 [n_out, t, k, n] to [n_out, t, n]."""
        g, (n_out, t, k, n), nb = ggml(), shape(y), strides(y)
        if k == 1:
            return y
        each = [g.ggml_view_3d(ctx, y, n_out, t, n, nb[1], nb[3], i * nb[2]) for i in range(k)]
        total = each[0]
        for part in each[1:]:
            total = g.ggml_add(ctx, total, part)
        return total


def adapters_lack(device: Device) -> list[str]:
    """List what adapters need of a device and it says that it cannot compute."""
    descriptors = Descriptors(_PROBE_NODES, _PROBE_NODES)
    g, ctx = ggml(), descriptors.ctx
    try:
        with Device.open("cpu") as cpu, LoraSlots(cpu, 8, 1) as slots:
            slots.extend([[LoraTarget("probe", 64, 64)]])
            place = slots.place("probe")
            assert place is not None
            inputs = LoraInputs(
                new_tensor(descriptors, I32, (1, 1), "ids"),
                new_tensor(descriptors, F32, (1, 1, 1), "factors"),
                new_tensor(descriptors, I32, (1,), "rows"), (1,),
            )  # fmt: skip
            x = new_tensor(descriptors, F32, (64, 1), "x")
            graph = g.ggml_new_graph_custom(ctx, _PROBE_NODES, False)
            g.ggml_build_forward_expand(graph, LoraUse(slots).delta(ctx, place, x, inputs))
            with lying_on(device, [place.group.down, place.group.up]):
                return lacking(device, graph)
    finally:
        descriptors.free()


def runs_of(columns: tuple[int, ...]) -> Iterator[Run]:
    """Join neighbours of equal length; sequences without a column are left out."""
    sequence = column = 0
    while sequence < len(columns):
        t, n = columns[sequence], 1
        while sequence + n < len(columns) and columns[sequence + n] == t:
            n += 1
        if t:
            yield Run(sequence, column, n, t)
        sequence, column = sequence + n, column + n * t
