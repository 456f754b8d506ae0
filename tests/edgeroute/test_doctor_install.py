"""What the doctor advises to install, from recorded trees of machines with accelerators."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeroute.commands.doctor_hardware import Hardware, Sight, look
from edgeroute.commands.doctor_install import Missing, install, jetpack, missing_gpu, n_jobs
from edgeroute.runtime.board_files import Tree

SMI = """
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
"""
NVCC = "Cuda compilation tools, release {}, V{}.85\n"
VULKAN_H = """#define VK_HEADER_VERSION {}
#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, {}, VK_HEADER_VERSION)
"""
ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
    "etc/os-release": 'NAME="Ubuntu"\nVERSION_ID="22.04"\nID=ubuntu\n',
    "usr/local/cuda/bin/nvcc": "",
}
DEBIAN = {"etc/os-release": 'ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n'}
AMD = {"sys/class/drm/card1/device/vendor": "0x1002\n", "dev/dri/renderD128": ""}
INTEL = {"sys/class/drm/card0/device/vendor": "0x8086\n", "dev/dri/renderD128": ""}
READY = {
    "usr/lib/x86_64-linux-gnu/libvulkan.so.1": "", "usr/include/spirv/unified1/spirv.hpp": "",
    "usr/include/vulkan/vulkan_core.h": VULKAN_H.format(275, 3),
}  # fmt: skip


def seen(
    root: Path, files: Mapping[str, str], programs: Mapping[str, str] | None = None, **more: str
) -> Hardware:
    """Look at a recorded machine; `programs` are on its PATH and print what is given."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    known = programs or {}

    def run(command: Sequence[str]) -> str:
        given = known.get(" ".join(command[:2]), known.get(command[0], ""))
        return given or known.get(Path(command[0]).name, "")

    def which(name: str) -> str | None:
        return f"/usr/bin/{name}" if name in known else None

    settings: dict[str, Any] = {"system": "linux", "processor": "x86_64"} | more
    return look(Sight(Tree(root), run, which, **settings))


def advice(hardware: Hardware) -> Missing:
    (found,) = missing_gpu(hardware)
    assert "llama-cpp-python==" in found.command and "-DGGML_RPC=ON" in found.command
    assert "--no-binary llama-cpp-python" in found.command
    return found


def test_nothing_is_advised_without_a_gpu(tmp_path: Path) -> None:
    assert missing_gpu(seen(tmp_path, DEBIAN)) == []


def test_a_pc_with_cuda_and_its_compiler(tmp_path: Path) -> None:
    programs = {"nvidia-smi": SMI, "nvidia-smi --query-gpu=compute_cap": "8.9\n9.0\n8.9\n",
                "nvcc": NVCC.format("12.4", "12.4")}  # fmt: skip
    found = seen(tmp_path, DEBIAN, programs)
    assert (found.driver, found.driver_cuda, found.nvcc) == ("550.54.15", (12, 4), (12, 4))
    assert found.architectures == ("89", "90") and found.distribution == "debian 12"
    told = advice(found)
    assert told.what == "CUDA" and told.why.endswith("ggml was built without CUDA")
    flags = '"-DGGML_CUDA=ON -DGGML_RPC=ON -DCMAKE_CUDA_ARCHITECTURES=89;90"'
    assert told.command.startswith(f"CMAKE_ARGS={flags} CMAKE_BUILD_PARALLEL_LEVEL=")


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "sudo apt-get install -y cuda-toolkit-12-4 && CUDACXX="),
        ("ID=fedora\nVERSION_ID=42\n", "sudo dnf install -y cuda-toolkit-12-4 && "),
        ("ID=arch\n", "sudo pacman -S --needed cuda && "),
        ("ID=gentoo\n", ": install cuda-toolkit-12-4 as NVIDIA says"),
    ],
)
def test_a_pc_without_the_cuda_compiler(tmp_path: Path, system: str, words: str) -> None:
    told = advice(seen(tmp_path, {"etc/os-release": system}, {"nvidia-smi": SMI}))
    assert "nvcc is not installed" in told.why and told.command.startswith(words)


@pytest.mark.parametrize(
    ("nvcc", "capability", "words"),
    [
        ("13.0", "8.9", "CUDA 13.0 is newer than what driver 550.54.15 runs (up to 12.4)"),
        ("12.4", "12.0", "the GPU (architecture 120) needs CUDA 12.8 or newer, here is 12.4"),
        ("11.5", "8.9", "needs CUDA 11.8 or newer, here is 11.5"),
    ],
)
def test_what_does_not_go_together_is_told(
    tmp_path: Path, nvcc: str, capability: str, words: str
) -> None:
    programs = {"nvidia-smi": SMI, "nvidia-smi --query-gpu=compute_cap": f"{capability}\n",
                "nvcc": NVCC.format(nvcc, nvcc)}  # fmt: skip
    assert words in advice(seen(tmp_path, DEBIAN, programs)).why


@pytest.mark.parametrize(
    ("chip", "number"), [("tegra194", "72"), ("tegra234", "87"), ("tegra264", "110")]
)
def test_a_jetson(tmp_path: Path, chip: str, number: str) -> None:
    files = ORIN | {"proc/device-tree/compatible": f"nvidia,p3768\0nvidia,{chip}\0"}
    found = seen(tmp_path, files, {"/usr/local/cuda/bin/nvcc": NVCC.format("13.0", "13.0")})
    assert found.l4t == "36.4" and found.nvidia and found.architectures == (number,)
    told = advice(found)
    assert "this Jetson (L4T 36.4, JetPack 6) has a CUDA GPU" in told.why
    assert told.command.startswith("CUDACXX=/usr/local/cuda/bin/nvcc CMAKE_ARGS=")
    assert f"-DCMAKE_CUDA_ARCHITECTURES={number}" in told.command
    assert "CMAKE_BUILD_PARALLEL_LEVEL=" in told.command


def test_a_jetson_without_its_toolkit_or_release_file(tmp_path: Path) -> None:
    files = {name: text for name, text in ORIN.items() if "nvcc" not in name and "nv_" not in name}
    found = seen(tmp_path, files, {"dpkg-query": "38.2.0-20250821174705"})
    assert found.l4t == "38.2" and jetpack(found.l4t) == "7"
    told = advice(found)
    assert "sudo apt-get install -y nvidia-jetpack && CUDACXX=" in told.command


def test_few_jobs_where_memory_is_short() -> None:
    small = Hardware(cores=6, memory_bytes=7 << 30, nvidia=True, architectures=("87",))
    assert n_jobs(small) == 3 and "CMAKE_BUILD_PARALLEL_LEVEL=3 " in install(small, "CUDA", "RPC")
    assert n_jobs(Hardware(cores=6, memory_bytes=1 << 30)) == 1
    assert n_jobs(Hardware(cores=2, memory_bytes=64 << 30)) == 2


def test_vulkan_where_its_headers_are_new_enough(tmp_path: Path) -> None:
    found = seen(tmp_path, AMD | READY, {"glslc": ""})
    assert found.vulkan_header == 275 and found.vendors == ("amd",)
    told = advice(found)
    assert told.what == "Vulkan" and told.command.startswith('CMAKE_ARGS="-DGGML_VULKAN=ON ')
    newer = READY | {"usr/include/vulkan/vulkan_core.h": VULKAN_H.format(4, 5)}
    assert seen(tmp_path, newer).vulkan_header == 2004


@pytest.mark.parametrize("patch", [239, None])
def test_vulkan_where_its_headers_are_too_old(tmp_path: Path, patch: int | None) -> None:
    """Debian 12's are, installed or not."""
    files = AMD | DEBIAN
    if patch is not None:
        files = files | {"usr/include/vulkan/vulkan_core.h": VULKAN_H.format(patch, 3)}
    told = advice(seen(tmp_path, files, {"glslc": ""}))
    assert "too old for this ggml, which needs 1.3.272" in told.why and "debian 12" in told.why
    assert ("1.3.239" in told.why) == (patch is not None)
    assert told.command.startswith(". ~/vulkan/*/setup-env.sh && ")


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ('ID=ubuntu\nVERSION_ID="24.04"\n', "sudo apt-get install -y libvulkan-dev glslc"),
        ("ID=fedora\n", "sudo dnf install -y vulkan-loader-devel"),
        ("ID=nixos\n", ": install the Vulkan SDK of LunarG && "),
    ],
)
def test_vulkan_where_it_is_not_installed(tmp_path: Path, system: str, words: str) -> None:
    told = advice(seen(tmp_path, AMD | {"etc/os-release": system}))
    assert told.why.endswith("not installed: libvulkan, glslc, Vulkan headers, SPIR-V headers")
    assert told.command.startswith(words)


def test_rocm_and_oneapi_where_they_are(tmp_path: Path) -> None:
    rocm = seen(tmp_path / "a", AMD | {"opt/rocm/bin/hipconfig": ""})
    assert advice(rocm).what == "HIP" and "-DGGML_HIP=ON" in advice(rocm).command
    oneapi = seen(tmp_path / "b", INTEL | {"opt/intel/oneapi/setvars.sh": ""})
    told = advice(oneapi)
    assert told.what == "SYCL" and told.command.startswith(". /opt/intel/oneapi/setvars.sh && ")
    assert "-DGGML_SYCL=ON -DGGML_RPC=ON -DCMAKE_C_COMPILER=icx" in told.command


@pytest.mark.parametrize("tools", [True, False])
def test_a_mac(tmp_path: Path, tools: bool) -> None:
    programs = {"xcode-select": "/Library/Developer/CommandLineTools\n" if tools else ""}
    found = seen(tmp_path, {}, programs, system="darwin", processor="arm64")
    told = advice(found)
    assert told.what == "Metal" and "-DGGML_METAL=ON -DGGML_RPC=ON" in told.command
    assert told.command.startswith("xcode-select --install && ") == (not tools)


def test_windows_quotes_otherwise() -> None:
    command = install(Hardware(system="win32", nvidia=True), "CUDA", "RPC")
    assert command.startswith('set "CMAKE_ARGS=-DGGML_CUDA=ON -DGGML_RPC=ON" && ')


def test_rubbish_in_files_is_no_version(tmp_path: Path) -> None:
    files = {
        "etc/nv_tegra_release": "R36 (re", "etc/os-release": "ID=\x00\nVERSION_ID=$(reboot)\n",
        "usr/include/vulkan/vulkan_core.h": "#define VK_HEADER_VERSION x",
        "usr/local/cuda/bin/nvcc": "",
    }  # fmt: skip
    found = seen(tmp_path, files, {"nvidia-smi": "CUDA Version: x"})
    assert (found.l4t, found.vulkan_header, found.distribution) == (None, None, "")
    assert found.nvcc == (0, 0) and found.driver_cuda is None
