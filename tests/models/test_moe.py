"""Mixtures of experts: what is refused, where experts live, and what `slots` means."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models import forward, moe
from edgeroute.models.base import MoeHparams, MoeModel
from edgeroute.models.registry import describe
from edgeroute.runtime.batch_shape import BatchShape, Segment, Span
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import EdgerouteError, ModelFileError, UnsupportedModelError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.tensor import (
    F32,
    I32,
    Descriptors,
    get_bytes,
    new_tensor,
    place_all,
    set_bytes,
)
from edgeroute.tools import synth

MOE = ("llama-moe", "llama-moe-one", "qwen2moe", "qwen3moe", "olmoe")
QWEN3MOE = synth.ARCHITECTURES["qwen3moe"]


@pytest.fixture
def device() -> Iterator[Device]:
    with Device.open() as opened:
        yield opened


def load(path: Path, n_ubatch: int = 512) -> LoadedModel:
    return LoadedModel(path, RunParams(n_ctx=512, n_ubatch=n_ubatch, threads=1))


# headers


def refused(path: Path) -> EdgerouteError:
    with GGUFFile.open(path) as file, pytest.raises(EdgerouteError) as caught:
        describe(file)
    return caught.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_expert_used": 0}, "expert_used_count is 0, outside 1 to 16"),
        ({"n_expert_used": 17}, "expert_used_count is 17, outside 1 to 16"),
        (
            {"n_expert": 2000, "n_ff_exp": 1, "n_embd": 8},
            "expert_count' is 2000; it must be between 0 and 1024",
        ),
        ({"n_expert": 0}, "has no qwen3moe.expert_count"),
    ],
)
def test_counts_out_of_bounds_are_refused(
    change: dict[str, int], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    synth.write(dataclasses.replace(QWEN3MOE, **change), path)
    error = refused(path)
    assert isinstance(error, ModelFileError) and words in str(error)


def test_a_dense_architecture_with_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.write(dataclasses.replace(QWEN3MOE, arch="qwen3"), path)
    error = refused(path)
    assert isinstance(error, UnsupportedModelError) and "should be qwen3moe" in str(error)


def test_routing_in_groups_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = synth._add_hparams

    def grouped(spec: synth.SynthSpec, writer: GGUFWriter) -> None:
        plain(spec, writer)
        writer.add_expert_group_count(4)

    monkeypatch.setattr(synth, "_add_hparams", grouped)
    path = tmp_path / "model.gguf"
    synth.make("qwen3moe", path)
    assert "in 4 groups" in str(refused(path))


Change = Callable[[str, npt.NDArray[Any]], Iterator[tuple[str, npt.NDArray[Any]]]]


def make_changed(path: Path, arch: str, change: Change, patch: pytest.MonkeyPatch) -> None:
    """Write a synthetic model whose 3D tensors are what `change` makes of them."""
    plain = synth.tensors

    def changed(spec: synth.SynthSpec) -> Iterator[tuple[str, Any, Any]]:
        for name, data, kind in plain(spec):
            if data.ndim < 3:
                yield name, data, kind
            else:
                yield from ((new, part, kind) for new, part in change(name, data))

    patch.setattr(synth, "tensors", changed)
    synth.make(arch, path)


def test_experts_in_tensors_of_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral files of early 2024; llama.cpp no longer reads them either."""

    def split(name: str, data: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for i, part in enumerate(data):
            yield name.replace("_exps.", f".{i}."), part

    path = tmp_path / "model.gguf"
    make_changed(path, "llama-moe", split, monkeypatch)
    assert "convert the original model again" in str(refused(path))


def test_tensors_with_too_few_experts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert number beyond them would read outside the tensor."""

    def shorten(name: str, data: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield name, data[:-1]

    path = tmp_path / "model.gguf"
    make_changed(path, "qwen3moe", shorten, monkeypatch)
    with pytest.raises(ModelFileError, match=r"ffn_gate_exps.*extents \[256, 256, 15\]"):
        load(path)


def test_older_files_name_the_width_of_all_chosen_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GGUFWriter, "add_expert_feed_forward_length", lambda self, n: None)
    path = tmp_path / "model.gguf"
    synth.write(dataclasses.replace(QWEN3MOE, n_ff=8 * 256), path)
    with closing(load(path)) as loaded:
        moe_counts = loaded.model.hparams.moe
        assert moe_counts is not None and moe_counts.n_ff_exp == 256


# memory and graphs


@pytest.mark.parametrize("arch", MOE)
def test_a_moe_model_is_described_planned_and_bounded(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.make(arch, path, weight_type="Q4_0")
    with closing(load(path)) as loaded:
        model, run = loaded.model, loaded.forward
        assert isinstance(model, MoeModel) and model.is_moe(0)
        # Experts are repacked exactly where ggml repacks other matrices of this type.
        repacked = loaded.plan.weights.repacked
        assert ("blk.0.ffn_up_exps.weight" in repacked) == ("blk.0.attn_q.weight" in repacked)
        assert {"blk.0.ffn_gate_exps.weight"} < set(model.expert_tensors(0))
        assert loaded.plan.compute_bytes >= run.graphs.n_bytes
        hp = model.hparams
        segments = tuple(Segment(256 * i, 256, 1) for i in range(2))
        shape = BatchShape(segments, 2)
        graph = run._build(run.whole[0], shape)
        n_nodes = ggml().ggml_graph_n_nodes(graph.pointer)
        graph.free()
        assert n_nodes < forward.room_for_nodes(hp, hp.n_layer, shape)


def test_many_experts_at_once_fit_the_graph(tmp_path: Path) -> None:
    """llama.cpp's graph has room for 8 nodes per tensor and aborts; ours counts the experts."""
    path = tmp_path / "model.gguf"
    spec = dataclasses.replace(QWEN3MOE, n_expert=200, n_expert_used=200, n_ff_exp=8, n_layer=1)
    synth.write(spec, path)
    with closing(load(path, n_ubatch=64)) as loaded:
        region = loaded.kv.allocate(256)
        assert region is not None
        logits = loaded.forward.run([forward.Piece([5, 6, 7], 0, region, 3)])
        assert logits is not None and np.isfinite(logits).all()


# slots


@dataclasses.dataclass(frozen=True)
class Given:
    """Weights by name, as a Builder asks for them."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


N_IN, N_OUT, N_EXPERT, N_USED, N_TOKENS = 64, 32, 6, 3, 5


Arrays = dict[str, npt.NDArray[Any]]


def compute(
    device: Device, arrays: Arrays, out: npt.NDArray[Any], build: Callable[[Builder], Tensor]
) -> npt.NDArray[Any]:
    """Fill `out` with what `build` makes of tensors that it finds by name as weights."""
    kinds = {np.dtype(np.float32): F32, np.dtype(np.int32): I32}
    descriptors = Descriptors(len(arrays))
    tensors = {
        name: new_tensor(descriptors, kinds[a.dtype], a.shape[::-1], name)
        for name, a in arrays.items()
    }
    buffer = place_all(list(tensors.values()), device)
    for name, array in arrays.items():
        set_bytes(tensors[name], np.ascontiguousarray(array))
    kv_shape = KvShape(n_layer=1, n_embd_k_gqa=64, n_embd_v_gqa=64, n_embd_head=64)
    with closing(KvCache(device, kv_shape, 256)) as kv, closing(GraphCache(device)) as graphs:
        shape = BatchShape((Segment(0, 256, N_TOKENS),), N_TOKENS)
        b = Builder(Span((), embed=False, output=True), shape, Given(tensors), kv, 64)
        graph = graphs.add("one", b.finish(build(b)))
        assert device.compute(graph.pointer)
        get_bytes(graph.output, out)
    buffer.free()
    descriptors.free()
    return out


def products(device: Device, arrays: Arrays) -> npt.NDArray[np.float32]:
    """Compute `linear_id` of weight and bias `e` for input `x`, `ids` and `slots`."""

    def build(b: Builder) -> Tensor:
        return b.linear_id("e", b.weight("x"), b.weight("ids"), b.weight("slots"))

    return compute(device, arrays, np.empty((N_TOKENS, N_USED, N_OUT), np.float32), build)


def test_weights_go_by_slots_and_biases_by_ids(device: Device) -> None:
    """Experts stored in another order, and found there, give the same bits."""
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((N_EXPERT, N_OUT, N_IN)).astype(np.float32)
    arrays: Arrays = {
        "e.bias": rng.standard_normal((N_EXPERT, N_OUT)).astype(np.float32),
        "x": rng.standard_normal((N_TOKENS, 1, N_IN)).astype(np.float32),
    }
    ids = np.stack([rng.permutation(N_EXPERT)[:N_USED] for _ in range(N_TOKENS)]).astype(np.int32)
    at = rng.permutation(N_EXPERT)
    moved = np.empty_like(weight)
    moved[at] = weight
    resident = products(device, {**arrays, "e.weight": weight, "ids": ids, "slots": ids})
    paged = products(
        device, {**arrays, "e.weight": moved, "ids": ids, "slots": at[ids].astype(np.int32)}
    )
    assert np.array_equal(resident, paged)
    expected = np.einsum("tkoi,ti->tko", weight[ids], arrays["x"][:, 0]) + arrays["e.bias"][ids]
    assert np.allclose(resident, expected, atol=1e-4)
    assert not np.array_equal(paged, products(device, {**arrays, "e.weight": moved, "ids": ids,
                                                       "slots": ids}))  # fmt: skip


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "softmax_weight"])
def test_scores_that_are_no_numbers_are_put_in_order(gating: moe.Gating, device: Device) -> None:
    """ggml's sort may leave its array when a row has numbers and others: it never gets one."""
    n_expert, n_used = 128, 8
    counts = MoeHparams(n_expert=n_expert, n_expert_used=n_used, n_ff_exp=1)
    scores = np.random.default_rng(5).standard_normal((N_TOKENS, n_expert)).astype(np.float32)
    scores[1, 77], scores[2, 5:90], scores[3] = np.nan, np.nan, np.nan

    def build(b: Builder) -> Tensor:
        ids, _ = moe.choose(b, 0, b.weight("scores"), counts, moe.Routing(gating=gating))
        return b.g.ggml_cont(b.ctx, ids)

    out = np.empty((N_TOKENS, n_used), np.int32)
    ids = compute(device, {"scores": scores}, out, build)
    assert ids.min() >= 0 and ids.max() < n_expert
    assert all(len(set(row)) == n_used for row in ids)
    for t in (0, 4):
        assert list(ids[t]) == list(np.argsort(-scores[t])[:n_used])
    if gating != "softmax":  # which makes the whole row NaN
        assert ids[1, 0] == 77 and set(ids[2]) <= set(range(5, 90))
