"""Cells that another thread copies out of the cache, or into it, while others are computed."""

import threading

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.cells import Region
from edgeroute.runtime.kv_cache import KvCache

Bytes = npt.NDArray[np.uint8]


class HeldCells:
    """A region that a thread may copy until it is let go; nobody computes there meanwhile.

    The owner of the cache lets go at any moment, and waits for no more than one copy: never for
    what the other thread does with its bytes, such as a disk that hangs.
    """

    def __init__(self, kv: KvCache, region: Region) -> None:
        self._kv = kv
        self._start, self._n_cells = region.start, region.n_cells
        self._lock = threading.Lock()
        self._active = True

    @property
    def active(self) -> bool:
        """Whether it was not let go yet."""
        return self._active

    def read(self, first: int, n_cells: int, data: Bytes) -> bool:
        """Copy cells from the region's `first` on out, see `KvCache.read_cells`.

        Returns:
            False where they were let go; nothing was copied then.
        """
        with self._lock:
            if self._active:
                self._check(first, n_cells)
                self._kv.read_cells(self._start + first, n_cells, data)
            return self._active

    def write(self, first: int, n_cells: int, data: Bytes) -> bool:
        """Copy cells in; else as `read`."""
        with self._lock:
            if self._active:
                self._check(first, n_cells)
                self._kv.write_cells(self._start + first, n_cells, data)
            return self._active

    def let_go(self) -> None:
        """Give the region back; safe to call twice, and from any thread."""
        with self._lock:
            self._active = False

    def _check(self, first: int, n_cells: int) -> None:
        if not 0 <= first <= first + n_cells <= self._n_cells:
            raise ValueError(f"cells {first} to {first + n_cells} of a region of {self._n_cells}")
