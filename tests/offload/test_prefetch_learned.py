"""The trained predictor: its arithmetic, its file, what is refused, and the engine with it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.config import RunParams
from edgeroute.offload import prefetch_learned
from edgeroute.offload.prefetch import make_predictor
from edgeroute.offload.prefetch_learned import (
    DECAY,
    N_BACK,
    N_PARTS,
    Learned,
    RouteModel,
    Score,
    load,
    read_model,
    to_onnx,
)
from edgeroute.runtime.errors import ModelFileError, UsageError
from edgeroute.tools import synth
from tests.edgeroute import paged_lab as lab

N_LAYER, N_EXPERT = 7, 10


def random_model(n_layer: int = N_LAYER, n_expert: int = N_EXPERT) -> RouteModel:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(n_layer, N_PARTS * n_expert, n_expert)).astype(np.float32)
    return RouteModel(
        weight=weight, bias=rng.normal(size=(n_layer, 1, n_expert)).astype(np.float32)
    )


def on_numpy(model: RouteModel) -> Score:
    return lambda seen: seen @ model.weight + model.bias


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same map computed by numpy, where only what is around it is tested."""
    monkeypatch.setattr(prefetch_learned, "on_onnxruntime", on_numpy)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "routes.onnx"
    found.write_bytes(to_onnx(random_model()))
    return found


def expected_scores(model: RouteModel, tokens: list[Any], layer: int) -> Any:
    """The next layer's scores in the latest token, written apart from the predictor."""
    hot = np.zeros((len(tokens), N_LAYER, N_EXPERT))
    for t, token in enumerate(tokens):
        for il, ids in enumerate(token):
            hot[t, il, ids] = 1
    before = hot[:-1, layer + 1]
    ages = np.arange(len(before))[::-1]
    often = ((1 - DECAY) * DECAY**ages) @ before
    last = before[-1] if len(before) else np.zeros(N_EXPERT)
    back = [hot[-1, layer - i] if layer >= i else np.zeros(N_EXPERT) for i in range(N_BACK)]
    seen = np.concatenate([*back, last, often])
    return seen @ model.weight[layer + 1] + model.bias[layer + 1, 0]


def check_against_formula(predictor: Learned, model: RouteModel) -> None:
    rng = np.random.default_rng(6)
    tokens: list[Any] = []
    for _ in range(12):
        predictor.begin_step()
        tokens.append([])
        for layer in range(N_LAYER):
            ids = rng.integers(0, N_EXPERT, 6).tolist()  # of two sequences: some twice
            tokens[-1].append(ids)
            ranked = predictor.predict(layer, ids, None)
            if layer == N_LAYER - 1:
                assert not ranked
                continue
            scores = expected_scores(model, tokens, layer)
            assert sorted(guess.page for guess in ranked) == [
                (layer + 1) * N_EXPERT + expert for expert in range(N_EXPERT)
            ]
            found = [guess.score for guess in ranked]
            assert found == sorted(found, reverse=True)
            at = [guess.page % N_EXPERT for guess in ranked]
            np.testing.assert_allclose(found, scores[at], rtol=1e-4, atol=1e-4)


def test_scores_are_the_map_of_what_was_seen() -> None:
    model = random_model()
    check_against_formula(Learned(model, on_numpy(model)), model)


def test_onnxruntime_computes_the_same_from_a_file(path: Path) -> None:
    pytest.importorskip("onnxruntime")
    check_against_formula(load(path, N_LAYER, N_EXPERT), random_model())


def test_a_new_sequence_has_no_last_token() -> None:
    model = random_model()
    predictor = Learned(model, on_numpy(model))
    predictor.begin_step()
    for layer in range(N_LAYER):
        predictor.predict(layer, [1, 2], None)
    predictor.end_sequence()
    predictor.begin_step()
    ranked = predictor.predict(0, [3], None)
    seen = np.zeros(N_PARTS * N_EXPERT)
    seen[3] = 1
    often = (N_PARTS - 1) * N_EXPERT
    seen[[often + 1, often + 2]] = (1 - DECAY) * DECAY
    scores = seen @ model.weight[1] + model.bias[1, 0]
    found = {guess.page % N_EXPERT: guess.score for guess in ranked}
    np.testing.assert_allclose([found[i] for i in range(N_EXPERT)], scores, rtol=1e-4, atol=1e-4)


def test_a_file_has_the_numbers_that_were_written(path: Path) -> None:
    model, found = random_model(), read_model(path, N_LAYER, N_EXPERT)
    assert np.array_equal(found.weight, model.weight)
    assert np.array_equal(found.bias, model.bias)


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _lengthen(data: bytes) -> bytes:
    return data + b"\0"


def _rename_an_operator(data: bytes) -> bytes:
    assert data.count(b"MatMul") == 1
    return data.replace(b"MatMul", b"MatMuL")


def _transpose(data: bytes) -> bytes:
    head = prefetch_learned._tensor_head("weight", (7, 60, 10), 16800)
    other = prefetch_learned._tensor_head("weight", (7, 10, 60), 16800)
    assert data.count(head) == 1
    return data.replace(head, other)


@pytest.mark.parametrize("spoil", [_cut, _lengthen, _rename_an_operator, _transpose])
def test_a_foreign_file_is_refused(path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelFileError, match=r"routes.onnx is no route predictor for 7 layers"):
        read_model(path, N_LAYER, N_EXPERT)


def test_no_byte_around_the_numbers_may_differ(path: Path) -> None:
    """Each is changed in turn: what reaches onnxruntime differs in its numbers at most."""
    data = path.read_bytes()
    model = random_model()
    numbers = model.weight.nbytes, model.bias.nbytes
    at = data.index(model.weight.tobytes()), data.index(model.bias.tobytes())
    free = {i for start, n in zip(at, numbers, strict=True) for i in range(start, start + n)}
    fixed = [i for i in range(len(data)) if i not in free]
    assert 100 < len(fixed) < 400
    for i in fixed:
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(ModelFileError):
            read_model(path, N_LAYER, N_EXPERT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(path: Path, value: float) -> None:
    data = path.read_bytes()
    number = random_model().bias[2, 0, 3].tobytes()
    assert data.count(number) == 1
    path.write_bytes(data.replace(number, np.float32(value).tobytes()))
    with pytest.raises(ModelFileError, match="must be finite"):
        read_model(path, N_LAYER, N_EXPERT)


def test_a_predictor_of_another_model_is_refused(path: Path) -> None:
    for n_layer, n_expert in ((N_LAYER + 1, N_EXPERT), (N_LAYER, N_EXPERT - 1)):
        with pytest.raises(ModelFileError, match="train_routes"):
            read_model(path, n_layer, n_expert)


def test_a_huge_file_is_not_read(path: Path) -> None:
    os.truncate(path, 1 << 40)
    with pytest.raises(ModelFileError, match="no route predictor"):
        read_model(path, N_LAYER, N_EXPERT)
    with pytest.raises(UsageError, match="at most 64 MiB"):
        read_model(path, 60, 1000)
    with pytest.raises(UsageError, match="0 x 10"):
        read_model(path, 0, 10)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(UsageError, match=r"cannot read the route predictor"):
            read_model(missing, N_LAYER, N_EXPERT)


def test_shapes_that_are_no_predictors_are_refused() -> None:
    good = random_model()
    for weight, bias in (
        (good.weight[:, :-1], good.bias),
        (good.weight, good.bias[:, 0]),
        (good.weight[:0], good.bias[:0]),
    ):
        with pytest.raises(UsageError, match="a route predictor has weight"):
            RouteModel(weight=weight, bias=bias)


def test_without_onnxruntime_the_remedy_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"needs onnxruntime.*edgeroute\[predict\]"):
        make_predictor(f"learned:{path}", N_LAYER, N_EXPERT)


@pytest.mark.usefixtures("without_onnxruntime")
def test_it_is_named_by_its_file(path: Path) -> None:
    assert make_predictor(f"learned:{path}", N_LAYER, N_EXPERT).name == "learned"
    with pytest.raises(ModelFileError):
        make_predictor(f"learned:{path}", N_LAYER, 2 * N_EXPERT)
    assert RunParams(prefetch=f"learned:{path}").prefetch == f"learned:{path}"
    with pytest.raises(UsageError, match="learned:FILE"):
        RunParams(prefetch="learned")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = tmp_path_factory.mktemp("learned") / "small.gguf"
    synth.write(lab.SMALL, found)
    opened = lab.Lab(found)
    yield opened
    opened.close()


def check_engine(small: Any, path: Path, slots: int | None) -> None:
    path.write_bytes(to_onnx(random_model(lab.SMALL.n_layer, lab.SMALL.n_expert)))
    with small.paged(prefetch=f"learned:{path}", slots=slots, forced=True) as paged:
        assert lab.equal(paged.run(lab.EVERYTHING), small.resident(lab.EVERYTHING))
        paged.settle()
        counts = paged.counts()
        if slots == 5:
            assert counts.prefetch_issued and counts.prefetch_useful
            assert counts.prefetch_wasted  # random weights: most of it is dropped again


@pytest.mark.usefixtures("without_onnxruntime")
@pytest.mark.parametrize("slots", [None, 1, 5])
def test_wrong_prefetches_change_no_bit(small: Any, tmp_path: Path, slots: int | None) -> None:
    check_engine(small, tmp_path / "routes.onnx", slots)


def test_the_engine_with_onnxruntime(small: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    check_engine(small, tmp_path / "routes.onnx", 5)


def test_the_engine_refuses_a_foreign_file_and_holds_nothing(small: Any, path: Path) -> None:
    with (
        pytest.raises(ModelFileError, match="no route predictor for 4 layers of 12 experts"),
        small.paged(prefetch=f"learned:{path}", forced=True),
    ):
        pass
