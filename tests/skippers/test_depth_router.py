"""Depth routers: right arithmetic, limits kept, hostile arrays refused, signals learned, frozen."""

import dataclasses
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.depth_routing import load_router, route_prefill
from edgeroute.models.forward import Piece
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.errors import ComputeError, DepthFileError
from edgeroute.skippers.depth_router import (
    CHOICES,
    LIMITS,
    DepthRouter,
    LayerRouter,
    RouterLimits,
    choices_of,
    choose,
    executed_ratio,
    from_arrays,
    legal,
    pool,
    steps_from,
    steps_of,
    to_arrays,
)
from edgeroute.tools.answerer import Answerer, open_answerer
from edgeroute.tools.question_records import Question
from edgeroute.tools.questions import make_questions
from edgeroute.tools.train_depth_router import (
    save_routers,
)

N_LAYER, N_EMBD = 8, 12
Arrays = dict[str, npt.NDArray[np.generic]]


def make_router(seed: int = 1, limits: RouterLimits | None = None, **shape: int) -> DepthRouter:
    """Random networks for all layers that may be routed."""
    n_layer, n_embd = shape.get("n_layer", N_LAYER), shape.get("n_embd", N_EMBD)
    limits = limits or RouterLimits(2, 1, 3, 2)
    rng = np.random.default_rng(seed)

    def normal(*ne: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(ne).astype(np.float32)

    layers = {
        il: LayerRouter(w1=normal(16, n_embd), b1=normal(16), w2=normal(3, 16), b2=normal(3))
        for il in range(n_layer)
        if limits.allows(il, n_layer)
    }
    return DepthRouter(
        layers=MappingProxyType(layers), limits=limits, n_layer=n_layer, n_embd=n_embd
    )


def always(choice: str, limits: RouterLimits, n_layer: int, n_embd: int) -> DepthRouter:
    """Networks that score one choice highest whatever they see."""
    router = make_router(1, limits, n_layer=n_layer, n_embd=n_embd)
    b2 = np.array([10.0 * (choice == each) for each in CHOICES], np.float32)
    layers = {
        il: dataclasses.replace(layer, w2=np.zeros_like(layer.w2), b2=b2)
        for il, layer in router.layers.items()
    }
    return dataclasses.replace(router, layers=MappingProxyType(layers))


# --- arithmetic ---------------------------------------------------------------------------


def plain_scores(layer: LayerRouter, states: npt.NDArray[np.float32]) -> list[float]:
    """The same by loops over plain floats."""
    rows = [[float(v) for v in row] for row in states[1:]]
    rows = [[v / math.sqrt(sum(w * w for w in row) / len(row)) for v in row] for row in rows]
    n, k = len(rows), min(8, len(rows))
    sizes = [n // k + (i < n % k) for i in range(k)]
    total, at = [0.0] * 3, 0
    for size in sizes:
        part, at = rows[at : at + size], at + size
        mean = [sum(column) / size for column in zip(*part, strict=True)]
        hidden = []
        for weights, bias in zip(layer.w1, layer.b1, strict=True):
            x = sum(float(w) * m for w, m in zip(weights, mean, strict=True)) + float(bias)
            hidden.append(0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
        for c in range(3):
            score = sum(float(w) * h for w, h in zip(layer.w2[c], hidden, strict=True))
            total[c] += (score + float(layer.b2[c])) / k
    return total


@pytest.mark.parametrize("n_tokens", [2, 5, 9, 10, 17, 40])
def test_scores_equal_plain_arithmetic(n_tokens: int) -> None:
    router = make_router()
    states = np.random.default_rng(n_tokens).standard_normal((n_tokens, N_EMBD)).astype(np.float32)
    for layer in router.layers.values():
        assert layer.scores(pool(states)) == pytest.approx(plain_scores(layer, states), abs=1e-4)


def test_neither_position_0_nor_a_loud_token_dominates() -> None:
    states = np.random.default_rng(2).standard_normal((30, N_EMBD)).astype(np.float32)
    pooled = pool(states)
    huge = states.copy()
    huge[0] *= 5000
    assert np.array_equal(pool(huge), pooled)
    huge[7] *= 5000
    assert pool(huge) == pytest.approx(pooled, abs=1e-5)
    assert pool(states * np.float32(3)) == pytest.approx(pooled, abs=1e-5)


def test_windows_cover_every_token() -> None:
    """The paper drops the rest of T / 8: the end of the question."""
    states = np.random.default_rng(3).standard_normal((24, N_EMBD)).astype(np.float32)
    for i in range(1, 24):
        other = states.copy()
        other[i] = -other[i]
        assert not np.array_equal(pool(other), pool(states)), i
    assert len(pool(states)) == 8 and len(pool(states[:4])) == 3 and len(pool(states[:1])) == 0


def test_what_cannot_be_scored_runs() -> None:
    limits = RouterLimits(1, 1, 9, 9)
    router = always("skip", limits, N_LAYER, N_EMBD)
    states = np.ones((9, N_EMBD), np.float32)
    assert choose(router, 3, states, ()) == "skip"
    assert choose(router, 3, states[:1], ()) == "run", "nothing is left without position 0"
    assert choose(router, 0, states, ()) == "run", "the first layer has no router"
    states[4, 4] = np.nan
    assert choose(router, 3, states, ()) == "run"
    for bad in (states[:, :5], states.astype(np.float64), states[0]):
        with pytest.raises(DepthFileError):
            choose(router, 3, bad, ())


# --- limits and steps ---------------------------------------------------------------------


def test_limits_hold_whatever_is_scored() -> None:
    limits = RouterLimits(2, 1, 3, 1)
    states = np.ones((9, N_EMBD), np.float32)
    for choice in CHOICES:
        router = always(choice, limits, N_LAYER, N_EMBD)
        steps: tuple[Step, ...] = ()
        for il in range(N_LAYER):
            steps += steps_of(il, choose(router, il, states, steps), steps)
        made = choices_of(steps, N_LAYER)
        assert steps == steps_from(made)
        assert made[:2] == ("run", "run") and made[-1] == "run"
        if choice == "skip":
            assert "".join(c[0] for c in made) == "rrssrsrr", "two in a row, three in all"
            assert executed_ratio(steps, N_LAYER) == 5 / 8
        if choice == "repeat":
            assert made.count("repeat") == 1 and executed_ratio(steps, N_LAYER) == 9 / 8
            assert [step.repeat for step in steps if step.repeat] == [1]
        if choice == "run":
            assert steps == all_run(range(N_LAYER))


def test_repetitions_are_counted_on() -> None:
    """Each has a row of keys and values of its own, whatever layer it repeats."""
    steps = steps_from(["run", "repeat", "skip", "repeat", "run"])
    assert [(step.il, step.repeat) for step in steps] == [
        (0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 2), (4, 0)
    ]  # fmt: skip
    assert legal(RouterLimits(1, 1, 9, 2), 4, 9, steps) == ("run", "skip")


# --- arrays and files ---------------------------------------------------------------------


def good() -> Arrays:
    return dict(to_arrays(make_router()))


def test_arrays_and_files_round_trip(tmp_path: Path) -> None:
    router = make_router()
    path = tmp_path / "r.npz"
    save_routers(path, router, "ab" * 32)
    for read in (from_arrays(to_arrays(router), N_LAYER, N_EMBD),
                 load_router(path, N_LAYER, N_EMBD)):  # fmt: skip
        assert read.limits == router.limits and read.layers.keys() == router.layers.keys()
        for il, layer in router.layers.items():
            for part in ("w1", "b1", "w2", "b2"):
                assert np.array_equal(getattr(read.layers[il], part), getattr(layer, part))
    halves = {n: a if n == LIMITS else a.astype(np.float16) for n, a in good().items()}
    assert from_arrays(halves, N_LAYER, N_EMBD).layers[2].w1.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("router/blk.2.w1", np.zeros((16, N_EMBD + 1), np.float32), "w1 of the router of layer 2"),
        ("router/blk.2.w2", np.zeros((2, 16), np.float32), "w2 of"),
        ("router/blk.2.b1", np.zeros((16, 1), np.float32), "b1"),
        ("router/blk.2.b1", np.zeros((0,), np.float32), "b1"),
        ("router/blk.2.b2", np.zeros((3,), np.int32), "type int32"),
        ("router/blk.2.b2", np.array([0, np.inf, 0], np.float32), "not finite"),
        ("router/blk.2.b2", np.zeros((3,), np.float64), "type float64"),
        ("router/blk.2.b2", None, "lacks b2"),
        ("router/blk.0.b2", np.zeros((3,), np.float32), "layer 0 has a router"),
        ("router/blk.7.b2", np.zeros((3,), np.float32), "layer 7 has a router"),
        ("router/blk.99.b2", np.zeros((3,), np.float32), "layer 99"),
        ("router/blk.02.b2", np.zeros((3,), np.float32), "not the name"),
        ("router/blk.2.b3", np.zeros((3,), np.float32), "not the name"),
        ("weights", np.zeros((3,), np.float32), "not the name"),
        (LIMITS, None, "4 whole numbers"),
        (LIMITS, np.array([2, 1, 3, 2], np.int64), "4 whole numbers"),
        (LIMITS, np.array([2, 1, -3, 2], np.int32), "each must be"),
        (LIMITS, np.array([2, 1, 99, 2], np.int32), "each must be"),
        (LIMITS, np.array([0, 1, 3, 2], np.int32), "at least one at each end"),
        (LIMITS, np.array([4, 4, 3, 2], np.int32), "at least one at each end"),
    ],
)  # fmt: skip
def test_hostile_arrays_are_refused(
    name: str, value: npt.NDArray[np.generic] | None, said: str
) -> None:
    arrays = good()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(DepthFileError, match=said):
        from_arrays(arrays, N_LAYER, N_EMBD)


def test_no_network_at_all_is_refused() -> None:
    with pytest.raises(DepthFileError, match="at least one"):
        from_arrays({LIMITS: good()[LIMITS]}, N_LAYER, N_EMBD)


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    header = tmp_path / "h.npy"
    np.save(header, np.zeros(4, np.int32))
    lying = header.read_bytes().replace(b"(4,)", b"(4444444444,)").replace(b" " * 10, b"", 1)
    evil = tmp_path / "evil.npy"
    np.save(evil, np.array([{"a": 1}], object), allow_pickle=True)
    members: dict[str, bytes] = {
        "router/limits.npy": lying, "router/blk.2.w1.npy": evil.read_bytes(),
        "router/blk.2.b1.npy": b"\x93NUMPY\x01\x00", "notes.txt": b"hello", "a.npy": b"",
        "b.npy": header.read_bytes()[:-3], "c.npy": b"\x93NUMPY\x02\x00" + bytes(200),
    }  # fmt: skip
    for name, data in members.items():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, data)
        with pytest.raises(DepthFileError, match="no depth routers"):
            load_router(path, N_LAYER, N_EMBD)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("router/limits.npy", bytes(1 << 20))
    with pytest.raises(DepthFileError, match="not a stored array"):
        load_router(path, N_LAYER, N_EMBD)
    save_routers(path, make_router(), "ab" * 32)
    load_router(path, N_LAYER, N_EMBD, "ab" * 32)
    with pytest.raises(DepthFileError, match="another model"):
        load_router(path, N_LAYER, N_EMBD, "cd" * 32)
    whole = path.read_bytes()
    for end in (0, 3, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:end])
        with pytest.raises(DepthFileError):
            load_router(path, N_LAYER, N_EMBD)
    with pytest.raises(DepthFileError):
        load_router(tmp_path / "none.npz", N_LAYER, N_EMBD)


# --- in the engine ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answerer(tiny_path: Path) -> Iterator[Answerer]:
    with open_answerer(tiny_path) as opened:
        yield opened


def small(answerer: Answerer, choice: str, **limits: int) -> DepthRouter:
    bounds = RouterLimits(1, 1, 1, 1)._replace(**limits)
    return always(choice, bounds, answerer.n_layer, answerer.n_embd)


def question(answer: str = "5") -> Question:
    (found,) = make_questions(1, 3, ["words"])
    return dataclasses.replace(found, answer=answer)


def test_routers_that_always_run_change_no_bit(answerer: Answerer) -> None:
    tokens = answerer.encode(question())
    piece = Piece(tokens=tokens, pos=0, region=answerer.region)
    whole = answerer.forward.run([piece])
    routed = route_prefill(answerer.forward, piece, small(answerer, "run"))
    assert routed is not None and whole is not None
    assert routed.steps == all_run(range(answerer.n_layer))
    assert np.array_equal(routed.logits, whole)


@pytest.mark.parametrize("choice", ["skip", "repeat"])
def test_decided_while_computing_equals_decided_before(answerer: Answerer, choice: str) -> None:
    tokens = answerer.encode(question())
    piece = Piece(tokens=tokens, pos=0, region=answerer.region)
    routed = route_prefill(answerer.forward, piece, small(answerer, choice))
    assert routed is not None
    assert routed.steps == steps_from(["run", choice, "run"])  # type: ignore[list-item]
    known = answerer.forward.run([piece], answerer.forward.spans(routed.steps))
    plain = answerer.forward.run([piece])
    assert known is not None and plain is not None
    assert np.array_equal(routed.logits, known) and not np.array_equal(known, plain)


@pytest.mark.parametrize("choice", ["skip", "repeat"])
def test_the_plan_holds_for_the_whole_request(
    answerer: Answerer, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers look at the prompt, once; every token is computed with what they decided then."""
    looks: list[int] = []
    spans_run: list[Any] = []
    plain_run = answerer.forward.run

    def watched(pieces: Any, spans: Any = None, **more: Any) -> Any:
        spans_run.append((len(pieces[0].tokens), spans))
        return plain_run(pieces, spans, **more)

    def looked(*arguments: Any) -> Any:
        looks.append(arguments[1])
        return choose(*arguments)

    monkeypatch.setattr("edgeroute.depth_routing.choose", looked)
    monkeypatch.setattr(answerer.forward, "run", watched)
    monkeypatch.setattr("edgeroute.tools.answerer.is_settled", lambda *_: False)
    n_decoded = 0
    for asked in make_questions(5, 3, ["words"]):
        looks.clear()
        spans_run.clear()
        answer = answerer.answer(asked, small(answerer, choice))
        assert looks == [1], "one layer has a router, and it is asked once"
        decoded = [spans for n, spans in spans_run if n == 1]
        assert all(spans == answerer.forward.spans(answer.steps) for spans in decoded)
        again = answerer.answer(asked, answer.steps)
        assert again == answer, "the same as when the steps are known before"
        n_decoded += len(decoded)
    assert n_decoded > 5


def test_cached_decoding_equals_recomputation(answerer: Answerer) -> None:
    """A repeated pass has keys of its own, a skipped layer none."""
    tokens = answerer.encode(question())
    for choice in CHOICES:
        spans = answerer.forward.spans(steps_from(["run", choice, "run"]))
        head = Piece(tokens=tokens[:-4], pos=0, region=answerer.region)
        assert answerer.forward.run([head], spans) is not None
        for i in range(len(tokens) - 4, len(tokens)):
            piece = Piece(tokens=tokens[i : i + 1], pos=i, region=answerer.region)
            logits = answerer.forward.run([piece], spans)
            assert logits is not None
            cached = logits[0].copy()
        whole = Piece(tokens=tokens, pos=0, region=answerer.region)
        fresh = answerer.forward.run([whole], spans)
        assert fresh is not None
        assert np.abs(cached - fresh[0]).max() < 1e-2 * np.abs(fresh[0]).max(), choice


def test_wrong_places_and_models_are_refused(answerer: Answerer) -> None:
    piece = Piece(tokens=[1, 2, 3], pos=4, region=answerer.region)
    with pytest.raises(ComputeError, match="first token on"):
        route_prefill(answerer.forward, piece, small(answerer, "run"))
    with pytest.raises(ComputeError, match="the router is for"):
        route_prefill(answerer.forward, piece._replace(pos=0), make_router())
