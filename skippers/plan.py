"""Depth plans: what becomes of every layer's attention and feed-forward, and what that costs.

A plan is data. Files of plans are not trusted: every type, length, name and number is checked
before a plan exists, and a plan that exists can be executed.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Final, Literal, Never, cast, get_args

from edgeroute.runtime.depth import Act, ExpertRule, Step
from edgeroute.runtime.errors import DepthFileError
from edgeroute.runtime.gguf_metadata import quote

SubBlock = Literal["attn", "ffn"]
SUB_BLOCKS: Final[tuple[SubBlock, ...]] = get_args(SubBlock)
LayerAct = Literal["run", "skip", "approximate", "repeat"]
"""What becomes of a sub-block; `repeat` computes it a second time after the layer."""

LAYER_ACTS: Final[tuple[LayerAct, ...]] = get_args(LayerAct)
EXPERT_RULES: Final[tuple[ExpertRule, ...]] = get_args(ExpertRule)
RESERVED_NAMES: Final = frozenset({"full", "auto", "routed"})
"""What `depth=` means by itself."""

MAX_PLANS, MAX_CHARS, MAX_LAYERS = 256, 8 << 20, 1024
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
        _check_name(self.name)
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
        return {"name": self.name, "layers": layers, **{n: getattr(self, n) for n in _NUMBERS}}

    @classmethod
    def from_json(cls, source: object, n_layer: int) -> "DepthPlan":
        """Read a plan that nobody vouches for.

        Args:
            source: JSON text, or what it parses to.
            n_layer: layers of the model; the plan must have as many.

        Raises:
            DepthFileError: it is no plan for such a model; the sentence says why.
        """
        value = parse_json(source, "a depth plan") if isinstance(source, str | bytes) else source
        return _plan(value, n_layer)


def plans_from_json(source: object, n_layer: int) -> tuple[DepthPlan, ...]:
    """Read a list of plans that nobody vouches for; names must differ.

    Args:
        source: JSON text, or what it parses to.
        n_layer: layers of the model.

    Raises:
        DepthFileError: one of them is no plan for such a model, or they are too many.
    """
    what = "a list of depth plans"
    value = parse_json(source, what) if isinstance(source, str | bytes) else source
    if not isinstance(value, list):
        raise DepthFileError(f"{what} is wanted, not {_show(value)}")
    if len(value) > MAX_PLANS:
        raise DepthFileError(f"{len(value)} depth plans are more than {MAX_PLANS}")
    plans = tuple(_plan(each, n_layer) for each in value)
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise DepthFileError(f"two depth plans are named {name!r}")
    return plans


def plans_to_json(plans: Sequence[DepthPlan]) -> str:
    """Return the text that `plans_from_json` reads."""
    return json.dumps([plan.to_json() for plan in plans], separators=(",", ":"))


def parse_json(raw: str | bytes, what: str) -> object:
    """Parse JSON; keys that appear twice, NaN, deep nesting and endless texts are refused.

    Args:
        raw: the text.
        what: how messages name it.

    Raises:
        DepthFileError: it is no such JSON.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = quote(", ".join(key for key, _ in pairs))
            raise DepthFileError(f"{what} has a key twice among {names}")
        return found

    def constant(text: str) -> Never:
        raise DepthFileError(f"{what} contains {text}, which is not JSON")

    if len(raw) > MAX_CHARS:
        raise DepthFileError(f"{what} has {len(raw)} characters, more than {MAX_CHARS}")
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        parsed: object = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise DepthFileError(f"{what} nests its values too deeply") from error
    except ValueError as error:  # also bad UTF-8 and endless digits
        reason = str(error).split("\n")[0][:120]
        raise DepthFileError(f"{what} is not JSON: {reason}") from error
    return parsed


_ALL: Final = LayerDepth()
_NUMBERS: Final = tuple(
    field.name for field in fields(DepthPlan) if field.name not in ("name", "layers")
)


# reading


def _plan(value: object, n_layer: int) -> DepthPlan:
    if not isinstance(value, dict):
        raise DepthFileError(f"a depth plan must be a JSON object, not {_show(value)}")
    name = value.get("name")
    if not isinstance(name, str):
        raise DepthFileError(f"a depth plan's name must be text, not {_show(name)}")
    _check_name(name)
    what = f"depth plan {name!r}"
    _refuse_unknown(value, {"name", "layers", *_NUMBERS}, what)
    layers = value.get("layers")
    if not isinstance(layers, list) or len(layers) != n_layer:
        shown = f"{len(layers)}" if isinstance(layers, list) else _show(layers)
        raise DepthFileError(
            f"{what} has {shown} as its layers; the model has {n_layer}, and each needs an entry"
        )
    return DepthPlan(
        name=name,
        layers=tuple(_layer(each, f"layer {il} of {what}") for il, each in enumerate(layers)),
        compute=_number(value.get("compute"), f"compute of {what}"),
        speed=_measured(value, "speed", what),
        kl=_measured(value, "kl", what),
        kl_error=_measured(value, "kl_error", what),
        ppl_ratio=_measured(value, "ppl_ratio", what),
        accuracy=_measured(value, "accuracy", what),
    )


def _layer(value: object, what: str) -> LayerDepth:
    if not isinstance(value, dict):
        raise DepthFileError(f"{what} must be a JSON object, not {_show(value)}")
    _refuse_unknown(value, {"attn", "ffn", "experts", "keep"}, what)
    experts = value.get("experts", {"rule": "all", "value": 0})
    if not isinstance(experts, dict) or set(experts) != {"rule", "value"}:
        raise DepthFileError(f"experts of {what} must be an object of a rule and a value")
    return LayerDepth(  # whose values the plan checks
        attn=cast(LayerAct, value.get("attn")), ffn=cast(LayerAct, value.get("ffn")),
        expert_rule=cast(ExpertRule, experts["rule"]),
        expert_value=_number(experts["value"], f"the expert value of {what}"),
        keep=cast(int, value.get("keep", 100)),
    )  # fmt: skip


def _measured(value: Mapping[str, object], key: str, what: str) -> float | None:
    found = value.get(key)
    return None if found is None else _number(found, f"{key} of {what}")


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DepthFileError(f"{what} must be a number, not {_show(value)}")
    if not -MAX_NUMBER <= value <= MAX_NUMBER:  # before float(), which a huge integer overflows
        raise DepthFileError(f"{what} is {_show(value)}; a number up to {MAX_NUMBER:g} is wanted")
    return float(value)


def _refuse_unknown(value: Mapping[object, object], known: set[str], what: str) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        raise DepthFileError(f"{what} has the unknown key {_show(unknown[0])}; known are "
                             f"{', '.join(sorted(known))}")  # fmt: skip


def _show(value: object) -> str:
    """Print a JSON value for a message: scalars short, containers by their kind."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "missing"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return quote(value) if isinstance(value, str) else repr(value)


# checks of a plan's values


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DepthFileError(
            f"a depth plan is named {_show(name)}; 1 to 64 of a-z, 0-9, dot, underscore and dash "
            "are wanted"
        )
    if name in RESERVED_NAMES:
        raise DepthFileError(f"a depth plan is named {name!r}, which has a meaning of its own")


def _check_layer(layer: LayerDepth, what: str) -> None:
    for part in SUB_BLOCKS:
        if layer.act(part) not in LAYER_ACTS:
            raise DepthFileError(f"the {part} of {what} is {_show(layer.act(part))}; one of "
                                 f"{', '.join(LAYER_ACTS)} is wanted")  # fmt: skip
    acts = {layer.attn, layer.ffn}
    if layer.repeats and not acts <= {"run", "repeat"}:
        raise DepthFileError(f"{what} repeats one sub-block and leaves the other out; "
                             "both must run first")  # fmt: skip
    keep = layer.keep
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= 100:
        raise DepthFileError(f"{what} keeps {_show(keep)} percent of a prompt's tokens; a whole "
                             "number from 1 to 100 is wanted")  # fmt: skip
    if keep < 100 and acts != {"run"}:
        raise DepthFileError(f"{what} keeps {keep} percent of a prompt's tokens, but does not run "
                             "both sub-blocks once")  # fmt: skip
    rule, value = layer.expert_rule, layer.expert_value
    if rule not in EXPERT_RULES:
        raise DepthFileError(f"the expert rule of {what} is {_show(rule)}; one of "
                             f"{', '.join(EXPERT_RULES)} is wanted")  # fmt: skip
    if rule != "all" and layer.ffn not in ("run", "repeat"):
        raise DepthFileError(f"{what} has an expert rule, but its ffn does not run")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= MAX_NUMBER:
        raise DepthFileError(f"the expert value of {what} is {_show(value)}; a number of at "
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
            raise DepthFileError(f"{name} of {what} is {_show(value)}; a number from {low:g} to "
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
