"""A model that is deep but tiny, and text to calibrate it on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeroute.tools.synth import write
from edgeroute.tools.synth_spec import ARCHITECTURES


def write_deep(folder: Path, arch: str = "llama", **changes: Any) -> Path:
    """Write a model of 64 values a token, with `changes` of its specification."""
    path = folder / "deep.gguf"
    small = {"n_embd": 64, "n_ff": 128, "n_head": 2, "n_head_kv": 1, "n_embd_head": 32}
    write(replace(ARCHITECTURES[arch], **small | changes), path)
    return path


def write_text(folder: Path, n_lines: int = 400) -> Path:
    """Write lines that begin alike."""
    path = folder / "data.txt"
    path.write_text("".join(f"line {i}: {i * i} is its square.\n" for i in range(n_lines)))
    return path
