"""Large shapes, scaled down: llama.cpp decodes them, and the gates are as skewed as asked."""

from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.vocab_check import check_vocab
from edgeroute.tools import synth_large
from edgeroute.tools.synth_large import GATES, SHAPES, LargeSpec, write_large


def small(shape: str, **changes: object) -> LargeSpec:
    """The shape with every width cut, its proportions about kept."""
    n_kv = 4 if SHAPES[shape].qk_norm_width == "all" else 2
    spec = replace(
        SHAPES[shape], n_layer=3, n_embd=256, n_ff=64, n_ff_exp=64, n_head=4, n_head_kv=n_kv,
        n_embd_head=64, n_expert=16, n_expert_used=4, n_vocab=1000, weight_type="Q4_0",
    )  # fmt: skip
    return replace(spec, **changes)  # type: ignore[arg-type]


def logits_of(path: Path) -> npt.NDArray[np.float32]:
    """Logits of 24 tokens by llama.cpp, F32 (24, n_vocab)."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True
    )
    try:
        model.eval(list(range(300, 324)))
        return np.array(model.scores[:24])
    finally:
        model.close()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_decodes_it(shape: str, gate: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_large(small(shape, gate=GATES[gate]), path)
    with GGUFFile.open(path) as file:
        check_vocab(file)
    logits = logits_of(path)
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 4
    assert len(set(logits.argmax(axis=1).tolist())) > 12


def test_holes_read_as_experts_that_answer_zero(tmp_path: Path) -> None:
    full, sparse = tmp_path / "full.gguf", tmp_path / "sparse.gguf"
    spec = small("olmoe", n_expert=64, n_ff=256, n_ff_exp=256)
    write_large(spec, full)
    write_large(spec, sparse, sparse=True)
    assert full.stat().st_size == sparse.stat().st_size
    tensors = {tensor.name: tensor for tensor in GGUFReader(sparse).tensors}
    for tensor in GGUFReader(full).tensors:
        other = tensors[tensor.name].data
        if "_exps" in tensor.name:
            assert tensor.data.any() and not other.any()
        else:
            assert np.array_equal(tensor.data, other), tensor.name
    assert np.isfinite(logits_of(sparse)).all()


def test_same_seed_same_bytes_and_memory_of_one_tensor(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        write_large(small("olmoe", n_layer=1, seed=seed), path)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


@pytest.mark.parametrize("gate", GATES)
def test_the_gate_reads_the_parts_as_asked(gate: str, tmp_path: Path) -> None:
    """Scores that the constant gives are the popularity, Zipf's; without skew there are none."""
    path = tmp_path / "model.gguf"
    spec = small("qwen3-30b-a3b", gate=GATES[gate])
    write_large(spec, path)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    weights = np.asarray(tensors["blk.0.ffn_gate_inp.weight"], np.float32)
    constant, context = weights[:, 6 * spec.part : 7 * spec.part], weights[:, 7 * spec.part :]
    if gate == "uniform":
        assert not constant.any() and not context.any()
        return
    # One direction, so the scores of any input are ordered alike: by rank, falling as its log.
    assert np.linalg.matrix_rank(constant) == 1
    scores = np.sort(constant @ constant[0] * np.sign(constant[0, 0]))
    steps = np.abs(np.diff(scores))
    ratio = max(steps[0], steps[-1]) / min(steps[0], steps[-1])
    assert ratio == pytest.approx(np.log(2) / np.log(16 / 15), rel=1e-3)
    assert context.std() > 0


def test_sizes_are_those_of_the_published_shapes(tmp_path: Path) -> None:
    """Nothing but holes is written for the experts, so that the whole shape costs no disk."""
    path = tmp_path / "model.gguf"
    spec = replace(SHAPES["qwen3-30b-a3b"], n_layer=1, n_vocab=1000)
    write_large(spec, path, sparse=True)
    slice_bytes = 3 * 2048 * 768 * 144 // 256
    layer_bytes = 128 * slice_bytes + (2 * 4096 + 2 * 512) * 2048 * 144 // 256
    assert 0 < path.stat().st_size - layer_bytes < 4 << 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_type": "Q4_K"}, "n_embd / 8 is 32; Q4_K needs a multiple of 256"),
        ({"weight_type": "Q9_X"}, "unknown weight type"),
        ({"n_vocab": 100}, "n_vocab is 100"),
        ({"n_ff_exp": 60}, "n_ff_exp is 60"),
    ],
)
def test_shapes_that_no_file_can_have_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write_large(small("olmoe", **changes), tmp_path / "model.gguf")


def test_the_command_writes_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    monkeypatch.setattr(synth_large, "SHAPES", {"olmoe": small("olmoe")})
    done = CliRunner().invoke(
        synth_large.main,
        ["olmoe", str(path), "--layers", "2", "--type", "Q8_0", "--gate", "uniform"],
    )
    assert done.exit_code == 0, done.output
    assert "2 layers, Q8_0, uniform gate" in done.output
    assert f"{path.stat().st_size} bytes" in done.output
