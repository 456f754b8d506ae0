"""The frames of ggml's RPC protocol: what each command carries, and what answers it.

A request is a command (u8), the bytes that follow (u64) and those bytes; an answer is its bytes
(u64) and those bytes. Numbers are little-endian.

Source: ggml-rpc.cpp, the enumeration of commands and the packed records of protocol 7.0.
"""

import struct
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.ggml.structs import (
    GGML_MAX_DIMS,
    GGML_MAX_NAME,
    GGML_MAX_OP_PARAMS,
    GGML_MAX_SRC,
)

VERSION: Final = (7, 0, 0)
"""Major, minor and patch. ggml raises the last whenever operations get other numbers."""

(ALLOC_BUFFER, GET_ALIGNMENT, GET_MAX_SIZE, BUFFER_GET_BASE, FREE_BUFFER, BUFFER_CLEAR,
 SET_TENSOR, SET_TENSOR_HASH, GET_TENSOR, COPY_TENSOR, GRAPH_COMPUTE, GET_DEVICE_MEMORY,
 INIT_TENSOR, GET_ALLOC_SIZE, HELLO, DEVICE_COUNT, GRAPH_RECOMPUTE,
 MEMSET_TENSOR) = range(18)  # fmt: skip

KEEP_GRAPH, USE_GRAPH = 200, 201
"""Not ggml's: our server's own. KEEP_GRAPH is a slot (u32) and what GRAPH_COMPUTE carries, to be
computed and kept there; USE_GRAPH is a slot, whose graph is computed again. A server that has
them says so in the fourth byte of its HELLO's answer, which ggml leaves zero and nobody reads."""
N_KEPT: Final = 512
MOST_KEPT_BYTES: Final = (1 << 18) - 64
"""What a graph may have to be kept; with larger ones, slots would hold too much."""

HEAD: Final = struct.Struct("<BQ")
SIZE: Final = struct.Struct("<Q")
U32: Final = struct.Struct("<I")
PAIR: Final = struct.Struct("<QQ")
ALLOC: Final = struct.Struct("<IQ")

TENSOR_BYTES: Final = (8 + 4 + 8 + 8 * GGML_MAX_DIMS + 4 + GGML_MAX_OP_PARAMS + 4
                       + 8 * GGML_MAX_SRC + 3 * 8 + GGML_MAX_NAME + 4)  # fmt: skip
"""One serialised tensor: id, type, buffer, ne, nb, op, op_params, flags, src, view_src,
view_offs, data, name, use_count."""
SET_HEAD_BYTES: Final = TENSOR_BYTES + 1 + 8
"""What stands before the bytes of a SET_TENSOR: the tensor, whether to keep it, the offset."""
CAPS_BYTES: Final = 24

MOST_BYTES: Final = 1 << 48
"""Sizes from here on are no memory of any machine; below it, sums of them cannot overflow."""
MOST_GRAPH_BYTES: Final = 1 << 26
MOST_DEVICES: Final = 64
MOST_ALIGNMENT: Final = 1 << 24

BUSY: Final = b"busy with another client"
"""What our server says, in place of its abilities and with version 0.0.0, to a second client."""
_LOST_BASE = 1 << 24  # an address that is no host's: not null, and aligned for everything
_NO_LIMIT = (1 << 64) - 1


class FrameError(Exception):
    """A frame that the protocol does not allow; the message is part of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: its request's bytes, and its answer's; None is no answer."""

    name: str
    least_bytes: int
    most_bytes: int
    answer_bytes: int | None


def _exact(name: str, n_bytes: int, answer_bytes: int | None = None) -> Command:
    return Command(name=name, least_bytes=n_bytes, most_bytes=n_bytes, answer_bytes=answer_bytes)


COMMANDS: Final = (
    _exact("ALLOC_BUFFER", 12, 16),
    _exact("GET_ALIGNMENT", 4, 8),
    _exact("GET_MAX_SIZE", 4, 8),
    _exact("BUFFER_GET_BASE", 8, 8),
    _exact("FREE_BUFFER", 8),
    _exact("BUFFER_CLEAR", 9),
    Command(name="SET_TENSOR", least_bytes=SET_HEAD_BYTES, most_bytes=MOST_BYTES,
            answer_bytes=None),
    _exact("SET_TENSOR_HASH", TENSOR_BYTES + 16, 1),
    _exact("GET_TENSOR", TENSOR_BYTES + 16, 0),  # as many as it asks for, see `answer_bytes`
    _exact("COPY_TENSOR", 2 * TENSOR_BYTES, 1),
    Command(name="GRAPH_COMPUTE", least_bytes=12, most_bytes=MOST_GRAPH_BYTES, answer_bytes=None),
    _exact("GET_DEVICE_MEMORY", 4, 16),
    _exact("INIT_TENSOR", TENSOR_BYTES),
    _exact("GET_ALLOC_SIZE", 4 + TENSOR_BYTES * (1 + GGML_MAX_SRC), 8),
    _exact("HELLO", CAPS_BYTES, 4 + CAPS_BYTES),
    _exact("DEVICE_COUNT", 0, 4),
    _exact("GRAPH_RECOMPUTE", 4),
    _exact("MEMSET_TENSOR", TENSOR_BYTES + 17),
)  # fmt: skip
"""By their numbers."""
_OURS = {
    KEEP_GRAPH: Command(name="KEEP_GRAPH", least_bytes=4 + 12, most_bytes=4 + MOST_KEPT_BYTES,
                        answer_bytes=None),
    USE_GRAPH: _exact("USE_GRAPH", 4),
}  # fmt: skip


def parse_head(head: bytes | memoryview, ours: bool = False) -> tuple[int, int]:
    """Read a request's first nine bytes: its command, and how many bytes follow.

    Args:
        head: those bytes.
        ours: whether our own commands may come too.

    Raises:
        FrameError: there is no such command, or it cannot be of that size.
    """
    command, n_bytes = HEAD.unpack(head)
    found = COMMANDS[command] if command < len(COMMANDS) else _OURS.get(command) if ours else None
    if found is None:
        raise FrameError(f"command {command}; there are {len(COMMANDS)}")
    if not found.least_bytes <= n_bytes <= found.most_bytes:
        raise FrameError(f"{found.name} of {n_bytes} bytes; it has {found.least_bytes}"
                         + ("" if found.least_bytes == found.most_bytes
                            else f" to {found.most_bytes}"))  # fmt: skip
    return command, n_bytes


def request(command: int, payload: bytes = b"") -> bytes:
    """Build a request."""
    return HEAD.pack(command, len(payload)) + payload


def answer(payload: bytes) -> bytes:
    """Build an answer."""
    return SIZE.pack(len(payload)) + payload


def answer_bytes(command: int, payload: memoryview) -> int | None:
    """Return how many bytes answer a request; None is no answer.

    Raises:
        FrameError: it asks for more than any machine has.
    """
    if command in _OURS:
        return None
    if command != GET_TENSOR:
        return COMMANDS[command].answer_bytes
    (n_bytes,) = SIZE.unpack_from(payload, TENSOR_BYTES + 8)
    if n_bytes > MOST_BYTES:
        raise FrameError(f"GET_TENSOR asks for {n_bytes} bytes")
    return int(n_bytes)


def hello_answer(version: tuple[int, int, int], caps: bytes = b"", keeps: bool = False) -> bytes:
    """Build what answers a HELLO; without abilities a connection stays plain TCP."""
    return answer(bytes((*version, keeps)) + caps.ljust(CAPS_BYTES, b"\0"))


def lost_answer(command: int) -> bytes:
    """Build what answers a request in the place of a server that is gone, GET_TENSOR excepted.

    It must be one that ggml can live with: a base that is null, an alignment that is no power
    of two would end the process. Nobody may believe anything else in it.
    """
    if command == HELLO:
        return hello_answer(VERSION)
    values = {GET_ALIGNMENT: 128, GET_MAX_SIZE: _NO_LIMIT, BUFFER_GET_BASE: _LOST_BASE,
              SET_TENSOR_HASH: 1, COPY_TENSOR: 1, DEVICE_COUNT: 1}  # fmt: skip
    n_bytes = COMMANDS[command].answer_bytes
    assert n_bytes is not None and command != GET_TENSOR
    return answer(values.get(command, 0).to_bytes(n_bytes, "little"))


def checked_answer(command: int, payload: bytes, asked: memoryview) -> bytes:
    """Return an answer as it may be handed on: none that ends our process or overflows a sum.

    Raises:
        FrameError: what is wrong with it.
    """
    name = COMMANDS[command].name
    if command in (SET_TENSOR_HASH, COPY_TENSOR):
        if payload[0] > 1:
            raise FrameError(f"{name} answered {payload[0]}; it is 0 or 1")
    elif command == ALLOC_BUFFER:
        _check_alloc(payload, asked)
    elif command == GET_DEVICE_MEMORY:
        free, total = PAIR.unpack(payload)
        if total > MOST_BYTES:
            raise FrameError(f"{name} answered {total} bytes")
        return PAIR.pack(min(free, total), total)  # some backends count below zero
    elif command in _RANGES:
        (value,) = SIZE.unpack(payload)
        least, most = _RANGES[command]
        if not least <= value <= most:
            raise FrameError(f"{name} answered {value}")
        if command == GET_ALIGNMENT and value & (value - 1):
            raise FrameError(f"{name} answered {value}, which is no power of two")
    return payload


_RANGES = {
    GET_ALIGNMENT: (1, MOST_ALIGNMENT),
    GET_MAX_SIZE: (1, _NO_LIMIT),
    BUFFER_GET_BASE: (1, _NO_LIMIT - MOST_BYTES),
    GET_ALLOC_SIZE: (0, MOST_BYTES),
}


def _check_alloc(payload: bytes, asked: memoryview) -> None:
    _, wanted = ALLOC.unpack(asked)
    pointer, n_bytes = PAIR.unpack(payload)
    if pointer and not wanted <= n_bytes <= MOST_BYTES:
        raise FrameError(f"ALLOC_BUFFER of {wanted} bytes answered {n_bytes}")


def check_graph(start: memoryview, n_bytes: int) -> None:
    """Refuse a GRAPH_COMPUTE whose counts do not add up to its bytes.

    Args:
        start: its payload, the first eight bytes at least: device u32, n_nodes u32. There follow
            the nodes (u64 each), n_tensors u32 and the tensors.

    Raises:
        FrameError: they do not.
    """
    (n_nodes,) = U32.unpack_from(start, 4)
    n_tensors, rest = divmod(n_bytes - 12 - 8 * n_nodes, TENSOR_BYTES)
    if rest or n_tensors < n_nodes:
        raise FrameError(f"GRAPH_COMPUTE of {n_nodes} nodes in {n_bytes} bytes")


def check_hello(payload: bytes) -> tuple[tuple[int, int, int], bool]:
    """Read a HELLO's answer: the version that the server speaks, and whether it keeps graphs.

    Raises:
        FrameError: the server has a client already.
    """
    if payload[4:] == BUSY:
        raise FrameError(BUSY.decode())
    return (payload[0], payload[1], payload[2]), payload[3] == 1
