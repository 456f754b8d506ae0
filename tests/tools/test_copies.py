"""`edgeroute convert copies`: ggml's own numbers, types that fit, and nothing else believed."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from edgeroute.offload.disk import DiskFile, read_range
from edgeroute.offload.sidecar import COPIES, PAGES, padded, read_sidecar, sidecar_path
from edgeroute.runtime.errors import ComputeError, ModelFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.gguf_types import GGMLType, TensorInfo
from edgeroute.tools import synth
from edgeroute.tools.convert.copies import copy_type, write_copies
from edgeroute.tools.convert.pack import pack

SPEC = replace(synth.ARCHITECTURES["olmoe"], n_layer=2)


def info(kind: str, n_in: int, n_out: int = 64, n_expert: int = 4) -> TensorInfo:
    ne = (n_in, n_out, n_expert)
    return TensorInfo(name="t", type=GGMLType[kind], ne=ne, offset=0,
                      nbytes=GGMLType[kind].nbytes(ne))  # fmt: skip


@pytest.mark.parametrize(
    ("own", "n_in", "copy"),
    [
        ("F32", 256, "Q8_0"), ("F16", 256, "Q8_0"), ("Q8_0", 256, "Q4_K"), ("Q8_0", 96, "Q4_0"),
        ("Q6_K", 256, "Q3_K"), ("Q4_K", 2048, "Q2_K"), ("Q5_K", 768, "Q2_K"),
    ],
)  # fmt: skip
def test_the_best_type_of_little_more_than_half_is_taken(own: str, n_in: int, copy: str) -> None:
    assert copy_type(info(own, n_in), None) is GGMLType[copy]


@pytest.mark.parametrize(
    ("own", "n_in", "asked", "message"),
    [
        ("Q4_0", 96, None, "no type has copies of t, Q4_0 in rows of 96.*60%.*--type"),
        ("Q8_0", 96, "Q4_K", "Q4_K has no copies of t, Q8_0 in rows of 96"),
        ("Q4_K", 256, "Q4_K", "Q4_K has no copies"),
        ("Q4_K", 256, "Q8_0", "Q8_0 has no copies"),
    ],
)
def test_a_type_that_saves_nothing_is_refused(
    own: str, n_in: int, asked: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        copy_type(info(own, n_in), None if asked is None else GGMLType[asked])


@pytest.mark.parametrize("own", ["F32", "Q8_0"])
@pytest.mark.parametrize("copy", ["Q4_0", "Q8_0"])
def test_copies_are_the_numbers_of_another_quantiser(own: str, copy: str, tmp_path: Path) -> None:
    if own == copy:
        pytest.skip("no smaller")
    path = tmp_path / "moe.gguf"
    synth.write(replace(SPEC, weight_type=own), path)
    report = write_copies(path, kind=GGMLType[copy])
    beside = sidecar_path(path, COPIES)
    assert report.pack.path == beside and report.pack.n_bytes == beside.stat().st_size
    with DiskFile.open(beside) as disk, DiskFile.open(path) as model, GGUFFile.open(path) as file:
        sidecar = read_sidecar(disk, model, file, COPIES)
        for page in sidecar.header.pages:
            il, expert = divmod(page, sidecar.header.n_expert)
            for part in sidecar.header.layers[il]:
                one = file.tensors[part.tensor]
                view = file.view(one)
                rows = np.frombuffer(view, np.uint8).reshape(one.ne[2], one.ne[1], -1)[expert]
                values = quants.dequantize(rows.copy(), GGMLQuantizationType(int(one.type)))
                wanted = quants.quantize(values.reshape(one.ne[1], -1), GGMLQuantizationType[copy])
                [extent] = sidecar.extents(0, page, [part.tensor])
                assert bytes(read_range(disk, extent.offset, extent.nbytes)) == wanted.tobytes()
                del rows
                view.release()


def test_copies_are_replaced_only_on_demand_and_pages_stay(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    synth.write(SPEC, path)
    pages = pack(path).path.read_bytes()
    write_copies(path, kind=GGMLType.Q8_0)
    with pytest.raises(UsageError, match=r"copies exists; replace it with --force"):
        write_copies(path)
    before = sidecar_path(path, COPIES).stat().st_size
    write_copies(path, kind=GGMLType.Q4_0, replace=True)
    assert sidecar_path(path, COPIES).stat().st_size < before
    assert sidecar_path(path, PAGES).read_bytes() == pages


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    writer = GGUFWriter(path, "test")
    for part in ("gate", "up", "down"):
        data = np.ones((4, 8, 32), np.float32)
        data[2, 3, 4] = np.nan
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ComputeError, match="not finite, and Q8_0"):
        write_copies(path)
    assert [each.name for each in tmp_path.iterdir()] == ["nan.gguf"]


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change the header of a sidecar; the pages stay where they are."""
    with path.open("r+b") as file:
        magic, version, length = struct.unpack("<8sII", file.read(16))
        content = json.loads(file.read(length))
        change(content)
        text = json.dumps(content, separators=(",", ":")).encode()
        head = struct.pack("<8sII", magic, version, len(text)) + text
        assert len(head) <= padded(16 + length)
        file.seek(0)
        file.write(head.ljust(padded(16 + length), b"\0"))


def part(i: int, value: object) -> Callable[[Any], object]:
    return lambda content: content["layers"][1]["parts"][0].__setitem__(i, value)


HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "another type of that length": (part(1, "IQ4_NL"), "or less of another type"),
    "no type": (part(1, "Q9_X"), "or less of another type"),
    "integers": (part(1, "I8"), "or less of another type"),
    "blocks that do not fit": (part(1, "Q2_K"), "or less of another type"),
    "shorter": (part(2, 64), "are 64 bytes of Q4_0"),
    "of another model": (lambda c: c.update(fingerprint="0"), "another model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_copies_are_refused_with_the_command(name: str, tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    synth.write(SPEC, path)
    write_copies(path, kind=GGMLType.Q4_0)
    change, message = HOSTILE[name]
    rewrite(sidecar_path(path, COPIES), change)
    with pytest.raises(ModelFileError, match=message) as caught:
        opened(path)
    assert "`edgeroute convert copies --force`" in str(caught.value)


def opened(path: Path) -> None:
    with (
        DiskFile.open(sidecar_path(path, COPIES)) as disk, DiskFile.open(path) as model,
        GGUFFile.open(path) as file,
    ):  # fmt: skip
        read_sidecar(disk, model, file, COPIES)


def test_pages_are_no_copies(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    synth.write(SPEC, path)
    pack(path).path.rename(sidecar_path(path, COPIES))
    with pytest.raises(ModelFileError, match=r"it starts with b'EDGEPAGE', not b'EDGECOPY'"):
        opened(path)
