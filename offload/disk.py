"""Page bytes from disk: past the page cache where the system can, never quietly wrong.

A file is opened once and read by offset from any number of threads. Whoever parses the
file's header opens the DiskFile first and asks `unchanged` afterwards: then header and
bytes are of one file.
"""

import io
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol, Self

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ClosedError, ModelFileError

Mode = Literal["direct", "uncached", "buffered"]
"""Past the page cache; without adding to it (macOS); or through it, dropped after each read."""

_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
_F_NOCACHE: Final = 48  # Source: macOS fcntl.h; not every Python names it
_FLAGS: Final[int] = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_ALIGNMENTS: Final = (512, 1024, 2048, 4096, 8192, 16384, 65536)
_SAFE_ALIGNMENT: Final = 4096  # for files too short to ask
_MAX_STALLS: Final = 16
"""Reads in a row that bring nothing usable before the disk is given up."""


class Identity(NamedTuple):
    """What tells a file from another, and from itself before a change."""

    size_bytes: int
    mtime_ns: int
    inode: int
    device: int


class Disk(Protocol):
    """An open file as the I/O threads see it; tests put faulty ones in its place."""

    @property
    def path(self) -> Path:
        """For messages."""

    @property
    def size_bytes(self) -> int:
        """Size when it was opened."""

    @property
    def alignment(self) -> int:
        """Offsets, lengths and addresses of reads must be multiples of this; 1 is any."""

    def read_at(self, offset: int, *buffers: memoryview) -> int:
        """Read once, into one buffer after the other; return the bytes read.

        They are fewer than asked at the end of the file, and may be elsewhere.

        Raises:
            OSError: what the system said.
        """

    def check(self) -> None:
        """Raise ModelFileError if the open file is no longer as it was when opened."""

    def close(self) -> None:
        """Close the file; safe to call twice."""


class DiskFile(Closing):
    """A regular file, opened for reads by offset."""

    def __init__(self, path: Path, descriptor: int, mode: Mode, alignment: int) -> None:
        self.path = path
        self.mode: Mode = mode
        self.alignment = alignment
        self.identity = _identity(os.fstat(descriptor))
        self.size_bytes = self.identity.size_bytes
        self._descriptor: int | None = descriptor
        self._seeking = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, direct: bool = True) -> Self:
        """Open a file in the way that leaves the page cache alone, if there is one.

        Args:
            path: a regular file.
            direct: False reads through the page cache even where it could be passed by.

        Raises:
            ModelFileError: missing, unreadable or not a regular file; nothing stays open.
        """
        where = Path(path)
        if direct and _O_DIRECT:
            alignment, descriptor = _open_direct(where)
            if descriptor is not None:
                return cls(where, descriptor, "direct", alignment)
        descriptor = _open_plain(where, _FLAGS)
        if direct and _refuse_cache(descriptor):
            return cls(where, descriptor, "uncached", 1)
        if hasattr(os, "posix_fadvise"):  # pages lie anywhere: reading ahead is wasted
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return cls(where, descriptor, "buffered", 1)

    def read_at(self, offset: int, *buffers: memoryview) -> int:
        """Read once, into one buffer after the other; return the bytes read.

        Raises:
            OSError: what the system said.
            ClosedError: the file was closed.
        """
        descriptor = self._open_descriptor()
        if hasattr(os, "preadv"):
            n = os.preadv(descriptor, buffers, offset)
        else:
            with self._seeking:  # this system has no reads at an offset: one at a time
                os.lseek(descriptor, offset, os.SEEK_SET)
                with io.FileIO(descriptor, "rb", closefd=False) as file:
                    n = 0
                    for buffer in buffers:
                        got = file.readinto(buffer) or 0
                        n += got
                        if got < len(buffer):
                            break
        if self.mode == "buffered":
            self.drop_cache(offset, n)
        return n

    def drop_cache(self, offset: int, nbytes: int) -> bool:
        """Ask the system to forget these bytes; False where it takes no such wish.

        Its cache is charged to our memory limit, and pages of a model would fill it.
        """
        if not hasattr(os, "posix_fadvise"):
            return False
        start = offset & -mmap.PAGESIZE  # part of a page is not dropped
        length = (offset + nbytes - start + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
        os.posix_fadvise(self._open_descriptor(), start, length, os.POSIX_FADV_DONTNEED)
        return True

    def check(self) -> None:
        """Raise if the open file was truncated or written to.

        After a read, this says that what was read is what the file held when it was opened
        (writing sets the time first). A file replaced under the same name is no matter:
        the old one stays readable for as long as it is open.

        Raises:
            ModelFileError: its size or time of writing differs.
            ClosedError: the file was closed.
        """
        status = os.fstat(self._open_descriptor())
        if status.st_size != self.size_bytes:
            raise ModelFileError(
                f"{self.path} had {self.size_bytes} bytes when it was opened and has "
                f"{status.st_size} now; a model in use must be replaced, not rewritten: "
                "load it again"
            )
        if status.st_mtime_ns != self.identity.mtime_ns:
            raise ModelFileError(
                f"{self.path} was written to since it was opened; a model in use must be "
                "replaced, not rewritten: load it again"
            )

    def unchanged(self) -> bool:
        """Tell whether the open file is as it was, and still the one under its name."""
        if _identity(os.fstat(self._open_descriptor())) != self.identity:
            return False
        try:
            return _identity(self.path.stat()) == self.identity
        except OSError:  # the name is gone
            return False

    def close(self) -> None:
        """Close the file; safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ClosedError(f"{self.path} is closed; open it again to read pages")
        return self._descriptor


def read_full(disk: Disk, offset: int, buffer: memoryview, wanted: int) -> None:
    """Read until the first `wanted` bytes of `buffer` are those at `offset`.

    Args and Raises: as `read_into`, with one buffer.
    """
    read_into(disk, offset, (buffer,), wanted)


def read_into(disk: Disk, offset: int, buffers: Sequence[memoryview], wanted: int) -> None:
    """Read until the first `wanted` bytes of some buffers, in turn, are those at `offset`.

    Args:
        disk: a file.
        offset: a multiple of the disk's alignment, as are each buffer's address and length.
        buffers: at most 256, which take `wanted` bytes or more; what lies behind them is
            undefined.
        wanted: bytes that must come.

    Raises:
        ModelFileError: the disk failed, the file ended early, or it was changed since it
            was opened; the buffers' content is undefined.
    """
    done, stalls = 0, 0
    while done < wanted:
        if stalls == _MAX_STALLS:
            disk.check()  # says how the file changed, where it did
            raise _failed(disk, (offset, wanted, done), "the disk brings nothing more")
        try:
            n = disk.read_at(offset + done, *_behind(buffers, done))
        except InterruptedError:
            stalls += 1
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            raise _failed(disk, (offset, wanted, done), reason) from error
        if n == 0:
            disk.check()  # says how the file changed, where it did
            raise _failed(disk, (offset, wanted, done), "the file ends there")
        if done + n >= wanted:
            break
        # The next read must be aligned again, so the odd bytes are read twice.
        so_far = (done + n) // disk.alignment * disk.alignment
        stalls = stalls + 1 if so_far == done else 0
        done = so_far
    disk.check()


def _behind(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What of the buffers lies behind their first `done` bytes."""
    if not done:
        return buffers
    left = list(buffers)
    while done >= len(left[0]):
        done -= len(left.pop(0))
    return [left[0][done:], *left[1:]]


def read_range(disk: Disk, offset: int, nbytes: int) -> memoryview:
    """Return any bytes of a file, aligned or not, in memory of their own.

    Raises:
        ModelFileError: as `read_full`.
    """
    start = offset // disk.alignment * disk.alignment
    length = -(-(offset + nbytes - start) // disk.alignment) * disk.alignment
    view = memoryview(mmap.mmap(-1, max(1, length)))[:length]  # begins at a page
    read_full(disk, start, view, offset + nbytes - start)
    return view[offset - start : offset - start + nbytes]


def _failed(disk: Disk, at: tuple[int, int, int], reason: str) -> ModelFileError:
    offset, wanted, done = at
    return ModelFileError(
        f"reading {disk.path} failed at offset {offset}: wanted {wanted} bytes, got {done} "
        f"({reason}); check the disk and fetch the file again"
    )


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def _open_plain(path: Path, flags: int) -> int:
    """Open a regular file; `O_NONBLOCK` among the flags, so that a FIFO cannot hold us up."""
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"cannot open {path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFileError(f"{path} is not a regular file; pages are read from files only")
    return descriptor


def _open_direct(path: Path) -> tuple[int, int | None]:
    """Open past the page cache: (alignment, descriptor), or None where that is refused."""
    try:
        descriptor = _open_plain(path, _FLAGS | _O_DIRECT)
    except ModelFileError as error:
        if isinstance(error.__cause__, OSError):  # the flag, or the file: a plain open tells
            return 1, None
        raise
    alignment = _find_alignment(descriptor)
    if alignment is None:  # taken at open, refused at read
        os.close(descriptor)
        return 1, None
    return alignment, descriptor


def _find_alignment(descriptor: int) -> int | None:
    """Try ever coarser reads until one is taken; None if none is."""
    size = os.fstat(descriptor).st_size
    with mmap.mmap(-1, 2 * _ALIGNMENTS[-1]) as memory, memoryview(memory) as view:
        for alignment in _ALIGNMENTS:
            short = size < 2 * alignment  # no such offset in the file: nothing is learnt from it
            offset = 0 if short else alignment
            step = max(alignment, _SAFE_ALIGNMENT) if short else alignment
            with view[step : 2 * step] as target:
                try:
                    os.preadv(descriptor, [target], offset)
                except OSError:
                    continue
            return step
    return None


def _refuse_cache(descriptor: int) -> bool:
    """Keep this file's reads from filling the cache: macOS's nearest to O_DIRECT."""
    if os.name != "posix" or _O_DIRECT:
        return False
    import fcntl  # not on Windows

    try:
        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
    except OSError:
        return False
    return True
