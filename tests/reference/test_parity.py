"""The same numbers as llama.cpp, bit for bit, and as an independent float32 reference."""

from pathlib import Path

import numpy as np
import pytest

from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools import synth
from edgeroute.tools.bench import parity
from edgeroute.tools.bench.text import PROMPTS, TEXT, text_tokens
from tests.reference import numpy_llama
from tests.reference.family_checks import check_clear_routes, random_tokens

TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K")
CASES = [(arch, weight_type) for arch in synth.ARCHITECTURES for weight_type in TYPES]
OTHER_TYPES = [t for t in synth.WEIGHT_TYPES if t not in TYPES]

# Past one 256-cell bucket and past gemma3's window of 32; not a multiple of 4 or of 64.
N_BATCHED, N_SINGLE = 275, 90

# F32 leaves only the half-precision keys and values; quantised types multiply by activations
# rounded to 8 bits. About four times what is seen.
NMSE_LIMITS = {"F32": 1e-6, "Q8_0": 2e-3}
DENSE = [arch for arch, spec in synth.ARCHITECTURES.items() if not spec.n_expert]
MOE = ("llama-moe", "llama-moe-one", "qwen2moe", "qwen3moe", "olmoe")


def check_identical(found: parity.Comparison) -> None:
    assert found.equal_batched == found.n_positions, found
    assert found.equal_single == found.n_single, found
    assert found.layers_identical, found
    # Not vacuous: llama.cpp's own two ways differ wherever arithmetic depends on the batch.
    assert np.isfinite(found.own_nmse)


@pytest.mark.parametrize(("arch", "weight_type"), CASES)
def test_every_architecture_has_llama_cpps_bits(
    arch: str, weight_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    synth.make(arch, path, weight_type=weight_type)
    check_identical(parity.compare(path, random_tokens(N_BATCHED), n_single=N_SINGLE))


@pytest.mark.parametrize("weight_type", OTHER_TYPES)
def test_every_other_block_type_has_llama_cpps_bits(weight_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.make("llama", path, weight_type=weight_type)
    check_identical(parity.compare(path, random_tokens(N_BATCHED), n_single=N_SINGLE))


@pytest.mark.parametrize("arch", ["gemma3", "qwen3moe"])
def test_two_threads_change_no_bit(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.make(arch, path, weight_type="Q4_0", n_layer=2)
    check_identical(parity.compare(path, random_tokens(150), n_single=4, threads=2))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_q8_0_cache_has_llama_cpps_bits(arch: str, tmp_path: Path) -> None:
    """Both turn queries, keys and values by Hadamard matrices before they are quantised."""
    path = tmp_path / "model.gguf"
    synth.make(arch, path, weight_type="Q4_0")
    found = parity.compare(path, random_tokens(N_BATCHED), n_single=N_SINGLE, kv_type="q8_0")
    check_identical(found)


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """The comparison can fail: an F16 cache is not a Q8_0 cache."""
    path = tmp_path / "model.gguf"
    synth.make("llama", path)
    tokens = random_tokens(40)
    engine = parity.Engine(path, 256, 1, "q8_0")
    try:
        with parity.Peer(path, parity.PeerParams(n_ctx=256, threads=1)) as peer:
            seen = parity.Deviation()
            seen.add(engine.run(tokens, 0), peer.decode(tokens, 0, n_out=len(tokens)))
    finally:
        engine.close()
    assert seen.n_equal < len(tokens) and 0 < seen.nmse < 1e-2


def smollm2_tokens(path: Path, n_tokens: int) -> list[int]:
    with GGUFFile.open(path) as file, Tokenizer.open(file) as tokenizer:
        return text_tokens(
            lambda text: tokenizer.encode(text, add_special=True, parse_special=False), n_tokens
        )


def test_the_text_is_long_enough_to_need_no_repeat(smollm2_path: Path) -> None:
    tokens = smollm2_tokens(smollm2_path, 1024)
    assert len(tokens) == 1024 and tokens[:8] != tokens[-8:]
    assert "def " in TEXT and "SELECT" in TEXT


def test_smollm2_has_llama_cpps_bits(smollm2_path: Path) -> None:
    """512 positions in one batch, 128 one by one, and one graph per layer like one for all."""
    tokens = smollm2_tokens(smollm2_path, 512)
    found = parity.compare(smollm2_path, tokens, n_single=128)
    check_identical(found)
    assert found.own_nmse > 0


def test_smollm2_answers_greedily_like_llama_cpp(smollm2_path: Path) -> None:
    n_same, differences = parity.greedy(smollm2_path, PROMPTS[:5], 48, 1, lambda line: None)
    assert n_same == 5, differences


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("weight_type", NMSE_LIMITS)
def test_numpy_reference_agrees(arch: str, weight_type: str, tmp_path: Path) -> None:
    """An implementation that shares no code: it would see what both C++ engines get wrong."""
    path = tmp_path / "model.gguf"
    synth.make(arch, path, weight_type=weight_type)
    tokens = random_tokens(96)
    reference = numpy_llama.NumpyModel(path).logits(tokens)
    engine = parity.Engine(path, 256, 1, "f16")
    try:
        seen = parity.Deviation()
        seen.add(engine.run(tokens, 0), reference)
    finally:
        engine.close()
    assert seen.nmse < NMSE_LIMITS[weight_type]


@pytest.mark.parametrize("arch", MOE)
def test_numpy_reference_agrees_where_routes_are_clear(arch: str, tmp_path: Path) -> None:
    """Those of one layer: rounding flips near-tied experts, and later layers see it."""
    path = tmp_path / "model.gguf"
    synth.make(arch, path, n_layer=1)
    check_clear_routes(path, numpy_llama.NumpyModel(path), n_clear=64)
