"""Traces in files: written through record by record, read as a stream, continued later."""

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Final

from edgeroute.offload.trace_codec import (
    HEAD_BYTES,
    MAGIC,
    MAX_HEADER_BYTES,
    VERSION,
    VERSIONS,
    Place,
    pack,
    read_head,
)
from edgeroute.offload.trace_records import (
    Counted,
    Mark,
    Pools,
    Record,
    StepPaging,
    Trace,
    TraceError,
    TraceMeta,
    TraceStep,
)
from edgeroute.runtime.closing import Closing

_START: Final = struct.Struct("<8sII")
_VERSION_AT: Final = len(MAGIC)


class TraceReader(Closing):
    """Reads a file record by record, holding one at a time. A context manager and an iterator.

    Attributes:
        meta: what the trace is of.
        version: of the file.
        end: bytes of the header and all whole records so far.
        truncated: whether the file ended inside a record, once all have been read.

    Raises:
        TraceError: it is no trace, or a record contradicts its header.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: BinaryIO = Path(path).open("rb")  # noqa: SIM115 (closed by close)
        try:
            self.version, self.meta = _read_start(self._file)
        except BaseException:
            self._file.close()
            raise
        self.end = self._file.tell()
        self.truncated = False
        self._left = os.fstat(self._file.fileno()).st_size - self.end
        self.place = Place()

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        if self._left < HEAD_BYTES:
            self.truncated = self._left > 0
            raise StopIteration
        head = read_head(self._read(HEAD_BYTES), self.version, self.meta)
        if self._left < HEAD_BYTES + head.n_bytes:
            self._file.seek(-HEAD_BYTES, os.SEEK_CUR)  # to come to the same end if asked again
            self.truncated = True
            raise StopIteration
        record = self.place.unpack(head, self._read(head.n_bytes), self.meta)
        self._left -= HEAD_BYTES + head.n_bytes
        self.end += HEAD_BYTES + head.n_bytes
        return record

    def _read(self, n_bytes: int) -> bytes:
        data = self._file.read(n_bytes)
        if len(data) < n_bytes:
            raise TraceError("the trace file shrank while it was read")
        return data

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()


def iter_trace(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records of a file in order, up to its last whole one, holding one at a time.

    Raises:
        TraceError: it is no trace, or a record contradicts its header.
        OSError: the file cannot be read.
    """
    with TraceReader(path) as reader:
        yield from reader


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a whole trace, up to its last whole record.

    Raises:
        TraceError: it is no trace, or a record contradicts its header.
        OSError: the file cannot be read.
    """
    steps: list[TraceStep] = []
    marks: list[Mark] = []
    paging: list[StepPaging] = []
    live: list[Pools | Counted] = []
    with TraceReader(path) as reader:
        for record in reader:
            if isinstance(record, TraceStep):
                steps.append(record)
            elif isinstance(record, StepPaging):
                paging.append(record)
            elif isinstance(record, Mark):
                marks.append(record)
            else:
                live.append(record)
    return Trace(
        meta=reader.meta, steps=tuple(steps), truncated=reader.truncated, marks=tuple(marks),
        paging=tuple(paging), live=tuple(live),
    )  # fmt: skip


def _read_start(file: BinaryIO) -> tuple[int, TraceMeta]:
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise TraceError("not an expert trace: it does not begin with its magic")
    _, version, n_bytes = _START.unpack(start)
    if version not in VERSIONS:
        raise TraceError(
            f"trace version {version} is unknown; this program reads {VERSIONS[0]} to {VERSION}"
        )
    if n_bytes > MAX_HEADER_BYTES:
        raise TraceError(f"trace header of {n_bytes} B; the limit is {MAX_HEADER_BYTES} B")
    text = file.read(n_bytes)
    if len(text) < n_bytes:
        raise TraceError("the trace file ends inside its header")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"trace header is not JSON: {error}") from error
    names = set(TraceMeta.__dataclass_fields__)
    if not isinstance(fields, dict) or fields.keys() != names:
        raise TraceError(f"trace header must have exactly the fields {sorted(names)}")
    if not isinstance(fields["layers"], list):
        raise TraceError("trace header: layers must be a list")
    return version, TraceMeta(**{**fields, "layers": tuple(fields["layers"])})


class TraceWriter(Closing):
    """Appends records to a file, each whole when `append` returns. A context manager.

    A file of version 1 becomes one of the present version, which only adds kinds of records.

    Raises:
        TraceError: the file to append to holds a trace of something else.
    """

    def __init__(self, path: str | os.PathLike[str], meta: TraceMeta) -> None:
        self.meta = meta
        self.place = Place()
        self._n_layers = 0
        # Unbuffered: what a full disk refused must not be tried again by close.
        self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            if self._file.tell() == 0:
                header = json.dumps(asdict(meta)).encode()
                self._write(_START.pack(MAGIC, VERSION, len(header)) + header)
            else:
                self._resume(Path(path))
        except BaseException:
            self._file.close()
            raise

    def _resume(self, path: Path) -> None:
        """Cut a half-written record off, so that the next one is readable."""
        with TraceReader(path) as old:
            if old.meta != self.meta:
                raise TraceError(
                    f"{path.name} is a trace of {old.meta.model[:80]!r}, set up otherwise"
                )
            for _ in old:
                pass
        self._file.truncate(old.end)
        self.place = old.place
        if old.version < VERSION:
            with path.open("r+b") as file:
                file.seek(_VERSION_AT)
                file.write(struct.pack("<I", VERSION))

    def append(self, record: Record) -> None:
        """Write one record through to the system; steps number themselves.

        Raises:
            OSError: it could not be written; the file is as it was before.
            TraceError: it is larger than a trace may hold.
        """
        self._write(pack(record, self.meta, self._n_layers))
        self.place.passed(record)
        if isinstance(record, TraceStep):
            self._n_layers = len(record.layers)

    @property
    def n_steps(self) -> int:
        """Steps in the file."""
        return self.place.n_steps

    def _write(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # a device cannot be cut
                self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()
