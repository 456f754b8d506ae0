"""Session files: whole and of the same model, or refused; a killed save leaves the last one."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.runtime import session_file, session_writer
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import SessionFileError
from edgeroute.runtime.held_cells import HeldCells
from edgeroute.runtime.kv_cache import KvCache, KvShape, all_finite
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sequence import Sequence, chunk_classes
from edgeroute.runtime.session_file import FIXED, SessionFacts, SessionReader, digest
from edgeroute.runtime.session_writer import SessionWriter, is_being_written

Bytes = npt.NDArray[np.uint8]

FACTS = SessionFacts(name="a", model="m", adapter="", plan="", shape="s", numerics="n")
N_CELLS, CELL_BYTES = 23, 48
TOKENS = np.arange(N_CELLS, dtype=np.int32) * 7
CLASSES = np.full(N_CELLS, 3, np.uint8)
DATA = np.random.default_rng(1).integers(0, 256, N_CELLS * CELL_BYTES, np.uint8)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five cells a block, so that the last is not full."""
    monkeypatch.setattr(session_file, "BLOCK_BYTES", 5 * CELL_BYTES + 3)


def save(path: Path, data: Bytes = DATA, facts: SessionFacts = FACTS) -> Path:
    part = path.with_suffix(".part")
    with SessionWriter(part, facts, TOKENS, CLASSES, CELL_BYTES) as writer:
        for first in range(0, len(data), 5 * CELL_BYTES):
            writer.add(data[first : first + 5 * CELL_BYTES])
        assert is_being_written(part)
        writer.commit(path)
        assert writer.n_bytes == path.stat().st_size
    return path


def load(path: Path) -> Bytes:
    """Read all blocks of a file."""
    buffer = np.empty(5 * CELL_BYTES, np.uint8)
    with SessionReader(path) as reader:
        reader.head.check(FACTS)
        parts = [reader.read_block(i, buffer).copy() for i in range(reader.head.n_blocks(N_CELLS))]
    return np.concatenate(parts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "x.session")


def test_what_was_saved_is_read(path: Path) -> None:
    assert np.array_equal(load(path), DATA)
    with SessionReader(path) as reader:
        head = reader.head
        assert np.array_equal(head.tokens, TOKENS) and np.array_equal(head.classes, CLASSES)
        assert [head.block(i) for i in (0, 4)] == [(0, 5), (20, 3)]
        assert [head.n_blocks(n) for n in (1, 5, 6, 23)] == [1, 1, 2, 5]
    assert list(path.parent.iterdir()) == [path]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_every_changed_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for i in range(len(whole)):
        changed = bytearray(whole)
        changed[i] ^= 1 << (i % 8)
        path.write_bytes(changed)
        with pytest.raises(SessionFileError):
            load(path)


def test_every_truncation_and_every_tail_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n])
        with pytest.raises(SessionFileError):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(SessionFileError, match="truncated or damaged"):
        load(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(path: Path) -> None:
    with SessionReader(path) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(SessionFileError, match="truncated while"):
            reader.read_block(4, np.empty(5 * CELL_BYTES, np.uint8))


def forge(path: Path, *, facts: bytes | None = None, classes: bytes | None = None) -> Path:
    """Write a file whose digests are right and whose contents are not."""
    text = json.dumps(asdict(FACTS)).encode() if facts is None else facts
    parts = [DATA[i : i + 5 * CELL_BYTES] for i in range(0, len(DATA), 5 * CELL_BYTES)]
    head = b"".join((
        FIXED.pack(session_file.MAGIC, session_file.VERSION, len(text), N_CELLS, CELL_BYTES, 0),
        text, TOKENS.tobytes(), CLASSES.tobytes() if classes is None else classes,
        *(digest(part.data) for part in parts),
    ))  # fmt: skip
    path.write_bytes(head + digest(head) + DATA.tobytes())
    return path


HOSTILE_FACTS = [
    b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 50_000, b'{"name": 1}',
    json.dumps(asdict(FACTS) | {"more": "x"}).encode(),
    json.dumps(asdict(FACTS) | {"model": ["m"]}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("facts", HOSTILE_FACTS, ids=range(len(HOSTILE_FACTS)))
def test_facts_that_are_none_are_refused(tmp_path: Path, facts: bytes) -> None:
    assert np.array_equal(load(forge(tmp_path / "good.session")), DATA)
    with pytest.raises(SessionFileError, match="facts"):
        load(forge(tmp_path / "x.session", facts=facts))


def test_an_unknown_kind_of_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SessionFileError, match="kind of cell"):
        load(forge(tmp_path / "x.session", classes=b"\x08" * N_CELLS))


@pytest.mark.parametrize(("offset", "value", "told"), [
    (8, 1, "version 1"), (8, 0, "version 0"), (12, 0, "other sizes"), (12, 1 << 31, "other sizes"),
    (16, 0, "0 cells"), (16, (1 << 32) - 1, "cells, this cache"), (20, 0, "other sizes"),
    (20, (1 << 32) - 1, "other sizes"), (16, 1 << 22, "bytes"), (20, 1, "bytes"),
])  # fmt: skip
def test_sizes_are_checked_before_anything_is_allocated(
    path: Path, offset: int, value: int, told: str
) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<I", value))
    with pytest.raises(SessionFileError, match=told):
        load(path)


def test_more_cells_than_the_cache_has_are_refused(path: Path) -> None:
    with pytest.raises(SessionFileError, match="23 cells, this cache has 22"):
        SessionReader(path, N_CELLS - 1)


@pytest.mark.parametrize("name", ["name", "model", "adapter", "plan", "shape", "numerics"])
def test_whatever_differs_is_named(tmp_path: Path, name: str) -> None:
    other = save(tmp_path / "x.session", facts=replace(FACTS, **{name: "other"}))
    with pytest.raises(SessionFileError, match="the saved session"):
        load(other)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SessionFileError, match="nothing is saved"):
        load(tmp_path / "missing")
    with pytest.raises(SessionFileError, match=r"not a regular file|cannot be opened"):
        load(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to(save(tmp_path / "x.session"))
        for name in ("pipe", "link"):
            with pytest.raises(SessionFileError):
                load(tmp_path / name)


def test_what_fails_leaves_the_last_save_and_no_other_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_writer.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path, data=DATA[::-1].copy())
    assert np.array_equal(load(path), DATA)
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from edgeroute.runtime import session_file, session_writer
from edgeroute.runtime.session_file import SessionFacts
from edgeroute.runtime.session_writer import SessionWriter

folder, cell = Path(sys.argv[1]), 64
session_file.BLOCK_BYTES = 4 * cell
facts = SessionFacts(name="a", model="m", adapter="", plan="", shape="s", numerics="n")

def save(value):
    path, tokens = folder / "x.session", np.full(20, value, np.int32)
    part = folder / f"{os.getpid()}.part"
    with SessionWriter(part, facts, tokens, np.zeros(20, np.uint8), cell) as writer:
        for _ in range(5):
            writer.add(np.full(4 * cell, value, np.uint8))
        writer.commit(path)

save(1)
n = 0
while True:  # one child for each place to die at, until one dies nowhere
    pid = os.fork()
    if pid == 0:
        left = n
        def die():
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        def slow(self, view):
            for at in range(0, len(view), 100):
                die()
                self._file.write(view[at : at + 100])
        SessionWriter._write = slow
        for name in ("fsync", "replace"):
            def both(*args, real=getattr(os, name)):
                die()
                real(*args)
                die()
            setattr(session_writer.os, name, both)
        save(2)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    reader = session_file.SessionReader(folder / "x.session")
    value = int(reader.head.tokens[0])
    block = reader.read_block(4, np.empty(4 * cell, np.uint8))
    assert block.tolist() == [value] * (4 * cell)
    reader.close()
    for part in folder.glob("*.part"):
        assert not session_writer.is_being_written(part)
    print(n, status, value)
    save(1)
    n += 1
    if status == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_at_any_moment_leaves_the_last_complete_save(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) > 15
    assert all(status == signal.SIGKILL for _, status, _ in rows[:-1])
    values = [value for _, _, value in rows]
    first_new = values.index(2)
    assert values == [1] * first_new + [2] * (len(rows) - first_new)
    assert rows[-1][1] == 0 and 10 < first_new < len(rows) - 1


# cells out of the cache and into it

SHAPES = {
    "f16": KvShape(n_layer=2, n_embd_k_gqa=64, n_embd_v_gqa=32, n_embd_head=32),
    "q8_0": KvShape(n_layer=2, n_embd_k_gqa=64, n_embd_v_gqa=64, n_embd_head=64, kv_type="q8_0",
                    n_repeat=1),
    "latent": KvShape(n_layer=3, n_embd_k_gqa=96, n_embd_v_gqa=64, n_embd_head=96,
                      n_embd_head_v=64, v_in_k=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with Device.open() as opened:
        yield opened


@pytest.fixture
def make(device: Device) -> Iterator[Callable[[str], KvCache]]:
    made: list[KvCache] = []

    def new(name: str) -> KvCache:
        made.append(KvCache(device, SHAPES[name], 1024))
        return made[-1]

    yield new
    for each in made:
        each.close()


@pytest.mark.parametrize("name", SHAPES)
def test_cells_go_out_and_in_where_they_were(make: Callable[[str], KvCache], name: str) -> None:
    kv = make(name)
    kv.take_all()
    size = kv.shape.bytes_per_cell
    data = np.random.default_rng(2).integers(0, 256, 40 * size, np.uint8)
    kv.write_cells(300, 40, data)
    found = np.empty_like(data)
    kv.read_cells(300, 40, found)
    assert np.array_equal(found, data)
    for first, n in ((300, 7), (290, 10), (340, 5)):
        part = np.empty(n * size, np.uint8)
        kv.read_cells(first, n, part)
        want = kv.first_cells(data, 7) if first == 300 else np.zeros_like(part)
        assert np.array_equal(part, want)
    for first, n, given in ((-1, 2, 2), (1020, 5, 5), (0, 5, 4)):
        with pytest.raises(ValueError, match="cells"):
            kv.write_cells(first, n, np.zeros(given * size, np.uint8))


def test_only_numbers_count_as_finite() -> None:
    for bad in (0x7C00, 0xFC00, 0x7E00, 0xFFFF):
        halves = np.full(64, 0x7BFF, "<u2")
        assert all_finite(halves.view(np.uint8), "f16")
        halves[-1] = bad
        assert not all_finite(halves.view(np.uint8), "f16")
        blocks = np.full((3, 34), 0xFF, np.uint8)
        blocks[:, :2] = 1
        assert all_finite(blocks.ravel(), "q8_0")
        blocks[2, :2] = np.array([bad], "<u2").view(np.uint8)
        assert not all_finite(blocks.ravel(), "q8_0")


def test_held_cells_stay_until_they_are_let_go(make: Callable[[str], KvCache]) -> None:
    kv = make("f16")
    prefix = PrefixCache(kv, 64)

    def kept(n: int, held: bool = False) -> HeldCells | None:
        sequence = prefix.open([n] * n, n, "off")
        assert sequence is not None
        sequence.n_past, sequence.classes = n, bytearray(chunk_classes(n))
        found = HeldCells(kv, sequence.region) if held else None
        prefix.keep(sequence, found)
        return found

    held = kept(512, held=True)
    assert held is not None
    kept(512)
    data = np.empty(kv.shape.bytes_per_cell, np.uint8)
    assert held.read(511, 1, data)
    with pytest.raises(ValueError, match="region"):
        held.read(511, 2, data)
    assert prefix.open([1] * 600, 600) is None  # only what nobody holds may leave
    assert prefix.open([512] * 600, 600, "all") is None  # nor is it taken over
    other = prefix.open([1] * 300, 300)
    assert other is not None and prefix.n_kept_cells == 512
    held.let_go()
    assert not held.read(0, 1, data) and not held.write(0, 1, data)
    assert prefix.open([512] * 512, 512, "all") is not None


def test_random_moves_with_held_cells_lose_none(make: Callable[[str], KvCache]) -> None:
    kv, rng = make("f16"), random.Random(4)
    prefix = PrefixCache(kv, 64)
    running: list[Sequence] = []
    holds: list[HeldCells] = []
    for _ in range(400):
        if running and rng.random() < 0.5:
            sequence = running.pop(rng.randrange(len(running)))
            n = sequence.n_past = len(sequence.tokens)
            sequence.classes = bytearray(chunk_classes(n))
            held = HeldCells(kv, sequence.region) if rng.random() < 0.5 else None
            holds += [held] if held is not None else []
            prefix.keep(sequence, held)
        else:
            tokens = [rng.randrange(3)] * rng.randint(8, 500)
            opened = prefix.open(tokens, len(tokens), rng.choice(("exact", "all", "off")))
            running += [opened] if opened is not None else []
        if holds and rng.random() < 0.4:
            holds.pop(rng.randrange(len(holds))).let_go()
        owned = sum(each.region.n_cells for each in running)
        assert owned + prefix.n_kept_cells + kv.n_free_cells == kv.n_cells
