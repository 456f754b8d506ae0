"""Metadata of a GGUF file: typed getters that decode on demand.

The header parser has already proved that every entry lies inside the buffer, so a getter
only has to check what the caller wants: presence, type, range, UTF-8.
"""

import struct
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, TypeVar, overload

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import ClosedError, ModelFileError
from edgeroute.runtime.gguf_strings import SEPARATOR, join_strings, split_strings
from edgeroute.runtime.gguf_types import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    SCALAR_FORMATS,
    ValueType,
)

T = TypeVar("T")
UINT32_MAX: Final = 2**32 - 1


class _Required:
    """Marks a getter without a default: a missing key is then an error."""


_REQUIRED: Final = _Required()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key's value inside the buffer: bytes `start` to `end`.

    For an array `type` is ARRAY, `item` its element type and `n` its length, and `start`
    is its first element. For a string `start` is its first byte. `is_held` is False for an
    array whose elements the buffer does not hold.
    """

    type: ValueType
    item: ValueType
    n: int
    start: int
    end: int
    is_held: bool = True

    @property
    def type_name(self) -> str:
        """The type as error messages print it."""
        if self.type is ValueType.ARRAY:
            return f"ARRAY of {self.item.name}"
        return self.type.name


class Metadata:
    """Key-value pairs of one file. Nothing is cached; keep what you decode."""

    def __init__(self, buffer: memoryview, entries: Mapping[str, Entry], label: str) -> None:
        self._buffer: memoryview | None = buffer
        self._entries = entries
        self.label = label

    def close(self) -> None:
        """Let go of the buffer; later getters raise ClosedError."""
        self._buffer = None

    def keys(self) -> KeysView[str]:
        """Return the keys in file order."""
        return self._entries.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def type_name(self, key: str) -> str:
        """Return the stored type of a key, such as `UINT32` or `ARRAY of STRING`."""
        return self._find(key, _REQUIRED).type_name

    def is_array(self, key: str) -> bool:
        """Whether the key exists and holds an array."""
        entry = self._entries.get(key)
        return entry is not None and entry.type is ValueType.ARRAY

    def get_str(self, key: str, default: T | _Required = _REQUIRED) -> str | T:
        """Return a string value.

        Raises:
            ModelFileError: missing without a default, another type, or not UTF-8.
        """
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        self._want(key, entry, frozenset({ValueType.STRING}), "STRING")
        raw = bytes(self._data()[entry.start : entry.end])
        return self._decode(key, raw)

    def get_u32(
        self,
        key: str,
        default: T | _Required = _REQUIRED,
        *,
        low: int = 0,
        high: int = UINT32_MAX,
    ) -> int | T:
        """Return a value stored as UINT32, the type llama.cpp demands for sizes and ids.

        Raises:
            ModelFileError: missing without a default, another type, or outside the range.
        """
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        self._want(key, entry, frozenset({ValueType.UINT32}), "UINT32")
        return self._ranged(key, self._scalar(entry), low, high)

    def get_int(
        self,
        key: str,
        default: T | _Required = _REQUIRED,
        *,
        low: int = -(2**63),
        high: int = 2**64 - 1,
    ) -> int | T:
        """Return an integer of any stored width.

        Raises:
            ModelFileError: missing without a default, another type, or outside the range.
        """
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        self._want(key, entry, INTEGER_TYPES, "an integer")
        return self._ranged(key, self._scalar(entry), low, high)

    def get_float(self, key: str, default: T | _Required = _REQUIRED) -> float | T:
        """Return a finite FLOAT32 or FLOAT64.

        Raises:
            ModelFileError: missing without a default, another type, infinite or NaN.
        """
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        self._want(key, entry, FLOAT_TYPES, "FLOAT32")
        value = float(self._scalar(entry))
        if not isfinite(value):
            raise self._error(f"{quote(key)} is {value}; a finite number is needed")
        return value

    def get_bool(self, key: str, default: T | _Required = _REQUIRED) -> bool | T:
        """Return a BOOL.

        Raises:
            ModelFileError: missing without a default, or another type.
        """
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        self._want(key, entry, frozenset({ValueType.BOOL}), "BOOL")
        return bool(self._scalar(entry))

    def array_len(self, key: str) -> int:
        """Return the number of elements of an array without decoding it.

        Raises:
            ModelFileError: missing, or not an array.
        """
        return self._array(key).n

    def array_bytes(self, key: str) -> bytes:
        """Return a copy of an array's elements as the file stores them, strings with lengths."""
        return bytes(self._elements(key, self._array(key)))

    @overload
    def get_array(self, key: str, item: type[str]) -> list[str]: ...
    @overload
    def get_array(self, key: str, item: type[bytes]) -> list[bytes]: ...
    @overload
    # bool is a subclass of int, so mypy sees two answers; the first overload wins as meant.
    def get_array(  # type: ignore[overload-overlap]
        self, key: str, item: type[bool]
    ) -> npt.NDArray[np.bool_]: ...
    @overload
    def get_array(self, key: str, item: type[int]) -> npt.NDArray[np.integer[Any]]: ...
    @overload
    def get_array(self, key: str, item: type[float]) -> npt.NDArray[np.floating[Any]]: ...
    def get_array(self, key: str, item: type) -> object:
        """Decode an array: a list for `str` and `bytes`, else a numpy copy in the file's width.

        Args:
            key: the metadata key.
            item: what the elements must be; `bytes` gives strings without decoding UTF-8.

        Raises:
            ModelFileError: missing, not an array, other elements, bad UTF-8, a bool that is
                neither 0 nor 1.
        """
        entry = self._array(key)
        wanted, words = _ITEMS[item]
        if entry.item not in wanted:
            raise self._type_error(key, entry, f"ARRAY of {words}")
        if item is bytes or item is str:
            raw = bytes(self._elements(key, entry))
            if item is bytes:
                return split_strings(raw, entry.n)
            return self._decode_strings(key, raw, entry.n)
        view = self._elements(key, entry)
        values = np.frombuffer(view, dtype=SCALAR_FORMATS[entry.item]).copy()
        if item is bool:
            if values.size and int(values.max()) > 1:
                raise self._error(f"{quote(key)} has a bool that is neither 0 nor 1")
            return values.astype(np.bool_)
        return values

    def get_int_or_array(
        self, key: str, n: int, default: int | _Required = _REQUIRED, *, high: int = UINT32_MAX
    ) -> tuple[int, ...]:
        """Return `n` integers: an array of exactly `n`, or one integer for all of them.

        llama.cpp stores per-layer head counts and widths either way.

        Raises:
            ModelFileError: missing without a default, another type or length, out of range.
        """
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return (entry,) * n
        if entry.type is not ValueType.ARRAY:
            return (self.get_int(key, low=0, high=high),) * n
        if entry.n != n:
            raise self._error(f"{quote(key)} has {entry.n} elements; {n} are needed")
        values = self.get_array(key, int)
        return tuple(self._ranged(key, int(value), 0, high) for value in values)

    def _elements(self, key: str, entry: Entry) -> memoryview:
        if not entry.is_held:
            raise self._error(f"the elements of {quote(key)} were not fetched; pull the model")
        return self._data()[entry.start : entry.end]

    def _data(self) -> memoryview:
        if self._buffer is None:
            raise ClosedError(f"{self.label} is closed; read its metadata before closing it")
        return self._buffer

    @overload
    def _find(self, key: str, default: _Required) -> Entry: ...
    @overload
    def _find(self, key: str, default: T | _Required) -> Entry | T: ...
    def _find(self, key: str, default: T | _Required) -> Entry | T:
        entry = self._entries.get(key)
        if entry is not None:
            return entry
        if isinstance(default, _Required):
            raise self._error(f"the key {quote(key)} is missing")
        return default

    def _array(self, key: str) -> Entry:
        entry = self._find(key, _REQUIRED)
        self._want(key, entry, frozenset({ValueType.ARRAY}), "ARRAY")
        return entry

    def _scalar(self, entry: Entry) -> Any:
        return struct.unpack_from(SCALAR_FORMATS[entry.type], self._data(), entry.start)[0]

    def _decode(self, key: str, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = raw[max(error.start - 8, 0) : error.start + 8]
            raise self._error(f"{quote(key)} is not UTF-8 near {quote(where)}") from None

    def _decode_strings(self, key: str, raw: bytes, n: int) -> list[str]:
        joined = join_strings(raw, n)
        if joined is None:
            return [self._decode(key, text) for text in split_strings(raw, n)]
        # Zero bytes between the strings keep a broken one from borrowing from the next.
        return self._decode(key, joined).split(SEPARATOR.decode())[1:]

    def _want(self, key: str, entry: Entry, types: frozenset[ValueType], words: str) -> None:
        if entry.type not in types:
            raise self._type_error(key, entry, words)

    def _ranged(self, key: str, value: int, low: int, high: int) -> int:
        if not low <= value <= high:
            raise self._error(f"{quote(key)} is {value}; it must be between {low} and {high}")
        return value

    def _type_error(self, key: str, entry: Entry, words: str) -> ModelFileError:
        return self._error(f"{quote(key)} is {entry.type_name}, but {words} is wanted")

    def _error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.label}: {message}")


_ITEMS: Final[dict[type, tuple[frozenset[ValueType], str]]] = {
    str: (frozenset({ValueType.STRING}), "STRING"),
    bytes: (frozenset({ValueType.STRING}), "STRING"),
    bool: (frozenset({ValueType.BOOL}), "BOOL"),
    int: (INTEGER_TYPES, "integers"),
    float: (FLOAT_TYPES, "FLOAT32"),
}


def quote(text: str | bytes) -> str:
    """Print a name from a file: escaped, and short enough for one sentence."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:76]}...{quoted[-1]}"
