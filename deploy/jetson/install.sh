#!/usr/bin/env bash
# Installs edgeroute on a Jetson with ggml's CUDA and RPC backends, built on the board itself.
#
#   deploy/jetson/install.sh                  into ~/edgeroute
#   deploy/jetson/install.sh --prefix /opt/edgeroute
#   deploy/jetson/install.sh --dry-run        says what it would do
#
# It asks for sudo where packages are missing. Run again after another JetPack: ggml is built anew.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
prefix=$HOME/edgeroute
dry=false
# Where the board describes itself; tests put recorded files in their place.
release_file=${EDGEROUTE_L4T_FILE:-/etc/nv_tegra_release}
chip_file=${EDGEROUTE_CHIP_FILE:-/proc/device-tree/compatible}
memory_file=${EDGEROUTE_MEMORY_FILE:-/proc/meminfo}
cuda=${CUDA_HOME:-/usr/local/cuda}

say() { printf '%s\n' "$*" >&2; }
fail() { say "install.sh: $*"; exit 1; }
run() {
    printf '+'; printf ' %q' "$@"; printf '\n'
    if ! $dry; then "$@"; fi
}

while [ $# -gt 0 ]; do
    case $1 in
        --prefix) [ $# -gt 1 ] || fail "--prefix needs a folder"; prefix=$2; shift 2 ;;
        --dry-run) dry=true; shift ;;
        *) fail "unknown option $1; there are --prefix DIR and --dry-run" ;;
    esac
done

# Which board, which JetPack.
[ -r "$release_file" ] || fail "no $release_file: this is no Jetson, use pip as README.md says"
l4t=$(sed -n 's/^# R\([0-9]*\) (release).*/\1/p' "$release_file" | head -n 1)
case $l4t in
    36) jetpack=6 ;;
    38) jetpack=7 ;;
    *) fail "L4T R${l4t:-?} is not known here; this script is for R36 (JetPack 6) and R38 (JetPack 7)" ;;
esac
chips=$(tr '\0' '\n' < "$chip_file")
case $chips in
    *tegra264*) board=Thor; architecture=110 ;;
    *tegra234*) board=Orin; architecture=87 ;;
    *tegra194*) board=Xavier; architecture=72 ;;
    *) fail "the chip is not known here: $chips" ;;
esac
say "JetPack $jetpack (L4T R$l4t) on $board"

# How much is compiled at once: a CUDA file takes up to 2 GiB.
kib() { sed -n "s/^$1: *\([0-9]*\) kB/\1/p" "$memory_file"; }
room=$(( ($(kib MemAvailable) + $(kib SwapFree)) / 1048576 ))
jobs=$(( room / 2 ))
cores=$(nproc)
if [ "$jobs" -gt "$cores" ]; then jobs=$cores; fi
if [ "$jobs" -lt 1 ]; then jobs=1; fi
say "$room GiB of memory and swap are free: $jobs compilations at once"
if [ "$room" -lt 4 ]; then
    say "that is little; a swap file helps while building:"
    say "  sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile"
    say "  sudo mkswap /swapfile && sudo swapon /swapfile"
fi

# Packages of the system.
packages=(build-essential cmake git)
if [ "$jetpack" = 6 ]; then packages+=(python3-pip); else packages+=(python3-venv); fi
[ -x "$cuda/bin/nvcc" ] || packages+=(nvidia-jetpack)
run sudo apt-get update
run sudo apt-get install -y --no-install-recommends "${packages[@]}"

# A Python that edgeroute runs on: Ubuntu 22.04 of JetPack 6 has 3.10, which is too old.
if [ "$jetpack" = 6 ]; then
    run python3 -m pip install --user uv
    run python3 -m uv venv --seed --python 3.12 "$prefix"
else
    run python3 -m venv "$prefix"
fi

# The versions are those of pyproject.toml; only the compiled part is named, to be built here.
run env CUDACXX="$cuda/bin/nvcc" CMAKE_BUILD_PARALLEL_LEVEL="$jobs" \
    CMAKE_ARGS="-DGGML_CUDA=ON -DGGML_RPC=ON -DCMAKE_CUDA_ARCHITECTURES=$architecture" \
    "$prefix/bin/python" -m pip install --no-cache-dir --no-binary llama-cpp-python \
    "$here[serve,energy]"

run "$prefix/bin/edgeroute" doctor
