"""Numbers of a batch, written into the inputs of its graphs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeroute.runtime.batch_shape import Segment, causal_mask
from edgeroute.runtime.graph_inputs import Inputs, MaskSlot
from edgeroute.runtime.lora import LoraShape, lora_factors, lora_ids
from edgeroute.runtime.tensor import Table, set_bytes, set_ids, set_range

if TYPE_CHECKING:
    from edgeroute.models.forward import Piece


class Feeder:
    """Writes what every forward has: tokens, their positions and cells, what they may look at.

    Args:
        n_cells: of the pool; no position is beyond it.
        n_swa: the sliding window of a model that has one.
    """

    def __init__(self, n_cells: int, n_swa: int | None) -> None:
        self._strip = Table(causal_mask(n_cells))
        self._strip_swa = Table(causal_mask(n_cells, n_swa)) if n_swa else None
        self._rows = Table(np.arange(n_cells, dtype=np.int64))
        self._positions = Table(np.arange(n_cells, dtype=np.int32))

    def write(self, inputs: Inputs, pieces: Sequence["Piece"], segments: Sequence[Segment]) -> None:
        """Write a batch's numbers into the inputs that there are."""
        on_host = inputs.on_host
        if inputs.tokens is not None:
            ids = [token for piece in pieces for token in piece.tokens]
            set_ids(inputs.tokens, ids, on_host=on_host)
        first = 0
        for piece in pieces:
            n = len(piece.tokens)
            if inputs.pos is not None:
                self._positions.write(inputs.pos, first, piece.pos, n, on_host=on_host)
            if inputs.rows is not None:
                cell = piece.region.start + piece.cell
                self._rows.write(inputs.rows, first, cell, n, on_host=on_host)
            first += n
        if inputs.out_ids is not None:
            set_ids(inputs.out_ids, _out_ids(pieces), on_host=on_host)
        for strip, masks in ((self._strip, inputs.masks), (self._strip_swa, inputs.masks_swa)):
            if strip is not None:
                for slot, piece, segment in zip(masks, pieces, segments, strict=False):
                    _write_mask(strip, slot, piece, segment, on_host=on_host)


def _write_mask(
    strip: Table, slot: MaskSlot, piece: "Piece", segment: Segment, *, on_host: bool
) -> None:
    """Write the mask rows of a piece, F16 (n_tokens, n_kv), each a slice of the strip."""
    first = len(strip.values) // 2 - 1 - piece.pos
    if piece.branch is not None:
        row = strip.values[first : first + segment.n_kv].copy()
        row[piece.branch.n_shared :] = -np.inf
        row[[*piece.branch.above, piece.branch.cell]] = 0
        set_range(slot.tensor, row.view(np.uint8), slot.at * row.itemsize)
    elif segment.n_tokens == 1:
        strip.write(slot.tensor, slot.at, first, segment.n_kv, on_host=on_host)
    else:
        rows = np.lib.stride_tricks.sliding_window_view(strip.values, segment.n_kv)
        last = first - segment.n_tokens
        set_bytes(slot.tensor, np.ascontiguousarray(rows[first : last if last >= 0 else None : -1]))


def fill_lora(inputs: Inputs, pieces: Sequence["Piece"], lora: LoraShape) -> None:
    """Write the adapter slots of each sequence and token, and the factors on them."""
    if (slots := inputs.more.get("lora_rows")) is not None:
        set_bytes(slots, lora_ids([(piece.lora, 1) for piece in pieces], lora.n_used))
    for end, rows in (
        ("", [(piece.lora, len(piece.tokens)) for piece in pieces]),
        ("_out", [(piece.lora, piece.n_out) for piece in pieces]),
    ):
        if (ids := inputs.more.get(f"lora_ids{end}")) is not None:
            set_bytes(ids, lora_ids(rows, lora.n_used))
        if (factors := inputs.more.get(f"lora_factors{end}")) is not None:
            set_bytes(factors, lora_factors(rows, lora.n_used))


def _out_ids(pieces: Sequence["Piece"]) -> list[int]:
    ids: list[int] = []
    end = 0
    for piece in pieces:
        end += len(piece.tokens)
        ids += range(end - piece.n_out, end)
    return ids
