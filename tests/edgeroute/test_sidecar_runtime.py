"""A Runtime reads experts from the sidecar beside its model, or says why it does not."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from edgeroute import Runtime, paging
from edgeroute.cli import cli
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.sidecar import sidecar_path
from edgeroute.runtime import errors
from edgeroute.tools import synth
from edgeroute.tools.convert.pack import pack
from tests.edgeroute import test_paged_runtime as lab
from tests.edgeroute.test_paged_runtime import SETTINGS, SPEC, answers, open_paged


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("beside") / "model.gguf"
    synth.write(SPEC, found)
    pack(found)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[int, ...]]:
    with Runtime(model, **SETTINGS) as resident:
        return answers(resident, 4)


@pytest.fixture(autouse=True)
def _slim_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory, which is larger than any model here, counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the model with its sidecar, to damage."""
    yield Path(shutil.copy(model, tmp_path))
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_experts_come_from_the_sidecar_unless_it_is_off(
    model: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for sidecar in ("auto", "off"):
        with open_paged(model, sidecar=sidecar, policy="lru", prefetch="off") as paged:
            assert answers(paged, 4) == expected
            found[sidecar] = stats = paged.stats()["experts"]
            assert paged.stats()["warnings"] == []
        missed = stats["decode"]["demand_bytes"] + stats["prefill"]["demand_bytes"]
        assert missed and stats["read_bytes"] >= missed
    assert found["auto"]["pages_from"] == "model.gguf.pages"
    assert found["off"]["pages_from"] == "model.gguf"
    assert (found["auto"]["sidecar"], found["off"]["sidecar"]) == ("used", "off")
    for kind in ("decode", "prefill"):  # the same pages, in fewer reads
        assert found["auto"][kind]["misses"] == found["off"][kind]["misses"]
    assert found["auto"]["n_reads"] < found["off"]["n_reads"]
    monkeypatch.setenv("EDGEROUTE_SIDECAR", "off")
    with open_paged(model) as paged:
        assert paged.stats()["experts"]["pages_from"] == "model.gguf"


def test_a_model_without_a_sidecar_is_read_itself(
    mine: Path, expected: list[tuple[int, ...]]
) -> None:
    with open_paged(mine) as paged:
        assert answers(paged, 4) == expected
        found = paged.stats()
        assert (found["experts"]["pages_from"], found["experts"]["sidecar"]) == (
            "model.gguf", "none",
        )  # fmt: skip
        assert found["warnings"] == []


def other_weights(model: Path) -> None:
    """The sidecar of a model that was here before, of the same shape and size."""
    beside = sidecar_path(model)
    kept = model.read_bytes()
    synth.write(lab.replace(SPEC, seed=7), model)
    pack(model, replace=True)
    model.write_bytes(kept)
    assert beside.exists()


def truncated(model: Path) -> None:
    os.truncate(sidecar_path(model), sidecar_path(model).stat().st_size - 4096)


def emptied(model: Path) -> None:
    """All of its size, and nothing but holes behind the header."""
    path = sidecar_path(model)
    size = path.stat().st_size
    os.truncate(path, 16384)
    os.truncate(path, size)


def header_broken(model: Path) -> None:
    with sidecar_path(model).open("r+b") as file:
        file.seek(40)
        file.write(b"\xff")


def folder_instead(model: Path) -> None:
    sidecar_path(model).unlink()
    sidecar_path(model).mkdir()


def link_to_nothing(model: Path) -> None:
    sidecar_path(model).unlink()
    sidecar_path(model).symlink_to("gone")


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "stale": (other_weights, "made from another model than model.gguf"),
    "truncated": (truncated, "its header says"),
    "empty": (emptied, "are not those of model.gguf"),
    "header": (header_broken, "its header"),
    "folder": (folder_instead, "is not a regular file"),
    "dangling": (link_to_nothing, "cannot open"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_sidecar_is_refused_with_a_sentence_and_changes_nothing(
    damage: str, mine: Path, expected: list[tuple[int, ...]]
) -> None:
    pack(mine)
    change, reason = DAMAGED[damage]
    change(mine)
    with open_paged(mine) as paged:
        assert answers(paged, 4) == expected
        stats = paged.stats()
        [told] = stats["warnings"]
        assert reason in told and "model.gguf.pages" in told
        assert told.endswith("experts are read from the model itself")
        assert stats["experts"]["warning"] == told and stats["experts"]["sidecar"] == "refused"
        assert stats["experts"]["pages_from"] == "model.gguf"
    with open_paged(mine, sidecar="off") as paged:
        assert paged.stats()["warnings"] == []


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="everything can be read here, rights or not"
)
def test_a_sidecar_that_must_not_be_read_is_refused(mine: Path) -> None:
    pack(mine)
    sidecar_path(mine).chmod(0)
    with open_paged(mine) as paged:
        [told] = paged.stats()["warnings"]
        assert "Permission denied" in told


def test_a_disk_that_fails_while_the_sidecar_is_checked(
    mine: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(mine)
    read_at = DiskFile.read_at

    def broken(disk: DiskFile, offset: int, *buffers: memoryview) -> int:
        if disk.path.suffix == ".pages":
            raise OSError(errno.EIO, "Input/output error")
        return read_at(disk, offset, *buffers)

    monkeypatch.setattr(DiskFile, "read_at", broken)
    with open_paged(mine) as paged:
        assert answers(paged, 4) == expected
        [told] = paged.stats()["warnings"]
        assert "Input/output error" in told


def test_a_refused_sidecar_leaves_no_file_open(mine: Path) -> None:
    pack(mine)
    truncated(mine)
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("only Linux lists open files")
    with open_paged(mine):
        names = [os.readlink(each) for each in folder.iterdir() if each.is_symlink()]
        assert not [name for name in names if name.endswith(".pages")]


def test_a_sidecar_truncated_while_running_is_an_error_and_then_the_model_is_loaded_again(
    mine: Path, expected: list[tuple[int, ...]]
) -> None:
    pack(mine)
    with open_paged(mine) as paged:
        assert answers(paged, 4) == expected
        truncated(mine)
        with pytest.raises(errors.ModelFileError, match=r"\.pages had .*load it again"):
            answers(paged)
    with open_paged(mine) as paged:
        assert answers(paged, 4) == expected
        assert "its header says" in paged.stats()["warnings"][0]


def test_models_that_fit_do_not_look_at_it(mine: Path, expected: list[tuple[int, ...]]) -> None:
    folder_instead(Path(pack(mine).path.with_name(mine.name)))
    with Runtime(mine, **SETTINGS) as resident:
        assert answers(resident, 4) == expected
        assert resident.stats()["warnings"] == []


def test_a_sidecar_that_spares_no_reads_is_left_alone(
    model: Path, expected: list[tuple[int, ...]]
) -> None:
    """Parts of 64 KiB in reads of 64 KiB: three a page either way."""
    for sidecar, state, name in (
        ("auto", "no fewer reads", "model.gguf"), ("on", "used", "model.gguf.pages"),
    ):  # fmt: skip
        with open_paged(model, sidecar=sidecar, read_bytes="64KiB") as paged:
            assert answers(paged, 4) == expected
            stats = paged.stats()
            assert (stats["experts"]["sidecar"], stats["warnings"]) == (state, [])
            assert stats["experts"]["pages_from"] == name


def test_the_setting_takes_three_values(model: Path) -> None:
    with pytest.raises(errors.UsageError, match="sidecar must be one of auto, on, off, got 'yes'"):
        Runtime(model, sidecar="yes", **SETTINGS)


def test_the_command_line_tells_of_a_refused_sidecar(mine: Path) -> None:
    pack(mine)
    truncated(mine)
    budget = lab.smallest_budget(mine) + 8 * lab.MIB
    done = CliRunner().invoke(cli, [
        "generate", "a", "--model", str(mine), "--max-tokens", "2", "--json",
        "--memory", str(budget), "--n-ctx", "512",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "experts are read from the model itself" in done.stderr
    json.loads(done.stdout.splitlines()[-1])
