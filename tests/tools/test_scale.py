"""A device's speeds from its figures: shares, modes, bounds; and against published runs."""

import math
from dataclasses import dataclass, replace

import pytest

from edgeroute.offload.throttle import Point, Throttle
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.forecast import scale
from edgeroute.tools.forecast.devices import load_devices
from edgeroute.tools.forecast.records import PowerMode, Speeds, StoragePoint
from edgeroute.tools.forecast.scale import MOST_RATIO, reference, speeds_of
from edgeroute.tools.measure import MemoryBandwidth

GB = 10**9
DEVICES = load_devices()
HERE = Speeds(
    name="here", memory_bytes=16 * GB, available_bytes=12 * GB,
    weight_bytes_s={"Q4_K": 10 * GB, "Q6_K": 5 * GB, "F16": 18 * GB},
    prefill_flops_s={"Q4_K": 200 * GB, "F16": 100 * GB}, kv_bytes_s=8 * GB,
    graph_s=0.0003, layer_s=0.00001, paged_layer_s=0.0001,
    storage=(StoragePoint(read_bytes=1 << 20, depth=1, bytes_s=1 * GB),), threads=2,
)  # fmt: skip


def test_a_published_share_decides_and_types_keep_their_order() -> None:
    device = replace(DEVICES["rpi5-8gb-sd"], memory_bytes_s=20e9, decode_ratio=0.5, flops_s=1e11)
    found = speeds_of(device, HERE)
    # The share is that of a Q4_K_M file, 30 % of which are Q6_K: here 1 / (0.07 + 0.06) GB/s.
    assert found.weight_bytes_s["Q4_K"] == pytest.approx(13e9)
    assert found.weight_bytes_s["Q6_K"] == pytest.approx(6.5e9)
    file_s = 0.7 / found.weight_bytes_s["Q4_K"] + 0.3 / found.weight_bytes_s["Q6_K"]
    assert 1 / file_s == pytest.approx(10e9)
    assert found.prefill_flops_s == {"Q4_K": pytest.approx(1e11), "F16": pytest.approx(5e10)}
    assert found.kv_bytes_s == pytest.approx(10.4e9)
    assert found.layer_s == HERE.layer_s and found.paged_layer_s == HERE.paged_layer_s
    assert found.available_bytes == device.memory_bytes - device.system_bytes
    assert found.threads == 4 and found.storage == device.storage
    assert found.origins["weight_bytes_s"] == "computed"
    assert found.origins["storage"] == "stated"


def test_nothing_reads_faster_than_memory_gives() -> None:
    device = replace(DEVICES["rpi5-8gb-sd"], memory_bytes_s=20e9, decode_ratio=0.9)
    assert speeds_of(device, HERE).weight_bytes_s["F16"] == pytest.approx(MOST_RATIO * 20e9)


def test_without_a_published_share_it_is_that_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = replace(DEVICES["rpi5-8gb-sd"], memory_bytes_s=20e9, decode_ratio=None)
    found = speeds_of(device, HERE, memory_bytes_s=25e9)
    assert found.weight_bytes_s["Q4_K"] == pytest.approx(20e9 * 10 / 25)
    assert "0.31 of 18.6 GiB/s, as" in found.notes[0]

    def measured(n_threads: int) -> MemoryBandwidth:
        assert n_threads == HERE.threads
        return MemoryBandwidth(read_bytes_s=50e9, copy_bytes_s=1, n_threads=2, array_bytes=1,
                               passes=2)  # fmt: skip

    monkeypatch.setattr(scale, "memory_bandwidth", measured)
    assert speeds_of(device, HERE).weight_bytes_s["Q4_K"] == pytest.approx(4e9)
    alone = replace(HERE, weight_bytes_s={"Q4_0": 10 * GB, "Q8_0": 12 * GB})
    found = speeds_of(device, alone, memory_bytes_s=25e9)
    assert found.weight_bytes_s["Q4_0"] == pytest.approx(8e9)


def test_a_gpu_waits_for_memory_whatever_the_type() -> None:
    device = replace(DEVICES["orin-nano-8gb-super"], memory_bytes_s=100e9, decode_ratio=0.4,
                     flops_s=2e12, layer_s=0.0001)  # fmt: skip
    found = speeds_of(device, HERE)
    assert list(found.weight_bytes_s.values()) == pytest.approx([40e9] * len(found.weight_bytes_s))
    assert {"Q8_0", "Q4_0", *HERE.weight_bytes_s} <= found.weight_bytes_s.keys()
    assert set(found.prefill_flops_s.values()) == {2e12}
    assert found.layer_s == 0.0001
    assert found.paged_layer_s == pytest.approx(HERE.paged_layer_s + 0.0001)
    assert speeds_of(replace(device, layer_s=None), HERE).layer_s == scale.GPU_LAYER_S


def test_a_power_mode_takes_its_share() -> None:
    mode = PowerMode(name="15W", watts=15, compute_ratio=0.5, memory_ratio=0.6)
    device = replace(DEVICES["orin-nano-8gb-super"], power_modes=(mode,), active_watts=20.0,
                     idle_watts=6.0)  # fmt: skip
    whole, part = speeds_of(device, HERE), speeds_of(device, HERE, "15w")
    assert part.weight_bytes_s["Q4_K"] == pytest.approx(0.6 * whole.weight_bytes_s["Q4_K"])
    assert part.prefill_flops_s["Q4_K"] == pytest.approx(0.5 * whole.prefill_flops_s["Q4_K"])
    assert part.layer_s == pytest.approx(2 * whole.layer_s)
    assert whole.active_watts == pytest.approx(20) and part.active_watts == pytest.approx(13)
    assert part.name == "orin-nano-8gb-super in 15W"
    low = replace(device, power_modes=(replace(mode, watts=10.0),))
    assert speeds_of(low, HERE, "15W").active_watts == pytest.approx(10)
    with pytest.raises(UsageError, match="no power mode 'MAXN'"):
        speeds_of(device, HERE, "MAXN")


def test_types_that_were_not_measured_here_do_no_harm() -> None:
    odd = replace(HERE, weight_bytes_s={"IQ3_S": 3e9, "TQ2_0": 5e9, "F32": 9e9},
                  prefill_flops_s={"F32": 1e9})  # fmt: skip
    found = speeds_of(DEVICES["rpi5-8gb-sd"], odd)
    reference = DEVICES["rpi5-8gb-sd"]
    assert found.weight_bytes_s["TQ2_0"] == pytest.approx(0.6 * reference.memory_bytes_s)


def test_what_is_guessed_is_said() -> None:
    timed = replace(HERE, expert_layer_s=0.002, overlap_ratio=0.3)
    found = speeds_of(DEVICES["orin-nano-8gb-super"], timed)
    assert (found.expert_layer_s, found.overlap_ratio) == (0.002, 0.3)
    notes = " ".join(speeds_of(DEVICES["orin-nano-8gb-super"], HERE).notes)
    assert "estimates of the profile: active_watts, flops_s, idle_watts, storage" in notes
    assert "realizar/issues/120" in notes and "power mode MAXN_SUPER" in notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A run that somebody published, of a model whose bytes per token are known.

    `resident` and `routed` are GB that a token goes through, `miss` the share of the routed ones
    that is read from storage, in reads of `read_bytes`, `depth` at once.
    """

    device: str
    tok_s: float
    resident: float
    layers: int
    routed: float = 0.0
    miss: float = 0.0
    read_bytes: int = 1 << 20
    depth: int = 4
    mode: str | None = None
    prompt_tok_s: float = 0.0
    billions: float = 0.0


PUBLISHED = {
    # Qwen2.5-Coder-1.5B Q4_K_M, llama.cpp: github.com/paiml/realizar/issues/120
    "orin nano, 1.5B": Published(device="orin-nano-8gb-super", tok_s=32.1, resident=1.117,
                                 layers=28),
    # SmolLM2-135M Q4_K_M: smolhub.com/posts/jetson-nano-super-benchmark-non-reasoning
    "orin nano 25W, 135M": Published(device="orin-nano-8gb-super", tok_s=165, resident=0.101,
                                     layers=30, mode="25W"),
    # Llama-3.2-3B Q4_K_M, Ollama: WayfindR-driver/docs/jetson_orin_nano_llm_benchmarks.md
    "orin nano 25W, 3B": Published(device="orin-nano-8gb-super", tok_s=30, resident=2.02,
                                   layers=28, mode="25W"),
    # Llama-2-7B 4 bit, llama.cpp: github.com/nvidia-holoscan/holohub/issues/170
    "agx orin, 7B": Published(device="agx-orin-64gb", tok_s=22.5, resident=3.8, layers=32),
    # Gemma-4-12B Q4_0 at 2048 tokens, llama.cpp: github.com/NVIDIA-AI-IOT/jetson-ai-lab/pull/411
    "agx orin, 12B": Published(device="agx-orin-64gb", tok_s=11, resident=6.9, layers=48),
    "thor, 12B": Published(device="thor-t5000", tok_s=18, resident=6.9, layers=48),
    # Llama-3.2-3B and 3.1-8B Q4_K_M, Ollama: github.com/geerlingguy/ai-benchmarks/issues/7
    "rpi 5, 3B": Published(device="rpi5-16gb-nvme", tok_s=4.88, resident=2.02, layers=28),
    "rpi 5, 8B": Published(device="rpi5-16gb-nvme", tok_s=2.17, resident=4.92, layers=32),
    # Llama-3.1-8B Q4_K_M, llama.cpp: github.com/brand-o/normiebench/issues/3
    "m4, 8B": Published(device="apple-m4-16gb", tok_s=20.87, resident=4.92, layers=32,
                        prompt_tok_s=225, billions=8.03),
    # Qwen3-30B-A3B Q4_K_M, 4000 MiB cache, 76 % hits: github.com/Helldez/BigMoeOnEdge
    "phone, 30B paged": Published(device="phone-snapdragon-8-gen-3", tok_s=5.2, resident=0.85,
                                  routed=1.10, miss=225 / 1051, layers=48, read_bytes=512 << 10),
    "phone, 30B, no cache": Published(device="phone-snapdragon-8-gen-3", tok_s=1.7, resident=0.85,
                                      routed=1.10, miss=1.0, layers=48, read_bytes=512 << 10),
    # Qwen3-30B-A3B 4 bit, 10.6 GB: github.com/Blaizzy/mlx-vlm/pull/1813; hits are not given,
    # 85 % is what 60 % of the experts give elsewhere.
    "m4 mini, 30B paged": Published(device="apple-m4-16gb", tok_s=14.1, resident=0.85, routed=1.10,
                                    miss=0.15, layers=48),
}  # fmt: skip


def computed(run: Published) -> float:
    """Tokens per second without overlap. Source: field.md, section 2, the physical limit."""
    there = speeds_of(DEVICES[run.device], HERE, run.mode)
    drive = Throttle([Point(p.read_bytes, p.depth, p.bytes_s) for p in there.storage])
    read_s = run.routed * GB * run.miss / drive.bytes_s(run.read_bytes, run.depth)
    weights_s = (run.resident + run.routed) * GB / reference(there.weight_bytes_s)
    return 1 / (read_s + weights_s + there.graph_s + run.layers * there.layer_s)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_met_within_a_factor_of_two(name: str) -> None:
    run = PUBLISHED[name]
    assert abs(math.log2(computed(run) / run.tok_s)) <= 1
    if run.prompt_tok_s:
        flops_s = speeds_of(DEVICES[run.device], HERE).prefill_flops_s["Q4_K"]
        assert flops_s / (2e9 * run.billions) == pytest.approx(run.prompt_tok_s, rel=0.5)
