"""Synthetic models: reproducible, valid for any block type, and decoded by llama.cpp."""

from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, quants

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGMLType, GGUFFile
from edgeroute.runtime.vocab_check import check_vocab
from edgeroute.tools import synth
from edgeroute.tools.synth_vocab import bpe_vocab, byte_characters, spm_vocab
from edgeroute.tools.synth_weights import WEIGHT_TYPES, random_weight

TEXT = "the time of day is what you have\n0123 naïve 日本"

CASES = [(arch, "F32") for arch in synth.ARCHITECTURES] + [
    ("llama", weight_type) for weight_type in WEIGHT_TYPES if weight_type != "F32"
]


@pytest.mark.parametrize(("arch", "weight_type"), CASES)
def test_llama_cpp_decodes_it(arch: str, weight_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.make(arch, path, weight_type=weight_type)
    with GGUFFile.open(path) as file:
        check_vocab(file)
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True
    )
    try:
        tokens = model.tokenize(TEXT.encode(), add_bos=False)
        assert model.detokenize(tokens).decode() == TEXT
        model.eval(tokens)
        logits = np.array(model.scores[: len(tokens)])
    finally:
        model.close()
    assert np.isfinite(logits).all()
    # Not degenerate: neither flat nor one token everywhere.
    assert 0.5 < logits.std() < 4
    assert len(set(logits.argmax(axis=1).tolist())) > len(tokens) // 3


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        synth.make("llama", path, seed=seed, weight_type="Q4_K", n_layer=1)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


def test_variants_share_what_they_do_not_change(tmp_path: Path) -> None:
    """Tensors are seeded by name, so a variant differs only where it means to."""
    synth.make("llama", tmp_path / "a", n_layer=1)
    synth.make("llama-rope-freqs", tmp_path / "b", n_layer=1)
    with GGUFFile.open(tmp_path / "a") as a, GGUFFile.open(tmp_path / "b") as b:
        assert set(b.tensors) - set(a.tensors) == {"rope_freqs.weight"}
        for name, info in a.tensors.items():
            assert bytes(a.view(info)) == bytes(b.view(b.tensors[name]))
        divisors = np.frombuffer(b.view(b.tensors["rope_freqs.weight"]), dtype=np.float32).copy()
    assert divisors[0] == 1.0 and divisors[-1] == 8.0
    assert (np.diff(divisors) >= 0).all() and ((divisors > 1) & (divisors < 8)).any()


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_weights_have_the_wanted_deviation(weight_type: str) -> None:
    data = random_weight("w", (64, 512), 0.05, weight_type=weight_type, seed=3)
    values = quants.dequantize(data, GGMLQuantizationType[weight_type])
    assert values.shape == (64, 512)
    assert values.std() == pytest.approx(0.05, rel=0.1)
    assert abs(values.mean()) < 0.005


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_matrices_have_the_type_and_vectors_are_f32(arch: str, tmp_path: Path) -> None:
    synth.make(arch, tmp_path / "m", weight_type="Q5_K", n_layer=2)
    with GGUFFile.open(tmp_path / "m") as file:
        for info in file.tensors.values():
            assert info.type == (GGMLType.Q5_K if len(info.ne) == 2 else GGMLType.F32)
        assert sum(name.startswith("blk.1.") for name in file.tensors) > 8
        assert "blk.2.attn_q.weight" not in file.tensors


def test_bpe_vocabulary_is_complete_and_distinct() -> None:
    vocab = bpe_vocab(384, "default")
    assert len(vocab.tokens) == len(set(vocab.tokens)) == len(vocab.token_types) == 384
    assert set(byte_characters()) <= set(vocab.tokens)
    known = set(vocab.tokens)
    assert vocab.merges
    for merge in vocab.merges:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= known


def test_byte_characters_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Every byte comes back through a vocabulary without merges."""
    synth.make("llama", tmp_path / "m", n_layer=1)
    model = llama_cpp.Llama(str(tmp_path / "m"), vocab_only=True, verbose=False)
    try:
        for token, byte in enumerate(range(256), start=4):
            assert model.detokenize([token]) == bytes([byte])
    finally:
        model.close()


def test_spm_vocabulary_is_complete_and_distinct() -> None:
    vocab = spm_vocab(384)
    assert len(vocab.tokens) == len(set(vocab.tokens)) == 384
    assert vocab.scores is not None and len(vocab.scores) == 384
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(vocab.tokens)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown architecture 'gpt5'; choose from llama"):
        synth.make("gpt5", tmp_path / "m")
    with pytest.raises(UsageError, match="unknown weight type 'Q9'; choose from F32"):
        synth.make("llama", tmp_path / "m", weight_type="Q9")
    narrow = replace(synth.ARCHITECTURES["llama"], n_embd=64, weight_type="Q4_K")
    with pytest.raises(UsageError, match="n_embd is 64; Q4_K needs a multiple of 256"):
        synth.write(narrow, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_command_line_writes_a_model(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    result = CliRunner().invoke(synth.main, ["qwen3", str(out), "--type", "Q8_0", "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert f"{out}: qwen3, Q8_0, seed 4" in result.output
    with GGUFFile.open(out) as file:
        assert file.metadata.get_str("general.architecture") == "qwen3"
