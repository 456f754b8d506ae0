"""Weights in the file's layout beside repacked ones: what passes over prompts multiply with.

ggml repacks matrices for few rows. From some tens of rows on its tiles over plain K- and I-types
are quicker: 30 % of a prompt's time less on a dense model in Q4_K, half on a mixture, where
decoding takes a fifth longer from plain weights. With both layouts each has its own. The plain
ones are the file's pages, so that they cost what is in the file once more, and no copying.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.runtime.joints import Joint, Joints
from edgeroute.runtime.sequence import FA_TILE
from edgeroute.runtime.weights import Weights

TILED: Final = frozenset(
    kind for kind in GGMLType if kind.name.startswith(("IQ", "Q")) and kind.block_size == 256
)
"""Types that ggml computes in tiles, from 8 rows on. Source: ggml-cpu/tiled/tiled.cpp."""
WIDE_FROM: Final = FA_TILE
"""Rows from which on a pass takes plain weights: the fewest of a prompt whose cells are reused."""


class PlainWeights:
    """Plain tensors where there are some, and the others of `base`.

    Lifetime: that of `base`, which owns the memory; close it all the same.
    """

    def __init__(self, base: Weights, plain: Mapping[str, Tensor]) -> None:
        self._base, self._plain = base, plain
        self._joints = Joints()

    def __getitem__(self, name: str) -> Tensor:
        found = self._plain.get(name)
        return self._base[name] if found is None else found

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None where the file has none of that name."""
        found = self._plain.get(name)
        return self._base.get(name) if found is None else found

    def joints(self, names: Sequence[str]) -> list[Joint]:
        """Join matrices of equal input where they lie side by side; see Weights."""
        return self._joints.find(names, self.get)

    def close(self) -> None:
        """Free descriptors; safe to call twice."""
        self._joints.close()
