"""A GGUF model file, mapped read-only: its header checked, its tensors in place.

Nothing is copied: `view` and `address` point into the mapping. A file that shrinks while
it is mapped cannot be caught here (the kernel ends the process that touches the lost
pages), so writers must replace model files, never rewrite them.
"""

import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import numpy as np

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ClosedError, ModelFileError
from edgeroute.runtime.gguf_header import Header, HeldParts, parse_header
from edgeroute.runtime.gguf_metadata import Metadata
from edgeroute.runtime.gguf_types import GGMLType, TensorInfo, ValueType
from edgeroute.runtime.host_memory import read_in

__all__ = ["GGMLType", "GGUFFile", "Metadata", "TensorInfo", "ValueType"]

_POPULATE_BYTES = 64 << 20  # at once, so that Ctrl-C is heard between
_HEADER_BYTES, _PIECE_BYTES = 16 << 20, 1 << 18
_MIN_FILE_BYTES = 4 + 4 + 8 + 8


class GGUFFile(Closing):
    """A mapped GGUF file; use it as a context manager or call `close`.

    One that was made by `from_parts` describes its tensors and has none of their bytes.
    """

    def __init__(
        self, path: Path, mapped: "_Mapped | None", buffer: memoryview, header: Header,
        size_bytes: int,
    ) -> None:  # fmt: skip
        self.path = path
        self.status = os.stat_result((0,) * 10) if mapped is None else mapped.status
        self.size_bytes = size_bytes
        self.version = header.version
        self.alignment = header.alignment
        self.data_offset = header.data_offset
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(header.tensors)
        self.metadata: Metadata = header.metadata
        self._mapping: mmap.mmap | None = None
        self._buffer = buffer
        self._base_address = 0
        self._gone = "is closed; open it again to read tensors"
        if mapped is None:
            self._gone = "is not on this machine, only its header; pull it to read tensors"
        else:
            self._mapping = mapped.mapping
            self._base_address = int(np.frombuffer(mapped.mapping, dtype=np.uint8).ctypes.data)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map a file and check its header.

        Raises:
            ModelFileError: not a readable regular file, or a malformed header; nothing
                stays open.
        """
        where = Path(path)
        mapped = _map(where)
        buffer = memoryview(mapped.mapping)
        try:
            header = parse_header(buffer, where.name)
        except BaseException:
            # The error's frames still refer to the buffer and would keep the mapping open.
            buffer.release()
            mapped.mapping.close()
            raise
        return cls(where, mapped, buffer, header, len(mapped.mapping))

    @classmethod
    def from_parts(cls, name: str, buffer: memoryview, held: HeldParts) -> Self:
        """Describe a file of which only the header is here.

        Args:
            name: what messages call it; becomes `path`, which need not exist.
            buffer: bytes of the file's beginning, format `B`.
            held: which of them are true, and the size of the whole file.

        Raises:
            ShortHeaderError: more of the file is needed.
            ModelFileError: a malformed header.

        Lifetime: the buffer must not change while the file is open.
        """
        header = parse_header(buffer, name, held)
        return cls(Path(name), None, buffer, header, held.size_bytes)

    def is_same(self, identity: tuple[int, int, int, int]) -> bool:
        """Whether (size, mtime in ns, inode, device) are those of the file that was mapped."""
        status = self.status
        return identity == (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)

    def view(self, info: TensorInfo) -> memoryview:
        """Return the bytes of one tensor, not copied.

        Lifetime: the mapping stays until every view is dropped, also after `close`.
        """
        return memoryview(self._open_mapping())[info.offset : info.offset + info.nbytes]

    def address(self, info: TensorInfo) -> int:
        """Return the address of a tensor's first byte.

        Lifetime: valid until `close`.
        """
        self._open_mapping()
        return self._base_address + info.offset

    def release(self, offset: int, nbytes: int) -> int:
        """Tell the system that these bytes of the file need not stay in memory.

        Only whole pages inside the range are given back; touching them again reads the
        file again. Does nothing where the system offers no such advice.

        Returns:
            The bytes given back.
        """
        mapping = self._open_mapping()
        start = (max(offset, 0) + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
        end = min(offset + nbytes, self.size_bytes) & -mmap.PAGESIZE
        if end <= start or not hasattr(mmap, "MADV_DONTNEED"):
            return 0
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)
        return end - start

    def populate(self, offset: int, nbytes: int) -> None:
        """Read these bytes and map their pages now, not one by one when they are first used.

        Does nothing where the system cannot; the pages then come on first use.
        """
        start = offset & -mmap.PAGESIZE
        end = min(offset + nbytes, self.size_bytes)
        for at in range(start, end, _POPULATE_BYTES):
            self._open_mapping()
            if not read_in(self._base_address + at, min(_POPULATE_BYTES, end - at)):
                return  # a kernel before 5.14 does not know this advice

    def close(self) -> None:
        """Unmap the file, or leave that to the last view of it that is still held."""
        mapping, self._mapping = self._mapping, None
        self.metadata.close()
        if mapping is None:
            return
        try:
            self._buffer.release()
            mapping.close()
        except BufferError:
            # Views are out: dropping our reference unmaps the file when the last one goes.
            return

    def _open_mapping(self) -> mmap.mmap:
        if self._mapping is None:
            raise ClosedError(f"{self.path.name} {self._gone}")
        return self._mapping


class _Mapped(NamedTuple):
    """A mapped file, and its status when it was opened."""

    mapping: mmap.mmap
    status: os.stat_result


def _map(path: Path) -> _Mapped:
    """Map a regular file read-only.

    Raises:
        ModelFileError: missing, unreadable, not a regular file, or too short for a header.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"cannot open the model file {path}: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            raise ModelFileError(f"the model file {path} is {kind}, not a regular file")
        if status.st_size < _MIN_FILE_BYTES:
            raise ModelFileError(
                f"the model file {path} has {status.st_size} bytes, fewer than the "
                f"{_MIN_FILE_BYTES} of a GGUF header; fetch it again"
            )
        _read_ahead(descriptor)
        return _Mapped(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), status)
    except (OSError, ValueError, OverflowError) as error:
        raise ModelFileError(f"cannot map the model file {path}: {error}") from error
    finally:
        os.close(descriptor)


def _read_ahead(descriptor: int) -> None:
    """Have the header in memory before it is parsed.

    The parser reads mapped pages, and where one of them has to come from a disk all threads of
    Python wait for it: for ever, where the disk is stuck.
    """
    if not hasattr(os, "pread"):
        return
    for at in range(0, _HEADER_BYTES, _PIECE_BYTES):
        if len(os.pread(descriptor, _PIECE_BYTES, at)) < _PIECE_BYTES:
            return
