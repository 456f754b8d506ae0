"""GGUF adapters that nobody vouches for: refused by a sentence naming what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from edgeroute.models.adapter_file import BaseShapes, open_adapter
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.tools.synth import make

LINEARS = {"attn_q": (48, 64), "attn_v": (48, 32)}
BASE = BaseShapes(
    arch="llama",
    n_head=4,
    n_head_kv=2,
    n_layer=2,
    n_expert=0,
    linears={f"blk.{il}.{leaf}": ne for il in range(2) for leaf, ne in LINEARS.items()},
)


def refused(path: Path, *words: str) -> None:
    """Opening must fail with one line that has all these words."""
    with pytest.raises(AdapterFileError) as caught:
        open_adapter(path, BASE)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and 30 < len(message) < 700


def gguf(
    path: Path, *, arch: str = "llama", kind: str | None = "adapter", lora: str | None = "lora",
    names: tuple[str, ...] = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"),
    shapes: tuple[tuple[int, ...], ...] = ((2, 48), (64, 2)), dtype: type = np.float32,
    alpha: float | None = 4.0, more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:  # fmt: skip
    """Write a GGUF adapter with something wrong."""
    writer = GGUFWriter(path, arch)
    if kind is not None:
        writer.add_type(kind)
    if lora is not None:
        writer.add_string("adapter.type", lora)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    more(writer)
    for name, shape in zip(names, shapes, strict=True):
        writer.add_tensor(name, np.zeros(shape, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_gguf_of_these_tests_is_fine(tmp_path: Path) -> None:
    assert open_adapter(gguf(tmp_path / "bad.gguf"), BASE).tensors[0].scale == 2.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"arch": "qwen2"}, ["'qwen2'", "the model is 'llama'"]),
        ({"kind": "model"}, ["not an adapter"]),
        ({"kind": None}, ["not an adapter"]),
        ({"lora": "ia3"}, ["adapter.type is 'ia3'"]),
        ({"lora": None}, ["adapter.type is ''"]),
        ({"alpha": float("nan")}, ["adapter.lora.alpha", "nan"]),
        ({"alpha": float("inf")}, ["adapter.lora.alpha", "inf"]),
        ({"alpha": 1e9}, ["adapter.lora.alpha", "1e+09"]),
        ({"dtype": np.float64}, ["lora_a", "F64"]),
        ({"dtype": np.int8}, ["lora_a", "I8"]),
        ({"shapes": ((2, 47), (64, 2))}, ["47 inputs", "has 48"]),
        ({"shapes": ((2, 48), (63, 2))}, ["63 outputs", "has 64"]),
        ({"shapes": ((2, 48), (64, 3))}, ["rank 2", "rank 3"]),
        ({"shapes": ((48, 2), (2, 64))}, ["blk.0.attn_q"]),
        ({"shapes": ((513, 48), (64, 513))}, ["rank 513", "1 to 512"]),
        ({"shapes": ((2, 2, 48), (64, 2))}, ["extents", "lora_a"]),
        ({"names": ("blk.0.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b")}, ["no B matrix"]),
        ({"names": ("blk.0.attn_q.lora_a", "blk.0.attn_q.lora_b")}, ["no LoRA matrix"]),
        ({"names": ("blk.2.attn_q.weight.lora_a", "x")}, ["layers 0 to 1"]),
        ({"names": ("blk.0.attn_w.weight.lora_a", "x")}, ["does not have"]),
        ({"names": ("blk.0.ffn_up_exps.weight.lora_a", "x")}, ["single experts"]),
        ({"names": ("token_embd.weight.lora_a", "x")}, ["embeddings"]),
        ({"names": ("output.weight.lora_a", "x")}, ["output head"]),
        ({"names": ("blk.0.attn_norm.weight", "x"), "shapes": ((48,), (1,))}, ["norm"]),
        ({"names": ("blk.0.attn_q.bias", "x")}, ["is a bias"]),
        ({"names": (), "shapes": ()}, ["adapts no weight"]),
    ],
)
def test_a_gguf_that_does_not_fit(wrong: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    refused(gguf(tmp_path / "bad.gguf", **wrong), "bad", *words)


def test_an_activated_lora(tmp_path: Path) -> None:
    path = gguf(
        tmp_path / "bad.gguf",
        more=lambda writer: writer.add_array("adapter.alora.invocation_tokens", [7]),
    )
    refused(path, "adapter.alora.invocation_tokens")


def test_a_quantised_gguf_adapter(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "bad.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for side, shape in (("a", (2, 2 * 34)), ("b", (64, 34))):
        data = np.zeros(shape, dtype=np.uint8)
        name = f"blk.0.attn_q.weight.lora_{side}"
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "bad.gguf", "Q8_0", "convert the adapter")


def test_a_model_in_the_place_of_an_adapter(tmp_path: Path) -> None:
    make("llama", tmp_path / "tiny.gguf", n_layer=1)
    refused(tmp_path / "tiny.gguf", "tiny.gguf", "not an adapter")


def test_a_truncated_gguf(tmp_path: Path) -> None:
    raw = gguf(tmp_path / "bad.gguf").read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 30, 5, 0):
        (tmp_path / "bad.gguf").write_bytes(raw[:size])
        refused(tmp_path / "bad.gguf", "bad.gguf")
