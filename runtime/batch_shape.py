"""What graphs depend on: the pieces of a batch, and the part of a model that is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.depth import Steps
from edgeroute.runtime.lora import LoraShape

SPLIT_KV_MIN = 512
"""Source: ggml-cpu/ops.cpp, ggml_compute_forward_flash_attn_ext_f16, use_split_kv_path."""


class Segment(NamedTuple):
    """Tokens of one sequence inside a batch, and the cells they may look at.

    `start` is the first cell of the sequence's region; `n_kv` a multiple of the bucket.
    """

    start: int
    n_kv: int
    n_tokens: int


class Span(NamedTuple):
    """What one graph computes: embedding, passes over some layers in order, output head.

    `plan` names the stand-ins of approximated sub-blocks; `norm` ends with the norm of `output`.
    """

    steps: Steps
    embed: bool
    output: bool
    plan: str = ""
    norm: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are passed, in order."""
        return tuple(step.il for step in self.steps)


class BatchShape(NamedTuple):
    """Everything about a batch that a graph depends on; equal shapes share a graph.

    A tuple, because it is made and hashed for every token.
    """

    segments: tuple[Segment, ...]
    n_out: int
    lora: LoraShape | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens over all segments."""
        return sum(segment.n_tokens for segment in self.segments)

    def anywhere(self) -> "tuple[BatchShape, int]":
        """Return the shape as if the first region began with cell 0, and where it does begin.

        Equal ones share a graph: see CellViews.
        """
        start = self.segments[0].start
        if not start:
            return self, 0
        moved = [Segment(each.start - start, each.n_kv, each.n_tokens) for each in self.segments]
        return self._replace(segments=tuple(moved)), start


def group_segments(segments: Sequence[Segment]) -> list[tuple[Segment, ...]]:
    """Join neighbours that one attention operation can serve with the bits of one each.

    They have one token and equally many cells, at equal distances. From SPLIT_KV_MIN cells on,
    ggml splits a lone query's cells between threads, but not those of several queries.
    """
    groups: list[list[Segment]] = []
    for segment in segments:
        group = groups[-1] if groups else []
        alike = bool(group) and segment.n_kv == group[0].n_kv < SPLIT_KV_MIN
        if alike and segment.n_tokens == group[0].n_tokens == 1:
            step = segment.start - group[-1].start
            if step > 0 and (len(group) == 1 or step == group[1].start - group[0].start):
                group.append(segment)
                continue
        groups.append([segment])
    return [tuple(group) for group in groups]


def change_places(first: int, last: int, n_threads: int) -> bool:
    """Whether a lone query has equal bits wherever its cells `first` to `last` are among them.

    It visits cells in their order and passes over those that it does not see. From SPLIT_KV_MIN
    on each thread visits a part of them, and no cell may come to another thread.
    """
    n_kv = round_cells(first + 1)
    if n_kv != round_cells(last + 1):
        return False
    part = -(-n_kv // max(1, n_threads))
    return n_kv < SPLIT_KV_MIN or first // part == last // part


def causal_mask(n_ctx: int, window: int | None = None) -> np.ndarray:
    """Make a strip from which every causal mask row is a slice: F16 (2 * n_ctx,).

    Row of position p over n_kv cells: `strip[n_ctx - 1 - p : n_ctx - 1 - p + n_kv]`.
    With `window`, a token sees itself and the `window - 1` before it.
    """
    strip = np.full(2 * n_ctx, -np.inf, np.float16)
    first = 0 if window is None else max(0, n_ctx - window)
    strip[first:n_ctx] = 0
    return strip
