"""What to install so that ggml uses a machine's accelerators: exact commands for that machine."""

import importlib.metadata
import sys
from dataclasses import dataclass
from typing import Final

from edgeroute.commands.doctor_hardware import Hardware, Version
from edgeroute.runtime.ggml.lib import REMEDY

LEAST_VULKAN_HEADER: Final = 272
"""ggml's Vulkan backend names vk::LayerSettingTypeEXT, which headers have from 1.3.272 on: with
Debian 12's, 1.3.239, it does not compile."""
JOB_BYTES: Final = 2 << 30
"""Memory of one compilation of a CUDA file, about."""
_LEAST_NVCC: Final[dict[str, Version]] = {
    "87": (11, 4), "89": (11, 8), "90": (11, 8), "100": (12, 8), "110": (13, 0), "120": (12, 8),
    "121": (12, 9),
}  # fmt: skip
"""The first CUDA that compiles for an architecture."""
_OLD_HEADERS: Final = ("debian 11", "debian 12", "ubuntu 20.04", "ubuntu 22.04")
_VULKAN_PACKAGES: Final = {
    "debian": "sudo apt-get install -y libvulkan-dev glslc spirv-headers",
    "ubuntu": "sudo apt-get install -y libvulkan-dev glslc spirv-headers",
    "fedora": "sudo dnf install -y vulkan-loader-devel vulkan-headers glslc spirv-headers-devel",
    "arch": "sudo pacman -S --needed vulkan-icd-loader vulkan-headers shaderc spirv-headers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What a machine could have and has not: why, and the command that brings it."""

    what: str
    why: str
    command: str


def missing_gpu(hardware: Hardware) -> list[Missing]:
    """Say how ggml's backend for the GPU of this machine is built; nothing where there is none."""
    if hardware.apple_gpu:
        return [_metal(hardware)]
    if hardware.nvidia:
        return [_cuda(hardware)]
    if not hardware.render_nodes:
        return []
    if hardware.rocm and "amd" in hardware.vendors:
        return [_hip(hardware)]
    if hardware.oneapi and "intel" in hardware.vendors:
        return [_sycl(hardware)]
    return [_vulkan(hardware)]


def _metal(hardware: Hardware) -> Missing:
    why = "this Mac has a GPU, and ggml was built without Metal"
    command = install(hardware, "METAL", "RPC")
    if hardware.xcode:
        return Missing(what="Metal", why=why, command=command)
    return Missing(what="Metal", why=f"{why}; Apple's command line tools are not installed",
                   command=f"xcode-select --install && {command}")  # fmt: skip


def _cuda(hardware: Hardware) -> Missing:
    """Build for CUDA; on a Jetson for its chip, and with few jobs at once."""
    reasons = ["there is an NVIDIA GPU, and ggml was built without CUDA"]
    if hardware.l4t:
        reasons = [f"this Jetson (L4T {hardware.l4t}, JetPack {jetpack(hardware.l4t)}) has a CUDA "
                   "GPU, and ggml was built without CUDA"]  # fmt: skip
    command = install(hardware, "CUDA", "RPC")
    if hardware.nvcc is None:
        reasons.append("nvcc is not installed: the CUDA toolkit comes first")
        command = f"{_toolkit(hardware)} && {_with_nvcc(command)}"
    else:
        reasons += _mismatches(hardware, hardware.nvcc)
        if hardware.nvcc_path:
            command = _with_nvcc(command, hardware.nvcc_path)
    return Missing(what="CUDA", why="; ".join(reasons), command=command)


def _mismatches(hardware: Hardware, nvcc: Version) -> list[str]:
    """Say what does not go together of the driver, the compiler and the GPU."""
    found = []
    driver = hardware.driver_cuda
    if driver is not None and nvcc[0] > driver[0]:
        found.append(f"CUDA {_dotted(nvcc)} is newer than what driver {hardware.driver} runs (up "
                     f"to {_dotted(driver)}): take a newer driver or CUDA {driver[0]}")  # fmt: skip
    for each in hardware.architectures:
        least = _LEAST_NVCC.get(each, (0, 0))
        if nvcc < least:
            found.append(f"the GPU (architecture {each}) needs CUDA {_dotted(least)} or newer, "
                         f"here is {_dotted(nvcc)}")  # fmt: skip
    return found


def _toolkit(hardware: Hardware) -> str:
    """The command that installs the CUDA toolkit, no newer than the driver runs."""
    if hardware.l4t:
        return "sudo apt-get update && sudo apt-get install -y nvidia-jetpack"
    name = "cuda-toolkit"
    if hardware.driver_cuda is not None:
        name += "-{}-{}".format(*hardware.driver_cuda)
    if hardware.distribution.startswith(("debian", "ubuntu")):
        return f"sudo apt-get install -y {name}"  # of NVIDIA's repository
    if hardware.distribution.startswith(("fedora", "rhel", "rocky", "almalinux")):
        return f"sudo dnf install -y {name}"
    if hardware.distribution.startswith("arch"):
        return "sudo pacman -S --needed cuda"
    return f": install {name} as NVIDIA says for this system"


def _with_nvcc(command: str, path: str = "/usr/local/cuda/bin/nvcc") -> str:
    return f"CUDACXX={path} {command}"


def _hip(hardware: Hardware) -> Missing:
    return Missing(
        what="HIP", why="there is an AMD GPU and ROCm, and ggml was built without HIP",
        command=f'HIPCXX="$({hardware.rocm}/bin/hipconfig -l)/clang" '
        f'HIP_PATH="$({hardware.rocm}/bin/hipconfig -R)" {install(hardware, "HIP", "RPC")}',
    )  # fmt: skip


def _sycl(hardware: Hardware) -> Missing:
    more = ("-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx")
    return Missing(
        what="SYCL", why="there is an Intel GPU and oneAPI, and ggml was built without SYCL",
        command=f". {hardware.oneapi}/setvars.sh && {install(hardware, 'SYCL', 'RPC', more=more)}",
    )  # fmt: skip


def _vulkan(hardware: Hardware) -> Missing:
    """Build for Vulkan, which every GPU with a driver has; its headers may be too old."""
    why = f"{hardware.render_nodes[0]} is a GPU, and ggml was built without Vulkan"
    build = install(hardware, "VULKAN", "RPC")
    header = hardware.vulkan_header
    name, distribution = hardware.distribution.partition(" ")[0], hardware.distribution
    old = header is not None and header < LEAST_VULKAN_HEADER
    if old or (header is None and distribution.startswith(_OLD_HEADERS)):
        has = f"{distribution or 'this system'}'s Vulkan headers"
        has += f", 1.3.{header}," if old else ""
        return Missing(
            what="Vulkan", why=f"{why}; {has} are too old for this ggml, which needs "
            f"1.3.{LEAST_VULKAN_HEADER}: take the Vulkan SDK of LunarG, unpacked in ~/vulkan",
            command=f". ~/vulkan/*/setup-env.sh && {build}",
        )  # fmt: skip
    lacks = [
        what for what, there in (("libvulkan", hardware.vulkan_loader), ("glslc", hardware.glslc),
                                 ("Vulkan headers", header is not None),
                                 ("SPIR-V headers", hardware.spirv_headers)) if not there
    ]  # fmt: skip
    if not lacks:
        return Missing(what="Vulkan", why=why, command=build)
    packages = _VULKAN_PACKAGES.get(name)
    first = packages or ": install the Vulkan SDK of LunarG"
    return Missing(what="Vulkan", why=f"{why}; not installed: {', '.join(lacks)}",
                   command=f"{first} && {build}")  # fmt: skip


def jetpack(l4t: str) -> str:
    """Name the JetPack of a release of L4T."""
    return {"32": "4", "35": "5", "36": "6", "38": "7"}.get(l4t.partition(".")[0], "unknown")


def install(hardware: Hardware, *backends: str, more: tuple[str, ...] = ()) -> str:
    """The command that builds llama-cpp-python again, with these backends."""
    flags = [f"-DGGML_{name}=ON" for name in backends]
    if "CUDA" in backends and hardware.architectures:
        flags.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(hardware.architectures)}")
    text = " ".join([*flags, *more])
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    pip = (f"{python} -m pip install --force-reinstall --no-cache-dir --no-deps "
           f'--no-binary llama-cpp-python "llama-cpp-python{requirement()}"')  # fmt: skip
    if hardware.system == "win32":
        return f'set "CMAKE_ARGS={text}" && {pip}'
    jobs = f"CMAKE_BUILD_PARALLEL_LEVEL={n_jobs(hardware)} " if "CUDA" in backends else ""
    return f'CMAKE_ARGS="{text}" {jobs}{pip}'


def n_jobs(hardware: Hardware) -> int:
    """Compilations at once that memory and cores have room for."""
    return max(1, min(hardware.cores, hardware.memory_bytes // JOB_BYTES))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def requirement() -> str:
    """The version of llama-cpp-python that is here, or the range that edgeroute asks for."""
    version = package_version()
    return f"=={version}" if version else REMEDY.rpartition("llama-cpp-python")[2].strip("'")


def package_version() -> str | None:
    """Version of llama-cpp-python; None where only its libraries are here."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
