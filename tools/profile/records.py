"""The figures of a profile: what `edgeroute profile` prints, draws and writes as JSON.

One record per section; a report shows the sections that are there. All ratios are 0 to 1.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "edgeroute-profile"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What was profiled, where, and how much of it."""

    model: str
    file_bytes: int
    arch: str
    n_layer: int
    n_moe_layer: int
    n_expert: int
    n_expert_used: int
    page_bytes: int
    n_page: int
    n_prompt_token: int
    n_decode_token: int
    machine: str
    power_mode: str | None
    when: str
    trace: str | None
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Hit ratio against resident experts: `n_slots[i]` pages give `hit_ratios[i]`."""

    policy: str
    n_slots: tuple[int, ...]
    hit_ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HitRates:
    """Curves by policy over all layers pooled, and of some policies layer by layer at one size.

    `active` is the policy that the runtime would use; `cliff_slots` one token's cycle, below
    which LRU keeps next to nothing. `by_layer` is policy to one ratio per MoE layer with
    `layer_slots` slots for each.
    """

    pooled: tuple[Curve, ...]
    active: str
    cliff_slots: int
    layer_slots: int
    layers: tuple[int, ...]
    by_layer: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """How soon an expert is asked for again.

    `distances` are upper bounds of bins (distinct pages between two uses of one), `shares` the
    share of requests in each; `cold` that of first uses. `working_set` is (tokens, distinct pages
    that so many consecutive tokens use, in the mean).
    """

    distances: tuple[int, ...]
    shares: tuple[float, ...]
    cold: float
    working_set: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """SRP by segment length m, and SCH by (m, rho), with intervals; see offload/locality."""

    srp: Mapping[int, Interval]
    srp_rho: Mapping[int, float]
    srp_by_layer: Mapping[int, tuple[float, ...]]
    """Of the segment length that is shown by layer."""
    sch: tuple[tuple[int, float, Interval], ...]
    """(m, rho, hit ratio)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """How unequally experts are used, and how far domains use the same ones.

    `top_shares` is the share of requests that the most used 10, 25 and 50 % of a layer's experts
    take, per layer; `load_sd` the standard deviation of loads in units of their mean, per layer;
    `overlap` for two domains the overlap of their loads (sum of minima), a symmetric matrix.
    """

    layers: tuple[int, ...]
    top_shares: Mapping[int, tuple[float, ...]]
    load_sd: tuple[float, ...]
    domains: tuple[str, ...]
    overlap: tuple[tuple[float, ...], ...]
    loads: tuple[tuple[int, ...], ...] = ()
    """Requests of each expert, per layer; what two profiles are correlated by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorRow:
    """What a predictor of the next layer's experts names right, at k guesses per layer."""

    name: str
    n_guess: int
    recall: float
    precision: float
    bytes_token: float
    wasted_bytes_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What the recorded run itself did."""

    policy: str
    n_slots: int
    slots_bytes: int
    budget_bytes: int
    hit_ratio: float
    demand_bytes_token: float
    prefetch_bytes_token: float
    stall_s_token: float
    decode_tok_s: float
    prefill_tok_s: float
    replay_equal: bool | None
    """Whether a replay of the trace gave the same counters, bit for bit; None: not comparable."""
    joules_token: float | None = None
    energy_source: str | None = None
    energy_estimated: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A budget and a policy, with the reason in a sentence."""

    policy: str
    n_slots: int
    budget_bytes: int
    hit_ratio: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything. `forecasts` are `tools.forecast.records.Forecast` as mappings, by machine."""

    subject: Subject
    live: Live | None
    hits: HitRates
    reuse: Reuse
    locality: Locality
    skew: Skew
    predictors: tuple[PredictorRow, ...]
    advice: tuple[Advice, ...]
    forecasts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON types, with the format's name and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}
