"""Tensor descriptors: contexts that hold them, and bytes in and out of them.

A ggml context here never owns tensor data, only the descriptors (`no_alloc`).
"""

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.lib import bind, libraries
from edgeroute.runtime.ggml.structs import InitParams, TensorStruct

F32, F16, I32, I64, Q8_0, BF16 = 0, 1, 26, 27, 8, 30
"""ggml type numbers that edgeroute names itself. Source: ggml.h, enum ggml_type."""
F32_BYTES, F16_BYTES = 4, 2


class Descriptors:
    """A ggml context with room for `n_tensors` descriptors and, if asked, graphs.

    Lifetime: every Tensor made in it dies with `free`.
    """

    def __init__(self, n_tensors: int, n_graph_nodes: int = 0) -> None:
        g = ggml()
        n_bytes = (n_tensors + 1) * g.ggml_tensor_overhead()
        if n_graph_nodes:
            n_bytes += g.ggml_graph_overhead_custom(n_graph_nodes, False)
        ctx = g.ggml_init(InitParams(n_bytes, None, True))
        if ctx is None:
            raise CapacityError(f"no memory for {n_tensors} tensor descriptors")
        self.ctx = ctx
        self.n_bytes = n_bytes

    def free(self) -> None:
        """Free the descriptors; safe to call twice."""
        if self.ctx:
            ggml().ggml_free(self.ctx)
            self.ctx = 0


def new_tensor(descriptors: Descriptors, ggml_type: int, ne: tuple[int, ...], name: str) -> Tensor:
    """Describe a tensor of 1 to 4 extents, fastest first; it has no data yet."""
    ne4 = (*ne, 1, 1, 1)[:4]
    tensor = ggml().ggml_new_tensor_4d(descriptors.ctx, ggml_type, *ne4)
    ggml().ggml_set_name(tensor, name.encode()[:63])
    return tensor


def place(tensor: Tensor, buffer: Buffer, address: int) -> None:
    """Give a tensor its memory at `address` inside `buffer`.

    Raises:
        CapacityError: ggml refused; the tensor has no memory.
    """
    if ggml().ggml_backend_tensor_alloc(buffer.pointer, tensor, address) != 0:
        raise CapacityError("ggml refused to place a tensor in its buffer")


def is_placed(tensor: Tensor) -> bool:
    """Whether a tensor has memory; a graph's input that nothing reads has none."""
    return TensorStruct.from_address(tensor).data is not None


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor has memory that the host can read and write."""
    buffer = TensorStruct.from_address(tensor).buffer
    return buffer is not None and ggml().ggml_backend_buffer_is_host(buffer)


def place_all(tensors: list[Tensor], device: Device, buffer_type: int | None = None) -> Buffer:
    """Allocate one buffer for all of `tensors` and place them in it.

    Raises:
        CapacityError: not enough memory; nothing stays allocated.
    """
    g = ggml()
    kind = buffer_type or device.buffer_type
    align = g.ggml_backend_buft_get_alignment(kind)
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        size = g.ggml_backend_buft_get_alloc_size(kind, tensor)
        end += -(-size // align) * align
    buffer = device.allocate(end, kind)
    base = buffer.base
    for tensor, offset in zip(tensors, offsets, strict=True):
        place(tensor, buffer, base + offset)
    return buffer


def set_bytes(tensor: Tensor, array: npt.NDArray[np.generic]) -> None:
    """Copy a C-contiguous array into the start of a tensor."""
    ggml().ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def set_ids(tensor: Tensor, ids: Iterable[int], *, on_host: bool = False) -> None:
    """Copy whole numbers into the start of an I32 tensor, without a numpy object for them.

    `on_host` says that `is_on_host` holds for it: no other thread gets a turn meanwhile.

    Raises:
        OverflowError: one does not fit 32 bits.
    """
    numbers, g = array("i", ids), ggml()
    address, n = numbers.buffer_info()
    copy = g.host_tensor_set if on_host else g.ggml_backend_tensor_set
    copy(tensor, address, 0, n * numbers.itemsize)


class Table:
    """Numbers that graphs are fed slices of, written without an array made per slice.

    A decode step writes four slices; making numpy objects for them cost 1 % of its time.
    """

    def __init__(self, values: npt.NDArray[np.generic]) -> None:
        self.values = np.ascontiguousarray(values)
        self._address = self.values.ctypes.data
        self._size, self._n = self.values.itemsize, len(self.values)
        self._copy = ggml().ggml_backend_tensor_set, ggml().host_tensor_set

    def write(self, tensor: Tensor, at: int, first: int, n: int, *, on_host: bool = False) -> None:
        """Copy elements `first` to `first + n` to a tensor's elements from `at` on.

        `on_host` says that `is_on_host` holds for it: no other thread gets a turn meanwhile.

        Raises:
            IndexError: the slice is not inside the table.
        """
        if not 0 <= first <= first + n <= self._n:
            raise IndexError(f"{first} to {first + n} of {self._n}")
        size = self._size
        self._copy[on_host](tensor, self._address + first * size, at * size, n * size)


def to_half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round F32 numbers to F16, flat; what is beyond F16 becomes infinite.

    By ggml's vector instructions where its CPU library is there: 15 times as fast as numpy.
    """
    flat = np.ascontiguousarray(values, np.float32).ravel()
    convert = _half_converter()
    if convert is None:
        with np.errstate(over="ignore", invalid="ignore"):
            return flat.astype(np.float16)
    halves = np.empty(flat.size, np.float16)
    convert(flat.ctypes.data, halves.ctypes.data, flat.size)
    return halves


@functools.cache
def _half_converter() -> Callable[[int, int, int], None] | None:
    library = libraries().cpu
    if library is None or not hasattr(library, "ggml_cpu_fp32_to_fp16"):
        return None
    function = bind(library, "ggml_cpu_fp32_to_fp16")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def get_bytes(tensor: Tensor, array: npt.NDArray[np.generic]) -> None:
    """Fill a C-contiguous array from the start of a tensor."""
    ggml().ggml_backend_tensor_get(tensor, array.ctypes.data, 0, array.nbytes)


def get_range(tensor: Tensor, array: npt.NDArray[np.uint8], offset: int) -> None:
    """Fill a C-contiguous array from `offset` bytes into a tensor on; any thread.

    Nothing may be writing there. Both lie within the tensor, or ggml ends the process.
    """
    ggml().ggml_backend_tensor_get(tensor, array.ctypes.data, offset, array.nbytes)


def set_range(tensor: Tensor, array: npt.NDArray[np.uint8], offset: int) -> None:
    """Copy a C-contiguous array to `offset` bytes into a tensor; see `get_range`."""
    ggml().ggml_backend_tensor_set(tensor, array.ctypes.data, offset, array.nbytes)


def host_view(tensor: Tensor, shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
    """View an F32 tensor's own memory, where the backend says that the host can read it.

    Lifetime: the numbers are those of the last computation that wrote there; the view must
    not outlive the tensor.
    """
    return host_bytes(tensor).view(np.float32).reshape(shape) if is_on_host(tensor) else None


def host_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """View the bytes of a tensor that `is_on_host`: U8 (n_bytes,). It must not outlive them."""
    size, data = ggml().ggml_nbytes(tensor), TensorStruct.from_address(tensor).data
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(data))


def shape(tensor: Tensor) -> tuple[int, int, int, int]:
    """Read a tensor's extents, fastest first."""
    ne = TensorStruct.from_address(tensor).ne
    return ne[0], ne[1], ne[2], ne[3]


def strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Read a tensor's byte strides, fastest dimension first."""
    nb = TensorStruct.from_address(tensor).nb
    return nb[0], nb[1], nb[2], nb[3]
