"""Hostile mixtures of experts: counts, widths and types that disagree, and scores without order.

As in test_hostile_models, whose helpers this uses: each file works or is refused with a
sentence, in a process of its own.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.synth import make
from tests.models import test_hostile_models as helpers

COUNTS = ("expert_count", "expert_used_count", "feed_forward_length",
          "expert_feed_forward_length", "expert_shared_feed_forward_length")  # fmt: skip
VALUES = (0, 1, 2, 3, 5, 11, 17, 255, 1024, 1025, 65536, 2**31 - 1, 2**31, 2**32 - 1)
TYPES = (24, 25, 26, 30, 9, 15)
TENSORS = ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight")


def run_all(folder: Path) -> dict[str, dict[str, str]]:
    """Load and run every file of a folder; what became of each, by name."""
    done = subprocess.run(
        [sys.executable, "-c", helpers.RUNNER, str(folder)],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died on {lines[-1]['name']}: {done.stderr[-2000:]}"
    return {line["name"]: line for line in lines if "error" in line}


@pytest.mark.parametrize("spec", ["llama-moe", "qwen2moe", "qwen3moe", "olmoe"])
def test_contradicting_counts_are_refused_or_harmless(spec: str, tmp_path: Path) -> None:
    good = tmp_path / "good.gguf"
    make(spec, good)
    folder, data = tmp_path / "files", good.read_bytes()
    folder.mkdir()
    (folder / "000-good.gguf").write_bytes(data)
    for key in COUNTS:
        for value in VALUES:
            patched = helpers.patch_key(
                data, f"{spec.split('-')[0]}.{key}", helpers.UINT32, struct.pack("<I", value)
            )
            if patched is not None:
                (folder / f"{key}={value}.gguf").write_bytes(patched)
    for tensor in TENSORS:
        for kind in TYPES:
            (folder / f"{tensor}-{kind}.gguf").write_bytes(helpers.patch_type(data, tensor, kind))
    results = run_all(folder)
    assert len(results) == len(list(folder.iterdir())) > 50
    assert results["000-good.gguf"]["error"] == ""
    for line in results.values():
        assert not line["error"] or len(line["message"]) > 20, line
    for value in (0, 17, 2**31, 2**32 - 1):
        assert results[f"expert_used_count={value}.gguf"]["error"] == "ModelFileError"


def poison(path: Path, good: bytes, name: str, at: slice, value: float) -> None:
    """Write a copy of a file with some numbers of an F32 tensor replaced."""
    path.write_bytes(good)
    with GGUFFile.open(path) as file:
        offset, nbytes = file.tensors[name].offset, file.tensors[name].nbytes
    data = bytearray(good)
    numbers = np.frombuffer(data, np.float32, nbytes // 4, offset)
    numbers[at] = value
    path.write_bytes(data)


@pytest.mark.parametrize("spec", ["llama-moe", "qwen2moe", "qwen3moe", "olmoe"])
def test_scores_that_are_no_numbers_end_in_no_crash(spec: str, tmp_path: Path) -> None:
    """Sorting scores of which some are NaN is undefined in C++; the engine never does."""
    good = tmp_path / "good.gguf"
    make(spec, good)
    folder, data = tmp_path / "files", good.read_bytes()
    folder.mkdir()
    router, width = "blk.0.ffn_gate_inp.weight", 256
    for what, value in (("nan", float("nan")), ("inf", float("inf")), ("big", 3e38)):
        poison(folder / f"{what}-all.gguf", data, router, slice(None), value)
        poison(folder / f"{what}-one.gguf", data, router, slice(width, 2 * width), value)
        poison(folder / f"{what}-norm.gguf", data, "blk.0.ffn_norm.weight", slice(3, 4), value)
    if spec == "qwen2moe":
        gate = "blk.0.ffn_gate_inp_shexp.weight"
        poison(folder / "shared-gate-zero.gguf", data, gate, slice(None), 0.0)
    results = run_all(folder)
    assert len(results) == len(list(folder.iterdir())) >= 9
