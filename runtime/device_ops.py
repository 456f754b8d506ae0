"""Which operations a device lacks, of a graph or for a weight.

ggml ends the process at one that it cannot do.
"""

import contextlib
from collections.abc import Iterator, Sequence

from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.tensor import F32, I32, Descriptors, new_tensor, shape

_FREE = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
"""Other looks at the same bytes: nothing is computed."""
_PROBE_TOKENS = 512  # as many as a prefill has, so that the answer holds for both
_WITH = {"MUL_MAT": "weights", "MUL_MAT_ID": "weights", "GET_ROWS": "rows"}


def lacking(device: Device, graph: int) -> list[str]:
    """List what a device says that it cannot compute of a built graph, each kind once.

    Nothing need be allocated. Names are ggml's with what the answer may depend on, such as
    `FLASH_ATTN_EXT with keys of q8_0, heads of 80`.
    """
    g, found = ggml(), dict[str, None]()
    for i in range(g.ggml_graph_n_nodes(graph)):
        node = g.ggml_graph_node(graph, i)
        if g.ggml_backend_dev_supports_op(device.info.pointer, node):
            continue
        if g.ggml_op_desc(node).decode() not in _FREE:
            found[describe(node)] = None
    return list(found)


def describe(node: Tensor) -> str:
    """Name an operation and the types that decide whether a backend has it."""
    name = ggml().ggml_op_desc(node).decode()
    struct = TensorStruct.from_address(node)
    sources = [Tensor(each) for each in struct.src if each]
    if name == "FLASH_ATTN_EXT":
        keys = sources[1]
        return f"{name} with keys of {type_name(keys)}, heads of {shape(keys)[0]}"
    if name in ("SET_ROWS", "CPY"):
        return f"{name} of {type_name(sources[0])} to {type_name(node)}"
    if not sources:
        return name
    return f"{name} with {_WITH.get(name, 'values')} of {type_name(sources[0])}"


def type_name(tensor: Tensor) -> str:
    """Name a tensor's type as ggml does: `f32`, `q8_0`."""
    kind = TensorStruct.from_address(tensor).type
    return (ggml().ggml_type_name(kind) or b"?").decode()


@contextlib.contextmanager
def lying_on(device: Device, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let tensors seem to lie on a device for as long as it is asked about them.

    Backends look at the type of a weight's buffer, and some at that of any tensor; a buffer of
    no bytes has one too.
    """
    g = ggml()
    empty = g.ggml_backend_buft_alloc_buffer(device.buffer_type, 0)
    structs = [TensorStruct.from_address(tensor) for tensor in tensors]
    before = [struct.buffer for struct in structs]
    try:
        for struct in structs:
            struct.buffer = empty
        yield
    finally:
        for struct, buffer in zip(structs, before, strict=True):
            struct.buffer = buffer
        if empty is not None:
            g.ggml_backend_buffer_free(empty)


def supports_product(
    device: Device, buffer_type: int, info: TensorInfo, *, by_id: bool = False
) -> bool:
    """Ask ggml whether it multiplies with a weight of this type and shape in `buffer_type`.

    `by_id` asks for products with the slices that ids choose. Using such a buffer unasked
    aborts the process. Source: ggml-backend.h, ggml_backend_dev_supports_op.
    """
    g = ggml()
    empty = g.ggml_backend_buft_alloc_buffer(buffer_type, 0)
    if empty is None:
        return False
    probe = Descriptors(4)
    try:
        weight = new_tensor(probe, info.type, info.ne, "probe")
        if by_id:
            x = new_tensor(probe, F32, (info.ne[0], 1, _PROBE_TOKENS), "probe_x")
            ids = new_tensor(probe, I32, (1, _PROBE_TOKENS), "probe_ids")
            op = g.ggml_mul_mat_id(probe.ctx, weight, x, ids)
        else:
            ne = (info.ne[0], _PROBE_TOKENS, *info.ne[2:])
            x = new_tensor(probe, F32, ne, "probe_x")
            op = g.ggml_mul_mat(probe.ctx, weight, x)
        TensorStruct.from_address(weight).buffer = empty
        return g.ggml_backend_dev_supports_op(device.info.pointer, op)
    finally:
        g.ggml_backend_buffer_free(empty)
        probe.free()
