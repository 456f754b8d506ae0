"""Rules for experts inside a graph: their definition's answers, in each family's weights."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.models import moe
from edgeroute.models.base import MoeHparams
from edgeroute.models.moe import Routing
from edgeroute.runtime.batch_shape import BatchShape, Segment, Span
from edgeroute.runtime.depth import ExpertRule
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.tensor import F32, Descriptors, get_bytes, new_tensor, place_all, set_bytes
from edgeroute.skippers import experts

COUNTS = MoeHparams(n_expert=24, n_expert_used=7, n_ff_exp=32)
N = 96
ROUTINGS = {
    "olmoe": Routing(),
    "mixtral": Routing(norm_w=True),
    "gpt-oss": Routing(gating="softmax_weight"),
    "deepseek": Routing(gating="sigmoid", norm_w=True, w_scale=2.5, selection_bias="exp_probs_b"),
    "deepseek-v2": Routing(w_scale=16.0),
}
RULES: list[tuple[ExpertRule, float]] = [
    ("weight", 0.0), ("weight", 0.07), ("weight", 0.14), ("weight", 2.0), ("mass", 0.0),
    ("mass", 0.3), ("mass", 0.8), ("mass", 99.0), ("ratio", 0.0), ("ratio", 0.3), ("ratio", 1.1),
]  # fmt: skip


class _Given:
    """Weights that a test made up."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self._tensors.get(name)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with Device.open() as opened:
        yield opened


def choose(
    device: Device, scores: npt.NDArray[np.float32], routing: Routing,
    rule: tuple[ExpertRule, float] = ("all", 0.0), *, ids: bool = False,
) -> npt.NDArray[np.generic]:  # fmt: skip
    """Choose for each row of scores (n, n_expert): weights (n, k), or expert numbers."""
    bias = np.linspace(0.3, -0.3, COUNTS.n_expert).astype(np.float32)
    descriptors = Descriptors(2)
    tensors = {
        "scores": new_tensor(descriptors, F32, scores.shape[::-1], "scores"),
        "blk.0.exp_probs_b.bias": new_tensor(descriptors, F32, bias.shape, "bias"),
    }
    buffer = place_all(list(tensors.values()), device)
    for tensor, array in zip(tensors.values(), (scores, bias), strict=True):
        set_bytes(tensor, array)
    kv_shape = KvShape(n_layer=1, n_embd_k_gqa=64, n_embd_v_gqa=64, n_embd_head=64)
    with closing(KvCache(device, kv_shape, 256)) as kv, closing(GraphCache(device)) as graphs:
        batch = BatchShape((Segment(0, 256, len(scores)),), len(scores))
        b = Builder(Span((), embed=False, output=True), batch, _Given(tensors), kv, 64)
        b.expert_rule, b.expert_value = rule
        numbers, weights = moe.choose(b, 0, b.weight("scores"), COUNTS, routing)
        k = moe.n_ranked(COUNTS, *rule)
        out: npt.NDArray[np.generic] = np.empty((len(scores), k), np.float32)
        if ids:
            numbers, out = b.g.ggml_cont(b.ctx, numbers), np.empty((len(scores), k), np.int32)
        graph = graphs.add("one", b.finish(numbers if ids else weights))
        assert device.compute(graph.pointer)
        get_bytes(graph.output, out)
    buffer.free()
    descriptors.free()
    return out


def some_scores() -> npt.NDArray[np.float32]:
    """Rows flat and sharp, with ties."""
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((N, COUNTS.n_expert)) * np.linspace(0, 4, N)[:, None]
    return scores.round(1).astype(np.float32)


@pytest.mark.parametrize("family", ROUTINGS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_graph_answers_as_the_definition(
    family: str, rule: tuple[ExpertRule, float], device: Device
) -> None:
    routing, scores = ROUTINGS[family], some_scores()
    full = choose(device, scores, replace(routing, w_scale=1.0))
    kept = experts.kept(full, *rule)
    found = choose(device, scores, routing, rule)
    assert np.array_equal(found != 0, kept & (full != 0))
    scale = routing.w_scale or 1.0
    if routing.norm_w or routing.gating == "softmax_weight":
        assert found.sum(axis=1) == pytest.approx(scale, rel=1e-5)
        left = np.where(kept, full, 0)
        assert found == pytest.approx(scale * left / left.sum(axis=1, keepdims=True), rel=1e-5)
    else:
        plain = choose(device, scores, routing)
        assert np.array_equal(found[kept], plain[kept])
    assert np.array_equal(choose(device, scores, routing, rule, ids=True),
                          choose(device, scores, routing, ids=True))  # fmt: skip


@pytest.mark.parametrize("family", ROUTINGS)
@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_a_count_is_the_family_with_fewer_experts(family: str, count: int, device: Device) -> None:
    """Weights are divided by the sum of those that are left, where the family divides."""
    routing, scores = ROUTINGS[family], some_scores()
    found = choose(device, scores, routing, ("count", count))
    ids = choose(device, scores, routing, ("count", count), ids=True)
    k = min(count, COUNTS.n_expert_used)
    assert found.shape == ids.shape == (N, k)
    assert np.array_equal(ids, choose(device, scores, routing, ids=True)[:, :k])
    full = choose(device, scores, routing)[:, :k]
    if routing.norm_w or routing.gating == "softmax_weight":
        wanted = (routing.w_scale or 1.0) * full / full.sum(axis=1, keepdims=True)
        assert found == pytest.approx(wanted, rel=1e-5)
    else:
        assert np.array_equal(found, full)


def test_numbers_that_are_none_leave_the_best_expert(device: Device) -> None:
    """A row of NaN stays one, and no rule makes a token compute nothing."""
    scores = some_scores()
    scores[3] = np.nan
    for rule in (("weight", 0.1), ("mass", 0.5), ("ratio", 0.5)):
        found = choose(device, scores, ROUTINGS["mixtral"], rule)
        assert np.isnan(found[3]).all()
        assert np.isfinite(np.delete(found, 3, axis=0)).all()
        assert (np.delete(found, 3, axis=0)[:, 0] > 0).all()
