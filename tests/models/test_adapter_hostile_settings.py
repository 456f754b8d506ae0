"""Adapters' settings, files and names that nobody vouches for; and damage of every kind."""

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeroute.models.adapter_config import MAX_CONFIG_BYTES
from edgeroute.models.adapter_file import open_adapter
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf, make_peft
from tests.models.adapter_hostile_lab import BASE, config, data_path, join, refused

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
