"""Numbers of an adapter out of its file: F16, F32 or BF16 in, checked F16 out.

Read, not mapped: a file that shrinks under a mapping would end the process.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.tensor import to_half

Kind = Literal["F16", "F32", "BF16"]
KIND_BYTES: Final[dict[Kind, int]] = {"F16": 2, "F32": 4, "BF16": 2}
"""Bytes of one number, of every type that is read."""

Identity = tuple[int, int, int, int]
"""Size, mtime in ns, inode and device."""

F16_MAX: Final = 65504.0
_F16_EXPONENT: Final = np.uint16(0x7C00)  # all of its bits set: NaN or infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One matrix in a file: its name there, type, (rows, columns) and place in bytes."""

    name: str
    kind: Kind
    shape: tuple[int, int]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape[0] * self.shape[1] * KIND_BYTES[self.kind]


def open_regular(path: Path, what: str) -> io.FileIO:
    """Open a regular file for reading, also through a link.

    Raises:
        AdapterFileError: missing, unreadable, or not a regular file.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterFileError(f"cannot open {what} {str(path)!r}: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFileError(f"{what} {str(path)!r} is not a regular file")
    return io.FileIO(descriptor, "rb")


def identify(file: io.FileIO) -> Identity:
    """Return what tells this file from another of the same name, or from itself rewritten."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def open_data(path: Path, identity: Identity) -> "DataReader":
    """Open a data file whose header was checked when it had this identity.

    Raises:
        AdapterFileError: it cannot be opened, or it is not that file any more.
    """
    file = open_regular(path, "the adapter file")
    reader = DataReader(file, path, identity)
    try:
        reader.check_same("since it was opened")
    except BaseException:
        file.close()
        raise
    return reader


class DataReader:
    """An open data file; a context manager that checks on leaving that nobody rewrote it."""

    def __init__(self, file: io.FileIO, path: Path, identity: Identity) -> None:
        self._file = file
        self._path = path
        self._identity = identity

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.check_same("while it was read")
        finally:
            self._file.close()

    def check_same(self, when: str) -> None:
        """Raise AdapterFileError if the file is not the one whose header was checked."""
        if identify(self._file) != self._identity:
            raise AdapterFileError(
                f"the adapter file {str(self._path)!r} changed {when}; add the adapter again"
            )

    def expect(self, start: int, end: int) -> None:
        """Ask the system to fetch these bytes already while earlier ones are converted."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, stored: Stored) -> npt.NDArray[np.float16]:
        """Read one matrix as F16 (rows, columns), C-contiguous.

        Raises:
            AdapterFileError: the file ends early, or a number does not fit F16.
        """
        raw = np.empty(stored.nbytes, dtype=np.uint8)
        self._fill(raw.data, stored)
        return to_f16(raw, stored, self._path).reshape(stored.shape)

    def _fill(self, view: memoryview, stored: Stored) -> None:
        try:
            self._file.seek(stored.offset)
            done = 0
            while done < len(view):
                n_read = self._file.readinto(view[done:])
                if not n_read:
                    raise AdapterFileError(
                        f"{self._path.name}: tensor {stored.name!r} ends at byte "
                        f"{stored.offset + done}, {len(view) - done} too early; the file is "
                        "truncated, fetch it again"
                    )
                done += n_read
        except OSError as error:
            raise AdapterFileError(
                f"cannot read {len(view)} bytes of tensor {stored.name!r} from "
                f"{str(self._path)!r}: {error.strerror}"
            ) from error


def to_f16(raw: npt.NDArray[np.uint8], stored: Stored, path: Path) -> npt.NDArray[np.float16]:
    """Convert the little-endian bytes of a matrix to F16, flat.

    Raises:
        AdapterFileError: a number is NaN, infinite, or beyond F16.
    """
    wide = _native(raw, stored.kind)
    values: npt.NDArray[np.float16] = wide
    if stored.kind != "F16":
        values = to_half(wide)
    if values.size and int((values.view(np.uint16) & _F16_EXPONENT).max()) == _F16_EXPONENT:
        raise _not_finite(wide, stored, path)
    return values


def _native(raw: npt.NDArray[np.uint8], kind: Kind) -> npt.NDArray[Any]:
    if kind == "BF16":
        return widen_bf16(raw)
    return raw.view("<f4" if kind == "F32" else "<f2")


def widen_bf16(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return BF16 numbers as F32: they are its upper halves."""
    wide = raw.view("<u2").astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _not_finite(wide: npt.NDArray[Any], stored: Stored, path: Path) -> AdapterFileError:
    """Name the first number that cannot be used."""
    with np.errstate(invalid="ignore"):  # converting a signalling NaN
        values = wide.astype(np.float64)
    index = int(np.flatnonzero(~(np.abs(values) < F16_MAX + 16))[0])
    row, column = divmod(index, stored.shape[1])
    value = float(values[index])
    if np.isfinite(value):
        limit = f"beyond the {F16_MAX:g} of F16; train with smaller numbers and a larger alpha"
    else:
        limit = "not a number to compute with; the adapter is damaged or its training diverged"
    return AdapterFileError(
        f"{path.name}: tensor {stored.name!r} has {value:g} at row {row}, column {column}, {limit}"
    )
