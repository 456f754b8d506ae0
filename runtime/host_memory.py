"""Gives parts of this process's own memory back to the system."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

OWN_PAGES_FROM = 1 << 16
"""Bytes from which a block of the heap gets pages of its own, see `keep_heap_small`."""
_M_MMAP_THRESHOLD = -3  # Source: malloc.h of glibc
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


def keep_heap_small() -> bool:
    """Let large blocks of this process's heap go back to the system as soon as they are freed.

    glibc raises its own bound whenever such a block is freed, up to 32 MiB; graphs that come and
    go then break the heap up, and a server grows for as long as shapes vary. It concerns the
    whole process, so that only a program of our own may ask for it.

    Returns:
        Whether the C library could be told.
    """
    if sys.platform != "linux":
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    return tell is not None and tell(_M_MMAP_THRESHOLD, OWN_PAGES_FROM) == 1
