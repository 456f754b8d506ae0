"""How weights come out of a mapped file: asked for ahead of their use, copied by several threads.

Left to page faults, a cold disk waits whenever a processor copies, and reads on behind every
tensor: with a read-ahead of 8 MiB, half as much again as was wanted.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from edgeroute.runtime import host_memory
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf import GGUFFile, TensorInfo
from edgeroute.runtime.machine import usable_cores

MOST_AHEAD_BYTES: Final = 256 << 20
"""Asked for and not used yet, at most: the page cache may have to be smaller than a file."""
MOST_THREADS: Final = 4
PIECE_BYTES: Final = 256 << 10
"""Asked for at once: Linux drops what is beyond the disk's read-ahead and its longest request."""


class ReadAhead(Closing):
    """Asks the system for tensors of a file before they are used, in a thread of its own.

    Where the system takes no such wish, nothing happens. The file must stay open until `close`.
    """

    def __init__(self, file: GGUFFile, infos: Iterable[TensorInfo]) -> None:
        """Begin, in this order."""
        self._file = file
        self._infos = list({info.name: info for info in infos}.values())
        self._changed = threading.Condition()
        self._asked: dict[str, int] = {}
        self._asked_bytes = 0
        self._used: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="edgeroute-ahead", daemon=True)
        self._thread.start()

    def used(self, info: TensorInfo) -> None:
        """Tell that a tensor has been used: it makes room for others. Any thread."""
        with self._changed:
            self._used.add(info.name)
            self._asked_bytes -= self._asked.pop(info.name, 0)
            self._changed.notify_all()

    def close(self) -> None:
        """Ask for nothing more; safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        for info in self._infos:
            address = self._file.address(info)
            for at in range(0, info.nbytes, PIECE_BYTES):
                nbytes = min(PIECE_BYTES, info.nbytes - at)
                if not self._may_ask(info, nbytes):
                    break
                if not host_memory.will_need(address + at, nbytes):
                    return

    def _may_ask(self, info: TensorInfo, nbytes: int) -> bool:
        """Wait until there is room for a piece of a tensor; False if nobody wants it any more."""
        with self._changed:
            while not self._closed and info.name not in self._used:
                if self._asked_bytes + nbytes <= MOST_AHEAD_BYTES:
                    self._asked[info.name] = self._asked.get(info.name, 0) + nbytes
                    self._asked_bytes += nbytes
                    return True
                self._changed.wait()
            return False


class Copy(NamedTuple):
    """A tensor that has its place, and the one of the file that goes there.

    `mapped` are those whose bytes in the file are used in place as well.
    """

    tensor: Tensor
    info: TensorInfo
    mapped: bool


def rank(info: TensorInfo) -> tuple[int, int]:
    """Sort tensors into the order of copying: the longest first, so that threads end alike."""
    return -info.nbytes, info.offset


def copy_all(file: GGUFFile, device: Device, copies: Sequence[Copy], ahead: ReadAhead) -> None:
    """Write tensors into their buffers; the file's pages are let go as we go.

    Args:
        file: where they are read.
        device: where the buffers are.
        copies: the tensors.
        ahead: what reads them, in the order of `rank`.

    Raises:
        DeviceLostError: the device is gone; the rest is not written.
    """
    write = ggml().ggml_backend_tensor_set

    def copy(each: Copy) -> None:
        info = each.info
        write(each.tensor, file.address(info), 0, info.nbytes)
        device.check()  # the rest of a large model would go nowhere for a while
        if not each.mapped:
            file.release(info.offset, info.nbytes)
        ahead.used(info)

    todo = sorted(copies, key=lambda each: rank(each.info))
    # A core is libllama's, which reads the vocabulary meanwhile: most starts wait for that.
    n_threads = min(MOST_THREADS, usable_cores() - 1, len(todo))
    if n_threads < 2 or not device.is_cpu:  # others have one queue, or one connection
        for each in todo:
            copy(each)
        return
    with ThreadPoolExecutor(n_threads, "edgeroute-copy") as pool:
        for _ in pool.map(copy, todo):
            pass
