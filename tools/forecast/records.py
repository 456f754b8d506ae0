"""What a forecast is made of: a device, what a model asks of it, and what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["measured", "stated", "computed"]
"""Where a figure is from: this machine, a source, or arithmetic over others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePoint:
    """Bandwidth of random reads of `read_bytes` each, `depth` of them at once."""

    read_bytes: int
    depth: int
    bytes_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerMode:
    """A power mode of a board: its budget, and what share of the full speeds it leaves.

    `compute_ratio` and `memory_ratio` are against the mode in which the device's own figures
    hold, 1 there.
    """

    name: str
    watts: float
    compute_ratio: float = 1.0
    memory_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A kind of machine, by stated or measured figures. Bytes, bytes/s, FLOP/s, watts.

    `memory_bytes` is all there is, `system_bytes` what its system takes of it when nothing
    else runs. `memory_bytes_s` is the peak; `decode_ratio` the share of it that decoding has
    been seen to reach with ggml there (None: as on the machine that calibrates), and `layer_s`
    what each layer costs there beyond that (None: as there). `flops_s` is of
    dense multiplications as ggml does them on what computes (`processor`: cpu or gpu).
    `active_watts` is while decoding, beyond nothing: the whole board. `boards` are parts of the
    names by which such a board calls itself. `sources` says for each field where its figure is
    from; one that begins with `estimate:` is nobody's measurement.
    """

    name: str
    title: str
    processor: Literal["cpu", "gpu"]
    unified: bool
    memory_bytes: int
    system_bytes: int
    memory_bytes_s: float
    flops_s: float
    cores: int
    storage: tuple[StoragePoint, ...]
    active_watts: float
    idle_watts: float
    decode_ratio: float | None = None
    layer_s: float | None = None
    power_modes: tuple[PowerMode, ...] = ()
    boards: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a machine reaches: measured here (`calibration`), or computed for a DeviceProfile.

    `weight_bytes_s` is, by the name of a weight's type, the bytes of weights of that type that
    decoding of one token goes through per second, all arithmetic included; `prefill_flops_s`
    the same for prompts, in multiply-adds times two per second. `graph_s` is spent per token
    whatever the model, `layer_s` per layer, `paged_layer_s` more per layer whose experts are
    paged, `expert_layer_s` more where they are resident. `storage` is what the pager's reads
    get, and `overlap_ratio` what of reading hides behind computing at the same time: 1 all, 0
    none of it. `kv_bytes_s` counts a cell once for every query head that reads it.

    A type's name alone is for matrices as a resident model has them; `Q4_K:plain` for those of
    streamed layers, `Q4_K:experts` for resident experts, `Q4_K:slots` for paged ones.
    """

    name: str
    memory_bytes: int
    available_bytes: int
    weight_bytes_s: Mapping[str, float]
    prefill_flops_s: Mapping[str, float]
    kv_bytes_s: float
    graph_s: float
    layer_s: float
    paged_layer_s: float
    storage: tuple[StoragePoint, ...]
    threads: int
    expert_layer_s: float = 0.0
    overlap_ratio: float = 0.0
    active_watts: float | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A forecast number: the likely value, and what it should lie between."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HitModel:
    """How often an expert is found in memory, by the share of all experts that are resident.

    `curve` is (share, hit ratio) pairs, ascending, from a trace of this model (`measured`), or
    for models like it (`stated`, with a wide range).
    """

    curve: tuple[tuple[float, float], ...]
    origin: Origin
    spread: float = 0.0
    """What the hit ratio may be off by, either way."""
    source: str = ""
    pace: tuple[float, float] | None = None
    """Of a run on this very machine: its hit ratio, and its seconds per decoded token. None: not
    known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a model would do on a machine under a budget. Seconds, bytes, tokens per second.

    `parts` are the seconds of one decoded token by cause (reads, weights, KV, overhead), of the
    likely case. `smallest_bytes` is the least budget that would do. `joules_token` is None where
    the machine's watts are not known.
    """

    machine: str
    verdict: Literal["FITS", "PAGES", "REFUSED"]
    pages: Literal["experts", "layers"] | None
    budget_bytes: int
    smallest_bytes: int
    hit_ratio: Range | None
    read_bytes_token: float
    decode_tok_s: Range | None
    prefill_tok_s: Range | None
    ttft_s: Range | None
    joules_token: Range | None
    parts: Mapping[str, float]
    notes: tuple[str, ...] = ()
