"""Which levers a model has at a budget, and the settings that each is tried with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.prefetch import PREDICTORS

Pages = Literal["experts", "layers"]
Quality = Literal["same", "measured", "other"]
"""Answers are the same, bit for bit; their divergence is measured; they are meant to differ."""
CONTROLS: Final = ("random",)
"""Predictors and policies that nobody should want."""
MAX_PLANS: Final = 6
LEVERS: Final = (
    "prefetch", "policy", "overlap", "speculate", "run_ahead", "threads", "direct_io", "read_bytes",
    "io_threads", "sidecar", "repack_experts", "plain_prompts", "kv_type", "n_ubatch", "depth",
    "steps", "adapters",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What decides which levers there are.

    Attributes:
        pages: what comes from disk at this budget; None where all is in memory.
        drafts: whether several tokens in a pass have the bits of one each.
        repacks: whether experts in memory are kept in another layout than the file's.
        twofold: whether all is in memory, and some of it repacked.
        sidecar: whether experts are read from pages packed beside the model.
        cores: that threads may use.
        plans: names of the plans in the model's depth file.
        small: a small model beside it; `shares` whether its vocabulary is the same, without
            which it cannot draft; `steps` whether the pair was calibrated.
        adapters: names of the adapters given.
    """

    pages: Pages | None
    drafts: bool
    repacks: bool
    twofold: bool = False
    cores: int
    sidecar: bool = False
    plans: tuple[str, ...] = ()
    small: str | None = None
    shares: bool = False
    steps: bool = False
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to set a lever, and what it is measured against.

    `options` are those of each generation, where the lever is one. `prefill` says that it is
    judged by prompts, not by decoding.
    """

    lever: str
    settings: Mapping[str, Any]
    off: Mapping[str, Any]
    quality: Quality = "same"
    prefill: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    off_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The settings as text, for tables."""
        both = {**self.settings, **self.options}
        return ", ".join(f"{name}={value}" for name, value in both.items() if name != "small")


def candidates(facts: Facts, *, controls: bool = False) -> list[Candidate]:
    """List what is to be measured; `controls` adds what must lose."""
    found = _paged(facts, controls) if facts.pages == "experts" else []
    if facts.drafts:
        sources = ["lookup", "self"] + (["auto"] if facts.pages else [])
        found += _each("speculate", sources, "off")
        if facts.small and facts.shares:
            pair = {"small": facts.small, "steps": "off"}
            found.append(Candidate(lever="speculate", settings=pair | {"speculate": "small"},
                                   off=pair | {"speculate": "off"}))  # fmt: skip
    if facts.pages is None and facts.small is None:
        found += _each("run_ahead", ["auto"], "off")
    found += _each("threads", list(range(1, facts.cores + 1)), None)
    if facts.pages:
        found += _each("direct_io", [False], True)
        found += _each("read_bytes", [1 << 18, 1 << 20, 1 << 22], None)
        found += _each("io_threads", [1, 2, 4, 8], None)
    if facts.sidecar:
        found += _each("sidecar", ["auto", "on"], "off")
    if facts.twofold:
        found.append(Candidate(lever="plain_prompts", settings={"plain_prompts": True},
                               off={"plain_prompts": False}, prefill=True,
                               quality="measured"))  # fmt: skip
    if facts.repacks:
        found.append(Candidate(lever="repack_experts", settings={"repack_experts": True},
                               off={"repack_experts": False}, quality="measured"))  # fmt: skip
    found.append(Candidate(lever="kv_type", settings={"kv_type": "q8_0"},
                           off={"kv_type": "f16"}, quality="measured"))  # fmt: skip
    found += [Candidate(lever="n_ubatch", settings={"n_ubatch": n}, off={"n_ubatch": 512},
                        prefill=True, quality="other") for n in (128, 256, 1024)]  # fmt: skip
    return found + _lossy(facts)


def _each(lever: str, values: list[Any], off: Any) -> list[Candidate]:
    return [Candidate(lever=lever, settings={lever: value}, off={lever: off}) for value in values]


def _paged(facts: Facts, controls: bool) -> list[Candidate]:
    def wanted(names: Any, off: str) -> list[str]:
        return ["auto", *(n for n in names if n != off and (controls or n not in CONTROLS))]

    return [
        *_each("prefetch", wanted(PREDICTORS, "none"), "off"),
        *_each("policy", wanted(POLICIES, "lru"), "lru"),
        *_each("overlap", ["auto", "on"], "off"),
    ]


def _lossy(facts: Facts) -> list[Candidate]:
    found = [
        Candidate(lever="depth", settings={"depth": plan}, off={"depth": "full"},
                  quality="measured") for plan in facts.plans[:MAX_PLANS]
    ]  # fmt: skip
    if facts.small and facts.steps:
        # One of another vocabulary is good for steps only, and not opened where there are none.
        beside = facts.small if facts.shares else None
        found.append(Candidate(
            lever="steps", settings={"small": facts.small, "speculate": "off", "steps": "auto"},
            off={"small": beside, "speculate": "off", "steps": "off"}, quality="other",
        ))  # fmt: skip
    if facts.adapters:
        found.append(Candidate(lever="adapters", settings={}, off={}, quality="other",
                               options={"adapter": "auto"},
                               off_options={"adapter": facts.adapters[0]}))  # fmt: skip
    return found
