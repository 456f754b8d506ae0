"""Misses computed from copies of fewer bits: a model of the copies gives the same answers."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from edgeroute import Runtime, paging
from edgeroute.cli import cli
from edgeroute.models.paged import PagedForward
from edgeroute.offload.disk import Disk, DiskFile, read_range
from edgeroute.offload.expert_copies import ExpertCopies
from edgeroute.offload.sidecar import COPIES, Part, read_sidecar, sidecar_path
from edgeroute.offload.transfer import Transfer
from edgeroute.paging_copies import copied_pools
from edgeroute.runtime.errors import CapacityError, ModelFileError, UsageError
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.skippers.misses import MissLevers
from edgeroute.tools import synth
from edgeroute.tools.convert import pack
from edgeroute.tools.convert.copies import write_copies
from tests.edgeroute import paged_lab as lab
from tests.offload.faulty_disk import FaultyDisk

equal, play = lab.equal, lab.play

SMALL = replace(lab.SMALL, n_expert_used=4)
DECODE: list[Any] = [
    [("a", 40, 1)], [("b", 20, 1)], [("c", 9, 1)],
    *[[("a", 1, 1)]] * 6,
    *[[("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]] * 6,
]  # fmt: skip
MANY: list[Any] = [[("a", 40, 1)], *[[("a", 1, 1)] * 18] * 3]
"""More tokens, as if of so many sequences, than a layer's experts are held at once for."""
ALONE: list[Any] = [*[[("a", 1, 1)]] * 8, *[[("a", 1, 1), ("b", 1, 1)]] * 4]
"""Single tokens from the first on: no prompt whose experts are computed in full."""


def copy_exactly(path: Path) -> None:
    """Write copies that are no smaller: of the experts' own type, with their own bytes."""
    with pack.opened(path) as (disk, file):

        def read(part: Part, expert: int) -> memoryview:
            info = file.tensors[part.tensor]
            return read_range(disk, info.offset + expert * part.nbytes, part.nbytes)

        layout = replace(pack.packed_layout(file), kind=COPIES)
        pack.write_sidecar((disk, file), layout, read, replace=True, progress=None)


@contextlib.contextmanager
def with_copies(
    paged: Any, opened: Any, levers: MissLevers, *, slots: int = 6,
    faults: Callable[[Disk], Disk] = lambda disk: disk,
) -> Iterator[tuple[PagedForward, ExpertCopies, Any]]:  # fmt: skip
    """Open another forward over a paged lab's store, with copies; yields their disk too."""
    path = opened.file.path
    disk: Any = faults(DiskFile.open(sidecar_path(path, COPIES)))
    with DiskFile.open(path) as model:
        sidecar = read_sidecar(disk, model, opened.file, COPIES)
    pools = copied_pools(opened._layers(), sidecar)
    paged.forward.close()
    with contextlib.ExitStack() as own:
        transfer = own.enter_context(Transfer([DiskFile.open(path), disk], 2, 1 << 16, 1 << 22))
        slots_bytes = sum(slots * len(pool.layers) * pool.slot_bytes for pool in pools)
        copies = own.enter_context(
            ExpertCopies(paged.store, opened.device, pools, transfer, slots_bytes)
        )
        forward = paged.forward = PagedForward(
            opened.model, opened.device, paged.store, paged.kv, lab.N_TOKENS, levers
        )
        forward.copies = copies
        try:
            yield forward, copies, disk
            paged.check()
            for pool in copies.pools:
                pool.table.check()
                assert pool.table.n_pinned == 0 and pool.table.n_loading == 0
        finally:
            forward.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("copies") / "small.gguf"
    synth.write(SMALL, path)
    copy_exactly(path)
    opened = lab.Lab(path)
    yield opened
    opened.close()


@pytest.mark.parametrize("slots", [1, 12])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [DECODE, MANY], ids=["few", "many"])
def test_copies_of_all_bits_change_none(steps: Any, overlap: bool, slots: int, small: Any) -> None:
    with small.paged(slots=5, overlap=overlap) as paged:
        levers = MissLevers(degrade_misses=0.8)
        with with_copies(paged, small, levers, slots=slots) as (forward, copies, _):
            assert equal(play(forward, steps), small.resident(steps))
            assert levers.degraded > 0 and not levers.dropped
            told: Any = copies.stats()
            assert told["misses"] > 0 and told["hits"] + told["misses"] <= levers.degraded


@pytest.mark.parametrize("arch", [a for a, s in synth.ARCHITECTURES.items() if s.n_expert])
def test_every_family(arch: str, tmp_path: Path) -> None:
    """Those with biases, shared experts and leading dense layers too."""
    path = tmp_path / f"{arch}.gguf"
    synth.make(arch, path)
    copy_exactly(path)
    with contextlib.closing(lab.Lab(path)) as opened, opened.paged() as paged:
        levers = MissLevers(degrade_misses=1.0)
        with with_copies(paged, opened, levers) as (forward, _, _):
            assert equal(play(forward, DECODE[:6]), opened.resident(DECODE[:6]))
            assert (levers.degraded > 0) == (opened.n_used > 1)


def test_beside_the_other_levers(small: Any) -> None:
    """What is dropped is not read as a copy either; with exact copies only that changes answers."""
    found = []
    for degrade in (0.0, 0.9):
        with small.paged(slots=5) as paged:
            levers = MissLevers(drop_misses=0.3, prefer_resident=0.5, degrade_misses=degrade)
            with with_copies(paged, small, levers) as (forward, _, _):
                found.append(play(forward, DECODE[:4]))
            assert levers.dropped > 0 and (levers.degraded > 0) == bool(degrade)
    assert equal(*found)


@pytest.mark.parametrize("share", [0.0, 1e-12])
def test_off_is_bit_identical_and_reads_nothing(share: float, small: Any) -> None:
    with small.paged(slots=5) as paged:
        levers = MissLevers(degrade_misses=share)
        with with_copies(paged, small, levers) as (forward, copies, _):
            assert equal(play(forward, DECODE), small.resident(DECODE))
            told: Any = copies.stats()
            assert (levers.degraded, told["hits"], told["misses"]) == (0, 0, 0)


class Always(MissLevers):
    """Takes copies of whatever is missing, of a token's best expert too."""

    def degrade(
        self, weights: npt.NDArray[np.float32], here: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        return ~here


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_answers_are_those_of_a_model_of_the_copies(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "full.gguf", tmp_path / "low.gguf"
    synth.write(SMALL, path)
    synth.write(replace(SMALL, expert_type=kind), other)
    report = write_copies(path, kind=GGMLType[kind])
    assert report.types == (kind,)
    with (
        contextlib.closing(lab.Lab(path)) as opened, contextlib.closing(lab.Lab(other)) as low,
        opened.paged(slots=4) as paged, with_copies(paged, opened, Always()) as (forward, _, _),
    ):  # fmt: skip
        found = play(forward, ALONE)
        assert equal(found, low.resident(ALONE))
        assert not equal(found, opened.resident(ALONE))
        assert paged.counts().misses == 0


def test_an_expert_that_one_token_wants_in_full_serves_all(small: Any) -> None:
    """Of several tokens in a pass, and then nobody reads its copy."""
    with small.paged(slots=8) as paged:
        levers = MissLevers(degrade_misses=0.8)
        with with_copies(paged, small, levers) as (forward, copies, _):
            asked: list[tuple[int, list[int], list[int]]] = []
            lease, full = copies.lease, paged.store.lease
            copies.lease = lambda il, experts: (  # type: ignore[method-assign]
                asked.append((il, list(experts), [])), lease(il, experts))[1]  # fmt: skip

            def told(il: int, experts: Any) -> Any:
                if asked and asked[-1][0] == il:
                    asked[-1][2].extend(experts)
                return full(il, experts)

            paged.store.lease = told
            play(forward, DECODE)
            paged.store.lease = full
            assert asked and all(each[2] for each in asked)
            assert not any(set(low) & set(high) for _, low, high in asked)


def test_more_copies_than_room_are_read_in_full(small: Any) -> None:
    with small.paged(slots=12) as paged:
        levers = Always()
        with with_copies(paged, small, levers) as (forward, copies, _):
            copies.max_at_once = lambda il: 2  # type: ignore[method-assign]
            assert equal(play(forward, ALONE), small.resident(ALONE))
            assert levers.degraded > 0 and paged.counts().misses > 0


@pytest.mark.parametrize("nth", [0, 3])
def test_a_disk_that_fails_is_told_and_forgotten(nth: int, small: Any) -> None:
    steps = DECODE[:4]
    with small.paged(slots=4) as paged, with_copies(
        paged, small, MissLevers(degrade_misses=0.8), faults=FaultyDisk
    ) as (forward, _, disk):  # fmt: skip
        disk.eio_at = len(disk.offsets) + nth
        with pytest.raises(ModelFileError, match=r"\.copies failed at .*Input/output error"):
            for _ in range(8):
                play(forward, steps)
        disk.eio_at = None
        assert equal(play(forward, steps), small.resident(steps))


# the settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("settings") / "qwen3moe.gguf"
    synth.write(replace(SMALL, n_ff_exp=128, n_embd=128, n_head_kv=1, n_embd_head=64, n_expert=32,
                        n_expert_used=4), where)  # fmt: skip
    return where


@pytest.fixture
def path(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(model, tmp_path))


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))


ASK: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "speculate": "off",
                       "prefetch": "off"}  # fmt: skip
PROMPT = list(range(5, 45))


def least(path: Path, **more: Any) -> int:
    with pytest.raises(CapacityError) as refusal:
        Runtime(path, memory=1 << 20, **ASK, **more)
    assert refusal.value.smallest_bytes is not None
    return refusal.value.smallest_bytes


@pytest.mark.usefixtures("slim")
def test_a_runtime_takes_copies_within_its_budget(path: Path) -> None:
    done = CliRunner().invoke(cli, ["convert", "copies", str(path), "--type", "Q4_0"])
    assert done.exit_code == 0 and "in Q4_0" in done.output, done.output
    memory = least(path) + (4 << 20)
    with Runtime(path, memory=memory, **ASK) as plain:
        expected = plain.generate(prompt_ids=PROMPT, max_tokens=24, prefix="off")
        full: Any = plain.stats()
    with Runtime(path, memory=memory, degrade_misses=0.7, **ASK) as runtime:
        found = runtime.generate(prompt_ids=PROMPT, max_tokens=24, prefix="off")
        assert found.token_ids[0] == expected.token_ids[0]  # the prompt's own last token
        stats: Any = runtime.stats()
        assert sum(stats["memory"].values()) <= stats["budget_bytes"]
        done_without = stats["experts"]["done_without"]
        copies = done_without["copies"]
        assert done_without["degraded"] >= copies["misses"] + copies["hits"] > 0
        assert copies["slots_bytes"] <= stats["memory"]["expert copies"]
        assert stats["memory"]["expert slots"] < full["memory"]["expert slots"]
        each = copies["demand_bytes"] / copies["misses"]
        costs = stats["experts"]["decode"]
        assert each < 0.2 * costs["demand_bytes"] / costs["misses"]  # Q4_0 of F32
    with Runtime(path, memory=memory, degrade_misses=0.7, levers="off", **ASK) as off:
        same = off.generate(prompt_ids=PROMPT, max_tokens=24, prefix="off")
        assert same.token_ids == expected.token_ids


@pytest.mark.usefixtures("slim")
def test_the_smallest_budget_with_copies_is_enough(path: Path) -> None:
    write_copies(path, kind=GGMLType.Q8_0)
    smallest = least(path, degrade_misses=0.5)
    assert smallest > least(path)
    with Runtime(path, memory=smallest, degrade_misses=0.5, **ASK) as runtime:
        assert len(runtime.generate(prompt_ids=PROMPT, max_tokens=4).token_ids) == 4


@pytest.mark.usefixtures("slim")
def test_without_copies_it_is_refused_with_the_command(path: Path) -> None:
    memory = least(path) + (4 << 20)
    with pytest.raises(UsageError, match=r"no .*\.copies; write it with `edgeroute convert copies"):
        Runtime(path, memory=memory, degrade_misses=0.5, **ASK)
    write_copies(path)
    sidecar_path(path, COPIES).write_bytes(b"EDGECOPY" + bytes(40))
    with pytest.raises(ModelFileError, match=r"write it again with `edgeroute convert copies"):
        Runtime(path, memory=memory, degrade_misses=0.5, **ASK)
    with Runtime(path, degrade_misses=0.5, repack_experts=False, **ASK) as whole:
        stats: Any = whole.stats()
        assert any("degrade_misses changes nothing" in each for each in stats["warnings"])
