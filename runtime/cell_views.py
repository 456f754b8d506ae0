"""What a graph reads of the pool, moved to where another sequence has its cells.

Graphs differ by where their sequences lie only in views of the pool, so that one is found again
for the next sequence, which costs a hundredth of building it anew.
"""

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.ggml.structs import TensorStruct

I64 = npt.NDArray[np.int64]
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

    def move(self, start: int) -> None:
        """View the cells that lie as those here do, but begin with another one.

        An offset and an address in each view say where it is, whatever device that is on. Source:
        ggml.c, ggml_view_impl; ggml-alloc.c, ggml_gallocr_init_tensor.
        """
        if start == self.start:
            return
        if self._views:
            words, places, cell_bytes = self._words
            words[places] += (start - self.start) * cell_bytes
        self.start = start

    @functools.cached_property
    def _words(self) -> tuple[I64, I64, I64]:
        """One array over all descriptors, what of it says where views are, and bytes of a cell.

        A loop over the views would cost more than all else.
        """
        at = np.array([tensor for tensor, _ in self._views])
        first, last = int(at.min()), int(at.max())
        n = (last - first + ctypes.sizeof(TensorStruct)) // _WORD
        words = np.ctypeslib.as_array((ctypes.c_int64 * n).from_address(first))
        fields = (TensorStruct.view_offs.offset, TensorStruct.data.offset)
        places = np.concatenate([at - first + field for field in fields]) // _WORD
        return words, places, np.tile([n_bytes for _, n_bytes in self._views], len(fields))
