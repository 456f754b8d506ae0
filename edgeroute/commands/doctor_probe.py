"""What one ggml device reaches, measured on weights of its own: bandwidths, products, round trips.

A second per device at most. Weights are random rows repeated, so that a GPU has real work.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.device import Device
from edgeroute.runtime.device_ops import supports_product
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.runtime.tensor import (
    F32,
    Descriptors,
    get_bytes,
    new_tensor,
    place_all,
    set_bytes,
)

TYPES: Final = ("Q4_K", "Q8_0", "F16")
N_IN, N_BLOCK = 4096, 64
"""Width of the weights, and rows of which they are repetitions."""
COPY_BYTES: Final = 16 << 20
DEVICE_S: Final = 1.0
_SHARE_S: Final = 0.04
"""What one figure may take, beyond its first run."""
_UPLOAD_S: Final = 0.15
"""A weight is no longer than what gets onto the device in this time."""
_MOST_ROWS, _PROMPT_ROWS, _LONG_PROMPT, _SHORT_PROMPT = 16384, 1024, 512, 32


class _Product(NamedTuple):
    """A placed product of a weight [N_IN, n] with columns [N_IN, m]."""

    graph: int
    out: Tensor


def probe(device: Device, room_bytes: int, threads: int) -> dict[str, Any]:
    """Measure a device within DEVICE_S, and one run of each figure beyond it.

    Args:
        device: to measure.
        room_bytes: what may be allocated on it.
        threads: of the processor, if it is that.

    Returns:
        `upload_bytes_s`, `download_bytes_s`, `round_trip_s` (a number read back), and `products`:
        by type of weight `decode_bytes_s` (one column) and `prefill_flops_s` (many). What there
        was no room or time for, or what the device lacks, is None.

    Raises:
        CapacityError: the device has not even memory for the smallest probe.
        DeviceLostError: it went away.
    """
    device.set_threads(threads)
    ends = time.perf_counter() + DEVICE_S
    found = _copies(device, min(COPY_BYTES, max(1 << 20, room_bytes // 4) & -4096))
    room = min(room_bytes // 2, int(_UPLOAD_S * found["upload_bytes_s"]))
    decode = {name: _decode_bytes_s(device, name, room, ends) for name in TYPES}
    products = {
        name: {"decode_bytes_s": decode[name],
               "prefill_flops_s": _prefill_flops_s(device, name, room, ends)}
        for name in TYPES
    }  # fmt: skip
    device.check()
    return found | {"products": products}


def _copies(device: Device, n_bytes: int) -> dict[str, Any]:
    """Time copies to and from a tensor, and the way of a single number."""
    data = np.zeros(n_bytes, np.uint8)
    few = np.zeros(4, np.uint8)
    descriptors = Descriptors(1)
    try:
        tensor = new_tensor(descriptors, F32, (n_bytes // 4,), "copy")
        buffer = place_all([tensor], device)
        try:

            def up() -> None:
                set_bytes(tensor, data)
                get_bytes(tensor, few)  # where copies are queued, it waits for them

            round_trip_s = _seconds(lambda: get_bytes(tensor, few))
            up_s = max(1e-9, _seconds(up) - (round_trip_s if device.link else 0.0))
            down_s = _seconds(lambda: get_bytes(tensor, data))
            device.check()
        finally:
            buffer.free()
    finally:
        descriptors.free()
    return {
        "copied_bytes": n_bytes,
        "upload_bytes_s": round(n_bytes / up_s),
        "download_bytes_s": round(n_bytes / down_s),
        "round_trip_s": round(round_trip_s, 9),
    }


def _decode_bytes_s(device: Device, name: str, room: int, ends: float) -> int | None:
    """Time the product of a weight of one type with a column, in its bytes per second."""
    row = GGMLType[name].row_size(N_IN)
    n_rows = _n_rows(name, room, _MOST_ROWS)
    if not n_rows or time.perf_counter() > ends:
        return None
    with _product(device, name, n_rows, 1) as one:
        return (
            None if one is None else round(n_rows * row / _seconds(lambda: _compute(device, one)))
        )


def _prefill_flops_s(device: Device, name: str, room: int, ends: float) -> int | None:
    """Time products with a few columns, and with many where there is time for them."""
    n_rows = _n_rows(name, room, _PROMPT_ROWS)
    rate = 0.0
    for n in (_SHORT_PROMPT, _LONG_PROMPT) if n_rows else ():
        flops = 2 * n_rows * N_IN * n
        if time.perf_counter() + (flops / rate if rate else 0.0) > ends:
            break
        with _product(device, name, n_rows, n) as many:
            if many is None:
                return None
            rate = max(rate, flops / _seconds(lambda: _compute(device, many)))
    return round(rate) if rate else None


def _n_rows(name: str, room: int, most: int) -> int:
    """Rows of a weight that there is room for, a multiple of N_BLOCK."""
    return min(most, room // GGMLType[name].row_size(N_IN)) // N_BLOCK * N_BLOCK


@contextmanager
def _product(device: Device, name: str, n_rows: int, n: int) -> Iterator[_Product | None]:
    """Place one product on a device; None where it says that it has no such operation."""
    g = ggml()
    descriptors = Descriptors(4, 8)
    try:
        weight = new_tensor(descriptors, GGMLType[name], (N_IN, n_rows), "weight")
        x = new_tensor(descriptors, F32, (N_IN, n), "x")
        out = g.ggml_mul_mat(descriptors.ctx, weight, x)
        buffers = [place_all([weight], device, _home(device, name, n_rows))]
        try:
            buffers.append(place_all([x, out], device))
            if not g.ggml_backend_dev_supports_op(device.info.pointer, out):
                yield None
                return
            set_bytes(weight, np.tile(_quantised(name), n_rows // N_BLOCK))
            set_bytes(x, _random(n))
            graph = g.ggml_new_graph_custom(descriptors.ctx, 8, False)
            g.ggml_build_forward_expand(graph, out)
            yield _Product(graph, out)
        finally:
            for buffer in buffers:
                buffer.free()
    finally:
        descriptors.free()


def _compute(device: Device, product: _Product) -> None:
    """Compute, and wait until that is over wherever it happens."""
    device.compute(product.graph)
    if device.link is not None:  # its server answers to reads only
        get_bytes(product.out, np.zeros(4, np.uint8))


def _home(device: Device, name: str, n_rows: int) -> int:
    """The buffer type in which the engine would hold such a weight."""
    info: Any = SimpleNamespace(type=GGMLType[name], ne=(N_IN, n_rows))
    fits = (each for each in device.extra_buffer_types if supports_product(device, each, info))
    return next(fits, device.buffer_type)


@functools.cache
def _quantised(name: str) -> npt.NDArray[np.uint8]:
    """Make N_BLOCK random rows of a type."""
    kind, values = GGMLType[name], _random(N_BLOCK)
    rows = np.empty(N_BLOCK * kind.row_size(N_IN), np.uint8)
    ggml().ggml_quantize_chunk(
        kind, values.ctypes.data, rows.ctypes.data, 0, N_BLOCK, N_IN, None
    )  # fmt: skip
    return rows


@functools.cache
def _random(n: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((n, N_IN), np.float32)


def _seconds(run: Callable[[], object]) -> float:
    """Run once unseen, then for a share of the time; return the best."""
    run()
    best, ends = np.inf, time.perf_counter() + _SHARE_S
    while True:
        began = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > ends:
            return float(max(best, 1e-9))
