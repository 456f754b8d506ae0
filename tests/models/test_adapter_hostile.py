"""Adapters' tensors that nobody vouches for: refused by a sentence naming what is wrong."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.models.adapter_file import open_adapter
from edgeroute.models.adapter_safetensors import MAX_HEADER_BYTES
from edgeroute.tools.synth_adapter import AdapterSpec, make_peft
from tests.models.adapter_hostile_lab import (
    BASE,
    Entries,
    Q,
    begin_of,
    config,
    data_path,
    edit,
    join,
    refused,
    rename,
    split,
)


def test_the_unchanged_adapter_is_fine(peft: Path) -> None:
    assert len(list(open_adapter(peft, BASE).read())) == 4


# names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.layers.0.self_attn.w_proj.lora_A.weight", ["models have not"]),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", ["does not have"]),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", ["no LoRA matrix"]),
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", ["layers 0 to 1"]),
        ("base_model.model.model.layers.9999.self_attn.q_proj.lora_A.weight", ["layer 9999"]),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", ["no LoRA matrix"]),
        ("base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight", ["no LoRA matrix"]),
        ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", ["experts"]),
        ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", ["experts"]),
        ("base_model.model.lm_head.lora_A.weight", ["output head"]),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ["embeddings"]),
        ("base_model.model.lm_head.modules_to_save.weight", ["modules_to_save"]),
        ("base_model.model.lm_head.weight", ["output head"]),
        (f"{Q}.bias", ["is a bias"]),
        (f"{Q}.lora_B.bias", ["is a bias"]),
        (f"{Q}.lora_magnitude_vector.weight", ["DoRA"]),
        (f"{Q}.base_layer.weight", ["base model"]),
        ("base_model.model.model.layers.0.input_layernorm.weight", ["norm"]),
        ("base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight", ["no LoRA"]),
        (f"{Q}.lora_A.other.weight", ["no LoRA matrix"]),
        ("../../etc/passwd", ["no LoRA matrix"]),
        ("\ud800\x00\n" + "x" * 5000, ["no LoRA matrix"]),
        ("", ["no LoRA matrix"]),
    ],
)
def test_a_target_that_cannot_be_adapted(name: str, words: list[str], peft: Path) -> None:
    rename(peft, f"{Q}.lora_A.weight", name)
    refused(peft, "bad: tensor", repr(name)[1:30], *words)


def test_expert_tensors_are_refused_whatever_the_count(peft: Path) -> None:
    """llama.cpp once wrote past a buffer for adapters with more experts than the model."""
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.9.w1"
    rename(peft, f"{Q}.lora_B.weight", f"{stem}.lora_B.weight")
    refused(peft, "experts.9.w1", "single experts")


def test_a_without_b(peft: Path) -> None:
    drop_last(peft, "lora_B")
    refused(peft, "lora_A.weight", "no B matrix")


def test_b_without_a(peft: Path) -> None:
    header, data = split(peft)
    name = f"{Q}.lora_A.weight"
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    join(peft, header, data[:begin] + data[end:])
    refused(peft, f"{Q}.lora_B.weight", "no A matrix")


def drop_last(folder: Path, word: str) -> None:
    header, data = split(folder)
    last = max(
        (name for name in header if name != "__metadata__"), key=lambda n: begin_of(header, n)
    )
    assert word in last
    begin = begin_of(header, last)
    del header[last]
    join(folder, header, data[:begin])


def test_one_matrix_under_two_names(peft: Path) -> None:
    other = "base_model.model.model.layers.1.self_attn.q_proj"
    for side in "AB":
        rename(peft, f"{other}.lora_{side}.weight", f"{Q}.lora_{side}.default.weight")
    refused(peft, "are both the A matrix of blk.0.attn_q")


def test_one_key_twice(peft: Path) -> None:
    header, data = split(peft)
    name = next(iter(header))
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    join(peft, text.encode(), data)
    refused(peft, "twice", name)


# shapes, types, places


def set_entry(folder: Path, **values: object) -> None:
    edit(folder, lambda header: header[f"{Q}.lora_A.weight"].update(values))


def test_wrong_rank_between_a_and_b(peft: Path) -> None:
    edit(peft, lambda header: header[f"{Q}.lora_B.weight"].update(shape=[128, 1]))
    refused(peft, "rank 2", "rank 1", "lora_A", "lora_B")


def test_wrong_rank_in_the_settings(peft: Path) -> None:
    config(peft, r=4)
    refused(peft, "q_proj", "rank 2 in the tensors", "4 in adapter_config.json")
    config(peft, r=2, rank_pattern={"v_proj": 1})
    refused(peft, "v_proj", "rank 2 in the tensors", "1 in adapter_config.json")


@pytest.mark.parametrize("rank", [0, -1, 513, 2**70, True, "8", 2.0, None, [8]])
def test_a_rank_out_of_range(rank: object, peft: Path) -> None:
    config(peft, r=rank)
    refused(peft, "bad: r is", "1 to 512")


def test_tensors_of_rank_0(peft: Path) -> None:
    def change(header: Entries) -> None:
        for name, shape in ((f"{Q}.lora_A.weight", [0, 48]), (f"{Q}.lora_B.weight", [64, 0])):
            header[name]["shape"] = shape

    edit(peft, change)
    refused(peft, "lora_A.weight", "takes 0")
    empty = {
        f"{Q}.lora_{side}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for side, shape in (("A", [0, 48]), ("B", [64, 0]))
    }
    join(peft, empty, b"")
    refused(peft, "rank 0", "1 to 512")


def test_a_rank_above_the_limit(tmp_path: Path) -> None:
    make_peft(tmp_path / "bad", BASE, AdapterSpec(rank=513, targets=("attn_q",)))
    config(tmp_path / "bad", r=512)
    refused(tmp_path / "bad", "rank 513", "1 to 512")


def test_wrong_n_in_and_n_out(peft: Path) -> None:
    edit(peft, lambda header: header[f"{Q}.lora_A.weight"].update(shape=[1, 96]))
    refused(peft, "rank 1", "rank 2")
    for side, what in (("A", "inputs"), ("B", "outputs")):
        make_peft(peft, BASE, AdapterSpec(rank=2, targets=("attn_q", "ffn_down")))
        down = f"base_model.model.model.layers.0.mlp.down_proj.lora_{side}.weight"
        own = f"{Q}.lora_{side}.weight"

        def swap(header: Entries, own: str = own, down: str = down) -> None:
            header[own], header[down] = header[down], header[own]

        edit(peft, swap)
        refused(peft, what, "of the model has", "another base model")


@pytest.mark.parametrize(
    "dtype", ["F64", "I8", "I64", "BOOL", "F8_E4M3", "f32", "", None, 7, ["F32"]]
)
def test_wrong_dtype(dtype: object, peft: Path) -> None:
    set_entry(peft, dtype=dtype)
    refused(peft, f"{Q}.lora_A.weight", "F16, F32 and BF16")


@pytest.mark.parametrize(
    "shape",
    [[96], [2, 48, 1], [], [2, -48], [2, 48.0], [True, 96], [2**62, 2**62], [10**4000, 1], "2,48",
     None, {"a": 1}],
)  # fmt: skip
def test_wrong_shape(shape: object, peft: Path) -> None:
    set_entry(peft, shape=shape)
    refused(peft, f"{Q}.lora_A.weight")


@pytest.mark.parametrize(
    ("offsets", "word"),
    [
        ([0, 383], "has 383 bytes"),
        ([1, 385], "leaves a hole"),
        ([384, 0], "has -384 bytes"),
        ([2**63, 2**63 + 384], "data_offsets contains"),
        ([-384, 0], "data_offsets contains"),
        ([0], "1 numbers"),
        ([0, 384, 0], "3 numbers"),
        (384, "a list of numbers"),
    ],
)
def test_wrong_offsets(offsets: object, word: str, peft: Path) -> None:
    set_entry(peft, data_offsets=offsets)
    refused(peft, f"{Q}.lora_A.weight", word)


def test_tensors_that_overlap(peft: Path) -> None:
    header, _ = split(peft)
    v = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    offsets = header[f"{Q}.lora_A.weight"]["data_offsets"]
    edit(peft, lambda header: header[v].update(data_offsets=offsets))
    refused(peft, "overlaps")


def test_a_hole_between_tensors(peft: Path) -> None:
    header, data = split(peft)
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] > 0:
            entry["data_offsets"] = [at + 4 for at in entry["data_offsets"]]
    join(peft, header, data + b"\0" * 4)
    refused(peft, "leaves a hole")


def test_a_truncated_file(peft: Path) -> None:
    raw = data_path(peft).read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 100, 8, 7, 0):
        data_path(peft).write_bytes(raw[:size])
        refused(peft, "adapter_model.safetensors")


def test_bytes_after_the_last_tensor(peft: Path) -> None:
    with data_path(peft).open("ab") as file:
        file.write(b"#!/bin/sh")
    refused(peft, "9 bytes follow its last tensor")


def test_a_header_that_is_too_long(peft: Path) -> None:
    data_path(peft).write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    refused(peft, "too few")
    path = data_path(peft)
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
    os.truncate(path, MAX_HEADER_BYTES + 100)
    refused(peft, f"2 to {MAX_HEADER_BYTES}")


@pytest.mark.parametrize(
    "text",
    [b"[]", b"{", b"{}}", b'{"a": NaN}', b'{"a": 1}', b'{"a": {}}', b'{"__metadata__": 1}',
     b'{"__metadata__": {"a": 1}}', b"{}", b'{"\xff": 1}', b'{"a":' * 100_000, b"  {}",
     b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_header_that_is_no_header(text: bytes, peft: Path) -> None:
    join(peft, text, b"")
    refused(peft)


# numbers


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_nan_and_infinity(kind: Any, value: float, side: str, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    make_peft(folder, BASE, AdapterSpec(rank=2, targets=("attn_q",), kind=kind))
    header, data = split(folder)
    begin = begin_of(header, f"{Q}.lora_{side}.weight")
    patch = {
        "F32": struct.pack("<f", value),
        "F16": struct.pack("<e", value),
        "BF16": struct.pack("<f", value)[2:],
    }[kind]
    at = begin + 5 * len(patch)
    join(folder, header, data[:at] + patch + data[at + len(patch) :])
    place = "row 0, column 5" if side == "A" else "row 2, column 1"
    refused(folder, f"{Q}.lora_{side}.weight", place, "not a number to compute with")


def test_a_signalling_nan(tmp_path: Path) -> None:
    """The processor reports it when it is converted, as a warning of numpy's."""
    for kind, patch in (("F32", b"\x01\x00\x80\x7f"), ("F16", b"\x01\x7c"), ("BF16", b"\x81\x7f")):
        folder = tmp_path / kind
        make_peft(folder, BASE, AdapterSpec(rank=2, targets=("attn_q",), kind=kind))
        header, data = split(folder)
        join(folder, header, patch + data[len(patch) :])
        refused(folder, "row 0, column 0", "nan")


@pytest.mark.parametrize("value", [65520.0, -1e9, 3e38])
def test_numbers_beyond_f16(value: float, peft: Path) -> None:
    header, data = split(peft)
    join(peft, header, struct.pack("<f", value) + data[4:])
    refused(peft, f"{value:g}", "beyond the 65504 of F16")
    join(peft, header, struct.pack("<f", 65519.0) + data[4:])
    assert sum(1 for _ in open_adapter(peft, BASE).read()) == 4
