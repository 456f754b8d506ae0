"""Session files: tokens of one sequence and the keys and values of their cells, on disk.

Layout, little-endian: MAGIC, then version, bytes of the facts, number of cells and bytes of one
cell (u32 each), and seconds since 1970 (u64); the facts, a JSON object of text; tokens (i32
each); classes (u8 each); a digest of each block of cells; a digest of all before. Then the
blocks: cells as `KvCache.read_cells` gives them, so many of a block as fit BLOCK_BYTES. What is
read is checked by its digest before it is used, block by block, so that neither side holds more
than a block in memory.

Nothing in a file is trusted: it is whole and of the same model, or refused. It appears under
its name only when it is complete and on the disk.
"""

import hashlib
import io
import json
import os
import stat
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import SessionFileError
from edgeroute.runtime.sequence import CLASS_GROUPED, CLASS_SINGLE, CLASS_TILED, Classes

MAGIC: Final = b"EDGRSESS"
VERSION: Final = 2
BLOCK_BYTES: Final = 2 << 20
MAX_CELLS: Final = 1 << 22
MAX_CELL_BYTES: Final = 1 << 26
MAX_FACTS_BYTES: Final = 1 << 16
MAX_HEAD_BYTES: Final = 64 << 20
DIGEST_BYTES: Final = 32

FIXED: Final = struct.Struct("<8sIIIIQ")
_MAX_CLASS: Final = CLASS_TILED | CLASS_GROUPED | CLASS_SINGLE
O_BINARY: Final = getattr(os, "O_BINARY", 0)

Tokens = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """What the numbers in a session file depend on, and whose they are. All text.

    Attributes:
        name: of the session.
        model: fingerprint of the model's file, vocabulary included.
        adapter: names, contents and factors; "" without any.
        plan: what a depth plan computes; "" for the whole model.
        shape: of a cell, with its type.
        numerics: what computed it: the last bits depend on that, too.
    """

    name: str
    model: str
    adapter: str
    plan: str
    shape: str
    numerics: str


_TOLD: Final = {
    "name": "is of another session", "model": "was made by another model",
    "adapter": "was made under another adapter, or without one",
    "plan": "was made under another depth plan, or without one",
    "shape": "has cells of another shape or type (kv_type)",
    "numerics": "was computed by another version of ggml, processor or layout of weights",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHead:
    """What stands before the cells.

    Attributes:
        facts: whose it is.
        tokens: int32 (n_cells,).
        classes: uint8 (n_cells,), see runtime/sequence.
        digests: of each block, one behind the other.
        cell_bytes: of one cell.
        n_bytes: of the whole file.
        saved: seconds since 1970.
    """

    facts: SessionFacts
    saved: int
    tokens: Tokens
    classes: Classes
    digests: bytes
    cell_bytes: int
    n_bytes: int

    @property
    def n_cells(self) -> int:
        """Cells in the file."""
        return len(self.tokens)

    @property
    def data_offset(self) -> int:
        """Where the cells begin."""
        return self.n_bytes - self.n_cells * self.cell_bytes

    def block(self, i: int) -> tuple[int, int]:
        """Return the first cell of a block, and how many it has."""
        size = block_cells(self.cell_bytes)
        first = i * size
        return first, min(size, self.n_cells - first)

    def n_blocks(self, n_cells: int) -> int:
        """Count the blocks that the first `n_cells` are in."""
        return -(-n_cells // block_cells(self.cell_bytes))

    def check(self, wanted: SessionFacts) -> None:
        """Compare with what is wanted.

        Raises:
            SessionFileError: it is of another session or model; names what differs.
        """
        for field in fields(SessionFacts):
            if getattr(self.facts, field.name) != getattr(wanted, field.name):
                raise SessionFileError(f"the saved session {_TOLD[field.name]}")


def block_cells(cell_bytes: int) -> int:
    """Cells of one block."""
    return max(1, BLOCK_BYTES // cell_bytes)


def head_bytes(n_facts: int, n_cells: int, cell_bytes: int) -> int:
    """Bytes of all that stands before the cells."""
    n_blocks = -(-n_cells // block_cells(cell_bytes))
    return FIXED.size + n_facts + 5 * n_cells + DIGEST_BYTES * (n_blocks + 1)


class SessionReader(Closing):
    """An open session file whose head was checked; use it as a context manager.

    Not thread-safe.
    """

    def __init__(self, path: Path, max_cells: int = MAX_CELLS) -> None:
        """Open a file and check all that stands before its cells.

        Args:
            path: of the file; a link is refused.
            max_cells: a file with more is refused.

        Raises:
            SessionFileError: it cannot be read, is damaged, truncated, or of another version.
        """
        self._file = _open_regular(path)
        try:
            self.head = self._read_head(max_cells)
        except OSError as error:
            self._file.close()
            raise SessionFileError(f"the saved session cannot be read: {error.strerror}") from error
        except BaseException:
            self._file.close()
            raise

    def read_block(self, i: int, data: Bytes) -> Bytes:
        """Read a block of cells and check it.

        Args:
            i: which.
            data: takes at least one block.

        Returns:
            The part of `data` that the block fills.

        Raises:
            SessionFileError: it cannot be read, or is not what was saved.
        """
        first, n_cells = self.head.block(i)
        size = self.head.cell_bytes
        part = data[: n_cells * size]
        try:
            self._file.seek(self.head.data_offset + first * size)
            self._fill(part.data)
        except OSError as error:
            raise SessionFileError(f"the saved session cannot be read: {error.strerror}") from error
        want = self.head.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
        if digest(part.data) != want:
            raise SessionFileError(f"the saved session is damaged: the cells from token {first} "
                                   "on are not those that were saved")  # fmt: skip
        return part

    def expect(self, n_cells: int) -> None:
        """Ask the system to fetch these cells ahead."""
        if hasattr(os, "posix_fadvise"):
            end = n_cells * self.head.cell_bytes
            os.posix_fadvise(
                self._file.fileno(), self.head.data_offset, end, os.POSIX_FADV_WILLNEED
            )

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def _read_head(self, max_cells: int) -> SessionHead:
        size = os.fstat(self._file.fileno()).st_size
        if size < FIXED.size:
            raise SessionFileError(f"the saved session has only {size} bytes")
        fixed = bytearray(FIXED.size)
        self._fill(memoryview(fixed))
        magic, version, n_facts, n_cells, cell_bytes, saved = FIXED.unpack(fixed)
        if magic != MAGIC:
            raise SessionFileError("the file of the saved session is none")
        if version != VERSION:
            raise SessionFileError(f"the saved session has version {version}, this program reads "
                                   f"{VERSION}")  # fmt: skip
        if not (0 < n_facts <= MAX_FACTS_BYTES and 0 < cell_bytes <= MAX_CELL_BYTES):
            raise SessionFileError("the saved session is damaged: its header has other sizes")
        if not 0 < n_cells <= min(max_cells, MAX_CELLS):
            raise SessionFileError(f"the saved session has {n_cells} cells, this cache has "
                                   f"{min(max_cells, MAX_CELLS)}")  # fmt: skip
        before = head_bytes(n_facts, n_cells, cell_bytes)
        if before > MAX_HEAD_BYTES or before + n_cells * cell_bytes != size:
            raise SessionFileError(f"the saved session has {size} bytes, {n_cells} cells take "
                                   f"{before + n_cells * cell_bytes}; it is truncated or "
                                   "damaged")  # fmt: skip
        rest = bytearray(before - FIXED.size)
        self._fill(memoryview(rest))
        if digest(fixed + rest[:-DIGEST_BYTES]) != rest[-DIGEST_BYTES:]:
            raise SessionFileError("the saved session is damaged: its header is not what was saved")
        at = n_facts + 4 * n_cells
        classes = np.frombuffer(rest, np.uint8, n_cells, at)
        if int(classes.max()) > _MAX_CLASS:
            raise SessionFileError("the saved session is damaged: it has an unknown kind of cell")
        return SessionHead(
            facts=_parse_facts(bytes(rest[:n_facts])),
            tokens=np.frombuffer(rest, "<i4", n_cells, n_facts).astype(np.int32),
            classes=classes, digests=bytes(rest[at + n_cells : -DIGEST_BYTES]),
            cell_bytes=cell_bytes, n_bytes=size, saved=saved,
        )  # fmt: skip

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            n_read = self._file.readinto(view[done:])
            if not n_read:
                raise SessionFileError("the saved session was truncated while it was read")
            done += n_read


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return what bytes are checked by."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _parse_facts(text: bytes) -> SessionFacts:
    """Read the facts.

    Raises:
        SessionFileError: they are no such object.
    """
    names = [field.name for field in fields(SessionFacts)]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SessionFileError("the saved session is damaged: its facts are no JSON") from error
    if (
        not isinstance(found, dict)
        or sorted(found) != sorted(names)
        or not all(isinstance(value, str) for value in found.values())
    ):
        raise SessionFileError("the saved session is damaged: its facts are others")
    return SessionFacts(**found)


def _open_regular(path: Path) -> io.FileIO:
    """Open a file that is one, not a link to one, nor something that a read would wait for.

    Raises:
        SessionFileError: it is none, or cannot be opened.
    """
    flags = os.O_RDONLY | O_BINARY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise SessionFileError("nothing is saved of this session yet") from error
    except OSError as error:
        raise SessionFileError(f"the saved session cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SessionFileError("the saved session is not a regular file")
    return io.FileIO(descriptor, "rb")
