"""Pruned prompts: what is kept is computed as a masked pass would, what is not passes by."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.models.forward import Forward, Piece
from edgeroute.models.registry import describe
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cells import Region
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.lora import LoraRow, LoraSlots, LoraTarget
from edgeroute.runtime.token_choice import BY_ATTENTION, MIN_TOKENS, TokenRule
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.skippers import prune
from edgeroute.tools.synth import make
from tests.reference import numpy_llama

Array = npt.NDArray[np.float32]
N = 210
KEEP = 40
RANDOM = prune.at_random(7)


class Bench:
    """A tiny model on one thread, with cells for a few prompts."""

    def __init__(self, path: Path, kv_type: str, own: ExitStack) -> None:
        self.file = own.enter_context(GGUFFile.open(path))
        self.model = describe(self.file)
        self.device = own.enter_context(Device.open("cpu"))
        self.device.set_threads(1)
        weights = ResidentWeights(self.file, self.device, self.model.specs())
        own.callback(weights.close)
        weights.load()
        self.hp = hp = self.model.hparams
        shape = KvShape(
            n_layer=hp.n_layer, n_embd_k_gqa=hp.n_embd_k_gqa, n_embd_v_gqa=hp.n_embd_v_gqa,
            n_embd_head=hp.n_embd_head_k, n_embd_head_v=hp.n_embd_head_v, v_in_k=hp.v_in_k,
            kv_type=kv_type,
        )  # fmt: skip
        self.kv = KvCache(self.device, shape, 2048)
        own.callback(self.kv.close)
        self.forward = Forward(self.model, self.device, weights, self.kv)
        own.callback(self.forward.close)
        self.forward.token_rule = RANDOM
        self.plain = all_run(range(hp.n_layer))

    def region(self) -> Region:
        found = self.kv.allocate(512)
        assert found is not None
        return found

    def tokens(self, n: int = N, seed: int = 3) -> list[int]:
        return [int(t) for t in np.random.default_rng(seed).integers(0, self.hp.n_vocab, n)]

    def run(self, piece: Piece, steps: tuple[Step, ...]) -> Array:
        logits = self.forward.run([piece], self.forward.spans(steps))
        assert logits is not None
        return logits

    def masked(self, piece: Piece, first: int, ids: npt.NDArray[np.int64]) -> Array:
        """Compute every token in every layer, then undo what a pruned layer leaves out."""
        forward, n = self.forward, len(piece.tokens)
        forward.run([piece._replace(n_out=0)], [Span((), embed=True, output=False)])
        state = forward.residual(n)
        for il in range(self.hp.n_layer - 1):
            forward.set_residual(state)
            forward.run([piece._replace(n_out=0)], [Span((Step(il),), embed=False, output=False)])
            after = forward.residual(n)
            kept = np.isin(np.arange(n), ids) | (il < first)
            state = np.where(kept[:, None], after, state)
        forward.set_residual(state)
        last = Step(self.hp.n_layer - 1)
        logits = forward.run([piece], [Span((last,), embed=False, output=True)])
        assert logits is not None
        return logits


@contextmanager
def opened(path: Path, kv_type: str = "f16") -> Iterator[Bench]:
    with ExitStack() as own:
        yield Bench(path, kv_type, own)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are exact: a row's result hardly depends on which rows share its batch."""
    found: Path = tmp_path_factory.mktemp("pruning") / "llama.gguf"
    make("llama", found, n_layer=4)
    return found


def nmse(found: Array, wanted: Array) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def close(found: Array, wanted: Array) -> bool:
    """Rows that share another batch meet kernels of another tile."""
    return nmse(found, wanted) < 1e-4


def far(found: Array, wanted: Array) -> bool:
    return nmse(found, wanted) > 1e-3


FAMILIES = ["llama", "gemma3", "qwen2", "qwen3", "qwen2moe", "deepseek2", "gpt-oss"]


@pytest.mark.parametrize(
    ("arch", "kv_type"), [*((arch, "f16") for arch in FAMILIES), ("gemma3", "q8_0")]
)
def test_kept_tokens_are_computed_as_by_a_masked_pass(
    tmp_path: Path, arch: str, kv_type: str
) -> None:
    """Answers, and what decoding sees after: keys and values of every token, kept or not."""
    model = tmp_path / "model.gguf"
    make(arch, model, n_layer=4)
    with opened(model, kv_type) as bench:
        tokens, steps = bench.tokens(), prune.pruned(bench.plain, KEEP, 1)
        ids = prune.choose(RANDOM, np.zeros(N, np.float32), KEEP)
        assert len(ids) == -(-KEEP * N // 100)
        ours, theirs = bench.region(), bench.region()
        full = bench.run(Piece(tokens, 0, theirs, n_out=8), bench.plain).copy()
        found = bench.run(Piece(tokens, 0, ours, n_out=8), steps).copy()
        wanted = bench.masked(Piece(tokens, 0, theirs, n_out=8), 1, ids).copy()
        assert close(found, wanted) and far(found, full)
        for i, token in enumerate(bench.tokens(3, seed=5)):
            a = bench.run(Piece([token], N + i, ours), steps).copy()
            b = bench.run(Piece([token], N + i, theirs), bench.plain).copy()
            assert close(a, b)


@pytest.mark.parametrize("n", [1, 2, MIN_TOKENS - 1])
def test_short_prompts_and_whole_ones_keep_their_bits(path: Path, n: int) -> None:
    with opened(path) as bench:
        region, tokens = bench.region(), bench.tokens(n)
        wanted = bench.run(Piece(tokens, 0, region), bench.plain).copy()
        assert np.array_equal(bench.run(Piece(tokens, 0, region), prune.pruned(bench.plain, 20, 0)),
                              wanted)  # fmt: skip
        assert prune.pruned(bench.plain, 100, 0) == bench.plain
        many = [Piece(bench.tokens(), 0, bench.region()), Piece(tokens, 0, region)]
        both = bench.forward.run(many)
        assert both is not None
        both = both.copy()
        again = bench.forward.run(many, bench.forward.spans(prune.pruned(bench.plain, 20, 0)))
        assert again is not None and np.array_equal(again, both)  # a batch is not pruned


def test_a_prompt_in_batches(path: Path) -> None:
    """Each batch chooses among its own; later ones see the keys of all before."""
    with opened(path) as bench:
        tokens, steps = bench.tokens(2 * N), prune.pruned(bench.plain, KEEP, 1)
        ours, theirs = bench.region(), bench.region()
        for pos in (0, N):
            ids = prune.choose(RANDOM, np.zeros(N, np.float32), KEEP, pos=pos)
            part = tokens[pos : pos + N]
            found = bench.run(Piece(part, pos, ours), steps).copy()
            assert close(found, bench.masked(Piece(part, pos, theirs), 1, ids))
        assert 0 in prune.choose(RANDOM, np.zeros(N, np.float32), KEEP)
        a = bench.run(Piece([5], 2 * N, ours), steps).copy()
        assert close(a, bench.run(Piece([5], 2 * N, theirs), bench.plain))


@pytest.mark.parametrize("n_out", [0, 1, 33, 100, N - 1, N])
def test_every_token_whose_logits_are_wanted_is_kept(path: Path, n_out: int) -> None:
    with opened(path) as bench:
        piece = Piece(bench.tokens(), 0, bench.region(), n_out=n_out)
        ids = prune.choose(RANDOM, np.zeros(N, np.float32), KEEP, n_out=n_out)
        assert set(range(N - n_out, N)) <= set(ids)
        found = bench.run(piece, prune.pruned(bench.plain, KEEP, 1)).copy()
        assert found.shape == (n_out, bench.hp.n_vocab)
        if n_out:
            assert close(found, bench.masked(piece, 1, ids))


def changed(bench: Bench, piece: Piece, il: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return the stream before a pruned layer, and which tokens it changed."""
    forward, n = bench.forward, len(piece.tokens)
    piece = piece._replace(n_out=0)
    before = [Span(bench.plain[:il], embed=True, output=False)]
    forward.run([piece], before)
    state = forward.residual(n)
    forward.run([piece], [Span((Step(il, keep=KEEP),), embed=False, output=False)])
    return state, np.flatnonzero((forward.residual(n) != state).any(axis=1))


def received(path: Path, il: int, state: Array, n_probe: int) -> Array:
    """What each token receives from the last ones in a layer, from the definition."""
    model = numpy_llama.NumpyModel(path)
    c, n, p = model.config, len(state), f"blk.{il}"
    h = model._norm(f"{p}.attn_norm", state)
    q = model._rotate(model._linear(f"{p}.attn_q", h).reshape(n, c.n_head, -1), False)
    k = model._rotate(model._linear(f"{p}.attn_k", h).reshape(n, c.n_head_kv, -1), False)
    k = np.repeat(k, c.n_head // c.n_head_kv, axis=1)
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    logits[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    share = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    found: Array = share[:, -n_probe:].mean(axis=(0, 1)).astype(np.float32) * np.float32(n)
    return found


def crooked() -> TokenRule:
    """A rule in which every factor counts and bends."""
    rng = np.random.default_rng(11)
    draw: Callable[..., Array] = lambda *n: rng.normal(size=n).astype(np.float32)  # noqa: E731
    return TokenRule(hidden=3 * draw(16, 4), bias=draw(16), out=draw(16))


WIDE = replace(BY_ATTENTION, n_recent=1, n_probe=MIN_TOKENS)
"""Whose choice depends on which queries may see a token."""


@pytest.mark.parametrize("rule", [BY_ATTENTION, WIDE, prune.BY_POSITION, crooked()],
                         ids=["attention", "wide", "position", "crooked"])  # fmt: skip
@pytest.mark.parametrize("il", [0, 2])
def test_the_graph_chooses_what_the_definition_does(path: Path, rule: TokenRule, il: int) -> None:
    with opened(path) as bench:
        bench.forward.token_rule = rule
        state, ids = changed(bench, Piece(bench.tokens(), 0, bench.region()), il)
        wanted = prune.choose(rule, received(path, il, state, rule.n_probe), KEEP, n_out=0)
        assert len(ids) == len(wanted)
        # Keys are stored in half precision: tokens at the threshold may change places.
        assert len(np.intersect1d(ids, wanted)) >= len(wanted) - 2
        other = prune.choose(prune.at_random(1), np.zeros(N, np.float32), KEEP, n_out=0)
        assert len(np.intersect1d(ids, other)) < len(wanted) - 20


def test_a_span_per_layer_gives_the_same_bits(path: Path) -> None:
    with opened(path) as bench:
        bench.forward.token_rule = BY_ATTENTION
        piece = Piece(bench.tokens(), 0, bench.region())
        steps = prune.pruned(bench.plain, KEEP, 1)
        whole = bench.run(piece, steps).copy()
        middle = [Span((step,), embed=False, output=False) for step in steps[:-1]]
        parts = [Span((), embed=True, output=False), *middle,
                 Span(steps[-1:], embed=False, output=True)]  # fmt: skip
        found = bench.forward.run([piece], parts)
        assert found is not None and np.array_equal(found, whole)
        shifted = Piece(piece.tokens, 0, bench.region())  # other cells, the same answer
        assert np.array_equal(bench.run(shifted, steps), whole)


def test_an_adapter_reaches_the_kept_tokens(path: Path) -> None:
    with opened(path) as bench, LoraSlots(bench.device, 4, 2) as slots:
        hp = bench.hp
        rng = np.random.default_rng(2)
        targets = [
            [LoraTarget(f"blk.{il}.{name}", hp.n_embd, n)]
            for il in range(hp.n_layer)
            for name, n in (("attn_q", hp.n_embd), ("attn_k", hp.n_embd_k_gqa), ("ffn_up", hp.n_ff))
        ]
        slots.extend(targets)
        for (target,) in targets:
            for slot in (1, 2):
                slots.write(slot, target.name,
                            rng.normal(size=(4, target.n_in)).astype(np.float16),
                            rng.normal(size=(target.n_out, 4)).astype(np.float16) / 8)  # fmt: skip
        bench.forward.lora = slots
        steps = prune.pruned(bench.plain, KEEP, 1)
        ids = prune.choose(RANDOM, np.zeros(N, np.float32), KEEP)
        tokens, ours, theirs = bench.tokens(), bench.region(), bench.region()
        plain = bench.run(Piece(tokens, 0, ours), steps).copy()
        for row in (LoraRow((1,), (1.0,)), LoraRow((1, 2), (0.25, 0.5))):
            found = bench.run(Piece(tokens, 0, ours, lora=row), steps).copy()
            assert close(found, bench.masked(Piece(tokens, 0, theirs, lora=row), 1, ids))
            assert far(found, plain)
