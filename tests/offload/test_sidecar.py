"""Sidecars: what is written is found again, and nothing else is believed."""

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.disk import DiskFile, read_range
from edgeroute.offload.sidecar import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    Sidecar,
    padded,
    read_sidecar,
    sidecar_path,
)
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.convert.pack import pack

PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose slices are no multiples of a block, with its sidecar."""
    path = tmp_path_factory.mktemp("sidecar") / "moe.gguf"
    synth.make("olmoe", path, weight_type="Q8_0", n_layer=3)
    pack(path)
    return path


@pytest.fixture
def sidecar(packed: Path, tmp_path: Path) -> Path:
    """A copy of the sidecar to damage."""
    path = tmp_path / "moe.gguf.pages"
    path.write_bytes(sidecar_path(packed).read_bytes())
    return path


def opened(sidecar: Path, model: Path) -> Sidecar:
    with DiskFile.open(sidecar) as disk, DiskFile.open(model) as base, GGUFFile.open(model) as file:
        return read_sidecar(disk, base, file)


def names(il: int) -> list[str]:
    return [f"blk.{il}.ffn_{part}_exps.weight" for part in PARTS]


def test_every_part_of_every_page_is_the_models(packed: Path) -> None:
    pages = opened(sidecar_path(packed), packed)
    header = pages.header
    assert len(header.pages) == 3 * header.n_expert
    with DiskFile.open(sidecar_path(packed)) as disk, GGUFFile.open(packed) as file:
        for page in header.pages:
            il, expert = divmod(page, header.n_expert)
            extents = pages.extents(5, page, names(il))
            assert [e.part for e in extents] == [0, 1, 2] and {e.file for e in extents} == {5}
            for extent, name in zip(extents, names(il), strict=True):
                assert extent.offset % ALIGNMENT == 0
                there = file.view(file.tensors[name])
                low = expert * extent.nbytes
                found = read_range(disk, extent.offset, extent.nbytes)
                assert found == there[low : low + extent.nbytes]
                there.release()
            ends = [padded(e.offset + e.nbytes) for e in extents]
            assert [e.offset for e in extents[1:]] == ends[:-1]  # side by side


def test_parts_come_in_the_order_that_is_asked_for(packed: Path) -> None:
    pages = opened(sidecar_path(packed), packed)
    extents = pages.extents(0, 1, list(reversed(names(0))))
    assert [e.part for e in extents] == [0, 1, 2]
    assert extents[0].offset > extents[2].offset


def test_pages_and_tensors_that_it_has_not_are_refused(packed: Path) -> None:
    pages = opened(sidecar_path(packed), packed)
    n = pages.header.n_expert
    for page, wanted in ((3 * n, names(3)), (-1, names(0)), (0, names(1)), (0, ["x"])):
        with pytest.raises(ModelFileError, match=r"write it again with `edgeroute convert pack"):
            pages.extents(0, page, wanted)


def test_a_sidecar_of_another_model_is_refused(packed: Path, tmp_path: Path) -> None:
    """Of the same shape and size: only the weights differ, or even one block of them."""
    other = tmp_path / "other.gguf"
    synth.make("olmoe", other, weight_type="Q8_0", n_layer=3, seed=2)
    assert other.stat().st_size == packed.stat().st_size
    with pytest.raises(ModelFileError, match=r"made from another model than other.gguf"):
        opened(sidecar_path(packed), other)
    synth.make("olmoe", other, weight_type="Q8_0", n_layer=2)
    with pytest.raises(ModelFileError, match=r"made from a model of \d+ bytes"):
        opened(sidecar_path(packed), other)


Content = dict[str, Any]


def rewrite(path: Path, change: Callable[[Content], None]) -> None:
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


def set_page(i: int, pair: object) -> Callable[[Content], None]:
    return lambda content: content["pages"].__setitem__(i, pair)


def set_part(i: int, value: object) -> Callable[[Content], None]:
    return lambda content: content["layers"][0]["parts"][0].__setitem__(i, value)


HOSTILE: dict[str, tuple[Callable[[Content], None], str]] = {
    "no key": (lambda c: c.pop("pages"), "exactly the keys"),
    "a key more": (lambda c: c.update(x=1), "exactly the keys"),
    "n_expert 0": (lambda c: c.update(n_expert=0), "n_expert is 0, not a number between 1 and"),
    "n_expert text": (lambda c: c.update(n_expert="8"), "n_expert is 8, not a number"),
    "n_expert bool": (lambda c: c.update(n_expert=True), "n_expert is True, not a number"),
    "n_expert other": (lambda c: c.update(n_expert=3), "does not list 3 pages for each of 3"),
    "no layers": (lambda c: c.update(layers=[]), "does not list between 1 and"),
    "layers twice": (lambda c: c["layers"].append(c["layers"][0]), "layer 0 comes twice"),
    "strange layer": (lambda c: c["layers"].append(7), "a layer is not an il"),
    "no parts": (lambda c: c["layers"][0].update(parts=[]), "does not have 1 to 8 parts"),
    "short part": (lambda c: c["layers"][0]["parts"][0].pop(), "is not a name, a type"),
    "name a number": (set_part(0, 5), "no string"),
    "unknown tensor": (set_part(0, "blk.0.x"), "which the model lacks"),
    "same tensor": (set_part(0, "blk.0.ffn_up_exps.weight"), "names a tensor twice"),
    "other type": (set_part(1, "F32"), "bytes of F32, not a 16th of"),
    "length 0": (set_part(2, 0), "the length of 'blk.0.ffn_gate_exps.weight' is 0"),
    "length huge": (set_part(2, 1 << 70), "not a number between 1 and"),
    "length less": (set_part(2, 34), "are 34 bytes of Q8_0"),
    "at odd": (set_part(3, 17), "lies at 17, no multiple of 4096"),
    "at negative": (set_part(3, -4096), "is -4096, not a number"),
    "at overlapping": (lambda c: c["layers"][0]["parts"][1].__setitem__(3, 0), "the place of"),
    "a page less": (lambda c: c["pages"].pop(), "does not list 16 pages"),
    "page twice": (lambda c: set_page(1, c["pages"][0])(c), "page 0 comes twice"),
    "page of no layer": (set_page(0, [800, 8192]), "page 800 comes twice, or is of no layer"),
    "page in the header": (set_page(0, [0, 0]), "the offset of page 0 is 0"),
    "page over page": (lambda c: c["pages"][1].__setitem__(1, c["pages"][0][1]), "offset of page"),
    "page past the end": (set_page(-1, [47, 1 << 40]), "the offset of page 47"),
    "page odd": (lambda c: c["pages"][0].__setitem__(1, c["pages"][0][1] + 1), "lies at"),
    "page no pair": (set_page(0, 4), "a page is not a number and an offset"),
    "fingerprint": (lambda c: c.update(fingerprint="0"), "another model"),
    "fingerprint type": (lambda c: c.update(fingerprint=None), "not a string"),
    "size": (lambda c: c.update(size_bytes=5), "its header says 5"),
    "model size": (lambda c: c.update(model_bytes=5), "a model of 5 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_with_a_sentence(
    packed: Path, sidecar: Path, name: str
) -> None:
    change, message = HOSTILE[name]
    rewrite(sidecar, change)
    with pytest.raises(ModelFileError, match=message) as caught:
        opened(sidecar, packed)
    assert "edgeroute convert pack" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too few for a header"),
        (b"EDGEPAGE", "too few"),
        (b"GGUFPAGE" + bytes(20), "it starts with"),
        (struct.pack("<8sII", b"EDGEPAGE", 9, 2) + b"{}", "of version 9"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, 999) + b"{}", "claims a header of 999 bytes"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, MAX_HEADER_BYTES + 1) + b"{}", "claims a header"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, 2) + b"{]", "not JSON"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, 2) + b"\xff\xfe", "not JSON"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, 2) + b"[]", "exactly the keys"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, 200_000) + b"[" * 200_000, "not JSON"),
        (struct.pack("<8sII", b"EDGEPAGE", 1, 9000) + b"9" * 9000, "not JSON"),
    ],
)
def test_what_is_no_sidecar_is_refused(
    packed: Path, sidecar: Path, raw: bytes, message: str
) -> None:
    sidecar.write_bytes(raw)
    with pytest.raises(ModelFileError, match=message):
        opened(sidecar, packed)


def test_a_truncated_sidecar_is_refused(packed: Path, sidecar: Path) -> None:
    os.truncate(sidecar, sidecar.stat().st_size - 1)
    with pytest.raises(ModelFileError, match="its header says"):
        opened(sidecar, packed)


@pytest.fixture(scope="module")
def content(packed: Path) -> Content:
    raw = sidecar_path(packed).read_bytes()
    [length] = struct.unpack_from("<I", raw, 12)
    found: Content = json.loads(raw[16 : 16 + length])
    return found


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from places(child, (*path, key))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.integers(-2, 9), st.floats(),
    st.text(max_size=5), st.just([]), st.just({}), st.just([[0, 4096]]),
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_header_is_either_refused_or_reads_inside_the_file(
    packed: Path,
    content: Content,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    changed = copy.deepcopy(content)
    where = data.draw(st.sampled_from([p for p in places(content) if p]))
    inner: Any = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = data.draw(VALUES)
    path = tmp_path_factory.getbasetemp() / "fuzzed.pages"
    if not path.exists():
        path.write_bytes(sidecar_path(packed).read_bytes())
    rewrite(path, lambda old: (old.clear(), old.update(changed)))  # type: ignore[func-returns-value]
    try:
        pages = opened(path, packed)
    except ModelFileError:
        return
    size = path.stat().st_size
    for page in pages.header.pages:
        for extent in pages.extents(0, page, names(page // pages.header.n_expert)):
            assert extent.offset > 0 and extent.offset + extent.nbytes <= size
