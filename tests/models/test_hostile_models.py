"""Well-formed GGUF with hostile contents: hyperparameters and tensors that do not agree.

Every file is loaded and run in a process of its own. It may work or be refused with a
sentence; it may not crash, hang or take memory that the file does not justify.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgeroute.tools.synth import make

RUNNER = """
import json, sys
from pathlib import Path
import edgeroute
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps({"name": path.name}), flush=True)
    error, message = "", ""
    try:
        with edgeroute.Runtime(path, n_ctx=256, threads=1, memory="2GiB") as runtime:
            runtime.generate(prompt_ids=[5, 6, 7], max_tokens=3)
            runtime.generate(prompt_ids=[8] * 70, max_tokens=2)
    except edgeroute.EdgerouteError as caught:
        error, message = type(caught).__name__, str(caught)
    print(json.dumps({"name": path.name, "error": error, "message": message}), flush=True)
"""

U32_KEYS = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "context_length", "attention.sliding_window",
    "rope.scaling.original_context_length", "attention.sliding_window_pattern",
)  # fmt: skip
U32_VALUES = (0, 1, 2, 3, 5, 7, 63, 255, 4096, 65536, 2**31 - 1, 2**31, 2**32 - 1)
F32_KEYS = ("rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor",
            "rope.freq_base_swa", "rope.scaling.yarn_beta_fast")  # fmt: skip
F32_VALUES = (0.0, -1.0, 1e-40, 1e38, float("inf"), float("nan"))
UINT32, FLOAT32 = 4, 6


def patch_key(data: bytes, key: str, kind: int, value: bytes) -> bytes | None:
    """Replace a scalar's value in a header; None where the file has no such key."""
    name = key.encode()
    at = data.find(struct.pack("<Q", len(name)) + name)
    if at < 0:
        return None
    at += 8 + len(name)
    if struct.unpack_from("<I", data, at)[0] != kind:
        return None
    return data[: at + 4] + value + data[at + 8 :]


def patch_type(data: bytes, tensor: str, new_type: int) -> bytes:
    """Replace a tensor's type number; its bytes stay, so most types no longer fit."""
    name = tensor.encode()
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    n_dims = struct.unpack_from("<I", data, at)[0]
    at += 4 + 8 * n_dims
    return data[:at] + struct.pack("<I", new_type) + data[at + 4 :]


def variants(arch: str, data: bytes) -> dict[str, bytes]:
    found: dict[str, bytes | None] = {}
    for key in U32_KEYS:
        for value in U32_VALUES:
            patched = patch_key(data, f"{arch}.{key}", UINT32, struct.pack("<I", value))
            found[f"{key}={value}"] = patched
    for key in F32_KEYS:
        for number in F32_VALUES:
            patched = patch_key(data, f"{arch}.{key}", FLOAT32, struct.pack("<f", number))
            found[f"{key}={number}"] = patched
    for kind in (24, 25, 26, 30, 9, 15):
        for tensor in ("blk.0.attn_q.weight", "token_embd.weight", "blk.1.ffn_norm.weight"):
            found[f"{tensor}-type={kind}"] = patch_type(data, tensor, kind)
    return {name: patched for name, patched in found.items() if patched is not None}


@pytest.mark.parametrize("spec", ["llama", "llama-yarn", "qwen2", "qwen3", "gemma3"])
def test_contradicting_headers_are_refused_or_harmless(spec: str, tmp_path: Path) -> None:
    good = tmp_path / "good.gguf"
    make(spec, good)
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "000-good.gguf").write_bytes(good.read_bytes())
    for name, data in variants(spec.split("-")[0], good.read_bytes()).items():
        (folder / f"{name}.gguf").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder)], capture_output=True, text=True, timeout=110
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died on {lines[-1]['name']}: {done.stderr[-2000:]}"
    results = [line for line in lines if "error" in line]
    assert len(results) == len(list(folder.iterdir())) > 60
    by_name = {line["name"]: line for line in results}
    assert by_name["000-good.gguf"]["error"] == ""
    for line in results:
        assert not line["error"] or len(line["message"]) > 20, line
    assert sum(bool(line["error"]) for line in results) > len(results) / 2


def test_types_that_ggml_cannot_multiply_are_refused(tmp_path: Path) -> None:
    """ggml would call a null pointer: it checks nothing here."""
    good = tmp_path / "good.gguf"
    make("llama", good)
    folder = tmp_path / "files"
    folder.mkdir()
    data = patch_type(good.read_bytes(), "blk.0.attn_q.weight", 26)  # I32, as wide as F32
    (folder / "i32.gguf").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["error"] == "ModelFileError" and "I32" in line["message"]
