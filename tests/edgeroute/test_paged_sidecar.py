"""Experts read from a sidecar: the bits of those read from the model, or of resident ones."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute.offload.disk import Disk, DiskFile
from edgeroute.offload.expert_pool import in_sidecar
from edgeroute.offload.sidecar import read_sidecar, sidecar_path
from edgeroute.runtime import slots as slots_module
from edgeroute.runtime.errors import ModelFileError
from edgeroute.tools import synth
from edgeroute.tools.convert.pack import pack
from tests.edgeroute import paged_lab as lab
from tests.edgeroute.paged_lab import EVERYTHING, LESS, PREFILL, SINGLE, equal
from tests.offload.faulty_disk import FaultyDisk

MOE = [name for name, spec in synth.ARCHITECTURES.items() if spec.n_expert]
IN_PLACE = replace(lab.SMALL, n_layer=3, n_ff_exp=256, n_embd=256)
"""Parts of whole blocks, so that those of a page follow each other without a gap."""


@contextlib.contextmanager
def packed(
    opened: Any, *, faults: Callable[[Disk], Disk] = lambda disk: disk, **params: Any
) -> Iterator[Any]:
    """Open a lab's model paged from its sidecar."""
    direct = params.get("direct", True)

    def instead(model: Disk) -> Disk:
        model.close()
        return faults(DiskFile.open(sidecar_path(opened.file.path), direct=direct))

    with (
        DiskFile.open(sidecar_path(opened.file.path)) as disk,
        DiskFile.open(opened.file.path) as model,
    ):
        sidecar = read_sidecar(disk, model, opened.file)
    plain = opened.pools
    opened.pools = in_sidecar(plain, sidecar)
    try:
        with opened.paged(wrap=instead, **params) as paged:
            yield paged
    finally:
        opened.pools = plain


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@contextlib.contextmanager
def made(spec: synth.SynthSpec, path: Path, order: list[int] | None = None) -> Iterator[Any]:
    """Write a model and its sidecar, and open a lab."""
    synth.write(spec, path)
    pack(path, order=order or [])
    with contextlib.closing(lab.Lab(path)) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with made(lab.SMALL, tmp_path_factory.mktemp("sidecar") / "small.gguf") as opened:
        yield opened


@pytest.fixture(scope="module")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Its slots must be made with IN_PLACE_MIN_BYTES at 1."""
    with made(IN_PLACE, tmp_path_factory.mktemp("sidecar") / "place.gguf") as opened:
        yield opened


def check_bytes(paged: Any) -> None:
    """What the books of pages and the I/O threads say of bytes is the same."""
    counts, moved = paged.counts(), paged.transfer.stats
    page_bytes = {pool.plan.page_bytes for pool in paged.store.pools}
    if len(page_bytes) == 1:
        assert counts.demand_bytes == counts.misses * page_bytes.pop()
    assert moved.demand_bytes == counts.demand_bytes
    assert paged.store.stats()["n_reads"] == moved.n_reads
    assert paged.store.stats()["read_bytes"] == moved.read_bytes >= moved.demand_bytes


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("arch", MOE)
def test_every_architecture_and_type(arch: str, kind: str, folder: Path) -> None:
    """Resident, paged from the model and paged from the sidecar; past the page cache or not."""
    path = folder / f"{arch}.gguf"
    synth.make(arch, path, weight_type=kind)
    pack(path)
    with contextlib.closing(lab.Lab(path)) as opened:
        expected, slots = opened.resident(LESS), opened.pools[0].n_expert // 2
        with opened.paged(slots=slots) as plain:
            assert equal(plain.run(LESS), expected)
        for direct, io_threads in ((True, 1), (True, 4), (False, 3)):
            with packed(opened, slots=slots, direct=direct, io_threads=io_threads) as paged:
                assert equal(paged.run(LESS), expected), (direct, io_threads)
                assert paged.counts().misses and paged.counts().evictions
                check_bytes(paged)


@pytest.mark.parametrize("read_bytes", [1 << 20, 1 << 16, 1 << 13])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_parts_are_read_into_the_slots(
    kind: str, direct: bool, read_bytes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "IN_PLACE_MIN_BYTES", 1)
    with made(replace(IN_PLACE, weight_type=kind), folder / "model.gguf") as opened:
        for forced, slots in ((False, 4), (True, 4), (True, 1), (True, 11)):
            with packed(opened, slots=slots, direct=direct, read_bytes=read_bytes, io_threads=3,
                        prefetch="gate" if forced else "none", forced=forced) as paged:  # fmt: skip
                assert equal(paged.run(EVERYTHING), opened.resident(EVERYTHING))
                paged.settle()
                assert paged.counts().misses
                in_place = paged.disk.alignment <= 4096 or not opened.device.info.host_pointers
                assert (paged.transfer.staging_bytes == 0) == in_place
                if not forced:
                    check_bytes(paged)


def n_reads(opened: Any, steps: Any, *, sidecar: bool, **params: Any) -> tuple[int, int]:
    """Reads, and pages that were missing, of some passes."""
    with (packed if sidecar else lab.Lab.paged)(opened, **params) as paged:
        assert equal(paged.run(steps), opened.resident(steps))
        return paged.transfer.stats.n_reads, paged.counts().misses


def test_a_page_is_one_read_and_neighbours_are_read_together(
    in_place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for least in (1, 1 << 30):  # in place, and through staging
        monkeypatch.setattr(slots_module, "IN_PLACE_MIN_BYTES", least)
        page_bytes = in_place.pools[0].page_bytes
        one = {"slots": 4, "read_bytes": page_bytes, "staging_bytes": 8 * page_bytes}
        apart, n_missing = n_reads(in_place, SINGLE, sidecar=False, **one)
        assert 2 * n_missing < apart <= 3 * n_missing  # neighbours in a tensor count here too
        assert n_reads(in_place, SINGLE, sidecar=True, **one) == (n_missing, n_missing)
        # All experts of a layer, in groups of as many as there are slots for.
        several = one | {"read_bytes": 4 * page_bytes, "staging_bytes": 16 * page_bytes}
        n, n_missing = n_reads(in_place, PREFILL, sidecar=True, **several)
        assert n < n_missing


def test_pages_that_are_used_together_come_in_fewer_reads(
    in_place: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that the sidecar was given decides which pages are neighbours."""
    monkeypatch.setattr(slots_module, "IN_PLACE_MIN_BYTES", 1)
    n = IN_PLACE.n_expert
    wanted = [0, 5, 10]
    path = folder / "ordered.gguf"
    shutil.copy(in_place.file.path, path)
    pack(path, order=[n + expert for expert in wanted])
    found = []
    with contextlib.closing(lab.Lab(path)) as ordered:
        for opened in (in_place, ordered):
            page_bytes = opened.pools[0].page_bytes
            with packed(opened, slots=4, read_bytes=3 * page_bytes) as paged:
                paged.store.begin(prefill=False)
                assert paged.store.lease(1, wanted) is not None
                paged.store.end()
                found.append(paged.transfer.stats.n_reads)
    assert found == [3, 1]


def test_layers_of_several_types(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "mixed.gguf"
    lab.write_mixed(replace(lab.SMALL, n_layer=5), ("Q4_0", "F32", "Q8_0"), path, monkeypatch)
    pack(path, order=[40, 3, 17])
    with contextlib.closing(lab.Lab(path)) as opened:
        assert len(opened.pools) == 3
        for slots in (None, 5):
            with packed(opened, slots=slots, prefetch="gate", forced=True) as paged:
                assert equal(paged.run(EVERYTHING), opened.resident(EVERYTHING))
                paged.settle()


def test_a_sidecar_of_other_layers_is_refused(small: Any, folder: Path) -> None:
    """Pools know which of their layers must be there."""
    with (
        DiskFile.open(sidecar_path(small.file.path)) as disk,
        DiskFile.open(small.file.path) as model,
    ):
        sidecar = read_sidecar(disk, model, small.file)
    [pool] = small.pools
    strange = pool.layers[0]._replace(il=9)
    with pytest.raises(ModelFileError, match=r"lacks experts of layer 9.*convert pack --force"):
        in_sidecar([replace(pool, layers=(*pool.layers, strange))], sidecar)
    with pytest.raises(ModelFileError, match=r"has 12 experts a layer, not 11"):
        in_sidecar([replace(pool, n_expert=11)], sidecar)


# faults

ALL = lab.LESS


@pytest.fixture(params=["staged", "in place"])
def faulty(
    request: pytest.FixtureRequest, small: Any, in_place: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, Any]]:
    """A lab, and its model paged from a sidecar on a disk that can fail."""
    opened = small
    if request.param == "in place":
        monkeypatch.setattr(slots_module, "IN_PLACE_MIN_BYTES", 1)
        opened = in_place
    with packed(opened, slots=4, prefetch="gate", forced=True, read_bytes=1 << 20,
                faults=FaultyDisk) as paged:  # fmt: skip
        yield opened, paged


def check_works(opened: Any, paged: Any) -> None:
    paged.settle()
    assert equal(paged.run(ALL), opened.resident(ALL))
    paged.settle()


@pytest.mark.parametrize("fault", [{"longest": 4096}, {"longest": 5000}, {"interrupted": True}],
                         ids=str)  # fmt: skip
def test_a_disk_that_takes_its_time(fault: dict[str, Any], faulty: tuple[Any, Any]) -> None:
    for name, value in fault.items():
        setattr(faulty[1].disk, name, value)
    check_works(*faulty)


@pytest.mark.parametrize("nth", [0, 1, 9])
@pytest.mark.parametrize("steps", [PREFILL, SINGLE], ids=["prefill", "decode"])
def test_an_error_of_the_disk_is_told(steps: Any, nth: int, faulty: tuple[Any, Any]) -> None:
    opened, paged = faulty
    paged.disk.eio_at = len(paged.disk.offsets) + nth
    with pytest.raises(ModelFileError, match=r"\.pages failed at .*Input/output error"):
        for _ in range(8):
            paged.run(steps)
    paged.disk.eio_at = None
    check_works(opened, paged)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be changed there")
@pytest.mark.parametrize("change", ["truncate", "rewrite", "touch"])
@pytest.mark.parametrize("steps", [PREFILL, SINGLE], ids=["prefill", "decode"])
def test_a_sidecar_changed_while_it_is_in_use_is_refused(
    change: str, steps: Any, folder: Path
) -> None:
    with made(lab.SMALL, folder / "mine.gguf") as opened, packed(opened, slots=4) as paged:
        check_works(opened, paged)
        path = sidecar_path(opened.file.path)
        if change == "truncate":
            os.truncate(path, 8192)
        elif change == "rewrite":
            with path.open("r+b") as file:
                file.seek(8192)
                file.write(b"\x55" * (path.stat().st_size - 8192))
        else:
            os.utime(path, ns=(1, 1))
        for _ in range(3):
            with pytest.raises(ModelFileError, match=r"must be\s+replaced, not rewritten"):
                paged.run(steps)
            paged.settle()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_a_sidecar_replaced_under_its_name_is_no_matter(folder: Path) -> None:
    with made(lab.SMALL, folder / "mine.gguf") as opened, packed(opened, slots=4) as paged:
        pack(opened.file.path, order=[7, 3], replace=True)
        check_works(opened, paged)
        sidecar_path(opened.file.path).unlink()
        check_works(opened, paged)
