"""Which operations of a graph a device lacks: ggml ends the process at one that it cannot do."""

import contextlib
from collections.abc import Iterator, Sequence

from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.tensor import shape

_FREE = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
"""Other looks at the same bytes: nothing is computed."""
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
