"""`edgeroute convert pack`: what it writes, and what it leaves behind when it fails: nothing."""

import errno
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFWriter

from edgeroute.cli import cli
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.load_plan import Extent, LoadJob
from edgeroute.offload.sidecar import Sidecar, page_bytes, read_sidecar, sidecar_path
from edgeroute.offload.transfer import Transfer
from edgeroute.runtime.errors import CapacityError, ModelFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.convert import pack as pack_module
from edgeroute.tools.convert.pack import pack

N_EXPERT = 16


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "moe.gguf"
    synth.make("olmoe", path, weight_type="Q4_0", n_layer=2)
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path))


def opened(model: Path) -> Sidecar:
    with (
        DiskFile.open(sidecar_path(model)) as disk,
        DiskFile.open(model) as base,
        GGUFFile.open(model) as file,
    ):
        return read_sidecar(disk, base, file)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pages_follow_each_other_without_a_gap(model: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = pack(model, progress=lambda *step: steps.append(step))
    header = opened(model).header
    assert report.path == sidecar_path(model) and contents(model.parent) == [
        "moe.gguf", "moe.gguf.pages",
    ]  # fmt: skip
    assert (report.n_layer, report.n_expert) == (2, N_EXPERT)
    assert report.n_bytes == report.path.stat().st_size == header.size_bytes
    assert list(header.pages) == list(range(2 * N_EXPERT))
    offsets = [*header.pages.values(), header.size_bytes]
    lengths = {b - a for a, b in pairwise(offsets)}
    assert lengths == set(report.page_bytes) == {page_bytes(header.layers[0])}
    assert steps[-1] == (report.n_bytes, report.n_bytes) and len(steps) == 2 * N_EXPERT
    assert steps == sorted(steps)


class Bytes:
    """A sink that keeps the parts."""

    whole_parts = True

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def destination(self, part: int) -> memoryview | None:
        return None

    def write(self, part: int, at: int, data: memoryview) -> None:
        self.parts[part] = bytes(data)


def test_a_page_read_through_the_sidecar_is_one_read_and_the_same_bytes(model: Path) -> None:
    pack(model)
    pages = opened(model)
    names = [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    page = N_EXPERT + 3
    there, beside = Bytes(), Bytes()
    with GGUFFile.open(model) as file:
        infos = [file.tensors[name] for name in names]
    apart = [
        Extent(0, info.offset + 3 * (info.nbytes // N_EXPERT), info.nbytes // N_EXPERT, part)
        for part, info in enumerate(infos)
    ]
    files = [DiskFile.open(model), DiskFile.open(sidecar_path(model))]
    with Transfer(files, 2, 1 << 20, 8 << 20) as transfer:
        assert transfer.wait(transfer.load([LoadJob(id=page, extents=apart, sink=there)]))
        n_before = transfer.stats.n_reads
        together = pages.extents(1, page, names)
        assert transfer.wait(transfer.load([LoadJob(id=page, extents=together, sink=beside)]))
        assert (n_before, transfer.stats.n_reads) == (3, 4)
    assert there.parts == beside.parts and len(there.parts) == 3


def test_an_order_puts_pages_first(model: Path) -> None:
    pack(model, order=[9, 2, 31])
    pages = list(opened(model).header.pages)
    assert pages[:5] == [9, 2, 31, 0, 1] and sorted(pages) == list(range(2 * N_EXPERT))


@pytest.mark.parametrize(("order", "message"), [([1, 1], "repeats"), ([0, 99], r"such as \[99\]")])
def test_a_strange_order_is_refused(model: Path, order: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pack(model, order=order)
    assert contents(model.parent) == ["moe.gguf"]


def test_a_sidecar_is_replaced_only_on_demand(model: Path) -> None:
    pack(model)
    before = sidecar_path(model).read_bytes()
    with pytest.raises(UsageError, match="--force"):
        pack(model)
    pack(model, order=[5], replace=True)
    assert sidecar_path(model).read_bytes() != before


def test_layers_may_have_different_types(tmp_path: Path) -> None:
    path = tmp_path / "mixed.gguf"
    writer = GGUFWriter(path, "test")
    rng = np.random.default_rng(0)
    for il, kind in ((1, np.float16), (3, np.float32)):
        for part in ("gate", "up", "down"):
            data = rng.standard_normal((5, 6, 32)).astype(kind)
            writer.add_tensor(f"blk.{il}.ffn_{part}_exps.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = pack(path)
    assert report.n_layer == 2 and len(report.page_bytes) == 1  # both padded to three blocks
    header = opened(path).header
    assert [part.nbytes for part in header.layers[3]] == [768] * 3
    assert [part.nbytes for part in header.layers[1]] == [384] * 3


def test_a_dense_model_is_refused(tiny_path: Path) -> None:
    with pytest.raises(UsageError, match="has no experts, so there is nothing to pack"):
        pack(tiny_path)
    with pytest.raises(ModelFileError, match="cannot open"):
        pack(tiny_path.with_name("missing.gguf"))


def test_too_little_room_is_said_before_the_first_byte(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(CapacityError, match=r"takes .* has 100 B free; free "):
        pack(model)
    assert contents(model.parent) == ["moe.gguf"]


def interrupt(step: int) -> None:
    raise KeyboardInterrupt


def fill(step: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse(step: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


ENDINGS = {
    "interrupted": (interrupt, KeyboardInterrupt, None),
    "full": (fill, CapacityError, "became full while moe.gguf.pages was written; nothing"),
    "failing": (refuse, ModelFileError, "Input/output error; nothing of it was kept"),
}


@pytest.mark.parametrize("had", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("name", ENDINGS)
def test_whatever_ends_it_early_leaves_what_was_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, had: bool
) -> None:
    if had:
        pack(model)
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    happen, error, message = ENDINGS[name]
    monkeypatch.setattr(os, "fsync", happen)
    with pytest.raises(error, match=message):
        pack(model, order=[3], replace=True)
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before


def test_a_model_that_changes_meanwhile_is_an_error(model: Path) -> None:
    os.utime(model, ns=(0, 10**18))

    def change(n_done: int, n_total: int) -> None:
        with model.open("r+b") as file:
            file.write(b"GGUF")

    with pytest.raises(ModelFileError, match="written to since it was opened"):
        pack(model, progress=change)
    assert contents(model.parent) == ["moe.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace an open file")
def test_a_model_that_is_replaced_meanwhile_is_an_error(model: Path) -> None:
    other = model.with_name("other.gguf")
    shutil.copy(model, other)

    def replace(n_done: int, n_total: int) -> None:
        if n_done == n_total:
            os.replace(other, model)

    with pytest.raises(ModelFileError, match="was changed while it was packed"):
        pack(model, progress=replace)
    assert contents(model.parent) == ["moe.gguf"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_disk_that_is_really_full(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opening(path: Path, mode: str = "r") -> object:
        return real(Path("/dev/full") if mode == "wb" else path, mode)

    monkeypatch.setattr(Path, "open", opening)
    with pytest.raises(CapacityError, match="became full"):
        pack(model)
    assert contents(model.parent) == ["moe.gguf"]


def test_the_command(model: Path, tmp_path: Path) -> None:
    order = tmp_path / "order.json"
    order.write_text("[4, 0]")
    done = CliRunner().invoke(cli, ["convert", "pack", str(model), "--order", str(order), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["path"] == str(sidecar_path(model)) and found["n_expert"] == N_EXPERT
    assert "of" in done.stderr and list(opened(model).header.pages)[:2] == [4, 0]
    again = CliRunner().invoke(cli, ["convert", "pack", str(model)])
    assert again.exit_code == 2 and "--force" in again.stderr
    forced = CliRunner().invoke(cli, ["convert", "pack", str(model), "--force"])
    assert forced.exit_code == 0 and "2 layers of 16 experts" in forced.stdout
    for text in ("[1.5]", "{}", "[true]", "nonsense"):
        order.write_text(text)
        bad = CliRunner().invoke(cli, ["convert", "pack", str(model), "--order", str(order)])
        assert bad.exit_code == 2 and str(order) in bad.stderr


def test_the_sync_interval_does_not_change_the_file(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(model)
    before = sidecar_path(model).read_bytes()
    monkeypatch.setattr(pack_module, "_SYNC_BYTES", 1)
    pack(model, replace=True)
    assert sidecar_path(model).read_bytes() == before
