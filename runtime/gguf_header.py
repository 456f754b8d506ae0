"""Parses a GGUF header out of a buffer that nobody vouches for.

Every count, length and offset is compared with the bytes that are really there before it
is used, so the work is linear in the header and nothing larger than it is allocated.
Arrays are stepped over, not decoded.

Source: gguf.h, the layout in its first comment; gguf.cpp, what ggml itself refuses.
"""

import struct
from dataclasses import dataclass
from typing import Final, Never

from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.gguf_metadata import Entry, Metadata, quote
from edgeroute.runtime.gguf_types import (
    GGML_MAX_DIMS,
    GGML_MAX_NAME,
    SCALAR_SIZES,
    GGMLType,
    TensorInfo,
    ValueType,
)

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MIN_ALIGNMENT: Final = 8
"""The format asks for a multiple of 8."""
MAX_ALIGNMENT: Final = 64 << 10
"""The largest page of any supported system; more would only pad."""

# The largest published models have about 2,000 tensors, 100 keys and 800,000 strings. The
# caps keep the worst file at well under a second of work whatever its size.
MAX_TENSORS: Final = 1 << 16
MAX_KEYS: Final = 1 << 16
MAX_STRINGS: Final = 1 << 22
MAX_KEY_BYTES: Final = (1 << 16) - 1
"""The limit that the format gives for a key."""

_LONG_BYTES: Final = 16 << 10
"""Arrays of numbers up to this may describe layers, and are always wanted."""
_MIN_ENTRY_BYTES: Final = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 1 + 4 + 8 + 4 + 8
_VALUE_TYPES: Final = {int(value): value for value in ValueType}
_GGML_TYPES: Final = {int(value): value for value in GGMLType}
_READ_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header of a file says, all of it checked against the file's size."""

    version: int
    alignment: int
    data_offset: int
    tensors: dict[str, TensorInfo]
    metadata: Metadata


class ShortHeaderError(ModelFileError):
    """The header needs bytes `start` to `end` of the file, which are not all at hand."""

    def __init__(self, message: str, start: int, end: int) -> None:
        super().__init__(message)
        self.start, self.end = start, end


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldParts:
    """Which bytes of a file of `size_bytes` a buffer holds: ascending, apart from each other."""

    size_bytes: int
    parts: tuple[tuple[int, int], ...]


def parse_header(buffer: memoryview, label: str, held: HeldParts | None = None) -> Header:
    """Read the header at the start of `buffer`, which holds the whole file or parts of it.

    Args:
        buffer: the file's bytes, format `B`; metadata getters keep reading from it.
        label: how messages name the file.
        held: which parts are in the buffer; None where all of the file is. Long arrays of
            numbers need not be: their metadata then has a length and no values.

    Raises:
        ShortHeaderError: a part is wanted that the buffer does not hold.
        ModelFileError: anything is malformed; nothing is kept.

    Lifetime: the buffer must outlive `metadata`.
    """
    whole = HeldParts(size_bytes=len(buffer), parts=((0, len(buffer)),))
    return _Parser(buffer, label, held or whole).parse()


class _Parser:
    """A cursor over the header. Each `_read_*` method moves it or raises."""

    def __init__(self, buffer: memoryview, label: str, held: HeldParts) -> None:
        self._buffer = buffer
        self._size = held.size_bytes
        self._parts, self._part = held.parts or ((0, 0),), 0
        self._label = label
        self._pos = 0
        self._n_strings = 0

    def parse(self) -> Header:
        version = self._read_version()
        n_tensors = self._read_count("tensors", MAX_TENSORS, _MIN_TENSOR_BYTES)
        n_keys = self._read_count("keys", MAX_KEYS, _MIN_ENTRY_BYTES)
        entries = self._read_entries(n_keys)
        alignment = self._alignment(entries)
        infos = self._read_infos(n_tensors)
        data_offset = _pad(self._pos, alignment)
        self._check_layout(infos, data_offset, alignment)
        tensors = {}
        for info in infos:
            tensors[info.name] = TensorInfo(
                name=info.name,
                type=info.type,
                ne=info.ne,
                offset=data_offset + info.offset,
                nbytes=info.nbytes,
            )
        return Header(
            version=version,
            alignment=alignment,
            data_offset=data_offset,
            tensors=tensors,
            metadata=Metadata(self._buffer, entries, self._label),
        )

    def _read_version(self) -> int:
        self._hold(0, min(4, self._size))
        if self._size < 4 or bytes(self._buffer[:4]) != MAGIC:
            found = bytes(self._buffer[:4])
            self._fail(f"it is not a GGUF file: it starts with {found!r}, not {MAGIC!r}")
        self._pos = 4
        version = self._read_u32("the version")
        if version and version & 0xFFFF == 0:
            self._fail("its numbers are big-endian; convert it to little-endian")
        if version not in VERSIONS:
            self._fail(f"GGUF version {version} is not read, only 2 and 3; convert it again")
        return version

    def _read_count(self, what: str, limit: int, min_bytes: int) -> int:
        count = self._read_u64(f"the number of {what}")
        if count > limit:
            self._fail(f"it claims {count} {what}; at most {limit} are read")
        if count * min_bytes > self._size - self._pos:
            self._fail(f"it claims {count} {what}, more than its {self._size} bytes can hold")
        return count

    def _read_entries(self, n_keys: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for index in range(n_keys):
            key = self._read_name(f"key {index}", MAX_KEY_BYTES)
            if key in entries:
                self._fail(f"the key {quote(key)} appears twice")
            entries[key] = self._read_value(key)
        return entries

    def _read_value(self, key: str) -> Entry:
        value_type = self._read_type(key)
        if value_type is ValueType.ARRAY:
            return self._read_array(key)
        if value_type is ValueType.STRING:
            n_bytes = self._read_u64(f"the length of {quote(key)}")
            self._skip(n_bytes, quote(key))
        else:
            self._skip(SCALAR_SIZES[value_type], quote(key))
            n_bytes = SCALAR_SIZES[value_type]
        start = self._pos - n_bytes
        if value_type is ValueType.BOOL and self._buffer[start] > 1:
            self._fail(f"{quote(key)} is a bool of value {self._buffer[start]}, not 0 or 1")
        return Entry(type=value_type, item=value_type, n=1, start=start, end=self._pos)

    def _read_array(self, key: str) -> Entry:
        item = self._read_type(key)
        if item is ValueType.ARRAY:
            # ggml refuses these as well, so no model that runs elsewhere is lost.
            self._fail(f"{quote(key)} is an array of arrays, which is not read")
        n = self._read_u64(f"the length of {quote(key)}")
        start, is_held = self._pos, True
        if item is ValueType.STRING:
            self._skip_strings(key, n)
        else:
            is_held = self._pass(n * SCALAR_SIZES[item], quote(key))
        return Entry(
            type=ValueType.ARRAY, item=item, n=n, start=start, end=self._pos, is_held=is_held
        )

    def _skip_strings(self, key: str, n: int) -> None:
        """Step over `n` strings; only a walk over their lengths finds their end."""
        self._n_strings += n
        if self._n_strings > MAX_STRINGS:
            self._fail(f"{quote(key)} claims {n} strings; at most {MAX_STRINGS} are read")
        if n * 8 > self._size - self._pos:
            self._fail(f"{quote(key)} claims {n} strings, more than the file can hold")
        self._hold(self._pos, min(self._pos + 8 * n, self._size))
        pos, buffer, read = self._pos, self._buffer, _READ_U64
        last = min(self._size, self._parts[self._part][1]) - 8
        # A length cannot move `pos` backwards, so one comparison per string is enough.
        for index in range(n):
            if pos > last:
                if pos <= self._size - 8:
                    self._hold(self._pos, min(pos + 8 * (n - index), self._size))
                self._fail(f"{quote(key)} runs past the end of the file at string {index}")
            pos += 8 + read(buffer, pos)[0]
        if pos > self._size:
            self._fail(f"{quote(key)} runs past the end of the file at its last string")
        self._hold(self._pos, pos)
        self._pos = pos

    def _alignment(self, entries: dict[str, Entry]) -> int:
        entry = entries.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        if entry.type is not ValueType.UINT32:
            self._fail(f"'general.alignment' is {entry.type_name}, but UINT32 is wanted")
        alignment = int.from_bytes(self._buffer[entry.start : entry.end], "little")
        is_power_of_two = alignment & (alignment - 1) == 0
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or not is_power_of_two:
            self._fail(
                f"'general.alignment' is {alignment}; it must be a power of two between "
                f"{MIN_ALIGNMENT} and {MAX_ALIGNMENT}"
            )
        return alignment

    def _read_infos(self, n_tensors: int) -> list[TensorInfo]:
        """Read the tensor table; offsets are still relative to the data section."""
        infos: list[TensorInfo] = []
        names: set[str] = set()
        for index in range(n_tensors):
            info = self._read_info(index)
            if info.name in names:
                self._fail(f"the tensor {quote(info.name)} appears twice")
            names.add(info.name)
            infos.append(info)
        return infos

    def _read_info(self, index: int) -> TensorInfo:
        name = self._read_name(f"the name of tensor {index}", GGML_MAX_NAME - 1)
        what = f"tensor {quote(name)}"
        n_dims = self._read_u32(f"the dimensions of {what}")
        if not 1 <= n_dims <= GGML_MAX_DIMS:
            self._fail(f"{what} has {n_dims} dimensions; 1 to {GGML_MAX_DIMS} are allowed")
        ne = tuple(self._read_extent(what) for _ in range(n_dims))
        number = self._read_u32(f"the type of {what}")
        ggml_type = _GGML_TYPES.get(number)
        if ggml_type is None:
            self._fail(f"{what} has type {number}, which ggml does not know or has removed")
        if ne[0] % ggml_type.block_size:
            self._fail(
                f"{what} has rows of {ne[0]} elements; {ggml_type.name} needs a multiple of "
                f"{ggml_type.block_size}"
            )
        nbytes = ggml_type.nbytes(ne)
        if nbytes > self._size:
            self._fail(f"{what} needs {nbytes} bytes; the whole file has {self._size}")
        offset = self._read_u64(f"the offset of {what}")
        return TensorInfo(name=name, type=ggml_type, ne=ne, offset=offset, nbytes=nbytes)

    def _read_extent(self, what: str) -> int:
        extent = self._read_u64(f"an extent of {what}")
        if extent >= 1 << 63:
            self._fail(f"{what} has the negative extent {extent - (1 << 64)}")
        if extent == 0:
            self._fail(f"{what} has an extent of 0")
        return extent

    def _check_layout(self, infos: list[TensorInfo], data_offset: int, alignment: int) -> None:
        """Check that tensors follow each other in order, without overlap, gap or excess.

        ggml demands this order too; it makes one pass enough to exclude any overlap.
        """
        expected = 0
        end = self._pos
        for info in infos:
            what = f"tensor {quote(info.name)}"
            if info.offset % alignment:
                self._fail(f"{what} starts at {info.offset}, no multiple of {alignment}")
            end = data_offset + info.offset + info.nbytes
            if end > self._size:
                self._fail(
                    f"{what} ends at byte {end}, but the file has {self._size}; it is "
                    "truncated or damaged, fetch it again"
                )
            if info.offset != expected:
                relation = "overlaps its predecessor" if info.offset < expected else "leaves a gap"
                self._fail(f"{what} {relation}: it starts at {info.offset}, not {expected}")
            expected = _pad(info.offset + info.nbytes, alignment)
        if self._size > _pad(end, alignment):
            extra = self._size - end
            self._fail(f"{extra} bytes follow its last tensor; it is damaged, fetch it again")

    def _read_name(self, what: str, limit: int) -> str:
        n_bytes = self._read_u64(f"the length of {what}")
        if not 1 <= n_bytes <= limit:
            self._fail(f"{what} has {n_bytes} bytes; 1 to {limit} are allowed")
        start = self._pos
        self._skip(n_bytes, what)
        raw = bytes(self._buffer[start : self._pos])
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8: {quote(raw)}")
        if "\0" in name:
            # ggml keeps names as C strings, so two names could become one.
            self._fail(f"{what} contains a zero byte: {quote(name)}")
        return name

    def _read_type(self, key: str) -> ValueType:
        number = self._read_u32(f"the type of {quote(key)}")
        value_type = _VALUE_TYPES.get(number)
        if value_type is None:
            self._fail(f"{quote(key)} has value type {number}; 0 to {len(ValueType) - 1} exist")
        return value_type

    def _read_u32(self, what: str) -> int:
        self._skip(4, what)
        return int.from_bytes(self._buffer[self._pos - 4 : self._pos], "little")

    def _read_u64(self, what: str) -> int:
        self._skip(8, what)
        return int.from_bytes(self._buffer[self._pos - 8 : self._pos], "little")

    def _skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._size - self._pos:
            self._fail(
                f"{what} needs {n_bytes} bytes at byte {self._pos}, but the file ends at "
                f"{self._size}"
            )
        self._hold(self._pos, self._pos + n_bytes)
        self._pos += n_bytes

    def _pass(self, n_bytes: int, what: str) -> bool:
        """Step over numbers that nobody needs to describe a model; False if not at hand."""
        if n_bytes <= _LONG_BYTES or self._has(self._pos, self._pos + n_bytes):
            self._skip(n_bytes, what)
            return True
        if n_bytes > self._size - self._pos:
            self._skip(n_bytes, what)
        self._pos += n_bytes
        return False

    def _has(self, start: int, end: int) -> bool:
        """Whether these bytes are at hand; later ones than asked for before."""
        while self._part + 1 < len(self._parts) and self._parts[self._part][1] <= start:
            self._part += 1
        first, last = self._parts[self._part]
        return first <= start and end <= last

    def _hold(self, start: int, end: int) -> None:
        """Ask for bytes, which the file has if its sizes are true."""
        if start < end and not self._has(start, end):
            raise ShortHeaderError(
                f"{self._label}: its header needs bytes {start} to {end}, which are not here",
                start, end,
            )  # fmt: skip

    def _fail(self, message: str) -> Never:
        raise ModelFileError(f"{self._label}: {message}")


def _pad(n_bytes: int, alignment: int) -> int:
    return (n_bytes + alignment - 1) & -alignment
