"""A plausible profile made by hand: 48 layers of 128 experts, 8 domains, no model needed."""

import math
from dataclasses import asdict
from typing import Any

from edgeroute.tools.forecast.records import Forecast, Range
from edgeroute.tools.profile.records import (
    Advice,
    Curve,
    HitRates,
    Interval,
    Live,
    Locality,
    PredictorRow,
    Profile,
    Reuse,
    Skew,
    Subject,
)

N_LAYER, N_EXPERT, N_USED, PAGE = 48, 128, 8, 2_764_800
N_PAGE = N_LAYER * N_EXPERT
DOMAINS = ("code", "mathematics", "law", "medicine", "news", "chat", "German", "Chinese")


def _curve(policy: str, power: float, cliff: float = 0.0) -> Curve:
    sizes = tuple(range(64, N_PAGE + 1, 64))
    shares = (size / N_PAGE for size in sizes)
    ratios = (
        (share**power) / (1 + math.exp((cliff - share) * 90) * (cliff > 0)) for share in shares
    )
    return Curve(policy=policy, n_slots=sizes, hit_ratios=tuple(ratios))


def _wave(mean: float, height: float, phase: float) -> tuple[float, ...]:
    return tuple(
        mean + height * (math.sin(i / 5 + phase) + 0.4 * math.sin(i * 2.3)) for i in range(N_LAYER)
    )


def _forecast(name: str, verdict: Any, speed: float, budget: int) -> Forecast:
    known = verdict != "REFUSED"
    near = Range(low=speed * 0.8, likely=speed, high=speed * 1.25) if known else None
    return Forecast(
        machine=name,
        verdict=verdict,
        pages="experts" if verdict == "PAGES" else None,
        budget_bytes=budget << 30,
        smallest_bytes=int(2.3 * (1 << 30)),
        hit_ratio=Range(low=0.6, likely=0.7, high=0.78) if verdict == "PAGES" else None,
        read_bytes_token=4.1e8,
        decode_tok_s=near,
        prefill_tok_s=Range(low=speed * 4, likely=speed * 6, high=speed * 9) if known else None,
        ttft_s=Range(low=40 / speed, likely=60 / speed, high=90 / speed) if known else None,
        joules_token=Range(low=0.4, likely=14 / speed, high=30.0) if known else None,
        parts={"reads": 0.5 / speed, "weights": 0.3 / speed, "KV": 0.05 / speed,
               "overhead": 0.15 / speed} if known else {},
    )  # fmt: skip


def _forecasts() -> dict[str, Forecast]:
    rows = (
        ("this machine", "PAGES", 9.4, 6),
        ("Jetson Orin Nano 8 GB", "PAGES", 6.1, 5),
        ("Jetson Orin NX 16 GB", "PAGES", 14.2, 12),
        ("Jetson AGX Orin", "FITS", 31.0, 56),
        ("Jetson Thor", "FITS", 58.0, 118),
        ("Raspberry Pi 5", "PAGES", 1.9, 6),
        ("Laptop, 16 GB", "PAGES", 11.8, 12),
        ("Phone", "REFUSED", 0.0, 2),
    )
    return {row[0]: _forecast(*row) for row in rows}


def _hits() -> HitRates:
    return HitRates(
        pooled=(_curve("lru", 0.55, 0.0625), _curve("lfu", 0.47), _curve("lfru", 0.42),
                _curve("sch", 0.3), _curve("belady", 0.25)),
        active="lfru",
        cliff_slots=N_LAYER * N_USED,
        layer_slots=32,
        layers=tuple(range(N_LAYER)),
        by_layer={"lru": _wave(0.55, 0.08, 0), "lfru": _wave(0.66, 0.07, 0.3),
                  "belady": _wave(0.8, 0.04, 0.2)},
    )  # fmt: skip


def _around(value: float, spread: float = 0.02) -> Interval:
    return Interval(value=value, low=value - spread, high=value + spread)


def _overlap() -> tuple[tuple[float, ...], ...]:
    n = len(DOMAINS)
    return tuple(
        tuple(1.0 if i == j else 0.85 - 0.08 * abs(i - j) ** 0.8 - 0.1 * (max(i, j) > 5)
              for j in range(n))
        for i in range(n)
    )  # fmt: skip


def made_profile() -> Profile:
    """Return the whole profile; every section is there."""
    steps = tuple((1 << i, N_PAGE * (1 - math.exp(-((1 << i) ** 0.62) / 17))) for i in range(11))
    return Profile(
        subject=Subject(
            model="Qwen3-30B-A3B-Q4_K_M.gguf", file_bytes=18_556_685_824, arch="qwen3moe",
            n_layer=N_LAYER, n_moe_layer=N_LAYER, n_expert=N_EXPERT, n_expert_used=N_USED,
            page_bytes=PAGE, n_page=N_PAGE, n_prompt_token=14_210, n_decode_token=8_192,
            machine="2 cores, x86-64 with AVX2, 8.0 GiB", power_mode=None,
            when="2026-11-22 20:31", trace="qwen3.trace", domains=DOMAINS,
        ),
        live=Live(
            policy="lfru", n_slots=2048, slots_bytes=2048 * PAGE, budget_bytes=7 << 30,
            hit_ratio=0.628, demand_bytes_token=3.9e8, prefetch_bytes_token=4.1e7,
            stall_s_token=0.061, decode_tok_s=9.4, prefill_tok_s=51.0, replay_equal=True,
            joules_token=2.3, energy_source="RAPL package", energy_estimated=False,
        ),
        hits=_hits(),
        reuse=Reuse(
            distances=tuple(1 << i for i in range(5, 14)), cold=0.021,
            shares=(0.004, 0.011, 0.03, 0.082, 0.213, 0.27, 0.221, 0.108, 0.04),
            working_set=steps,
        ),
        locality=Locality(
            srp={4: _around(0.66), 16: _around(0.541, 0.012), 64: _around(0.44),
                 256: _around(0.37, 0.03)},
            srp_rho={4: 1.1, 16: 1.4, 64: 1.9, 256: 2.3},
            srp_by_layer={16: _wave(0.54, 0.06, 0.9)},
            sch=tuple((m, rho, _around(1 - math.exp(-rho * (0.62 + 0.1 * i))))
                      for i, m in enumerate((4, 16, 64, 256)) for rho in (1.0, 1.5, 2.0, 3.0, 4.0)),
        ),
        skew=Skew(
            layers=tuple(range(N_LAYER)),
            top_shares={10: _wave(0.24, 0.03, 0), 25: _wave(0.47, 0.04, 0),
                        50: _wave(0.75, 0.03, 0)},
            load_sd=_wave(0.71, 0.1, 0), domains=DOMAINS, overlap=_overlap(),
        ),
        predictors=tuple(
            PredictorRow(name=name, n_guess=k, recall=top * (1 - math.exp(-k / 6)) + 0.03,
                         precision=0.8 - k / 40, bytes_token=k * N_LAYER * PAGE * rate,
                         wasted_bytes_token=k * k * N_LAYER * PAGE * rate / 40)
            for name, top, rate in (("gate reuse", 0.97, 0.3), ("learned", 0.88, 0.32),
                                    ("popularity", 0.52, 0.35), ("previous token", 0.61, 0.2))
            for k in (4, 8, 12, 16)
        ),
        advice=(
            Advice(policy="lfru", n_slots=3072, budget_bytes=int(9.4 * (1 << 30)), hit_ratio=0.745,
                   why="Beyond that, another GiB gains less than 3 points of hits."),
            Advice(policy="lfru", n_slots=768, budget_bytes=int(3.5 * (1 << 30)), hit_ratio=0.418,
                   why="The least that stays clear of the LRU cliff."),
        ),
        forecasts={name: as_mapping(one) for name, one in _forecasts().items()},
        notes=("The page cache could not be dropped: the first reads may have come from memory.",),
    )  # fmt: skip


def as_mapping(forecast: Forecast) -> dict[str, Any]:
    """Return a forecast as a profile carries it."""
    return asdict(forecast)
