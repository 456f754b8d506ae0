"""Depth plans from JSON that nobody vouches for, and to JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import cast

from edgeroute.runtime.depth import ExpertRule
from edgeroute.runtime.errors import DepthFileError
from edgeroute.runtime.untrusted_json import parse_json, show
from edgeroute.skippers.plan import (
    MAX_NUMBER,
    PLAN_NUMBERS,
    DepthPlan,
    LayerAct,
    LayerDepth,
    check_name,
)

MAX_PLANS, MAX_CHARS = 256, 8 << 20


def plans_from_json(source: object, n_layer: int) -> tuple[DepthPlan, ...]:
    """Read a list of plans that nobody vouches for; names must differ.

    Args:
        source: JSON text, or what it parses to.
        n_layer: layers of the model.

    Raises:
        DepthFileError: one of them is no plan for such a model, or they are too many.
    """
    what = "a list of depth plans"
    value = _parse(source, what) if isinstance(source, str | bytes) else source
    if not isinstance(value, list):
        raise DepthFileError(f"{what} is wanted, not {show(value)}")
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


def _parse(raw: str | bytes, what: str) -> object:
    if len(raw) > MAX_CHARS:
        raise DepthFileError(f"{what} has {len(raw)} characters, more than {MAX_CHARS}")
    return parse_json(raw, what, DepthFileError)


def _plan(value: object, n_layer: int) -> DepthPlan:
    if not isinstance(value, dict):
        raise DepthFileError(f"a depth plan must be a JSON object, not {show(value)}")
    name = value.get("name")
    if not isinstance(name, str):
        raise DepthFileError(f"a depth plan's name must be text, not {show(name)}")
    check_name(name)
    what = f"depth plan {name!r}"
    _refuse_unknown(value, {"name", "layers", *PLAN_NUMBERS}, what)
    layers = value.get("layers")
    if not isinstance(layers, list) or len(layers) != n_layer:
        shown = f"{len(layers)}" if isinstance(layers, list) else show(layers)
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
        raise DepthFileError(f"{what} must be a JSON object, not {show(value)}")
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
        raise DepthFileError(f"{what} must be a number, not {show(value)}")
    if not -MAX_NUMBER <= value <= MAX_NUMBER:  # before float(), which a huge integer overflows
        raise DepthFileError(f"{what} is {show(value)}; a number up to {MAX_NUMBER:g} is wanted")
    return float(value)


def _refuse_unknown(value: Mapping[object, object], known: set[str], what: str) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        raise DepthFileError(f"{what} has the unknown key {show(unknown[0])}; known are "
                             f"{', '.join(sorted(known))}")  # fmt: skip
