"""Models of next to no arithmetic: what computing a token with one takes is what is fixed.

All weights are zero, so that the file is a header and a hole. Written here, not by
`tools.synth`: that needs a package which a machine that only wants a forecast may not have.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

N_VOCAB: Final = 384
N_EMBD, N_FF, N_FF_EXP, N_HEAD_SIZE = 256, 256, 32, 32
N_EXPERT: Final = 64
N_EXPERT_USED: Final = 8
N_CTX: Final = 512
_N_BYTE: Final = 256
_ALIGNMENT: Final = 32
# Source: the GGUF specification in ggml's docs, gguf_metadata_value_type and ggml_type.
_U32, _I32, _F32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_TENSOR_F32, _TENSOR_Q8_0 = 0, 8
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

_NORMS: Final = (
    ("attn_norm", N_EMBD),
    ("ffn_norm", N_EMBD),
    ("attn_q_norm", N_HEAD_SIZE),
    ("attn_k_norm", N_HEAD_SIZE),
)

Value = int | float | str | list[int] | list[float] | list[str]
_Tensor = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Layers, and whether they have experts: as many of them per token as large models have."""

    n_layer: int
    experts: bool = False

    @property
    def arch(self) -> str:
        """The family that it is written as."""
        return "qwen3moe" if self.experts else "qwen3"


def write_tiny(shape: TinyShape, path: Path) -> None:
    """Write a model of this shape.

    Raises:
        OSError: no room, or no permission.
    """
    tensors = list(_tensors(shape))
    pairs = _metadata(shape)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    head += b"".join(_string(key) + _value(value) for key, value in pairs.items())
    at = 0
    for name, ne, kind in tensors:
        head += _string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, at)
        at += _padded(_n_bytes(ne, kind))
    with path.open("wb") as file:
        file.write(head)
        file.truncate(_padded(len(head)) + at)


def _metadata(shape: TinyShape) -> dict[str, Value]:
    arch, n_other = shape.arch, N_VOCAB - _N_BYTE - 3
    found: dict[str, Value] = {
        "general.architecture": arch,
        f"{arch}.context_length": N_CTX,
        f"{arch}.embedding_length": N_EMBD,
        f"{arch}.block_count": shape.n_layer,
        f"{arch}.feed_forward_length": N_FF,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": N_HEAD_SIZE,
        f"{arch}.attention.value_length": N_HEAD_SIZE,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>",
                                  *(f"<0x{i:02X}>" for i in range(_N_BYTE)),
                                  *(f"t{i}" for i in range(n_other))],
        "tokenizer.ggml.scores": [0.0] * N_VOCAB,
        "tokenizer.ggml.token_type": [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * _N_BYTE,
                                      *[_NORMAL] * n_other],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    if shape.experts:
        found |= {
            f"{arch}.expert_count": N_EXPERT,
            f"{arch}.expert_used_count": N_EXPERT_USED,
            f"{arch}.expert_feed_forward_length": N_FF_EXP,
        }
    return found


def _tensors(shape: TinyShape) -> Iterator[_Tensor]:
    """Yield name, extents and type of every tensor, in the file's order."""
    yield "token_embd.weight", (N_EMBD, N_VOCAB), _TENSOR_Q8_0
    yield "output_norm.weight", (N_EMBD,), _TENSOR_F32
    yield "output.weight", (N_EMBD, N_VOCAB), _TENSOR_Q8_0
    wide, narrow = 4 * N_HEAD_SIZE, 2 * N_HEAD_SIZE
    for il in range(shape.n_layer):
        stem = f"blk.{il}"
        for name, width in _NORMS:
            yield f"{stem}.{name}.weight", (width,), _TENSOR_F32
        for name, n_in, n_out in (
            ("attn_q", N_EMBD, wide),
            ("attn_k", N_EMBD, narrow),
            ("attn_v", N_EMBD, narrow),
            ("attn_output", wide, N_EMBD),
        ):
            yield f"{stem}.{name}.weight", (n_in, n_out), _TENSOR_Q8_0
        if shape.experts:
            yield f"{stem}.ffn_gate_inp.weight", (N_EMBD, N_EXPERT), _TENSOR_F32
        end, n_ff = ("_exps", N_FF_EXP) if shape.experts else ("", N_FF)
        more = (N_EXPERT,) if shape.experts else ()
        yield f"{stem}.ffn_gate{end}.weight", (N_EMBD, n_ff, *more), _TENSOR_Q8_0
        yield f"{stem}.ffn_up{end}.weight", (N_EMBD, n_ff, *more), _TENSOR_Q8_0
        yield f"{stem}.ffn_down{end}.weight", (n_ff, N_EMBD, *more), _TENSOR_Q8_0


def _n_bytes(ne: Sequence[int], kind: int) -> int:
    n = 1
    for extent in ne:
        n *= extent
    return 4 * n if kind == _TENSOR_F32 else n // 32 * 34


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, list):
        kind, _ = _scalar(value[0])
        kind = _I32 if kind == _U32 else kind  # as llama.cpp wants types of tokens
        body = b"".join(_scalar(each)[1] for each in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body
    kind, body = _scalar(value)
    return struct.pack("<I", kind) + body


def _scalar(value: int | float | str) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, float):
        return _F32, struct.pack("<f", value)
    return _U32, struct.pack("<I", value)
