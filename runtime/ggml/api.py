# mypy: disable-error-code="empty-body"
"""Typed ggml functions: one stub per C function, bound when first asked for.

Each stub's annotations carry the ctypes types, so that mypy and ctypes read the same
line. Pointers are plain ints; `None` is NULL. Source: ggml.h, ggml-alloc.h,
ggml-backend.h of ggml 0.25.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Annotated, Any, NewType, TypeVar, get_args, get_origin

from edgeroute.runtime.errors import LibraryError
from edgeroute.runtime.ggml import structs
from edgeroute.runtime.ggml.lib import REMEDY, bind, libraries

Tensor = NewType("Tensor", int)
"""Address of a struct ggml_tensor."""

Ptr = Annotated[int, ctypes.c_void_p]
OptPtr = Annotated[int | None, ctypes.c_void_p]
Ten = Annotated[Tensor, ctypes.c_void_p]
OptTen = Annotated[Tensor | None, ctypes.c_void_p]
I32 = Annotated[int, ctypes.c_int32]
I64 = Annotated[int, ctypes.c_int64]
Size = Annotated[int, ctypes.c_size_t]
F32 = Annotated[float, ctypes.c_float]
Bool = Annotated[bool, ctypes.c_bool]
Str = Annotated[bytes, ctypes.c_char_p]
OptStr = Annotated[bytes | None, ctypes.c_char_p]
Init = Annotated[structs.InitParams, structs.InitParams]
Struct = Annotated[Any, ctypes.c_void_p]
"""An argument given with ctypes.byref."""

PREC_F32 = 10
HINT_HADAMARD = 1
ROPE_NORMAL, ROPE_NEOX = 0, 2
USAGE_ANY, USAGE_WEIGHTS, USAGE_COMPUTE = 0, 1, 2
STATUS_SUCCESS, STATUS_ABORTED = 0, 1
DEVICE_CPU, DEVICE_GPU, DEVICE_IGPU, DEVICE_ACCEL = 0, 1, 2, 3


Stub = TypeVar("Stub", bound=Callable[..., Any])


def c(library: str, name: str | None = None) -> Callable[[Stub], Stub]:
    """Mark a stub as living in one of the libraries (see Libraries), there under `name`."""

    def mark(stub: Stub) -> Stub:
        stub.__dict__["library"] = library
        stub.__dict__["name"] = name or stub.__name__
        return stub

    return mark


class Ggml:
    """The bound functions, called as `g.ggml_mul_mat(ctx, a, b)`."""

    # contexts, tensors, graphs
    @c("held")
    def ggml_init(self, params: Init) -> OptPtr: ...
    @c("held")
    def ggml_free(self, ctx: Ptr) -> None: ...
    @c("held")
    def ggml_tensor_overhead(self) -> Size: ...
    @c("held")
    def ggml_graph_overhead_custom(self, size: Size, grads: Bool) -> Size: ...
    @c("held")
    def ggml_type_size(self, type: I32) -> Size: ...
    @c("held")
    def ggml_blck_size(self, type: I32) -> I64: ...
    @c("held")
    def ggml_row_size(self, type: I32, ne: I64) -> Size: ...
    @c("held")
    def ggml_nbytes(self, tensor: Ten) -> Size: ...
    @c("held")
    def ggml_new_tensor_1d(self, ctx: Ptr, type: I32, ne0: I64) -> Ten: ...
    @c("held")
    def ggml_new_tensor_2d(self, ctx: Ptr, type: I32, ne0: I64, ne1: I64) -> Ten: ...
    @c("held")
    def ggml_new_tensor_3d(self, ctx: Ptr, type: I32, ne0: I64, ne1: I64, ne2: I64) -> Ten: ...
    @c("held")
    def ggml_new_tensor_4d(
        self, ctx: Ptr, type: I32, ne0: I64, ne1: I64, ne2: I64, ne3: I64
    ) -> Ten: ...
    @c("held")
    def ggml_set_name(self, tensor: Ten, name: Str) -> Ten: ...
    @c("held")
    def ggml_set_input(self, tensor: Ten) -> None: ...
    @c("held")
    def ggml_set_output(self, tensor: Ten) -> None: ...
    @c("held")
    def ggml_new_graph_custom(self, ctx: Ptr, size: Size, grads: Bool) -> Ptr: ...
    @c("held")
    def ggml_build_forward_expand(self, graph: Ptr, tensor: Ten) -> None: ...
    @c("held")
    def ggml_graph_n_nodes(self, graph: Ptr) -> I32: ...
    @c("held")
    def ggml_graph_node(self, graph: Ptr, index: I32) -> Ten: ...
    @c("held")
    def ggml_op_desc(self, tensor: Ten) -> Str: ...
    @c("held")
    def ggml_type_name(self, type: I32) -> OptStr: ...
    @c("base")
    def ggml_log_set(self, callback: Struct, user_data: OptPtr) -> None: ...
    @c("base")
    def ggml_quantize_chunk(
        self, type: I32, src: Ptr, dst: Ptr, start: I64, nrows: I64, n_per_row: I64, imat: OptPtr
    ) -> Size: ...

    # operations
    @c("held")
    def ggml_add(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_mul(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_scale(self, ctx: Ptr, a: Ten, s: F32) -> Ten: ...
    @c("held")
    def ggml_tanh(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_rms_norm(self, ctx: Ptr, a: Ten, eps: F32) -> Ten: ...
    @c("held")
    def ggml_mul_mat(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_mul_mat_id(self, ctx: Ptr, a: Ten, b: Ten, ids: Ten) -> Ten: ...
    @c("held")
    def ggml_add_id(self, ctx: Ptr, a: Ten, b: Ten, ids: Ten) -> Ten: ...
    @c("held")
    def ggml_div(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_silu(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_sigmoid(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_soft_max(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_soft_max_ext(
        self, ctx: Ptr, a: Ten, mask: OptTen, scale: F32, max_bias: F32
    ) -> Ten: ...
    @c("held")
    def ggml_sum_rows(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_cumsum(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_step(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_scale_bias(self, ctx: Ptr, a: Ten, s: F32, b: F32) -> Ten: ...
    @c("held")
    def ggml_clamp(self, ctx: Ptr, a: Ten, min: F32, max: F32) -> Ten: ...
    @c("held")
    def ggml_argsort_top_k(self, ctx: Ptr, a: Ten, k: I32) -> Ten: ...
    @c("held")
    def ggml_mul_mat_set_hint(self, product: Ten, hint: I32) -> None: ...
    @c("held")
    def ggml_argmax(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_get_rows(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_out_prod(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_set_rows(self, ctx: Ptr, a: Ten, b: Ten, rows: Ten) -> Ten: ...
    @c("held")
    def ggml_cpy(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_cast(self, ctx: Ptr, a: Ten, type: I32) -> Ten: ...
    @c("held")
    def ggml_cont(self, ctx: Ptr, a: Ten) -> Ten: ...
    @c("held")
    def ggml_concat(self, ctx: Ptr, a: Ten, b: Ten, dim: I32) -> Ten: ...
    @c("held")
    def ggml_repeat_4d(self, ctx: Ptr, a: Ten, ne0: I64, ne1: I64, ne2: I64, ne3: I64) -> Ten: ...
    @c("held")
    def ggml_permute(self, ctx: Ptr, a: Ten, i0: I32, i1: I32, i2: I32, i3: I32) -> Ten: ...
    @c("held")
    def ggml_reshape_2d(self, ctx: Ptr, a: Ten, ne0: I64, ne1: I64) -> Ten: ...
    @c("held")
    def ggml_reshape_3d(self, ctx: Ptr, a: Ten, ne0: I64, ne1: I64, ne2: I64) -> Ten: ...
    @c("held")
    def ggml_view_2d(
        self, ctx: Ptr, a: Ten, ne0: I64, ne1: I64, nb1: Size, offset: Size
    ) -> Ten: ...
    @c("held")
    def ggml_view_3d(
        self, ctx: Ptr, a: Ten, ne0: I64, ne1: I64, ne2: I64, nb1: Size, nb2: Size, offset: Size
    ) -> Ten: ...
    @c("held")
    def ggml_view_4d(
        self, ctx: Ptr, a: Ten, ne0: I64, ne1: I64, ne2: I64, ne3: I64, nb1: Size, nb2: Size,
        nb3: Size, offset: Size,
    ) -> Ten: ...  # fmt: skip
    @c("held")
    def ggml_swiglu_split(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_geglu_split(self, ctx: Ptr, a: Ten, b: Ten) -> Ten: ...
    @c("held")
    def ggml_swiglu_oai(self, ctx: Ptr, a: Ten, b: Ten, alpha: F32, limit: F32) -> Ten: ...
    @c("held")
    def ggml_rope_ext(
        self, ctx: Ptr, a: Ten, pos: Ten, factors: OptTen, n_dims: I32, mode: I32,
        n_ctx_orig: I32, freq_base: F32, freq_scale: F32, ext_factor: F32, attn_factor: F32,
        beta_fast: F32, beta_slow: F32,
    ) -> Ten: ...  # fmt: skip
    @c("held")
    def ggml_rope_set_offset(self, a: Ten, n_offs: I32) -> Ten: ...
    @c("held")
    def ggml_flash_attn_ext(
        self, ctx: Ptr, q: Ten, k: Ten, v: Ten, mask: OptTen, scale: F32, max_bias: F32,
        logit_softcap: F32,
    ) -> Ten: ...  # fmt: skip
    @c("held")
    def ggml_flash_attn_ext_add_sinks(self, a: Ten, sinks: Ten) -> None: ...
    @c("held")
    def ggml_prec_set_acc(self, a: Ten, prec: I32) -> Bool: ...

    # backends, devices, buffers
    @c("ggml")
    def ggml_backend_load_all_from_path(self, folder: Str) -> None: ...
    @c("ggml")
    def ggml_backend_dev_count(self) -> Size: ...
    @c("ggml")
    def ggml_backend_dev_get(self, index: Size) -> Ptr: ...
    @c("ggml")
    def ggml_backend_dev_by_type(self, type: I32) -> OptPtr: ...
    @c("base")
    def ggml_backend_dev_get_props(self, device: Ptr, props: Struct) -> None: ...
    @c("base")
    def ggml_backend_dev_backend_reg(self, device: Ptr) -> Ptr: ...
    @c("base")
    def ggml_backend_dev_init(self, device: Ptr, params: OptStr) -> OptPtr: ...
    @c("base")
    def ggml_backend_dev_buffer_type(self, device: Ptr) -> Ptr: ...
    @c("base")
    def ggml_backend_dev_host_buffer_type(self, device: Ptr) -> OptPtr: ...
    @c("base")
    def ggml_backend_dev_memory(self, device: Ptr, free: Struct, total: Struct) -> None: ...
    @c("base")
    def ggml_backend_dev_buffer_from_host_ptr(
        self, device: Ptr, ptr: Ptr, size: Size, max_tensor_size: Size
    ) -> OptPtr: ...
    @c("base")
    def ggml_backend_dev_supports_op(self, device: Ptr, op: Ten) -> Bool: ...
    @c("ggml")
    def ggml_backend_register(self, reg: Ptr) -> None: ...
    @c("ggml")
    def ggml_backend_unload(self, reg: Ptr) -> None: ...
    @c("ggml")
    def ggml_backend_reg_by_name(self, name: Str) -> OptPtr: ...
    @c("base")
    def ggml_backend_reg_dev_count(self, reg: Ptr) -> Size: ...
    @c("base")
    def ggml_backend_reg_dev_get(self, reg: Ptr, index: Size) -> Ptr: ...
    @c("base")
    def ggml_backend_reg_name(self, reg: Ptr) -> OptStr: ...
    @c("base")
    def ggml_backend_reg_get_proc_address(self, reg: Ptr, name: Str) -> OptPtr: ...
    @c("base")
    def ggml_backend_free(self, backend: Ptr) -> None: ...
    @c("base")
    def ggml_backend_graph_compute(self, backend: Ptr, graph: Ptr) -> I32: ...
    @c("base")
    def ggml_backend_graph_compute_async(self, backend: Ptr, graph: Ptr) -> I32: ...
    @c("base")
    def ggml_backend_synchronize(self, backend: Ptr) -> None: ...
    @c("base")
    def ggml_backend_tensor_set_async(
        self, backend: Ptr, tensor: Ten, data: Ptr, offset: Size, size: Size
    ) -> None: ...
    @c("base")
    def ggml_backend_tensor_get_async(
        self, backend: Ptr, tensor: Ten, data: Ptr, offset: Size, size: Size
    ) -> None: ...
    @c("base")
    def ggml_backend_event_new(self, device: Ptr) -> OptPtr: ...
    @c("base")
    def ggml_backend_event_free(self, event: Ptr) -> None: ...
    @c("base")
    def ggml_backend_event_record(self, event: Ptr, backend: Ptr) -> None: ...
    @c("base")
    def ggml_backend_event_synchronize(self, event: Ptr) -> None: ...
    @c("base")
    def ggml_backend_event_wait(self, backend: Ptr, event: Ptr) -> None: ...
    @c("base")
    def ggml_backend_buft_name(self, buft: Ptr) -> OptStr: ...
    @c("base")
    def ggml_backend_buft_alloc_buffer(self, buft: Ptr, size: Size) -> OptPtr: ...
    @c("base")
    def ggml_backend_buft_get_alignment(self, buft: Ptr) -> Size: ...
    @c("base")
    def ggml_backend_buft_get_alloc_size(self, buft: Ptr, tensor: Ten) -> Size: ...
    @c("base")
    def ggml_backend_buffer_free(self, buffer: Ptr) -> None: ...
    @c("base")
    def ggml_backend_buffer_clear(
        self, buffer: Ptr, value: Annotated[int, ctypes.c_uint8]
    ) -> None: ...
    @c("base")
    def ggml_backend_buffer_get_base(self, buffer: Ptr) -> Ptr: ...
    @c("base")
    def ggml_backend_buffer_get_size(self, buffer: Ptr) -> Size: ...
    @c("held")
    def ggml_backend_buffer_is_host(self, buffer: Ptr) -> Bool: ...
    @c("base")
    def ggml_backend_buffer_set_usage(self, buffer: Ptr, usage: I32) -> None: ...
    @c("base")
    def ggml_backend_tensor_alloc(self, buffer: Ptr, tensor: Ten, address: Ptr) -> I32: ...
    @c("base")
    def ggml_backend_tensor_set(self, tensor: Ten, data: Ptr, offset: Size, size: Size) -> None: ...
    @c("held", "ggml_backend_tensor_set")
    def host_tensor_set(self, tensor: Ten, data: Ptr, offset: Size, size: Size) -> None: ...
    @c("base")
    def ggml_backend_tensor_get(self, tensor: Ten, data: Ptr, offset: Size, size: Size) -> None: ...
    @c("base")
    def ggml_backend_tensor_memset(
        self, tensor: Ten, value: Annotated[int, ctypes.c_uint8], offset: Size, size: Size
    ) -> None: ...

    # allocators
    @c("base")
    def ggml_gallocr_new(self, buft: Ptr) -> OptPtr: ...
    @c("base")
    def ggml_gallocr_free(self, galloc: Ptr) -> None: ...
    @c("base")
    def ggml_gallocr_reserve(self, galloc: Ptr, graph: Ptr) -> Bool: ...
    @c("base")
    def ggml_gallocr_alloc_graph(self, galloc: Ptr, graph: Ptr) -> Bool: ...
    @c("base")
    def ggml_gallocr_get_buffer_size(self, galloc: Ptr, buffer_id: I32) -> Size: ...


@functools.cache
def ggml() -> Ggml:
    """Bind every function once.

    Raises:
        LibraryError: a library, a function or a struct layout is not the expected one.
    """
    libs = libraries()
    bound = Ggml()
    for attribute, stub in vars(Ggml).items():
        marks = getattr(stub, "__dict__", {})
        if home := marks.get("library"):
            setattr(bound, attribute, bind_stub(getattr(libs, home), marks["name"], stub))
    _check_layout(bound)
    return bound


def bind_stub(library: ctypes.CDLL, name: str, stub: Callable[..., Any]) -> Any:
    """Look a stub's C function up and give it the types of the stub's annotations.

    Raises:
        LibraryError: the library has no such function.
    """
    function = bind(library, name)
    types = dict(stub.__annotations__)
    result = types.pop("return")
    function.restype = None if result is None else _ctype(result)
    function.argtypes = [_ctype(annotation) for annotation in types.values()]
    return function


def _ctype(annotation: Any) -> Any:
    if get_origin(annotation) is not Annotated:
        raise TypeError(f"a stub's annotation carries no ctypes type: {annotation!r}")
    return get_args(annotation)[1]


def _check_layout(g: Ggml) -> None:
    """Compare what ggml writes into a tensor with where our struct says it is."""
    ctx = g.ggml_init(structs.InitParams(4096, None, True))
    if ctx is None:
        raise LibraryError(f"ggml could not create a context; {REMEDY}")
    try:
        tensor = g.ggml_new_tensor_4d(ctx, 0, 8, 3, 5, 7)
        g.ggml_set_name(tensor, b"layout")
        seen = structs.TensorStruct.from_address(tensor)
        object_bytes = g.ggml_tensor_overhead() - ctypes.sizeof(structs.TensorStruct)
        good = (
            list(seen.ne) == [8, 3, 5, 7]
            and list(seen.nb) == [4, 32, 96, 480]
            and seen.name == b"layout"
            and object_bytes == 32
        )
    finally:
        g.ggml_free(ctx)
    if not good:
        raise LibraryError(f"ggml_tensor has another layout than expected; {REMEDY}")
