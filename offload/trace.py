"""Which experts each token chose: recorded in memory, appended to a file, read back.

File (little endian): magic, version, header length, a JSON header (`TraceMeta`), then one
record per step: marker, flags (1 prefill, 2 uniform), number of layers, payload bytes. The
payload of a uniform step, where all traced layers chose equally many, is that number and
then the ids, layer by layer; of any other step, (layer, number, ids) for each layer. Ids are
uint8 up to 256 experts, else uint16, token after token. A file cut off anywhere is readable
up to its last whole step; a wrong one is refused before anything large is allocated.
"""

import contextlib
import csv
import errno
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError

MAGIC: Final = b"EDGETRAC"
VERSION: Final = 1
MAX_LAYER: Final = 4096
MAX_EXPERT: Final = 1 << 16
MAX_HEADER_BYTES: Final = 1 << 16
MAX_PAYLOAD_BYTES: Final = 1 << 28
_START: Final = struct.Struct("<8sII")
_RECORD: Final = struct.Struct("<BBHI")
_COUNT: Final = struct.Struct("<I")
_LAYER: Final = struct.Struct("<HI")
_MARKER: Final = 0xE5
_PREFILL, _UNIFORM = 1, 2
_STEP_BYTES: Final = 400  # of the objects around a step's ids

Ids = npt.NDArray[np.uint16]


class TraceError(UsageError):
    """A trace file is malformed, or a step does not match its trace's header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMeta:
    """What a trace is of. `layers` are the traced (MoE) layers, ascending.

    Raises:
        TraceError: a value that no model has.
    """

    model: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    page_bytes: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        _check("model", self.model, isinstance(self.model, str) and len(self.model) <= 4096)
        _check_int("n_layer", self.n_layer, 1, MAX_LAYER)
        _check_int("n_expert", self.n_expert, 1, MAX_EXPERT)
        _check_int("n_expert_used", self.n_expert_used, 1, self.n_expert)
        _check_int("page_bytes", self.page_bytes, 0, 1 << 50)
        good = isinstance(self.layers, tuple) and 0 < len(self.layers) <= self.n_layer
        _check("layers", self.layers, good)
        for il in self.layers:
            _check_int("layers", il, 0, self.n_layer - 1)
        _check("layers", self.layers, list(self.layers) == sorted(set(self.layers)))

    @property
    def file_type(self) -> str:
        """numpy's name for an expert's number as stored."""
        return "u1" if self.n_expert <= 256 else "<u2"

    @property
    def id_bytes(self) -> int:
        """Bytes of an expert's number as stored."""
        return 1 if self.n_expert <= 256 else 2


def _check(name: str, value: object, good: bool) -> None:
    if not good:
        raise TraceError(f"trace header: {name} is {str(value)[:80]!r}, which no model has")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    _check(name, value, type(value) is int and low <= value <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One decode step or prefill ubatch.

    `flat` is what layer after layer chose, `sizes[i]` experts of it by `layers[i]`: n_tokens *
    n_expert_used, token after token. The last layer may have fewer tokens than the others.
    """

    prefill: bool
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    flat: Ids

    def parts(self) -> Iterator[tuple[int, Ids]]:
        """Each layer with the ids that it chose."""
        at = 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            yield layer, self.flat[at : at + size]
            at += size

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, nearly."""
        return _STEP_BYTES + 16 * len(self.layers) + self.flat.nbytes


def pages_of(layer: int, ids: Iterable[int], n_expert: int) -> list[int]:
    """Turn the experts that a layer's tokens chose into distinct pages, in order of first use.

    Engine and replay both use it, so that both ask the page table the same.
    """
    base = layer * n_expert
    return [base + expert for expert in dict.fromkeys(ids)]


def make_step(
    meta: TraceMeta, prefill: bool, chosen: Sequence[tuple[int, npt.ArrayLike]]
) -> TraceStep:
    """Pack (layer, ids) pairs of one step into compact arrays of their own.

    Raises:
        TraceError: an id or layer that the header does not have, or a layer without ids.
    """
    layers = tuple(layer for layer, _ in chosen)
    parts = [np.asarray(ids).reshape(-1) for _, ids in chosen]
    sizes = tuple(part.size for part in parts)
    known = len(set(layers)) == len(layers) > 0 and set(layers) <= set(meta.layers)
    if not known or min(sizes) == 0:
        raise TraceError(f"layers {layers} with {sizes} ids are no step of {meta.model[:80]!r}")
    flat = np.concatenate(parts)
    if not np.issubdtype(flat.dtype, np.integer):
        raise TraceError(f"a step's experts must be integers, got {flat.dtype}")
    if int(flat.min()) < 0 or int(flat.max()) >= meta.n_expert:
        raise TraceError(
            f"a step has experts {int(flat.min())} to {int(flat.max())}, but {meta.model[:80]!r} "
            f"has {meta.n_expert}"
        )
    return TraceStep(prefill=prefill, layers=layers, sizes=sizes, flat=flat.astype(np.uint16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Steps in order. `truncated` where the file ended inside a step, which was left out."""

    meta: TraceMeta
    steps: tuple[TraceStep, ...]
    truncated: bool = False


class TraceWriter:
    """Appends steps to a file, each whole when `append` returns. A context manager.

    Raises:
        TraceError: the file to append to holds a trace of something else.
    """

    def __init__(self, path: str | os.PathLike[str], meta: TraceMeta) -> None:
        self.meta = meta
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
        """Cut a half-written step off, so that the next one is readable."""
        with path.open("rb") as old:
            found = _read_meta(old)
            if found != self.meta:
                raise TraceError(
                    f"{path.name} is a trace of {found.model[:80]!r}, set up otherwise"
                )
            end = old.tell()
            for _ in _steps(old, found):
                end = old.tell()
        self._file.truncate(end)

    def append(self, step: TraceStep) -> None:
        """Write one step through to the system.

        Raises:
            OSError: it could not be written; the file is as it was before.
        """
        self._write(_pack(step, self.meta))

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pack(step: TraceStep, meta: TraceMeta) -> bytes:
    if step.layers == meta.layers and len(set(step.sizes)) == 1:
        flags = _UNIFORM
        payload = _COUNT.pack(step.sizes[0]) + step.flat.astype(meta.file_type).tobytes()
    else:
        flags = 0
        payload = b"".join(
            _LAYER.pack(layer, part.size) + part.astype(meta.file_type).tobytes()
            for layer, part in step.parts()
        )
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise TraceError(
            f"a step of {len(payload)} B exceeds a trace's limit of {MAX_PAYLOAD_BYTES} B; "
            f"use a smaller n_ubatch"
        )
    flags |= _PREFILL if step.prefill else 0
    return _RECORD.pack(_MARKER, flags, len(step.layers), len(payload)) + payload


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a whole trace, up to its last whole step.

    Raises:
        TraceError: it is no trace, or a step contradicts its header.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        meta = _read_meta(file)
        steps = tuple(_steps(file, meta))
        end = file.tell()
        truncated = file.seek(0, os.SEEK_END) != end
    return Trace(meta=meta, steps=steps, truncated=truncated)


def _read_meta(file: BinaryIO) -> TraceMeta:
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise TraceError("not an expert trace: it does not begin with its magic")
    _, version, n_bytes = _START.unpack(start)
    if version != VERSION:
        raise TraceError(f"trace version {version} is unknown; this program reads {VERSION}")
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
    return TraceMeta(**{**fields, "layers": tuple(fields["layers"])})


def _steps(file: BinaryIO, meta: TraceMeta) -> Iterator[TraceStep]:
    """Whole steps from here; the file stands behind the last one that was yielded."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    while left >= _RECORD.size:
        marker, flags, n_layers, n_bytes = _RECORD.unpack(file.read(_RECORD.size))
        if marker != _MARKER or flags > 3 or n_layers > len(meta.layers):
            raise TraceError(f"no step where one must begin, {left} B before the trace's end")
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise TraceError(f"a step of {n_bytes} B; the limit is {MAX_PAYLOAD_BYTES} B")
        left -= _RECORD.size + n_bytes
        if left < 0:
            file.seek(-_RECORD.size, os.SEEK_CUR)
            return
        payload = file.read(n_bytes)
        if len(payload) < n_bytes:
            raise TraceError("the trace file shrank while it was read")
        yield _unpack(payload, flags, n_layers, meta)


def _unpack(payload: bytes, flags: int, n_layers: int, meta: TraceMeta) -> TraceStep:
    """Split a payload by layers, every number checked."""
    if flags & _UNIFORM:
        layers, sizes, flat = _unpack_uniform(payload, n_layers, meta)
    else:
        layers, sizes, flat = _unpack_mixed(payload, n_layers, meta)
    if min(sizes, default=0) == 0 or int(flat.max()) >= meta.n_expert:
        raise TraceError(f"a step has no ids, or an expert beyond {meta.n_expert - 1}")
    return TraceStep(prefill=bool(flags & _PREFILL), layers=layers, sizes=sizes, flat=flat)


def _unpack_uniform(
    payload: bytes, n_layers: int, meta: TraceMeta
) -> tuple[tuple[int, ...], tuple[int, ...], Ids]:
    if n_layers != len(meta.layers) or len(payload) < _COUNT.size:
        raise TraceError("a uniform step must have every traced layer")
    (size,) = _COUNT.unpack_from(payload)
    if len(payload) != _COUNT.size + size * n_layers * meta.id_bytes:
        raise TraceError(f"a step of {len(payload)} B does not hold {n_layers} layers of {size}")
    flat = np.frombuffer(payload, meta.file_type, offset=_COUNT.size).astype(np.uint16)
    return meta.layers, (size,) * n_layers, flat


def _unpack_mixed(
    payload: bytes, n_layers: int, meta: TraceMeta
) -> tuple[tuple[int, ...], tuple[int, ...], Ids]:
    layers: list[int] = []
    parts: list[Ids] = []
    at = 0
    for _ in range(n_layers):
        if len(payload) - at < _LAYER.size:
            raise TraceError("a step ends inside a layer's head")
        layer, size = _LAYER.unpack_from(payload, at)
        at += _LAYER.size
        if layer not in meta.layers or layer in layers:
            raise TraceError(f"a step has layer {layer} twice, or it is none that was traced")
        if size * meta.id_bytes > len(payload) - at:
            raise TraceError(f"a step gives layer {layer} {size} ids, more than it holds")
        parts.append(np.frombuffer(payload, meta.file_type, size, at).astype(np.uint16))
        at += size * meta.id_bytes
        layers.append(layer)
    if at != len(payload) or not parts:
        raise TraceError(f"a step of {n_layers} layers has {len(payload) - at} B too many")
    return tuple(layers), tuple(part.size for part in parts), np.concatenate(parts)


class TraceRecorder:
    """Keeps the latest steps in memory, up to a number of bytes; may write all to a file.

    Not thread-safe: the engine thread owns it.
    """

    def __init__(
        self, meta: TraceMeta, max_bytes: int = 32 << 20, writer: TraceWriter | None = None
    ) -> None:
        self.meta = meta
        self.max_bytes = max_bytes
        self.n_dropped = 0
        self._writer = writer
        self._steps: deque[TraceStep] = deque()
        self._n_bytes = 0
        self._prefill = False
        self._open: list[tuple[int, npt.NDArray[np.generic]]] = []

    def begin_step(self, prefill: bool = False) -> None:
        """End the step before, if any, and begin one."""
        self.end_step()
        self._prefill = prefill

    def record(self, layer: int, ids: npt.ArrayLike) -> None:
        """Enter what a layer chose: ids [n_tokens * n_expert_used] or [n_tokens, n_expert_used].

        The ids are copied.
        """
        self._open.append((layer, np.array(ids)))

    def end_step(self) -> None:
        """End the step; one without any layer leaves nothing.

        Raises:
            TraceError: a layer or expert that the header has not; the step is left out.
            OSError: the file could not be written; the step is in memory.
        """
        if not self._open:
            return
        chosen, self._open = self._open, []
        step = make_step(self.meta, self._prefill, chosen)
        self._steps.append(step)
        self._n_bytes += step.n_bytes
        while self._n_bytes > self.max_bytes and len(self._steps) > 1:
            self._n_bytes -= self._steps.popleft().n_bytes
            self.n_dropped += 1
        if self._writer is not None:
            self._writer.append(step)

    def trace(self) -> Trace:
        """The ended steps that are kept."""
        return Trace(meta=self.meta, steps=tuple(self._steps))


def write_csv(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write one row per choice: step, prefill (0 or 1), layer, token, rank, expert."""
    used = trace.meta.n_expert_used
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["step", "prefill", "layer", "token", "rank", "expert"])
        for number, step in enumerate(trace.steps):
            for layer, ids in step.parts():
                out.writerows(
                    [number, int(step.prefill), layer, i // used, i % used, expert]
                    for i, expert in enumerate(ids.tolist())
                )
