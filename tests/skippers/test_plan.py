"""Depth plans from JSON that nobody vouches for, and what they execute."""

import json
import math
from typing import Any

import pytest

from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.errors import DepthFileError
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.skippers.plan_json import MAX_CHARS, MAX_PLANS, plans_from_json, plans_to_json

RUN = {"attn": "run", "ffn": "run"}


def plain(**changes: Any) -> dict[str, Any]:
    """A good plan for three layers, as JSON, with changes; None deletes a key."""
    found: dict[str, Any] = {
        "name": "half", "layers": [RUN, {"attn": "skip", "ffn": "approximate"}, RUN],
        "compute": 0.9, "speed": 1.1, "kl": 0.04, "kl_error": 0.01, "ppl_ratio": 1.02,
        "accuracy": None,
    }  # fmt: skip
    return {key: value for key, value in (found | changes).items() if value is not ...}


def layer(**changes: Any) -> dict[str, Any]:
    """A plan whose middle layer is changed."""
    return plain(layers=[RUN, RUN | changes, RUN])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "must be a JSON object"),
        ("[", "not JSON"),
        ('{"name": NaN}', "NaN"),
        ('{"name": "a", "name": "b"}', "twice"),
        ("[" * 100_000, "deeply"),
        (b"\xff\xfe", "not JSON"),
        (" " * (MAX_CHARS + 1), "characters"),
        ('{"name": ' + "9" * 5000 + "}", "not JSON"),
        (plain(name=7), "name must be text"),
        (plain(name=...), "name must be text"),
        (plain(name=""), "1 to 64"),
        (plain(name="a" * 65), "1 to 64"),
        (plain(name="Half"), "1 to 64"),
        (plain(name="../half"), "1 to 64"),
        (plain(name="half\n"), "1 to 64"),
        (plain(name="full"), "meaning of its own"),
        (plain(name="auto"), "meaning of its own"),
        (plain(name="routed"), "meaning of its own"),
        (plain(more=1), "unknown key 'more'"),
        (plain(layers=[RUN, RUN]), "has 2 as its layers; the model has 3"),
        (plain(layers=[RUN] * 4), "has 4 as its layers"),
        (plain(layers={"0": RUN}), "an object of 1"),
        (plain(layers=...), "missing"),
        (plain(layers=[RUN, [], RUN]), "layer 1"),
        (plain(layers=[{"attn": "skip", "ffn": "skip"}] * 3), "runs no layer whole"),
        (plain(layers=[{"attn": "approximate", "ffn": "approximate"}] * 3), "no layer whole"),
        (plain(layers=[{"attn": "run", "ffn": "skip"}, {"attn": "skip", "ffn": "run"},
                       {"attn": "skip", "ffn": "skip"}]), "no layer whole"),
        (layer(attn="dance"), "attn of layer 1"),
        (layer(attn=["run"]), "attn of layer 1"),
        (layer(attn=None), "attn of layer 1"),
        (layer(ffn=1), "ffn of layer 1"),
        (layer(repeat=1), "unknown key 'repeat'"),
        (layer(attn="repeat", ffn="skip"), "repeats one sub-block"),
        (layer(attn="approximate", ffn="repeat"), "repeats one sub-block"),
        (layer(experts=3), "object of a rule and a value"),
        (layer(experts={"rule": "count"}), "object of a rule and a value"),
        (layer(experts={"rule": "best", "value": 1}), "expert rule"),
        (layer(experts={"rule": {}, "value": 1}), "expert rule"),
        (layer(experts={"rule": "count", "value": 0}), "at least 1"),
        (layer(experts={"rule": "count", "value": 1.5}), "whole number"),
        (layer(experts={"rule": "mass", "value": -0.5}), "at least 0"),
        (layer(experts={"rule": "mass", "value": "1"}), "must be a number"),
        (layer(experts={"rule": "mass", "value": True}), "must be a number"),
        (layer(experts={"rule": "all", "value": 2}), "no rule for it"),
        (layer(ffn="skip", experts={"rule": "mass", "value": 0.5}), "ffn does not run"),
        (plain(compute=...), "compute of depth plan 'half' must be a number, not missing"),
        (plain(compute=0), "positive"),
        (plain(compute=-1), "from 0"),
        (plain(compute=1e9), "from 0"),
        (plain(compute=math.nan), "compute"),
        (plain(compute=math.inf), "compute"),
        (plain(compute="1"), "must be a number"),
        (plain(speed=True), "must be a number"),
        (plain(speed=0), "positive"),
        (plain(kl=-0.1), "kl"),
        (plain(kl=10**400), "bits"),
        (plain(kl_error=[1]), "a list of 1"),
        (plain(ppl_ratio=-1.0), "ppl_ratio"),
        (plain(accuracy=1.5), "accuracy"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused_with_a_sentence(source: object, says: str) -> None:
    """A plan that passed unchecked would crash ggml or skip the whole model."""
    with pytest.raises(DepthFileError) as caught:
        plans_from_json(source if isinstance(source, str | bytes) else [source], 3)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_plan_survives_its_json() -> None:
    given = [
        plain(),
        plain(name="b", kl=None, speed=None, kl_error=None),
        layer(experts={"rule": "mass", "value": 0.25}) | {"name": "c"},
        layer(attn="repeat") | {"name": "d"},
    ]
    plans = plans_from_json(given, 3)
    assert plans_from_json(json.dumps(given), 3) == plans
    assert plans_from_json(plans_to_json(plans), 3) == plans


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, "a list of depth plans is wanted"),
        ("{}", "a list of depth plans is wanted"),
        ([plain(), plain()], "two depth plans are named 'half'"),
        ([plain(name=f"p{i}") for i in range(MAX_PLANS + 1)], f"more than {MAX_PLANS}"),
        ([plain(), 3], "JSON object"),
    ],
)
def test_what_is_no_list_of_plans_is_refused(source: object, says: str) -> None:
    with pytest.raises(DepthFileError, match=says):
        plans_from_json(source, 3)


def test_running_all_is_the_plain_pass() -> None:
    """Its steps and key are those of no plan, so that graphs and kept prefixes are shared."""
    plan = DepthPlan(name="all", layers=(LayerDepth(),) * 4)
    assert plan.steps() == all_run(range(4))
    assert plan.key == "" and plan.n_repeats == 0 and not plan.approximates


def test_steps_say_what_each_pass_computes() -> None:
    plan = DepthPlan(name="mixed", layers=(
        LayerDepth(), LayerDepth(attn="skip", ffn="skip"), LayerDepth(attn="approximate"),
        LayerDepth(attn="repeat"), LayerDepth(attn="repeat", ffn="repeat", expert_rule="count",
                                              expert_value=2),
    ))  # fmt: skip
    two = {"expert_rule": "count", "expert_value": 2}
    assert plan.steps() == (
        Step(0), Step(1, "skip", "skip"), Step(2, "approximate", "run"),
        Step(3), Step(3, "run", "skip", 1), Step(4, **two), Step(4, repeat=2, **two),  # type: ignore[arg-type]
    )  # fmt: skip
    assert not plan.steps()[1].reads
    assert plan.n_repeats == 2
    assert plan.approximated == {(2, "attn")}


def test_keys_tell_apart_what_computes_differently() -> None:
    """A prefix computed by one plan must never serve another."""
    skip, approximate = LayerDepth(ffn="skip"), LayerDepth(ffn="approximate")
    some = [
        (LayerDepth(), skip, LayerDepth()), (skip, LayerDepth(), LayerDepth()),
        (skip, skip, LayerDepth()), (LayerDepth(attn="skip"), LayerDepth(), LayerDepth()),
        (LayerDepth(ffn="repeat"), LayerDepth(), LayerDepth()),
        (LayerDepth(expert_rule="mass", expert_value=0.5), LayerDepth(), LayerDepth()),
        (LayerDepth(expert_rule="mass", expert_value=0.5 + 1e-15), LayerDepth(), LayerDepth()),
        (LayerDepth(expert_rule="ratio", expert_value=0.5), LayerDepth(), LayerDepth()),
        (approximate, LayerDepth(), LayerDepth()),
    ]  # fmt: skip
    plans = [DepthPlan(name="one", layers=layers) for layers in some]
    assert len({plan.key for plan in plans}) == len(plans)
    again = [DepthPlan(name="two", layers=layers) for layers in some]
    same = [a.key == b.key for a, b in zip(plans, again, strict=True)]
    assert same == [not plan.approximates for plan in plans]  # stand-ins are a plan's own


def test_a_plan_made_in_python_is_checked_too() -> None:
    with pytest.raises(DepthFileError, match="runs no layer whole"):
        DepthPlan(name="none", layers=(LayerDepth(attn="skip", ffn="skip"),))
    with pytest.raises(DepthFileError, match="0 layers"):
        DepthPlan(name="none", layers=())
    with pytest.raises(DepthFileError, match="kl"):
        DepthPlan(name="none", layers=(LayerDepth(),), kl=math.nan)
