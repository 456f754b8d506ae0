"""Adapters that nobody vouches for: each way to be wrong is refused by a sentence naming it."""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.models.adapter_config import MAX_CONFIG_BYTES
from edgeroute.models.adapter_file import BaseShapes, open_adapter
from edgeroute.models.adapter_safetensors import MAX_HEADER_BYTES
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf, make_peft

LINEARS = {"attn_q": (48, 64), "attn_v": (48, 32), "ffn_down": (80, 48), "ffn_gate_inp": (48, 4)}
BASE = BaseShapes(
    arch="llama",
    n_head=4,
    n_head_kv=2,
    n_layer=2,
    n_expert=0,
    linears={f"blk.{il}.{leaf}": ne for il in range(2) for leaf, ne in LINEARS.items()},
)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Entries = dict[str, Any]


def refused(path: Path, *words: str) -> None:
    """Opening, or else reading, must fail with one line that has all these words."""
    with pytest.raises(AdapterFileError) as caught:
        for _ in open_adapter(path, BASE).read():
            pass
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and 30 < len(message) < 700


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    folder = tmp_path / "bad"
    make_peft(folder, BASE, AdapterSpec(rank=2, targets=("attn_q", "attn_v")))
    return folder


def data_path(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def split(folder: Path) -> tuple[Entries, bytes]:
    raw = data_path(folder).read_bytes()
    n_bytes = struct.unpack_from("<Q", raw)[0]
    return json.loads(raw[8 : 8 + n_bytes]), raw[8 + n_bytes :]


def join(folder: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data_path(folder).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(folder: Path, change: Callable[[Entries], None]) -> None:
    header, data = split(folder)
    change(header)
    join(folder, header, data)


def rename(folder: Path, old: str, new: str) -> None:
    def change(header: Entries) -> None:
        header[new] = header.pop(old)

    edit(folder, change)


def config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def begin_of(header: Entries, name: str) -> int:
    begin: int = header[name]["data_offsets"][0]
    return begin


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


# settings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [7]),
        ("invocation_string", "<go>"),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("init_lora_weights", "pissa_niter_16"),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("rank_pattern", {"(a+)+$": 2}),
        ("rank_pattern", {".*q_proj": 2}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", [2]),
        ("alpha_pattern", {"q_proj": "16"}),
        ("alpha_pattern", {"q_proj": 0}),
        ("lora_alpha", 0),
        ("lora_alpha", 1e7),
        ("lora_alpha", 10**400),
        ("lora_alpha", True),
        ("lora_alpha", None),
    ],
)
def test_a_setting_that_cannot_be_honoured(key: str, value: object, peft: Path) -> None:
    config(peft, **{key: value})
    refused(peft, "bad: ", key)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_alpha_that_is_not_finite(alpha: str, peft: Path) -> None:
    text = f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {alpha}}}'
    (peft / "adapter_config.json").write_text(text)
    refused(peft, "bad")


def test_tensors_that_the_settings_do_not_name(peft: Path) -> None:
    config(peft, target_modules=["v_proj"])
    refused(peft, "q_proj", "target_modules")


def test_targets_without_tensors(peft: Path) -> None:
    config(peft, target_modules=["q_proj", "v_proj", "down_proj"])
    refused(peft, "'down_proj'", "incomplete")
    config(peft, target_modules=["q_proj", "v_proj", "c_attn"])  # which no llama has
    assert len(open_adapter(peft, BASE).tensors) == 4


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{'r': 1}", b"\xff\xfe{}", b"\x80\x04K\x01.", b'{"r": 1, "r": 2}',
     b"[" * 200_000, b'{"r":' * 50_000, b"{" + b" " * MAX_CONFIG_BYTES + b"}",
     b'{"r": ' + b"1" * 100_000 + b"}"],
)  # fmt: skip
def test_settings_that_are_no_json_object(text: bytes, peft: Path) -> None:
    (peft / "adapter_config.json").write_bytes(text)
    refused(peft, "adapter_config.json")


def test_missing_files(peft: Path) -> None:
    (peft / "adapter_config.json").rename(peft / "aside")
    refused(peft, "adapter_config.json", "No such file")
    (peft / "aside").rename(peft / "adapter_config.json")
    data_path(peft).unlink()
    refused(peft, "adapter_model.safetensors", "No such file")
    refused(peft.parent / "nothing.gguf", "nothing.gguf")
    refused(peft.parent / "nul\0.gguf", "null")


def test_an_adapter_without_tensors(peft: Path) -> None:
    join(peft, {"__metadata__": {"format": "pt"}}, b"")
    refused(peft, "adapts no weight at all")


# files and names


def test_pickles_are_not_read(peft: Path) -> None:
    data_path(peft).rename(peft / "adapter_model.bin")
    refused(peft, "adapter_model.bin", "pickle", "save_pretrained")
    refused(peft / "adapter_model.bin", "pickle")
    (peft / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    refused(peft, "pickle", "save_pretrained")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pipe_or_device_in_the_place_of_a_file(name: str, peft: Path) -> None:
    (peft / name).unlink()
    os.mkfifo(peft / name)
    refused(peft, name, "not a regular file")
    (peft / name).unlink()
    (peft / name).symlink_to("/dev/zero")
    refused(peft, name, "not a regular file")
    (peft / name).unlink()
    (peft / name).mkdir()
    refused(peft, name, "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_gguf_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bad.gguf")
    refused(tmp_path / "bad.gguf", "bad.gguf", "not a regular file")


@pytest.mark.parametrize(
    "name", ["a b", "a;rm", "ä", "a\nb", "$HOME", "x" * 65, ".hidden", "auto", "none", "a:b", "-"]
)
def test_names_that_are_unsafe_elsewhere(name: str, tmp_path: Path) -> None:
    try:
        make_peft(tmp_path / name, BASE, AdapterSpec(rank=2, targets=("attn_q",)))
    except OSError:
        pytest.skip("the file system does not take this name")
    if name == "-":
        assert open_adapter(tmp_path / name, BASE).name == "-"
    else:
        refused(tmp_path / name, "rename it")


def test_names_that_escape_the_folder(peft: Path) -> None:
    """A path may point anywhere, but its name is its last part alone."""
    assert open_adapter(peft / ".." / "bad", BASE).name == "bad"
    assert open_adapter(peft.parent / "bad/../bad/", BASE).name == "bad"
    refused(Path(os.sep), "rename it")


def test_other_files_are_no_adapters(peft: Path) -> None:
    (peft / "notes.txt").write_text("x")
    refused(peft / "notes.txt", "is no adapter")


# everything at once


def mutations(raw: bytes, end: int, n: int, seed: int) -> Iterator[bytes]:
    """Flip, replace, cut out and repeat bytes before `end`; sometimes truncate."""
    rng = random.Random(seed)
    for _ in range(n):
        data, limit = bytearray(raw), end
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            at = rng.randrange(limit)
            match rng.randrange(6):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice(b'0123456789"{}[],:-.eE\x00\xff')
                case 2:
                    del data[at : at + rng.randrange(1, 9)]
                case 3:
                    data[at:at] = data[at : at + rng.randrange(1, 40)]
                case 4:
                    data[at : at + 8] = struct.pack(
                        "<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
                    )
                case _:
                    del data[rng.randrange(len(data)) :]
            limit = min(limit, len(data))
            if not limit:
                break
        yield bytes(data)


def try_one(path: Path) -> bool:
    """Whether an adapter can be read; only its own error may say that it cannot."""
    try:
        adapter = open_adapter(path, BASE)
        n_bytes = 0
        for tensor, a, b in adapter.read():
            assert BASE.linears[tensor.name] == (tensor.n_in, tensor.n_out)
            assert a.shape == (tensor.rank, tensor.n_in) and b.shape == (tensor.n_out, tensor.rank)
            assert np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(tensor.scale)
            n_bytes += a.size + b.size
        assert n_bytes * 2 <= adapter.n_bytes <= adapter.data_path.stat().st_size
    except AdapterFileError as error:
        assert len(str(error)) > 20
        return False
    return True


@pytest.mark.parametrize("what", ["header", "numbers", "settings", "gguf"])
def test_damaged_files_are_refused_or_harmless(what: str, peft: Path, tmp_path: Path) -> None:
    path, file = peft, data_path(peft)
    raw = file.read_bytes()
    end = 8 + struct.unpack_from("<Q", raw)[0]
    if what == "numbers":
        end = len(raw)
    elif what == "settings":
        file = peft / "adapter_config.json"
        raw = file.read_bytes()
        end = len(raw)
    elif what == "gguf":
        path = file = tmp_path / "fuzzed.gguf"
        make_gguf(file, BASE, AdapterSpec(rank=2, targets=("attn_q",)))
        raw = file.read_bytes()
        end = raw.index(b"blk.1.attn_q.weight.lora_b") + 60
    assert try_one(path)
    results = []
    for data in mutations(raw, end, 700, seed=len(what)):
        file.write_bytes(data)
        results.append(try_one(path))
    assert results.count(False) > len(results) // 20
