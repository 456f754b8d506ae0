"""Depth plans: what becomes of every layer's attention and feed-forward, and what that costs.

A plan is data. Files of plans are not trusted: every type, length, name and number is checked
before a plan exists, and a plan that exists can be executed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Final, Literal, cast, get_args

from edgeroute.runtime.depth import Act, ExpertRule, Step
from edgeroute.runtime.errors import DepthFileError
from edgeroute.runtime.untrusted_json import show

SubBlock = Literal["attn", "ffn"]
SUB_BLOCKS: Final[tuple[SubBlock, ...]] = get_args(SubBlock)
LayerAct = Literal["run", "skip", "approximate", "repeat"]
"""What becomes of a sub-block; `repeat` computes it a second time after the layer."""

LAYER_ACTS: Final[tuple[LayerAct, ...]] = get_args(LayerAct)
EXPERT_RULES: Final[tuple[ExpertRule, ...]] = get_args(ExpertRule)
RESERVED_NAMES: Final = frozenset({"full", "auto", "routed"})
"""What `depth=` means by itself."""

MAX_LAYERS: Final = 1024
MAX_NUMBER: Final = 1e9
"""Above any perplexity factor or divergence that a plan could have; below any overflow."""

_NAME = re.compile(r"[a-z0-9._-]{1,64}")
_LETTER: Final[Mapping[LayerAct, str]] = {"run": "R", "skip": "S", "approximate": "A",
                                          "repeat": "T"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDepth:
    """One layer of a plan.

    Attributes:
        attn, ffn: what becomes of its sub-blocks. Where one repeats, the other runs or repeats:
            the first pass computes both, the second only what repeats.
        expert_rule, expert_value: which chosen experts compute; see `Step`.
        keep: percent of a prompt's tokens that are computed, where both sub-blocks run.
    """

    attn: LayerAct = "run"
    ffn: LayerAct = "run"
    expert_rule: ExpertRule = "all"
    expert_value: float = 0.0
    keep: int = 100

    @property
    def repeats(self) -> bool:
        """Whether a second pass follows."""
        return "repeat" in (self.attn, self.ffn)

    def act(self, part: SubBlock) -> LayerAct:
        """Return what becomes of one sub-block."""
        return self.attn if part == "attn" else self.ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthPlan:
    """What to compute of every layer, with what was measured of it.

    Attributes:
        name: how it is asked for; its stand-ins go by it.
        layers: one entry per layer of the model.
        compute: share of the model's weights that are multiplied per token, output head and
            stand-ins counted; 1 is the full model.
        speed: measured decoding speed over the full model's.
        kl: measured divergence of the full model's next-token distribution, mean nats.
        kl_error: standard error of `kl`.
        ppl_ratio: perplexity over the full model's.
        accuracy: share of verifiable tasks solved.
        What was not measured is None.

    Raises:
        DepthFileError: it cannot be executed, or a number is out of bounds.
    """

    name: str
    layers: tuple[LayerDepth, ...]
    compute: float = 1.0
    speed: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    ppl_ratio: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        what = f"depth plan {self.name!r}"
        if not 0 < len(self.layers) <= MAX_LAYERS:
            raise DepthFileError(
                f"{what} has {len(self.layers)} layers; 1 to {MAX_LAYERS} can be executed"
            )
        for il, layer in enumerate(self.layers):
            _check_layer(layer, f"layer {il} of {what}")
        if not any(_runs_whole(layer) for layer in self.layers):
            raise DepthFileError(
                f"{what} runs no layer whole; a plan must run both sub-blocks of at least one layer"
            )
        _check_numbers(self, what)

    @property
    def key(self) -> str:
        """What is executed, as a short text: equal keys compute the same; empty if all runs.

        Stand-ins belong to a plan, so plans that approximate have keys of their own.
        """
        if all(layer == _ALL for layer in self.layers):
            return ""
        runs = [f"{len(list(same))}{_letters(layer)}" for layer, same in groupby(self.layers)]
        text = ",".join(runs)
        return f"{self.name}:{text}" if self.approximates else text

    @property
    def approximates(self) -> bool:
        """Whether it needs stand-ins."""
        return bool(self.approximated)

    @property
    def approximated(self) -> set[tuple[int, str]]:
        """Layer and sub-block of everything that needs a stand-in."""
        return {(il, part) for il, layer in enumerate(self.layers) for part in SUB_BLOCKS
                if layer.act(part) == "approximate"}  # fmt: skip

    @property
    def n_repeats(self) -> int:
        """Further passes over layers, each with room for keys and values of its own."""
        return sum(layer.repeats for layer in self.layers)

    def steps(self) -> tuple[Step, ...]:
        """Return what a pass computes: one step per layer, two where it repeats."""
        found: list[Step] = []
        n_repeats = 0
        for il, layer in enumerate(self.layers):
            n_repeats += layer.repeats
            found += _steps(il, layer, n_repeats)
        return tuple(found)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON types, from which `from_json` makes an equal plan."""
        layers = [_layer_json(layer) for layer in self.layers]
        return {"name": self.name, "layers": layers, **{n: getattr(self, n) for n in PLAN_NUMBERS}}


_ALL: Final = LayerDepth()
PLAN_NUMBERS: Final = tuple(
    field.name for field in fields(DepthPlan) if field.name not in ("name", "layers")
)


# checks of a plan's values


def check_name(name: str) -> None:
    """Refuse what cannot name a plan.

    Raises:
        DepthFileError: it is no such name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DepthFileError(
            f"a depth plan is named {show(name)}; 1 to 64 of a-z, 0-9, dot, underscore and dash "
            "are wanted"
        )
    if name in RESERVED_NAMES:
        raise DepthFileError(f"a depth plan is named {name!r}, which has a meaning of its own")


def _check_layer(layer: LayerDepth, what: str) -> None:
    for part in SUB_BLOCKS:
        if layer.act(part) not in LAYER_ACTS:
            raise DepthFileError(f"the {part} of {what} is {show(layer.act(part))}; one of "
                                 f"{', '.join(LAYER_ACTS)} is wanted")  # fmt: skip
    acts = {layer.attn, layer.ffn}
    if layer.repeats and not acts <= {"run", "repeat"}:
        raise DepthFileError(f"{what} repeats one sub-block and leaves the other out; "
                             "both must run first")  # fmt: skip
    keep = layer.keep
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= 100:
        raise DepthFileError(f"{what} keeps {show(keep)} percent of a prompt's tokens; a whole "
                             "number from 1 to 100 is wanted")  # fmt: skip
    if keep < 100 and acts != {"run"}:
        raise DepthFileError(f"{what} keeps {keep} percent of a prompt's tokens, but does not run "
                             "both sub-blocks once")  # fmt: skip
    rule, value = layer.expert_rule, layer.expert_value
    if rule not in EXPERT_RULES:
        raise DepthFileError(f"the expert rule of {what} is {show(rule)}; one of "
                             f"{', '.join(EXPERT_RULES)} is wanted")  # fmt: skip
    if rule != "all" and layer.ffn not in ("run", "repeat"):
        raise DepthFileError(f"{what} has an expert rule, but its ffn does not run")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= MAX_NUMBER:
        raise DepthFileError(f"the expert value of {what} is {show(value)}; a number of at "
                             "least 0 is wanted")  # fmt: skip
    if rule == "count" and (value < 1 or value != int(value)):
        raise DepthFileError(f"the expert count of {what} is {value:g}; a whole number of at "
                             "least 1 is wanted")  # fmt: skip
    if rule == "all" and value:
        raise DepthFileError(f"{what} has the expert value {value:g} and no rule for it")


def _check_numbers(plan: DepthPlan, what: str) -> None:
    bounds = {"compute": (0.0, 4.0), "speed": (0.0, 1e4), "kl": (0.0, MAX_NUMBER),
              "kl_error": (0.0, MAX_NUMBER), "ppl_ratio": (0.0, MAX_NUMBER),
              "accuracy": (0.0, 1.0)}  # fmt: skip
    for name, (low, high) in bounds.items():
        value = getattr(plan, name)
        if value is None and name != "compute":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise DepthFileError(f"{name} of {what} is {show(value)}; a number from {low:g} to "
                                 f"{high:g} is wanted")  # fmt: skip
        if name in ("compute", "speed", "ppl_ratio") and not value:
            raise DepthFileError(f"{name} of {what} is 0; it must be positive")


# executing and writing


def _runs_whole(layer: LayerDepth) -> bool:
    return {layer.attn, layer.ffn} <= {"run", "repeat"}


def _steps(il: int, layer: LayerDepth, number: int) -> Iterator[Step]:
    """Give the passes over one layer; `number` counts the plan's repetitions up to this one."""
    if not layer.repeats:
        yield Step(il, cast(Act, layer.attn), cast(Act, layer.ffn), keep=layer.keep,
                   expert_rule=layer.expert_rule, expert_value=layer.expert_value)  # fmt: skip
        return
    for repeat in (0, number):
        attn, ffn = (_pass(layer.act(part), repeat) for part in SUB_BLOCKS)
        yield Step(il, attn, ffn, repeat, expert_rule=layer.expert_rule,
                   expert_value=layer.expert_value)  # fmt: skip


def _pass(act: LayerAct, repeat: int) -> Act:
    """Return what a layer that repeats does with a sub-block in one of its passes."""
    return "run" if repeat == 0 or act == "repeat" else "skip"


def _letters(layer: LayerDepth) -> str:
    acts = _LETTER[layer.attn] + _LETTER[layer.ffn]
    if layer.keep < 100:
        acts += f"k{layer.keep}"
    if layer.expert_rule == "all":
        return acts
    return f"{acts}({layer.expert_rule}{layer.expert_value:.17g})"


def _layer_json(layer: LayerDepth) -> dict[str, object]:
    found: dict[str, object] = {"attn": layer.attn, "ffn": layer.ffn}
    if layer.keep < 100:
        found["keep"] = layer.keep
    if layer.expert_rule != "all":
        found["experts"] = {"rule": layer.expert_rule, "value": layer.expert_value}
    return found
