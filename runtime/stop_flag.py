"""What a running computation asks before each operation, without Python's lock."""

import ctypes
import sys
from typing import Final


class StopFlag:
    """What a running computation asks before each operation; any thread may raise it.

    ggml asks a C function `bool f(void *)`. A Python function would take Python's lock a
    thousand times per batch, which costs 5 % of a prefill. Where the C library has semaphores
    of a process's own, sem_trywait answers: it takes one of many until there are none, so that
    what is left tells how far the computation is. Elsewhere strlen answers the same question
    about a string of length zero or one.
    """

    _MANY: Final = (1 << 31) - 1  # SEM_VALUE_MAX

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint64 * 8)()
        self.address = ctypes.addressof(self._memory)
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        # macOS has these functions too, but they always fail.
        self._library = library if sys.platform == "linux" else None
        ask = library.strlen if self._library is None else library.sem_trywait
        self.callback = ctypes.cast(ask, ctypes.c_void_p).value
        self._n_asked = 0  # before it was raised
        self.clear()

    def set(self) -> None:
        """Stop the computation that runs now, if it watches."""
        self._n_asked = self.n_asked
        self._put(1 if self._library is None else 0)

    def is_set(self) -> bool:
        """Whether it was raised and not lowered since."""
        return bool(self._memory[0]) if self._library is None else not self._left()

    def clear(self) -> None:
        """Let computations run."""
        self._put(0 if self._library is None else self._MANY)

    @property
    def n_asked(self) -> int:
        """Operations begun since it was lowered, where that is known; any thread may look."""
        if self._library is None or not (left := self._left()):
            return self._n_asked
        return self._MANY - left

    def _put(self, value: int) -> None:
        if self._library is None:
            self._memory[0] = value
        else:
            self._library.sem_init(ctypes.byref(self._memory), 0, value)

    def _left(self) -> int:
        left = ctypes.c_int()
        assert self._library is not None
        self._library.sem_getvalue(ctypes.byref(self._memory), ctypes.byref(left))
        return left.value
