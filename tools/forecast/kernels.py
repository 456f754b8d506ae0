"""How fast ggml multiplies here, by weight type and by the form in which the engine holds it.

Graphs of one operation over more weights than the caches hold. All weights are zero: what a
processor takes for a product does not depend on its numbers.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.device_ops import supports_product
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf import GGMLType
from edgeroute.runtime.tensor import F16, F32, I32, Descriptors, new_tensor, place_all, set_bytes

Form = Literal["dense", "plain", "experts", "slots"]
"""How a weight is held: `dense` as a resident model's matrices are, repacked where that pays;
`plain` in the file's layout, as where layers stream; `experts` as those of a resident model;
`slots` as experts that are paged, in the file's layout."""
FORMS: Final[tuple[Form, ...]] = ("dense", "plain", "experts", "slots")

N_IN, N_OUT, N_OUT_EXPERT = 2048, 2048, 1024
SHORT_IN: Final = 512
"""A second length of rows. One costs something whatever its length: at 576 values, which small
models have, products ran at 0.6 of their speed at 2048."""
N_EXPERT, N_EXPERT_USED = 32, 8
N_PROMPT: Final = 256
WORKING_BYTES: Final = 96 << 20
"""More than the last cache of any machine that models are paged on."""
MOST_MATRICES: Final = 96
N_HEAD, N_HEAD_KV, N_HEAD_SIZE, N_CELLS, N_CACHES = 16, 4, 128, 1024, 12
_LEAST_RUNS, _FEW_RUNS = 5, 2


def rate_key(weight_type: str, form: Form, n_in: int = N_IN) -> str:
    """The name under which a speed of this type, form and length of rows is kept in `Speeds`."""
    name = weight_type if form == "dense" else f"{weight_type}:{form}"
    return name if n_in == N_IN else f"{name}/{n_in}"


class Kernel(NamedTuple):
    """A product to be measured: the weight's type, how it is held, and the length of its rows."""

    weight_type: str
    form: Form
    n_in: int = N_IN

    @property
    def by_id(self) -> bool:
        """Whether the product is with the slices that ids choose."""
        return self.form in ("experts", "slots")

    @property
    def ne(self) -> tuple[int, ...]:
        """Extents of one weight, of as many values whatever its rows."""
        n_rows = (N_OUT_EXPERT if self.by_id else N_OUT) * N_IN // self.n_in
        return (self.n_in, n_rows, N_EXPERT) if self.by_id else (self.n_in, n_rows)


def is_repacked(device: Device, kernel: Kernel) -> bool:
    """Whether the engine would hold such a weight in a layout of the processor's own."""
    return _home(device, kernel) != device.buffer_type


def decode_bytes_s(device: Device, kernel: Kernel, seconds: float) -> float:
    """Measure bytes of weights per second for one token, for about `seconds` and what placing
    them takes.

    Raises:
        CapacityError: no memory for some 100 MB of weights.
        ComputeError: ggml failed.
    """
    with _Products(device, kernel, 1) as products:
        return products.used_bytes / _usual_s(products.compute, seconds)


def prefill_flops_s(device: Device, kernel: Kernel) -> float:
    """Measure FLOP/s for a prompt's tokens, by a few products.

    Raises:
        CapacityError, ComputeError: as decode_bytes_s.
    """
    with _Products(device, kernel, N_PROMPT) as products:
        return products.flops / _usual_s(products.compute, 0.0, _FEW_RUNS)


def _usual_s(work: Callable[[], object], seconds: float, n_least: int = _LEAST_RUNS) -> float:
    """Repeat for a while, the first time uncounted; return the median of the times.

    Not the best: a token goes through all of them, the slow ones too.
    """
    work()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < n_least or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


class _Graph(Closing):
    """A graph of operations that do not depend on each other, and the memory of its tensors."""

    def __init__(self, device: Device, n_nodes: int) -> None:
        self._device = device
        n_room = 3 * n_nodes + 8  # a graph counts what its operations read apart, but as many
        self._descriptors = Descriptors(n_room, n_room)
        self.ctx = self._descriptors.ctx
        self._buffers: list[Buffer] = []
        self._graph = ggml().ggml_new_graph_custom(self.ctx, n_room, False)
        self._loose: list[Tensor] = []

    def tensor(self, ggml_type: int, ne: tuple[int, ...]) -> Tensor:
        """Describe a tensor that `place_rest` places."""
        made = new_tensor(self._descriptors, ggml_type, ne, "forecast")
        self._loose.append(made)
        return made

    def weights(self, ggml_type: int, ne: tuple[int, ...], n: int, home: int) -> list[Tensor]:
        """Make `n` tensors in a buffer type, and write their bytes."""
        made = [new_tensor(self._descriptors, ggml_type, ne, "forecast") for _ in range(n)]
        buffer = place_all(made, self._device, home)
        self._buffers.append(buffer)
        ggml().ggml_backend_buffer_set_usage(buffer.pointer, api.USAGE_WEIGHTS)
        zeros = np.zeros(ggml().ggml_nbytes(made[0]), np.uint8)
        for weight in made:
            ggml().ggml_backend_tensor_set(weight, zeros.ctypes.data, 0, zeros.nbytes)
        return made

    def add(self, output: Tensor) -> None:
        """Have an operation computed."""
        self._loose.append(output)
        ggml().ggml_build_forward_expand(self._graph, output)

    def place_rest(self) -> None:
        """Give inputs and outputs their memory."""
        self._buffers.append(place_all(self._loose, self._device))

    def compute(self) -> object:
        """Compute all of it."""
        return self._device.compute(self._graph)

    def close(self) -> None:
        """Free everything; safe to call twice."""
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
        self._descriptors.free()


class _Products(_Graph):
    """Products of `n_tokens` columns with as many weights as the caches do not hold."""

    def __init__(self, device: Device, kernel: Kernel, n_tokens: int) -> None:
        ggml_type, ne = GGMLType[kernel.weight_type], kernel.ne
        rows = int(np.prod(ne[1:]))
        weight_bytes = ggml_type.row_size(ne[0]) * rows
        n = 1 if n_tokens > 1 else max(1, min(MOST_MATRICES, -(-WORKING_BYTES // weight_bytes)))
        super().__init__(device, n)
        self._chosen: list[Tensor] = []
        self._turns: list[npt.NDArray[np.int32]] = []
        self._n_done = 0
        try:
            self._build(kernel, n, n_tokens)
        except BaseException:
            self.close()
            raise
        share = N_EXPERT_USED / N_EXPERT if kernel.by_id else 1.0
        self.used_bytes = n * weight_bytes * share
        n_products = n_tokens * (N_EXPERT_USED if kernel.by_id else 1)
        self.flops = 2.0 * n * ne[0] * ne[1] * n_products

    def _build(self, kernel: Kernel, n: int, n_tokens: int) -> None:
        g, ne = ggml(), kernel.ne
        home = _home(self._device, kernel)
        found = self.weights(GGMLType[kernel.weight_type], ne, n, home)
        if not kernel.by_id:
            x = self.tensor(F32, (kernel.n_in, n_tokens))
            for weight in found:
                self.add(g.ggml_mul_mat(self.ctx, weight, x))
            self.place_rest()
        else:
            x = self.tensor(F32, (kernel.n_in, 1, n_tokens))
            chosen = [self.tensor(I32, (N_EXPERT_USED, n_tokens)) for _ in found]
            for weight, ids in zip(found, chosen, strict=True):
                self.add(g.ggml_mul_mat_id(self.ctx, weight, x, ids))
            self.place_rest()
            self._chosen = chosen
            self._turns = [_chosen_ids(n_tokens, turn) for turn in range(N_EXPERT // N_EXPERT_USED)]
        set_bytes(x, np.ones(kernel.n_in * n_tokens, np.float32))

    def compute(self) -> object:
        """Compute all of it, with other experts each time: a cache would keep those of one time."""
        if self._chosen:
            ids = self._turns[self._n_done % len(self._turns)]
            self._n_done += 1
            for each in self._chosen:
                set_bytes(each, ids)
        return super().compute()


def _chosen_ids(n_tokens: int, turn: int) -> npt.NDArray[np.int32]:
    """Experts of each token, I32 [n_tokens * N_EXPERT_USED]; for one token no two turns' the same,
    for many evenly spread."""
    rng = np.random.default_rng(0)
    rows = [np.roll(rng.permutation(N_EXPERT), turn * N_EXPERT_USED) for _ in range(n_tokens)]
    return np.concatenate([row[:N_EXPERT_USED] for row in rows]).astype(np.int32)


def _home(device: Device, kernel: Kernel) -> int:
    """The buffer type in which the engine would hold such a weight."""
    if kernel.form in ("dense", "experts"):
        info: Any = SimpleNamespace(type=GGMLType[kernel.weight_type], ne=kernel.ne)
        for buffer_type in device.extra_buffer_types:
            if supports_product(device, buffer_type, info, by_id=kernel.by_id):
                return buffer_type
    return device.buffer_type


def measure_attention(device: Device, seconds: float) -> float:
    """Measure attention of one token to many cells, F16: bytes per second, counting keys and
    values once for every query head that reads them.

    Raises:
        CapacityError, ComputeError: as measure_kernel.
    """
    g = ggml()
    with _Graph(device, N_CACHES) as graph:
        ne = (N_HEAD_SIZE, N_CELLS, N_HEAD_KV)
        caches = graph.weights(F16, ne, 2 * N_CACHES, device.buffer_type)
        q = graph.tensor(F32, (N_HEAD_SIZE, 1, N_HEAD))
        mask = graph.tensor(F16, (N_CELLS, 1))
        for k, v in zip(caches[::2], caches[1::2], strict=True):
            out = g.ggml_flash_attn_ext(graph.ctx, q, k, v, mask, 1.0, 0.0, 0.0)
            g.ggml_prec_set_acc(out, api.PREC_F32)
            graph.add(out)
        graph.place_rest()
        set_bytes(q, np.ones(N_HEAD_SIZE * N_HEAD, np.float32))
        set_bytes(mask, np.zeros(N_CELLS, np.float16))
        used = 2 * 2 * N_CACHES * N_HEAD_SIZE * N_CELLS * N_HEAD
        return used / _usual_s(graph.compute, seconds)


class Load(Closing):
    """Something to compute that takes a few milliseconds of all threads, beside reads."""

    def __init__(self, device: Device) -> None:
        self._products = _Products(device, Kernel("Q8_0", "plain"), 1)

    def compute(self) -> None:
        """Compute it once."""
        self._products.compute()

    def close(self) -> None:
        """Free everything; safe to call twice."""
        self._products.close()
