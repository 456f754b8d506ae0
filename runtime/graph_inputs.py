"""Where a graph's numbers go in."""

from dataclasses import dataclass, field
from typing import NamedTuple

from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.tensor import is_on_host, is_placed


class MaskSlot(NamedTuple):
    """Where a segment's mask rows, F16 [n_kv, n_tokens], begin in a mask tensor."""

    tensor: Tensor
    at: int


@dataclass(slots=True)
class Inputs:
    """Input tensors of a graph; a span without embedding or attention lacks some."""

    tokens: Tensor | None = None  # I32 [n_tokens]
    pos: Tensor | None = None  # I32 [n_tokens]
    rows: Tensor | None = None  # I64 [n_tokens], cells that the new keys and values go to
    out_ids: Tensor | None = None  # I32 [n_out]
    masks: list[MaskSlot] = field(default_factory=list)  # one per segment
    masks_swa: list[MaskSlot] = field(default_factory=list)
    more: dict[str, Tensor] = field(default_factory=dict)  # what only one kind of forward has
    on_host: bool = False  # whether all but `more` are, see `is_on_host`

    def settle(self) -> None:
        """Look where the inputs of a placed graph are; drop those that no operation reads.

        They have no memory to be written to. Operations that were described and are not computed
        leave such inputs behind.
        """
        for name in ("tokens", "pos", "rows", "out_ids"):
            tensor = getattr(self, name)
            if tensor is not None and not is_placed(tensor):
                setattr(self, name, None)
        for masks in (self.masks, self.masks_swa):
            if not all(is_placed(slot.tensor) for slot in masks):
                masks.clear()
        self.more = {name: each for name, each in self.more.items() if is_placed(each)}
        masked = (slot.tensor for slot in (*self.masks, *self.masks_swa))
        own = (self.tokens, self.pos, self.rows, self.out_ids, *masked)
        self.on_host = all(is_on_host(tensor) for tensor in own if tensor is not None)
