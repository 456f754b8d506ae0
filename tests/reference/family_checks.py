"""What the tests of single families share: comparing with llama.cpp and with plain numpy."""

from pathlib import Path

import numpy as np

from edgeroute.runtime.batch_shape import SPLIT_KV_MIN
from edgeroute.tools import synth
from edgeroute.tools.bench import parity
from tests.reference.numpy_llama import NumpyModel

N_BATCHED, N_SINGLE = 275, 60  # past a bucket of 256 cells, and not a multiple of 4
MIN_MARGIN = 0.01  # of a score or probability; half-precision keys move one by 1e-3 at most
NMSE_LIMIT = 1e-6  # about four times what half-precision keys and values leave


def random_tokens(n_tokens: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(3).integers(4, 384, n_tokens)]


def check_identical(spec: synth.SynthSpec, folder: Path, *, n_single: int = N_SINGLE,
                    threads: int = 1, kv_type: str = "f16") -> None:  # fmt: skip
    """Demand llama.cpp's bits in one batch and token by token, and of a graph per layer."""
    path = folder / "model.gguf"
    synth.write(spec, path)
    found = parity.compare(
        path, random_tokens(N_BATCHED), n_single=n_single, threads=threads, kv_type=kv_type
    )
    assert found.identical, found
    assert found.layers_identical, found


def check_long_context(spec: synth.SynthSpec, folder: Path) -> None:
    """Demand llama.cpp's bits where a lone query's attention takes another path than below."""
    path, tokens = folder / "model.gguf", random_tokens(SPLIT_KV_MIN + 24)
    synth.write(spec, path)
    n_cells, last = 768, len(tokens) - 4
    engine = parity.Engine(path, n_cells, 1, "f16")
    try:
        with parity.Peer(path, parity.PeerParams(n_ctx=n_cells, threads=1)) as peer:
            for start, end in ((0, 512), (512, last)):
                part = tokens[start:end]
                ours, theirs = engine.run(part, start), peer.decode(part, start, n_out=len(part))
                assert np.array_equal(ours, theirs)
            for pos in range(last, len(tokens)):
                ours = engine.run(tokens[pos : pos + 1], pos)
                assert np.array_equal(ours[0], peer.step(tokens[pos], pos))
    finally:
        engine.close()


def check_formulas(spec: synth.SynthSpec, model: type[NumpyModel], folder: Path) -> None:
    """Demand numpy's numbers of a model of one layer, wherever the choice of experts is clear."""
    path = folder / "model.gguf"
    synth.write(spec, path)
    check_clear_routes(path, model(path))


def check_clear_routes(path: Path, model: NumpyModel, n_clear: int = 40) -> None:
    """Demand the numbers that a model has in numpy, wherever its choice of experts is clear.

    That must be so for more than `n_clear` tokens of 96. Rounding flips near-tied experts, and
    later layers would see it: the model has one layer.
    """
    tokens = random_tokens(96)
    reference = model.logits(tokens)
    clear = model.margins[0] > MIN_MARGIN
    engine = parity.Engine(path, 256, 1, "f16")
    try:
        found = engine.run(tokens, 0)
    finally:
        engine.close()
    seen = parity.Deviation()
    seen.add(found[clear], reference[clear])
    assert len(model.margins) == 1 and np.count_nonzero(clear) > n_clear
    assert seen.nmse < NMSE_LIMIT
