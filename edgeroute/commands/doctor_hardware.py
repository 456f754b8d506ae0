"""What accelerators a machine has, and what is installed to build ggml's backends for them."""

import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.runtime import machine
from edgeroute.runtime.board_files import Run, Tree, run_command

Which = Callable[[str], str | None]
Version = tuple[int, int]

_CUDA_FOLDER: Final = "usr/local/cuda"
_NVIDIA, _AMD, _INTEL = "0x10de", "0x1002", "0x8086"
_TEGRA: Final = {"tegra194": "72", "tegra234": "87", "tegra264": "110"}
"""CUDA architectures by the chip: Xavier, Orin, Thor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine as its system shows it, whatever ggml was built for.

    Attributes:
        system: as `sys.platform`.
        processor: as `platform.machine()`.
        distribution: name and version, such as `debian 12`; empty where there are none.
        nvidia: there is an NVIDIA GPU, or its driver.
        driver: version of NVIDIA's driver.
        driver_cuda: the newest CUDA that the driver runs.
        architectures: CUDA architectures of the GPUs here, such as `89`; `87` for Orin.
        nvcc: version of the CUDA compiler.
        nvcc_path: where it is, if not on the PATH.
        l4t: release of a Jetson's system, such as `36.4`.
        vulkan_loader: libvulkan is here, which programs load.
        vulkan_header: its headers' patch number, such as 275 of 1.3.275; 1000 more per minor
            version beyond 1.3.
        glslc, spirv_headers: what else ggml's Vulkan backend is built with.
        oneapi, rocm: folders of Intel's and AMD's compilers.
        xcode: Apple's command line tools are installed.
        render_nodes: GPUs that the kernel shows.
        vendors: who made them: nvidia, amd, intel.
        cores, memory_bytes: to build with.
    """

    system: str = "linux"
    processor: str = "x86_64"
    distribution: str = ""
    nvidia: bool = False
    driver: str | None = None
    driver_cuda: Version | None = None
    architectures: tuple[str, ...] = ()
    nvcc: Version | None = None
    nvcc_path: str | None = None
    l4t: str | None = None
    vulkan_loader: bool = False
    vulkan_header: int | None = None
    glslc: bool = False
    spirv_headers: bool = False
    oneapi: str | None = None
    rocm: str | None = None
    xcode: bool = False
    apple_gpu: bool = False
    render_nodes: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()
    cores: int = 1
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sight:
    """How a machine is looked at: its files, its programs; or a recorded tree of another one."""

    tree: Tree
    run: Run = run_command
    which: Which = shutil.which
    system: str = sys.platform
    processor: str = platform.machine()


def look(sight: Sight | None = None) -> Hardware:
    """Look at this machine, or at a recorded one."""
    see = sight or Sight(Tree(Path("/")))
    tree, which = see.tree, see.which
    nvcc, nvcc_path = _nvcc(see)
    smi = see.run(["nvidia-smi"]) if which("nvidia-smi") else ""
    l4t = _l4t(see)
    cuda = re.search(r"CUDA Version:\s*([0-9]{1,3})\.([0-9]{1,3})", smi)
    driver = re.search(r"Driver Version:\s*([0-9.]{1,20})", smi)
    vendors = _vendors(tree)
    return Hardware(
        system=see.system, processor=see.processor, distribution=_distribution(tree),
        nvidia=bool(smi or l4t or "nvidia" in vendors or tree.exists("proc/driver/nvidia/version")),
        driver=driver[1] if driver else None,
        driver_cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        architectures=_architectures(see, l4t is not None), nvcc=nvcc, nvcc_path=nvcc_path, l4t=l4t,
        vulkan_loader=_has_library(tree, "libvulkan.so.1"), vulkan_header=_vulkan_header(tree),
        glslc=which("glslc") is not None,
        spirv_headers=tree.exists("usr/include/spirv/unified1/spirv.hpp"),
        oneapi="/opt/intel/oneapi" if tree.exists("opt/intel/oneapi/setvars.sh") else None,
        rocm="/opt/rocm" if tree.exists("opt/rocm/bin/hipconfig") else None,
        xcode=see.system == "darwin" and bool(see.run(["xcode-select", "-p"]).strip()),
        apple_gpu=see.system == "darwin" and see.processor == "arm64",
        render_nodes=tuple(f"/{each}" for each in tree.glob("dev/dri/renderD*")), vendors=vendors,
        cores=machine.usable_cores(), memory_bytes=machine.memory().available_bytes,
    )  # fmt: skip


def _distribution(tree: Tree) -> str:
    text = tree.text("etc/os-release")
    words = [re.search(rf'^{key}="?([\w.-]{{1,40}})"?\s*$', text, re.M)
             for key in ("ID", "VERSION_ID")]  # fmt: skip
    return " ".join(found[1] for found in words if found)


def _nvcc(see: Sight) -> tuple[Version | None, str | None]:
    """Find the CUDA compiler: on the PATH, or where NVIDIA's packages put it."""
    path = None
    program = "nvcc"
    if see.which("nvcc") is None:
        if not see.tree.exists(f"{_CUDA_FOLDER}/bin/nvcc"):
            return None, None
        program = path = f"/{_CUDA_FOLDER}/bin/nvcc"
    found = re.search(r"release ([0-9]{1,3})\.([0-9]{1,3})", see.run([program, "--version"]))
    return ((int(found[1]), int(found[2])) if found else (0, 0)), path


def _l4t(see: Sight) -> str | None:
    """Read the release of a Jetson's system: from its file, else from its package."""
    text = see.tree.text("etc/nv_tegra_release")
    found = re.search(r"R([0-9]{1,3}) \(release\), REVISION: ([0-9]{1,3})", text)
    if found is None and "tegra" in see.tree.text("proc/device-tree/compatible"):
        asked = ["dpkg-query", "-W", "-f", "${Version}", "nvidia-l4t-core"]
        found = re.match(r"([0-9]{1,3})\.([0-9]{1,3})", see.run(asked))
    return f"{found[1]}.{found[2]}" if found else None


def _architectures(see: Sight, jetson: bool) -> tuple[str, ...]:
    if jetson:
        chips = see.tree.text("proc/device-tree/compatible")
        return tuple(number for chip, number in _TEGRA.items() if chip in chips)
    if see.which("nvidia-smi") is None:
        return ()
    listed = see.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return tuple(sorted({f"{a}{b}" for a, b in re.findall(r"^([0-9]{1,2})\.([0-9])\s*$", listed,
                                                          re.M)}))  # fmt: skip


def _vulkan_header(tree: Tree) -> int | None:
    """Read which version Vulkan's headers are of."""
    text = tree.text("usr/include/vulkan/vulkan_core.h")
    patch = re.search(r"^#define VK_HEADER_VERSION ([0-9]{1,4})", text, re.M)
    whole = re.search(r"VK_MAKE_API_VERSION\(0, 1, ([0-9]{1,2}), VK_HEADER_VERSION\)", text)
    if patch is None:
        return None
    minor = int(whole[1]) if whole else 3
    return int(patch[1]) + 1000 * max(0, minor - 3)


def _has_library(tree: Tree, name: str) -> bool:
    return any(tree.glob(f"{folder}/{name}") for folder in ("usr/lib/*", "usr/lib64", "usr/lib"))


def _vendors(tree: Tree) -> tuple[str, ...]:
    names = {_NVIDIA: "nvidia", _AMD: "amd", _INTEL: "intel"}
    cards = [each for each in tree.glob("sys/class/drm/card*") if re.search(r"card[0-9]+$", each)]
    found = (names.get(tree.line(f"{card}/device/vendor").lower()) for card in cards)
    return tuple(dict.fromkeys(each for each in found if each))
