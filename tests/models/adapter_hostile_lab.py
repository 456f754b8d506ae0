"""An adapter in PEFT's form to spoil, and what spoils it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeroute.models.adapter_file import BaseShapes, open_adapter
from edgeroute.runtime.errors import AdapterFileError

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


def begin_of(header: Entries, name: str) -> int:
    begin: int = header[name]["data_offsets"][0]
    return begin
