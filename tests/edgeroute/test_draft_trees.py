"""Several guesses for one place: answers, cells and rules are those of plain decoding."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime
from edgeroute.drafters import may_branch, tokens_of
from edgeroute.models.forward import Branch, Piece
from edgeroute.request import Request, sequence_of
from edgeroute.runtime.batch_shape import SPLIT_KV_MIN, change_places
from edgeroute.runtime.cells import CELL_BUCKET
from edgeroute.skippers.guesses import ROOT, Guess, above
from edgeroute.skippers.speculate import PLAIN, Choice, Speculator
from edgeroute.stats import Generation
from edgeroute.tools import synth
from tests.edgeroute.layered_lab import plain_machine

PARAMS: dict[str, Any] = {"n_ctx": 1024, "n_ubatch": 64}
LENGTHS = (20, CELL_BUCKET - 6, SPLIT_KV_MIN - 4, SPLIT_KV_MIN + 130, 762)
"""Of prompts: answers cross a bucket, the first split of cells, and a thread's part."""
N_TOKENS, MOST = 16, 6
OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 1.4, "seed": 3, "top_p": 0.9}]


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_machine(monkeypatch)


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(5, 380) for _ in range(length)]


def model(folder: Path, arch: str) -> Path:
    path = folder / f"{arch}.gguf"
    synth.write(replace(synth.ARCHITECTURES[arch], n_layer=4, weight_type="Q8_0"), path)
    return path


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gemma3 has a sliding window."""
    return model(tmp_path_factory.mktemp("trees"), request.param)


class _Always(Speculator):
    def __init__(self) -> None:
        super().__init__(15)

    def choose(self, offers: Mapping[str, int]) -> Choice:
        for name, most in offers.items():
            return Choice(name, min(MOST, most))
        return PLAIN


class _Bushy:
    """Knows the answers, and plants other guesses beside and behind the right ones."""

    def __init__(self, forward: Any, answers: list[list[int]], *, right: bool) -> None:
        self._forward, self._answers, self._right = forward, answers, right
        self.n_branched = 0

    def offers(self, request: Request, most: int) -> Mapping[str, int]:
        return {"fake": most}

    def draft(self, request: Request, n_tokens: int) -> list[Guess]:
        tokens = tokens_of(request)
        if not may_branch(self._forward, sequence_of(request), n_tokens):
            return []
        rng = random.Random(len(tokens))
        whole = next(text for text in self._answers if text[: len(tokens)] == tokens)
        coming, found, last = whole[len(tokens) :] if self._right else [], list[Guess](), ROOT
        while len(found) < n_tokens:
            if coming and rng.random() < 0.5:
                found.append(Guess(coming.pop(0), last))
                last = len(found) - 1
            else:
                found.append(Guess(rng.randrange(5, 380), rng.randrange(-1, len(found))))
        self.n_branched += any(len(above(found, i)) < i for i in range(len(found)))
        return found

    def end(self, request: Request) -> None:
        pass


def plant(runtime: Runtime, answers: list[list[int]], *, right: bool = True) -> _Bushy:
    speculation = runtime._scheduler.speculation
    assert speculation is not None
    speculation.policy = _Always()
    fake = _Bushy(runtime._loaded.forward, answers, right=right)
    speculation._drafters = {"fake": fake}
    return fake


def answer(runtime: Runtime, **options: Any) -> list[Generation]:
    return [runtime.generate(prompt_ids=prompt(n), max_tokens=N_TOKENS, prefix="off", **options)
            for n in LENGTHS]  # fmt: skip


def texts(answers: list[Generation]) -> list[list[int]]:
    return [[*prompt(n), *each.token_ids] for n, each in zip(LENGTHS, answers, strict=True)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_answers_are_the_plain_ones(path: Path, kv_type: str, threads: int) -> None:
    settings = PARAMS | {"threads": threads, "kv_type": kv_type}
    for options in OPTIONS:
        with Runtime(path, **settings, speculate="off") as runtime:
            expected = answer(runtime, **options)
        with Runtime(path, **settings, speculate="self") as runtime:
            fake = plant(runtime, texts(expected))
            found = answer(runtime, **options)
            assert texts(found) == texts(expected)
            counts: Any = runtime.stats()["speculation"]
            assert counts["accepted"] > N_TOKENS and fake.n_branched > len(LENGTHS)
            plant(runtime, texts(expected), right=False)
            assert texts(answer(runtime, **options)) == texts(expected)


def test_cells_are_the_plain_ones(path: Path) -> None:
    """Bit for bit, those of every layer: what comes later reads them."""
    length, n_bytes = LENGTHS[0], 0
    cells: list[np.ndarray] = []
    known: list[list[int]] = []
    for guessed in (False, True):
        with Runtime(path, **PARAMS, threads=1, speculate="self") as runtime:
            if guessed:
                plant(runtime, known)
            else:
                speculation: Any = runtime._scheduler.speculation
                speculation._drafters = {}
            found = runtime.generate(prompt_ids=prompt(length), max_tokens=N_TOKENS)
            known = [[*prompt(length), *found.token_ids]]
            kv = runtime._loaded.kv
            n = length + N_TOKENS - 1
            n_bytes = n * kv.shape.bytes_per_cell
            cells.append(np.empty(n_bytes, np.uint8))
            kv.read_cells(0, n, cells[-1])
    assert n_bytes and np.array_equal(*cells)


def test_a_branch_sees_what_it_follows_and_nothing_else(path: Path) -> None:
    """Logits of guesses for one place are those of answers that had taken them."""
    with Runtime(path, **PARAMS, threads=1, speculate="off") as runtime:
        forward, kv = runtime._loaded.forward, runtime._loaded.kv
        region = kv.allocate(CELL_BUCKET)
        assert region is not None
        n = 40
        tokens = prompt(n)

        def alone(*more: int) -> np.ndarray:
            forward.run([Piece(tokens[:-1], 0, region, n_out=0)])
            for i, token in enumerate([tokens[-1], *more]):
                found = forward.run([Piece((token,), n - 1 + i, region)])
            assert found is not None
            return found[0].copy()

        expected = [alone(), alone(7), alone(9), alone(7, 11), alone(9, 11), alone(9, 11, 5)]
        forward.run([Piece(tokens[:-1], 0, region, n_out=0)])
        pieces = [
            Piece((tokens[-1],), n - 1, region), Piece((7,), n, region),
            Piece((9,), n, region, branch=Branch(n + 1, n, ())),
            Piece((11,), n + 1, region, branch=Branch(n + 2, n, (n,))),
            Piece((11,), n + 1, region, branch=Branch(n + 3, n, (n + 1,))),
            Piece((5,), n + 2, region, branch=Branch(n + 4, n, (n + 1, n + 3))),
        ]  # fmt: skip
        found = forward.run(pieces)
        assert found is not None
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        kv.release(region)


@pytest.mark.parametrize(
    ("first", "last", "n_threads", "free"),
    [(10, 20, 2, True), (250, 255, 2, True), (250, 256, 2, False), (500, 511, 3, True),
     (520, 530, 2, True), (380, 390, 2, True), (768, 770, 2, True), (510, 515, 2, False),
     (380, 386, 4, False), (760, 764, 2, True), (600, 616, 5, False)],
)  # fmt: skip
def test_where_cells_may_change_places(first: int, last: int, n_threads: int, free: bool) -> None:
    """Cells of another thread's part, or a longer view, would mean other bits."""
    assert change_places(first, last, n_threads) == free


@pytest.fixture
def windowed(tmp_path: Path) -> Iterator[Runtime]:
    with Runtime(model(tmp_path, "gemma3"), **PARAMS, threads=1) as runtime:
        yield runtime


def test_trees_are_no_wider_than_a_sliding_window(windowed: Runtime) -> None:
    forward = windowed._loaded.forward
    n_swa = forward.model.n_swa
    assert n_swa is not None
    sequence: Any = type("Sequence", (), {"n_past": 3})()
    assert may_branch(forward, sequence, n_swa - 1)
    assert not may_branch(forward, sequence, n_swa)
