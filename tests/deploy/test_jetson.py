"""The Jetson recipe: what its script would do on recorded boards, and that its figures agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgeroute.commands.doctor_hardware import _TEGRA
from edgeroute.commands.doctor_install import jetpack

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "jetson"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="a script of Linux, for bash"
)


def dry_run(
    folder: Path, l4t: str = "36", chip: str = "tegra234", free_gib: int = 6, swap_gib: int = 0
) -> subprocess.CompletedProcess[str]:
    """What the script says on a board; it runs nothing."""
    release = f"# R{l4t} (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    (folder / "release").write_text(release)
    (folder / "chip").write_bytes(b"nvidia,p3768-0000\0nvidia," + chip.encode() + b"\0")
    memory = f"MemAvailable:   {free_gib << 20} kB\nSwapFree: {swap_gib << 20} kB\n"
    (folder / "meminfo").write_text(memory)
    given = {name: str(folder / file) for name, file in (
        ("EDGEROUTE_L4T_FILE", "release"), ("EDGEROUTE_CHIP_FILE", "chip"),
        ("EDGEROUTE_MEMORY_FILE", "meminfo"), ("CUDA_HOME", "cuda"))}  # fmt: skip
    return subprocess.run(
        ["bash", str(FOLDER / "install.sh"), "--dry-run", "--prefix", str(folder / "there")],
        env=os.environ | given, capture_output=True, text=True, timeout=30, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_script_is_valid() -> None:
    assert os.access(FOLDER / "install.sh", os.X_OK)
    checked = subprocess.run(["bash", "-n", str(FOLDER / "install.sh")], capture_output=True,
                             text=True, check=False)  # fmt: skip
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("l4t", "chip"), [("36", "tegra234"), ("38", "tegra264"), ("38", "tegra234")]
)
def test_what_is_done_on_a_board(tmp_path: Path, l4t: str, chip: str) -> None:
    done = dry_run(tmp_path, l4t, chip)
    assert done.returncode == 0, done.stderr
    assert f"JetPack {jetpack(l4t)} (L4T R{l4t})" in done.stderr
    assert (
        f"-DGGML_CUDA=ON\\ -DGGML_RPC=ON\\ -DCMAKE_CUDA_ARCHITECTURES={_TEGRA[chip]}" in done.stdout
    )
    assert "--no-binary llama-cpp-python" in done.stdout and "nvidia-jetpack" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("there/bin/edgeroute doctor")
    assert not (tmp_path / "there").exists()
    assert ("-m uv venv" in done.stdout) == (l4t == "36")


def test_the_compiler_that_is_there_is_not_installed_again(tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    done = dry_run(tmp_path)
    assert "nvidia-jetpack" not in done.stdout and f"CUDACXX={nvcc}" in done.stdout


@pytest.mark.parametrize(("free", "swap", "n"), [(5, 0, 2), (1, 0, 1), (2, 8, None), (3, 0, 1)])
def test_as_many_jobs_as_memory_holds(tmp_path: Path, free: int, swap: int, n: int | None) -> None:
    cores = int(subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout)
    done = dry_run(tmp_path, free_gib=free, swap_gib=swap)
    want = min(cores, n if n is not None else (free + swap) // 2)
    assert f"CMAKE_BUILD_PARALLEL_LEVEL={want}" in done.stdout
    assert ("sudo swapon /swapfile" in done.stderr) == (free + swap < 4)


@pytest.mark.parametrize(
    ("l4t", "chip", "words"),
    [("35", "tegra194", "L4T R35 is not known"), ("x", "tegra234", "L4T R? is not known"),
     ("36", "rk3588", "the chip is not known")],
)  # fmt: skip
def test_other_boards_are_refused(tmp_path: Path, l4t: str, chip: str, words: str) -> None:
    done = dry_run(tmp_path, l4t, chip)
    assert done.returncode == 1 and words in done.stderr and not done.stdout


def test_the_python_that_is_taken_is_one_that_edgeroute_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = tuple(map(int, re.findall(r"[0-9]+", project["requires-python"])))
    script = (FOLDER / "install.sh").read_text(encoding="utf-8")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for text in (script, readme):
        (taken,) = set(re.findall(r"--python ([0-9]+)\.([0-9]+)", text))
        assert tuple(map(int, taken)) >= least > (3, 10)  # the system's
    extras = re.search(r"\[([a-z,]+)\]\"", script)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    pinned = [each for each in project["dependencies"] if each.startswith("llama-cpp-python")]
    assert pinned and "llama-cpp-python==" not in script  # the pin is in one place only


def test_readme_and_script_say_the_same() -> None:
    script = (FOLDER / "install.sh").read_text(encoding="utf-8")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for number in _TEGRA.values():
        assert f"architecture={number}" in script and f"({number})" in readme
    for flag in ("-DGGML_CUDA=ON -DGGML_RPC=ON", "--no-binary llama-cpp-python"):
        assert flag in script and flag in readme
