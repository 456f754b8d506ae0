"""The equivalences that every lever stands on, bit for bit."""

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as IterSequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.registry import describe
from edgeroute.row_bits import rows_of
from edgeroute.runtime.batch_shape import Segment, group_segments
from edgeroute.runtime.cells import Region
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sequence import CLASS_SINGLE, Sequence, chunk_classes, next_chunk_end
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.synth import make

N_UBATCH = 128


@dataclass
class Bench:
    """A model with all that it runs on."""

    forward: Forward
    kv: KvCache

    def tokens(self, n_tokens: int, seed: int) -> list[int]:
        n_vocab = min(self.forward.model.hparams.n_vocab, 30000)
        return [int(t) for t in np.random.default_rng(seed).integers(0, n_vocab, n_tokens)]

    def prefill(self, sequence: Sequence) -> npt.NDArray[np.float32]:
        """Compute what a sequence lacks, in the scheduler's batches; return the last logits."""
        n, logits = len(sequence.tokens), None
        while sequence.n_past < n:
            start = sequence.n_past
            end = next_chunk_end(start, n, N_UBATCH)
            piece = Piece(
                tokens=sequence.tokens[start:end], pos=start, region=sequence.region, n_out=1
            )
            logits = self.forward.run([piece])
            sequence.n_past = end
            sequence.classes += chunk_classes(end - start).tobytes()
        assert logits is not None
        return logits

    def decode(self, sequences: list[Sequence], tokens: list[int]) -> npt.NDArray[np.float32]:
        """Compute one token for each sequence in one batch; nothing is appended."""
        logits = self.forward.run(
            [
                Piece(tokens=[token], pos=sequence.n_past, region=sequence.region)
                for sequence, token in zip(sequences, tokens, strict=True)
            ]
        )
        assert logits is not None
        return logits


@contextmanager
def open_bench(path: Path, n_cells: int = 2048, kv_type: str = "f16") -> Iterator[Bench]:
    with ExitStack() as own:
        file = own.enter_context(GGUFFile.open(path))
        model = describe(file)
        device = own.enter_context(Device.open())
        device.set_threads(1)
        weights = ResidentWeights(file, device, model.specs())
        own.callback(weights.close)
        weights.load()
        hp = model.hparams
        shape = KvShape(
            n_layer=hp.n_layer,
            n_embd_k_gqa=hp.n_embd_k_gqa,
            n_embd_v_gqa=hp.n_embd_v_gqa,
            n_embd_head=hp.n_embd_head_k,
            kv_type=kv_type,
        )
        kv = KvCache(device, shape, n_cells)
        own.callback(kv.close)
        forward = Forward(model, device, weights, kv)
        own.callback(forward.close)
        yield Bench(forward, kv)


@pytest.fixture(
    scope="module",
    params=["llama-F32", "llama-Q8_0", "llama-Q4_0", "qwen2-Q4_K", "qwen3-Q5_0", "gemma3-Q4_0"],
)
def synthetic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file per family, in types with and without repacked kernels."""
    arch, weight_type = request.param.split("-")
    path: Path = tmp_path_factory.mktemp("synthetic") / f"{request.param}.gguf"
    make(arch, path, weight_type=weight_type)
    return path


def open_sequence(bench: Bench, tokens: list[int]) -> Sequence:
    region = bench.kv.allocate(len(tokens) + 64)
    assert region is not None
    return Sequence(list(tokens), region)


@pytest.mark.parametrize("lengths", [(5, 70), (3, 40, 130), (300, 70, 90)])
def test_a_token_gets_the_same_bits_alone_and_in_a_batch(
    synthetic: Path, lengths: tuple[int, ...]
) -> None:
    """Up to three share a pass without touching each other's bits (RunParams.max_batch).

    Weights that are not quantised go through another kernel from two rows on.
    """
    with open_bench(synthetic) as bench:
        sequences = [open_sequence(bench, bench.tokens(n, n)) for n in lengths]
        for sequence in sequences:
            bench.prefill(sequence)
        tokens = bench.tokens(len(lengths), 7)
        together = bench.decode(sequences, tokens)
        alone = np.stack(
            [bench.decode([s], [t])[0] for s, t in zip(sequences, tokens, strict=True)]
        )
        if "F32" in synthetic.name:
            assert np.sum((together - alone) ** 2) < 1e-6 * np.sum(alone**2)
        else:
            assert np.array_equal(together, alone)


@pytest.mark.parametrize("weight_type", ["Q8_0", "Q4_1", "Q5_0", "Q5_K", "Q6_K", "IQ4_XS", "Q4_K",
                                         "Q4_0"])  # fmt: skip
def test_batches_that_keep_their_bits_in_one_pass_do(weight_type: str, tmp_path: Path) -> None:
    """As Rows.keep says, of prompts; and of one token each, as Rows.max_single says."""
    path = tmp_path / f"{weight_type}.gguf"
    make("qwen2", path, weight_type=weight_type)
    params = RunParams(n_ctx=256, n_kv=4096, threads=1)
    with closing(LoadedModel(path, params)) as loaded:
        bench, rows = Bench(loaded.forward, loaded.kv), rows_of(loaded)
        n_kept = 0
        for widths in itertools.product((1, 3, 5, 8, 12, 33, 64, 71), repeat=2):
            if rows.keep(widths):
                n_kept += 1
                assert_same_bits(bench, widths)
        assert n_kept > 10
        assert_same_bits(bench, [1] * rows.max_single)


def assert_same_bits(bench: Bench, widths: IterSequence[int]) -> None:
    """Compute prompts of so many tokens alone and in one pass: the same logits, the same cells."""
    sequences = [open_sequence(bench, bench.tokens(n, n + i)) for i, n in enumerate(widths)]
    pieces = [Piece(tokens=s.tokens, pos=0, region=s.region) for s in sequences]
    expected = []
    for piece in pieces:
        logits = bench.forward.run([piece])
        assert logits is not None
        expected.append((logits[0], read(bench.kv, piece)))
    together = bench.forward.run(pieces)
    assert together is not None
    for piece, logits, (alone, cells) in zip(pieces, together, expected, strict=True):
        assert np.array_equal(logits, alone), widths
        assert np.array_equal(read(bench.kv, piece), cells), widths
    for sequence in sequences:
        bench.kv.release(sequence.region)


def read(kv: KvCache, piece: Piece) -> npt.NDArray[np.uint8]:
    """Return the bytes of a piece's cells."""
    n = len(piece.tokens)
    found = np.empty(n * kv.shape.bytes_per_cell, np.uint8)
    kv.read_cells(piece.region.start, n, found)
    return found


def test_smollm2_bits_do_not_depend_on_any_batch(smollm2_path: Path) -> None:
    """Q4_1 has one kernel for all batch sizes: sixteen in a pass equal sixteen alone."""
    with open_bench(smollm2_path, n_cells=16 * 256) as bench:
        sequences = [open_sequence(bench, bench.tokens(20 + i, i)) for i in range(16)]
        for sequence in sequences:
            bench.prefill(sequence)
        tokens = bench.tokens(16, 99)
        together = bench.decode(sequences, tokens)
        for i, sequence in enumerate(sequences):
            assert np.array_equal(bench.decode([sequence], [tokens[i]])[0], together[i])


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize(
    ("n_old", "n_common", "n_new"),
    [(200, 150, 230), (300, 300, 301), (90, 64, 70), (129, 129, 256), (60, 59, 61),
     (257, 200, 400)],
)  # fmt: skip
def test_cached_equals_uncached(
    synthetic: Path, kv_type: str, n_old: int, n_common: int, n_new: int
) -> None:
    """A prompt on kept cells gives the bits of a prompt computed from nothing."""
    with open_bench(synthetic, kv_type=kv_type) as bench:
        old = bench.tokens(n_old, 1)
        new = old[:n_common] + bench.tokens(n_new - n_common, 2)
        expected = bench.prefill(open_sequence(bench, new))
        prefix = PrefixCache(bench.kv, N_UBATCH)
        first = prefix.open(old, n_old + 8)
        assert first is not None
        bench.prefill(first)
        prefix.keep(first)
        second = prefix.open(new, n_new + 8)
        assert second is not None
        n_reused = second.n_past
        assert np.array_equal(bench.prefill(second), expected)
        assert n_reused <= n_common
        if n_common >= 150:
            assert n_reused >= n_common - 64 - 4, "a useful part must be reused"


def test_generated_tokens_are_reused_only_when_asked(synthetic: Path) -> None:
    """A decoded cell has other bits than a prefilled one: `exact` computes it again."""
    with open_bench(synthetic) as bench:
        prefix = PrefixCache(bench.kv, N_UBATCH)
        tokens = bench.tokens(160, 3)
        first = prefix.open(tokens[:100], 200)
        assert first is not None
        bench.prefill(first)
        for token in tokens[100:140]:
            bench.decode([first], [token])
            first.tokens.append(token)
            first.n_past += 1
            first.classes.append(CLASS_SINGLE)
        prefix.keep(first)
        exact = prefix.open(tokens, 200, "exact")
        whole = prefix.open(tokens, 200, "all")
        none = prefix.open(tokens, 200, "off")
        assert exact is not None and whole is not None and none is not None
        assert exact.n_past <= 100 and exact.n_past >= 32
        assert whole.n_past == 140
        assert none.n_past == 0


def test_another_adapters_cells_are_never_reused(synthetic: Path) -> None:
    """Guards against llama.cpp 26207 and vLLM 5475: contamination between adapters."""
    with open_bench(synthetic) as bench:
        prefix = PrefixCache(bench.kv, N_UBATCH)
        tokens = bench.tokens(128, 4)
        first = prefix.open(tokens, 130, adapter="a")
        assert first is not None
        bench.prefill(first)
        prefix.keep(first)
        for adapter, expected in (("b", 0), (None, 0), ("a", 64)):
            found = prefix.open(tokens, 130, "exact", adapter)
            assert found is not None
            assert found.n_past == expected, adapter
            prefix.drop(found)


def test_layer_by_layer_equals_the_whole_graph(synthetic: Path) -> None:
    with open_bench(synthetic) as bench:
        tokens = bench.tokens(70, 5)
        region = bench.kv.allocate(128)
        assert region is not None
        piece = Piece(tokens=tokens, pos=0, region=region, n_out=70)
        whole = bench.forward.run([piece])
        apart = bench.forward.run([piece], bench.forward.by_layer())
        assert whole is not None and apart is not None
        assert np.array_equal(whole, apart)


def test_other_sequences_cells_do_not_matter(synthetic: Path) -> None:
    """Whatever stands in cells that are not its own, a sequence's bits stay."""
    with open_bench(synthetic) as bench:
        tokens = bench.tokens(90, 6)
        bench.kv.take_all()
        clean = bench.prefill(Sequence(list(tokens), Region(256, 256)))
        for start in (0, 512):
            bench.prefill(Sequence(bench.tokens(250, start), Region(start, 256)))
        assert np.array_equal(bench.prefill(Sequence(list(tokens), Region(256, 256))), clean)
        assert np.array_equal(bench.prefill(Sequence(list(tokens), Region(1024, 256))), clean)


def test_pieces_outside_their_region_are_refused(synthetic: Path) -> None:
    with open_bench(synthetic) as bench:
        region = Region(0, 256)
        for piece in (
            Piece(tokens=[], pos=0, region=region),
            Piece(tokens=[1] * 10, pos=250, region=region),
            Piece(tokens=[1], pos=0, region=region, n_out=2),
        ):
            with pytest.raises(ComputeError, match="do not fit"):
                bench.forward.run([piece])


@pytest.mark.parametrize(
    ("segments", "sizes"),
    [
        ([(0, 256, 1), (256, 256, 1), (512, 256, 1)], [3]),
        ([(0, 256, 1), (256, 256, 1), (1024, 256, 1)], [2, 1]),
        ([(0, 256, 1), (256, 512, 1)], [1, 1]),  # other lengths
        ([(0, 512, 1), (512, 512, 1)], [1, 1]),  # a lone query is split between threads there
        ([(0, 256, 5), (256, 256, 5)], [1, 1]),  # prompts
        ([(512, 256, 1), (0, 256, 1)], [1, 1]),  # not ascending
    ],
)
def test_only_alike_neighbours_share_an_attention(
    segments: list[tuple[int, int, int]], sizes: list[int]
) -> None:
    groups = group_segments([Segment(*each) for each in segments])
    assert [len(group) for group in groups] == sizes
    assert [tuple(segment) for group in groups for segment in group] == segments
