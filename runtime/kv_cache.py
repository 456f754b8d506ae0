"""Keys and values of many sequences in one pool of cells.

A sequence owns a contiguous region of cells, so its attention reads one view and computes
the same bits whatever else is in the batch. Regions are multiples of 256 cells, the
granularity at which graphs see the context.

The cells of one head lie one after another, as attention reads them. With all heads of a cell side
by side, as llama.cpp has them, it took 10 to 15 % longer at 1,000 cells, for the same bits.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.cells import Cells, Region
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.records import KV_TYPE_NAMES
from edgeroute.runtime.tensor import (
    F16,
    F32,
    Q8_0,
    Descriptors,
    get_range,
    host_bytes,
    new_tensor,
    place_all,
    set_bytes,
    set_range,
)

ROTATION_MIN = 64
"""Heads of a multiple of this are rotated before they are quantised. Source: llama.cpp."""

KV_TYPES = dict(zip(KV_TYPE_NAMES, (F16, Q8_0), strict=True))
Rotations = tuple[Tensor | None, Tensor | None]
"""What turns the keys and the values of a row."""
CLEAR_AHEAD_BYTES: Final = 16 << 20
CLEAR_BYTES: Final = 1 << 20
"""At a time: whoever comes meanwhile waits for a third of a millisecond."""
Q8_0_BLOCK_BYTES = 34


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What one cell holds: widths per layer of keys and values, and their type.

    Attributes:
        n_embd_head: width of a key head.
        n_embd_head_v: width of a value head, where it is another.
        n_repeat: passes beyond the first over any layers, each with a row of its own.
        v_in_k: values are the first `n_embd_head_v` of each key and are not stored again
            (multi-head latent attention); nothing is rotated then. Source: llama.cpp,
            build_attn over llm_graph_input_attn_k.
    """

    n_layer: int
    n_embd_k_gqa: int
    n_embd_v_gqa: int
    n_embd_head: int
    n_embd_head_v: int | None = None
    v_in_k: bool = False
    kv_type: str = "f16"
    n_repeat: int = 0

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"kv_type must be one of {', '.join(KV_TYPES)}, got {self.kv_type!r}")
        block = ggml().ggml_blck_size(KV_TYPES[self.kv_type])
        for width in (self.n_embd_head, self.value_head):
            if width % block:
                raise UsageError(
                    f"kv_type {self.kv_type} needs heads of a multiple of {block} values, this "
                    f"model has {width}; use f16"
                )

    @property
    def value_head(self) -> int:
        """Width of a value head."""
        return self.n_embd_head if self.n_embd_head_v is None else self.n_embd_head_v

    @property
    def k_heads(self) -> tuple[int, int]:
        """Width and number of the key heads of a row."""
        return self.n_embd_head, self.n_embd_k_gqa // self.n_embd_head

    @property
    def v_heads(self) -> tuple[int, int]:
        """Width and number of the value heads of a row that are stored."""
        width = self.value_head
        return width, 0 if self.v_in_k else self.n_embd_v_gqa // width

    @property
    def rotation_widths(self) -> tuple[int | None, int | None]:
        """Rows of the matrices that turn keys and values before they are quantised.

        The widest power of two that divides a key head, and 64; None where nothing turns.
        Source: llama.cpp, build_input_k_rot and build_input_v_rot.
        """
        if self.kv_type == "f16" or self.v_in_k:
            return None, None
        k, v = self.n_embd_head, self.value_head
        return (
            k & -k if k % ROTATION_MIN == 0 else None,
            ROTATION_MIN if v % ROTATION_MIN == 0 else None,
        )

    @property
    def bytes_per_cell(self) -> int:
        """Bytes of one token's keys and values over all passes."""
        g, t = ggml(), KV_TYPES[self.kv_type]
        row = g.ggml_row_size(t, self.n_embd_k_gqa)
        if not self.v_in_k:
            row += g.ggml_row_size(t, self.n_embd_v_gqa)
        return self.n_rows * row

    @property
    def n_rows(self) -> int:
        """Passes over layers that keep keys and values: row il is layer il's first pass."""
        return self.n_layer + self.n_repeat


class KvCache(Cells):
    """The pool: K and V tensors `[n_embd_head, n_cells, n_head_kv]` per row, and who owns cells.

    See KvShape for its rows. Cells are the same on all devices; their bytes go in and out in one
    order, wherever the rows are.

    Lifetime: tensors are valid until `close`.

    Attributes:
        rotations: for every row, the matrices that turn its keys and its values, on its device.
    """

    def __init__(self, device: Device | Sequence[Device], shape: KvShape, n_cells: int) -> None:
        """Allocate the pool on one device, or each row on the device that stands in its place.

        Raises:
            CapacityError: a device has not that much memory; nothing stays allocated.
        """
        kind = KV_TYPES[shape.kv_type]
        self.shape = shape
        super().__init__(n_cells)
        rows_on = [device] * shape.n_rows if isinstance(device, Device) else list(device)
        if len(rows_on) != shape.n_rows:
            raise ValueError(f"{len(rows_on)} devices for {shape.n_rows} rows")
        devices = list(dict.fromkeys(rows_on))
        self._descriptors = Descriptors(2 * shape.n_rows + 2 * len(devices))
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for il in range(shape.n_rows):
            for rows, (head, n_heads), name in ((self.k, shape.k_heads, "cache_k"),
                                                (self.v, shape.v_heads, "cache_v")):  # fmt: skip
                if n_heads:
                    ne = (head, self.n_cells, n_heads)
                    rows.append(new_tensor(self._descriptors, kind, ne, f"{name}_l{il}"))
        self._buffers: dict[Device, Buffer] = {}
        self._turning: list[Buffer] = []
        turned: dict[Device, Rotations] = {}
        try:
            for each in devices:
                mine = [il for il, on in enumerate(rows_on) if on is each]
                parts = [rows[il] for rows in (self.k, self.v) for il in mine if rows]
                self._buffers[each] = place_all(parts, each)
                turned[each] = self._make_rotations(each)
        except BaseException:
            self.close()
            raise
        self.rotations = [turned[each] for each in rows_on]
        self.n_clear = 0
        """Cells, from the first on, that hold numbers."""
        if not self.is_host:
            for buffer in self._buffers.values():
                ggml().ggml_backend_buffer_clear(buffer.pointer, 0)
            self.n_clear = self.n_cells

    def clear_ahead(self) -> bool:
        """Clear some cells for another region like the largest so far, while nobody waits.

        Returns:
            Whether more are left to be cleared.
        """
        tail = self._free[-1] if self._free else None
        if tail is None or tail.start + tail.n_cells != self.n_cells:
            return False
        ahead, step = (n // self.shape.bytes_per_cell for n in (CLEAR_AHEAD_BYTES, CLEAR_BYTES))
        end = tail.start + min(tail.n_cells, self._largest, ahead)
        self._given(min(end, self.n_clear + max(1, step)))
        return self.n_clear < end

    def _given(self, end: int) -> None:
        """Clear cells that are given away for the first time.

        Masked cells still meet a weight of zero: zero times an old NaN would be a NaN. Not all
        at once in host memory: touching what is never used would take a tenth of the time to
        the first token.
        """
        n = end - self.n_clear
        if n <= 0:
            return
        clear = ggml().ggml_backend_tensor_memset
        for tensor, offset, n_bytes in self._places(self.n_clear, n):
            clear(tensor, 0, offset, n_bytes)
        self.n_clear = end

    def _make_rotations(self, device: Device) -> Rotations:
        """Make the Hadamard matrices, F32 [n, n], that the shape asks for."""
        widths = self.shape.rotation_widths
        made = [
            n if n is None else new_tensor(self._descriptors, F32, (n, n), f"rotation_{n}")
            for n in widths
        ]
        tensors = [(tensor, n) for tensor, n in zip(made, widths, strict=True) if tensor and n]
        if tensors:
            self._turning.append(place_all([tensor for tensor, _ in tensors], device))
            for tensor, n in tensors:
                set_bytes(tensor, hadamard(n))
        k, v = made
        return k, v

    @property
    def k_rotation(self) -> Tensor | None:
        """The matrix that turns the first row's keys; None where nothing turns."""
        return self.rotations[0][0]

    @property
    def v_rotation(self) -> Tensor | None:
        """The matrix that turns the first row's values; None where nothing turns."""
        return self.rotations[0][1]

    @property
    def n_bytes(self) -> int:
        """Bytes of the pool, on all devices."""
        return sum(buffer.n_bytes for buffer in self._buffers.values())

    def bytes_on(self, device: Device) -> int:
        """Bytes of the rows that are on a device."""
        buffer = self._buffers.get(device)
        return 0 if buffer is None else buffer.n_bytes

    def copy(self, source: Region, target: Region, n_cells: int) -> None:
        """Copy the first `n_cells` cells of one region into another, through host memory."""
        if self.is_host:
            for cells in self._host_cells:
                cells[:, target.start : target.start + n_cells] = cells[
                    :, source.start : source.start + n_cells
                ]
            return
        g = ggml()
        sources, targets = self._places(source.start, n_cells), self._places(target.start, n_cells)
        for (tensor, start, n_bytes), (_, to, _) in zip(sources, targets, strict=True):
            staging = np.empty(n_bytes, np.uint8)
            g.ggml_backend_tensor_get(tensor, staging.ctypes.data, start, n_bytes)
            g.ggml_backend_tensor_set(tensor, staging.ctypes.data, to, n_bytes)

    @functools.cached_property
    def is_host(self) -> bool:
        """Whether the pool is host memory, so that any thread may copy cells nobody computes."""
        is_host = ggml().ggml_backend_buffer_is_host
        return all(is_host(buffer.pointer) for buffer in self._buffers.values())

    @functools.cached_property
    def _host_cells(self) -> list[npt.NDArray[np.uint8]]:
        """View the pool where it is host memory: U8 (n_heads, n_cells, bytes) of each tensor.

        Lifetime: that of the pool.
        """
        by_heads = zip((self.k, self.v), (self.shape.k_heads, self.shape.v_heads), strict=True)
        return [host_bytes(tensor).reshape(n_heads, self.n_cells, -1)
                for tensors, (_, n_heads) in by_heads for tensor in tensors]  # fmt: skip

    def read_cells(self, first: int, n_cells: int, data: npt.NDArray[np.uint8]) -> None:
        """Copy cells out: head by head of each K in turn, then of each V, as they are stored.

        Args:
            first: cell of the pool.
            n_cells: how many, in a row.
            data: takes n_cells x `bytes_per_cell` bytes.

        Raises:
            ValueError: the cells are not in the pool, or `data` has another size.
        """
        for tensor, part, offset in self._stretches(first, n_cells, data):
            get_range(tensor, part, offset)

    def write_cells(self, first: int, n_cells: int, data: npt.NDArray[np.uint8]) -> None:
        """Copy cells in, as `read_cells` gives them; see `all_finite` for what may be in them.

        Raises:
            ValueError: as `read_cells`; nothing was copied.
        """
        for tensor, part, offset in self._stretches(first, n_cells, data):
            set_range(tensor, part, offset)

    def first_cells(self, data: npt.NDArray[np.uint8], n_cells: int) -> npt.NDArray[np.uint8]:
        """Return the first cells of those that `read_cells` gave, in the same order."""
        n_all = data.nbytes // self.shape.bytes_per_cell
        if n_cells == n_all:
            return data
        parts = (part for _, part, _ in self._stretches(0, n_all, data))
        return np.concatenate([part[: len(part) // n_all * n_cells] for part in parts])

    def _stretches(
        self, first: int, n_cells: int, data: npt.NDArray[np.uint8]
    ) -> list[tuple[Tensor, npt.NDArray[np.uint8], int]]:
        """List where the parts of some cells are: tensor, its bytes of `data`, and offset in it."""
        want = n_cells * self.shape.bytes_per_cell
        if not 0 <= first <= first + n_cells <= self.n_cells or data.nbytes != want:
            raise ValueError(f"cells {first} to {first + n_cells} of {self.n_cells} take {want} "
                             f"bytes, got {data.nbytes}")  # fmt: skip
        found, at = [], 0
        for tensor, offset, n_bytes in self._places(first, n_cells):
            found.append((tensor, data[at : at + n_bytes], offset))
            at += n_bytes
        return found

    def _places(self, first: int, n_cells: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield where some cells are: tensor, offset in it and length in bytes, head by head."""
        row_size, kind = ggml().ggml_row_size, KV_TYPES[self.shape.kv_type]
        heads = (self.shape.k_heads, self.shape.v_heads)
        for tensors, (width, n_heads) in zip((self.k, self.v), heads, strict=True):
            size = row_size(kind, width)
            for tensor in tensors:
                for head in range(n_heads):
                    yield tensor, (head * self.n_cells + first) * size, n_cells * size

    def close(self) -> None:
        """Free the pool; safe to call twice."""
        for buffer in (*self._turning, *self._buffers.values()):
            buffer.free()
        self._descriptors.free()


def all_finite(data: npt.NDArray[np.uint8], kv_type: str) -> bool:
    """Tell whether cells hold numbers only: no NaN, nothing infinite.

    What is not must never get into the pool: masked cells still meet a weight of zero.
    Source: ggml-common.h, block_q8_0: a half, then 32 bytes.
    """
    halves = data.view("<u2")
    if kv_type == "q8_0":
        halves = halves.reshape(-1, Q8_0_BLOCK_BYTES // 2)[:, 0]
    exponents = halves & np.uint16(0x7C00)
    return not exponents.size or int(exponents.max()) != 0x7C00


def hadamard(n: int) -> npt.NDArray[np.float32]:
    """Make the symmetric orthogonal matrix of n = 2^k rows whose entries are all ±1/sqrt(n)."""
    rows = np.full((1, 1), np.float32(1.0) / np.sqrt(np.float32(n)), np.float32)
    while len(rows) < n:
        rows = np.block([[rows, rows], [rows, -rows]])
    return np.ascontiguousarray(rows, np.float32)
