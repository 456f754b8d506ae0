"""What a graph reads of the pool, moved to where another sequence has its cells.

Graphs differ by where their sequences lie only in views of the pool, so that one is found again
for the next sequence, which costs a hundredth of building it anew.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.ggml.structs import TensorStruct

_WORD = 8
"""Bytes of an address and of an offset; descriptors lie at multiples of it."""


class CellViews:
    """Views of cells in one graph. Not thread-safe, and not to be moved while the graph runs.

    Lifetime: that of the graph's descriptors.

    Args:
        views: each with the bytes of one cell in the tensor that it views.
        start: cell that the first sequence's region begins with.
    """

    def __init__(self, views: Sequence[tuple[Tensor, int]], start: int) -> None:
        self.start = start
        self._views = views
        self._words: npt.NDArray[np.int64] | None = None

    def move(self, start: int) -> None:
        """View the cells that lie as those here do, but begin with another one.

        An offset and an address in each view say where it is, whatever device that is on. Source:
        ggml.c, ggml_view_impl; ggml-alloc.c, ggml_gallocr_init_tensor.
        """
        if start == self.start or not self._views:
            self.start = start
            return
        if self._words is None:
            self._find_words()
        assert self._words is not None
        self._words[self._places] += (start - self.start) * self._cell_bytes
        self.start = start

    def _find_words(self) -> None:
        """Lay one array over all descriptors: a loop over them would cost more than all else."""
        first = min(tensor for tensor, _ in self._views)
        last = max(tensor for tensor, _ in self._views)
        n = (last - first + ctypes.sizeof(TensorStruct)) // _WORD
        self._words = np.ctypeslib.as_array((ctypes.c_int64 * n).from_address(first))
        at = np.array([tensor - first for tensor, _ in self._views])
        offsets, addresses = at + TensorStruct.view_offs.offset, at + TensorStruct.data.offset
        self._places = np.concatenate([offsets, addresses]) // _WORD
        self._cell_bytes = np.tile(np.array([n_bytes for _, n_bytes in self._views]), 2)
