"""Writes the refactored model as a qwen2moe file that stock llama.cpp loads.

The file grows layer by layer beside its target and is renamed when it is complete.
Source: llama.cpp, src/models/qwen2moe.cpp and llama-graph.cpp, for what the factors undo.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, quants

from edgeroute.runtime.gguf import GGMLType, Metadata, ValueType
from edgeroute.tools.convert.moe_activations import Array, DenseModel, FeedForward

ARCH: Final = "qwen2moe"
SHARED_GATE_NOISE: Final = 1e-6
"""llama.cpp forms the shared expert's sigmoid as silu(x) / x: a gate of zeros is 0/0."""
SHARED_FACTOR: Final = 2.0
"""Undoes that sigmoid, which is one half."""

NODES_PER_LAYER, NODES_PER_EXPERT, NODES_PER_TENSOR, MIN_NODES = 55, 2, 8, 1024
"""llama.cpp's graph has room for max(1024, 8 nodes per tensor of the file), and aborts
beyond. Source: llama-context.cpp, graph_max_nodes; nodes of a layer as measured."""

FILE_TYPES: Final = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
"""What experts can be stored as."""

_F32: Final = GGMLQuantizationType.F32
# Numbers beside a weight that llama.cpp loads for any type and uses for none but NVFP4: they
# cost a few bytes and make room for eight nodes each. (stem, whether one number per expert.)
_ROOM: Final = (
    ("attn_q", False), ("attn_k", False), ("attn_v", False), ("attn_output", False),
    ("ffn_gate_shexp", False), ("ffn_up_shexp", False), ("ffn_down_shexp", False),
    ("ffn_gate_exps", True), ("ffn_up_exps", True), ("ffn_down_exps", True),
)  # fmt: skip
_GLOBAL: Final = ("token_embd.weight", "output_norm.weight", "output.weight")
_PER_LAYER: Final = (
    "attn_norm.weight", "attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias",
    "attn_v.weight", "attn_v.bias", "attn_output.weight", "ffn_norm.weight",
)  # fmt: skip
_DROPPED: Final = frozenset({"general.architecture", "general.file_type", "general.size_label",
                             "general.alignment", "general.quantization_version"})  # fmt: skip
_PYTHON: Final = {ValueType.STRING: bytes, ValueType.BOOL: bool,
                  ValueType.FLOAT32: float, ValueType.FLOAT64: float}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Counts of the file to write, and the type of its experts, a key of FILE_TYPES."""

    n_layer: int
    n_embd: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_ff_shexp: int
    weight_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One refactored layer, its neurons in order: shared ones, then expert after expert.

    `gate` is (n_expert, n_embd); factors are not folded in yet.
    """

    gate: Array
    ff: FeedForward


def n_room(model: DenseModel, shape: MoeShape) -> int | None:
    """Return how many extra tensors a layer needs for llama.cpp's graph; None if too many."""
    for extra in range(len(_ROOM) + 1):
        if max_used(model, shape, extra) >= shape.n_expert_used:
            return extra
    return None


def max_used(model: DenseModel, shape: MoeShape, extra: int = len(_ROOM)) -> int:
    """Return how many experts llama.cpp's graph can run with `extra` tensors more a layer."""
    tensors = copied(model)
    n_tensors = len(tensors) + shape.n_layer * (8 + extra)
    n_nodes = max(MIN_NODES, NODES_PER_TENSOR * n_tensors)
    # nodes / layers > NODES_PER_EXPERT * k + NODES_PER_LAYER
    return ((n_nodes - 1) // shape.n_layer - NODES_PER_LAYER) // NODES_PER_EXPERT


class MoeWriter:
    """The file under way. Leaving the context before `finish` deletes it.

    Raises:
        OSError: no room, or no permission; nothing is left behind.
    """

    def __init__(self, model: DenseModel, shape: MoeShape, out: Path) -> None:
        self._model, self._shape, self._out = model, shape, out
        self._part = out.with_name(f"{out.name}.{os.getpid()}.part")
        self._qtype = FILE_TYPES[shape.weight_type][0]
        self._copies = copied(model)
        self._extra = n_room(model, shape) or 0
        self._writer = GGUFWriter(self._part, ARCH)
        self._noise = np.random.default_rng(shape.n_embd)
        _add_metadata(model, shape, self._writer)
        for name in _GLOBAL:
            self._declare_copy(name)
        for il in range(shape.n_layer):
            self._declare_layer(il)

    def __enter__(self) -> Self:
        try:
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()
            for name in _GLOBAL:
                self._put_copy(name)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._discard()

    def _discard(self) -> None:
        """Close and delete what is not finished; nothing is there to delete after `finish`."""
        self._writer.close()
        self._part.unlink(missing_ok=True)

    def finish(self) -> None:
        """Put the complete file in its place, on the disk."""
        self._writer.close()
        with self._part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._part, self._out)

    def put_layer(self, il: int, layer: MoeLayer) -> None:
        """Write the next layer."""
        for name in self._layer_copies(il):
            self._put_copy(name)
        for name, data in self._made(il, layer).items():
            values = data if _is_plain(name) else quants.quantize(data, self._qtype)
            self._writer.write_tensor_data(np.ascontiguousarray(values))

    def _made(self, il: int, layer: MoeLayer) -> dict[str, Array]:
        """Everything of a layer that the dense file has not, factors folded in."""
        shape, p = self._shape, f"blk.{il}"
        n, width = shape.n_ff_shexp, shape.n_ff_exp
        experts = (shape.n_expert, width, shape.n_embd)
        down = layer.ff.down[:, n:].reshape(shape.n_embd, shape.n_expert, width)
        noise = self._noise.standard_normal(shape.n_embd, dtype=np.float32)
        found = {
            f"{p}.ffn_gate_inp.weight": layer.gate,
            f"{p}.ffn_gate_exps.weight": layer.ff.gate[n:].reshape(experts),
            f"{p}.ffn_up_exps.weight": layer.ff.up[n:].reshape(experts),
            # Each chosen expert's softmax weight is 1 / n_expert.
            f"{p}.ffn_down_exps.weight": down.transpose(1, 0, 2) * np.float32(shape.n_expert),
            f"{p}.ffn_gate_inp_shexp.weight": noise * np.float32(SHARED_GATE_NOISE),
            f"{p}.ffn_gate_shexp.weight": layer.ff.gate[:n],
            f"{p}.ffn_up_shexp.weight": layer.ff.up[:n],
            f"{p}.ffn_down_shexp.weight": layer.ff.down[:, :n] * np.float32(SHARED_FACTOR),
        }
        for stem, per_expert in _ROOM[: self._extra]:
            n_ones = shape.n_expert if per_expert else 1
            found[f"{p}.{stem}.input_scale"] = np.ones(n_ones, np.float32)
        return found

    def _declare_layer(self, il: int) -> None:
        for name in self._layer_copies(il):
            self._declare_copy(name)
        shape = self._shape
        n_ff, n_embd = shape.n_ff_shexp + shape.n_expert * shape.n_ff_exp, shape.n_embd
        nothing = np.broadcast_to(np.float32(0), (n_ff, n_embd))
        empty = MoeLayer(
            gate=np.broadcast_to(np.float32(0), (shape.n_expert, n_embd)),
            ff=FeedForward(gate=nothing, up=nothing, down=nothing.T),
        )
        for name, data in self._made(il, empty).items():
            self._declare(name, data.shape, _F32 if _is_plain(name) else self._qtype)

    def _layer_copies(self, il: int) -> list[str]:
        return [name for name in self._copies if name.startswith(f"blk.{il}.")]

    def _declare_copy(self, name: str) -> None:
        info = self._model.file.tensors[self._source(name)]
        self._declare(name, info.ne[::-1], GGMLQuantizationType(info.type))

    def _declare(self, name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> None:
        n_bytes = GGMLType(qtype).row_size(shape[-1]) * prod(shape[:-1])
        self._writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=qtype)

    def _put_copy(self, name: str) -> None:
        rows = self._model.rows(self._source(name))
        if self._model.neighbours and name.split(".")[-2] in ("attn_q", "attn_k"):
            # A bias is one row in the file but has an element per output.
            outputs = rows.reshape(-1, 4) if name.endswith(".bias") else rows
            rows = outputs[_halves(len(outputs), self._model.hparams.n_embd_head_k)]
        self._writer.write_tensor_data(np.ascontiguousarray(rows).reshape(-1))

    def _source(self, name: str) -> str:
        tied = name == "output.weight" and self._model.hparams.tied
        return "token_embd.weight" if tied else name


def _halves(n_rows: int, width: int) -> npt.NDArray[np.int64]:
    """Order rows so that a rotary pair is a head's first and second half, not neighbours."""
    head = np.r_[np.arange(0, width, 2), np.arange(1, width, 2)]
    order: npt.NDArray[np.int64] = np.arange(0, n_rows, width)[:, None] + head
    return order.reshape(-1)


def _is_plain(name: str) -> bool:
    """Whether a made tensor stays F32: gates and single numbers."""
    return "_gate_inp" in name or name.endswith(".input_scale")


def copied(model: DenseModel) -> list[str]:
    """Name the tensors taken over as they are: embedding, norm and head, then the layers'."""
    names = list(_GLOBAL)
    for il in range(model.hparams.n_layer):
        layer = [f"blk.{il}.{name}" for name in _PER_LAYER]
        names += [name for name in layer if name in model.file.tensors]
    return names


def _add_metadata(model: DenseModel, shape: MoeShape, writer: GGUFWriter) -> None:
    meta, old = model.file.metadata, f"{model.hparams.arch}."
    for key in meta:
        if key in _DROPPED or key.startswith("split."):
            continue
        new = f"{ARCH}.{key.removeprefix(old)}" if key.startswith(old) else key
        _copy_value(meta, key, new, writer)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    writer.add_expert_feed_forward_length(shape.n_ff_exp)
    writer.add_expert_shared_feed_forward_length(shape.n_ff_shexp)
    writer.add_file_type(FILE_TYPES[shape.weight_type][1])
    writer.add_quantization_version(2)


def _copy_value(meta: Metadata, key: str, new: str, writer: GGUFWriter) -> None:
    """Copy one value in its own type."""
    type_name = meta.type_name(key)
    kind = ValueType[type_name.split()[-1]]
    value: Any
    if meta.is_array(key):
        if not meta.array_len(key):  # the writer cannot, and readers take absent as empty
            return
        value = meta.get_array(key, _PYTHON.get(kind, int))
        value = value if isinstance(value, list) else value.tolist()
        writer.add_key_value(new, value, GGUFValueType.ARRAY, GGUFValueType(kind))
        return
    if kind is ValueType.STRING:
        value = meta.get_str(key)
    elif kind is ValueType.BOOL:
        value = meta.get_bool(key)
    elif _PYTHON.get(kind) is float:
        value = meta.get_float(key)
    else:
        value = meta.get_int(key)
    writer.add_key_value(new, value, GGUFValueType(kind))
