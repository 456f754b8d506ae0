"""Gives parts of this process's own memory back to the system, and reads mapped files in."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

OWN_PAGES_FROM = 1 << 16
"""Bytes from which a block of the heap gets pages of its own, see `keep_heap_small`."""
_M_MMAP_THRESHOLD = -3  # Source: malloc.h of glibc
_ADVICE = {"linux": 4, "darwin": 5}  # MADV_DONTNEED, MADV_FREE: the next touch reads zeros
_WILL_NEED = 3  # MADV_WILLNEED, on Linux and macOS alike
_POPULATE_READ = 22  # Source: linux/mman.h, MADV_POPULATE_READ


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


def will_need(address: int, nbytes: int) -> bool:
    """Have the system begin to read a part of a mapped file, which is not waited for.

    Python's own `mmap.madvise` would keep its other threads waiting while the wish is queued.

    Args:
        address: any inside a mapping.
        nbytes: how many bytes of it.

    Returns:
        Whether the system takes such wishes.
    """
    madvise = _madvise()
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return madvise is not None and madvise(start, address + nbytes - start, _WILL_NEED) == 0


def read_in(address: int, nbytes: int) -> bool:
    """Read pages of a mapped file and map them, while other threads of Python go on.

    Python's own `mmap.madvise` keeps them all waiting: for as long as the disk takes, or for ever
    where that is stuck.

    Args:
        address: of a page's first byte, inside a mapping.
        nbytes: how many bytes of it.

    Returns:
        Whether they are there; False where the system cannot.
    """
    madvise = _madvise()
    if sys.platform != "linux" or madvise is None:
        return False
    return madvise(address, nbytes, _POPULATE_READ) == 0


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
