"""Gives parts of this process's own memory back to the system."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

_ADVICE = {"linux": 4, "darwin": 5}  # MADV_DONTNEED, MADV_FREE: the next touch reads zeros


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform not in _ADVICE:
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def give_back(address: int, nbytes: int) -> int:
    """Give whole pages inside private memory back; what they held is lost.

    Returns:
        The bytes given back: 0 where the system cannot.
    """
    madvise = _madvise()
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if madvise is None or end <= start:
        return 0
    return end - start if madvise(start, end - start, _ADVICE[sys.platform]) == 0 else 0
