"""Dense models refactored into experts: exact with all experts on, refused where impossible."""

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader, GGUFWriter

from edgeroute.commands.convert_moe import command
from edgeroute.runtime.errors import (
    CapacityError,
    ModelFileError,
    UnsupportedModelError,
    UsageError,
)
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.bench.parity import Deviation, Engine
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.convert import moe, moe_writer
from edgeroute.tools.convert.moe_activations import DenseModel
from edgeroute.tools.convert.moe_cluster import arrange, assign, balanced_kmeans
from edgeroute.tools.convert.moe_gate import SCORE_SCALE, choose, contributions, fit_gate
from edgeroute.tools.convert.moe_refit import refit
from edgeroute.tools.convert.moe_text import TextParams, default_windows, file_windows
from tests.reference import numpy_llama

SMALL = moe.MoeParams(n_expert=7, n_shared=64, n_used=3, n_tokens=1024, weight_type="f32")


def convert(source: Path, out: Path, **changes: Any) -> moe.MoeReport:
    params = {name: getattr(SMALL, name) for name in SMALL.__slots__} | changes
    return moe.convert(source, out, moe.MoeParams(**params), lambda *step: None)


def random_tokens(n_tokens: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(3).integers(4, 384, n_tokens)]


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama-linear"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    synth.make(request.param, path, n_layer=2)
    return path


def llama_cpp_logits(path: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    with Peer(path, PeerParams(n_ctx=256, threads=1)) as peer:
        return peer.decode(tokens, 0, n_out=len(tokens))


def nmse(found: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    seen = Deviation()
    seen.add(found, reference)
    return seen.nmse


def test_with_all_experts_on_it_is_the_dense_model(dense: Path, tmp_path: Path) -> None:
    """But for the softmax of the tiny scores, about 1e-7; llama.cpp adds F16 keys."""
    out = tmp_path / "moe.gguf"
    report = convert(dense, out, n_used=7)
    assert report.quality.nats_moe == pytest.approx(report.quality.nats_dense, abs=1e-5)
    tokens = random_tokens(40)
    reference = numpy_llama.NumpyModel(dense).logits(tokens)
    assert nmse(numpy_moe(out, tokens), reference) < 1e-6
    theirs = llama_cpp_logits(out, tokens)
    assert nmse(theirs, llama_cpp_logits(dense, tokens)) < 1e-6
    engine = Engine(out, 256, 1, "f16")
    try:
        assert np.array_equal(engine.run(tokens, 0), theirs)
    finally:
        engine.close()


def test_fewer_experts_cost_something_and_a_refit_gives_some_back(
    dense: Path, tmp_path: Path
) -> None:
    plain = convert(dense, tmp_path / "plain.gguf", n_used=1, repair=False, n_tokens=2048)
    repaired = convert(dense, tmp_path / "repaired.gguf", n_used=1, n_tokens=2048)
    assert repaired.repaired and not plain.repaired
    assert 0 < repaired.quality.lost_ratio < plain.quality.lost_ratio
    # Better than chance on text it was not fitted to: 1 of 7 would be 0.14.
    assert plain.quality.recall_ratio > 0.2
    tokens = random_tokens(40)
    theirs = llama_cpp_logits(tmp_path / "repaired.gguf", tokens)
    assert nmse(theirs, llama_cpp_logits(dense, tokens)) > 1e-3  # not the dense model's


def test_quantised_files_load_with_q8_0_experts(tmp_path: Path) -> None:
    source, out = tmp_path / "dense.gguf", tmp_path / "moe.gguf"
    synth.make("qwen2", source, weight_type="Q4_K", n_layer=2)
    report = convert(source, out, n_used=None, weight_type="q8_0")
    assert report.shape.n_expert_used == 3 and report.n_bytes == out.stat().st_size
    with GGUFFile.open(source) as a, GGUFFile.open(out) as b:
        assert b.tensors["blk.1.ffn_down_exps.weight"].type.name == "Q8_0"
        assert b.tensors["blk.1.ffn_down_exps.weight"].ne == (64, 256, 7)
        # What was not refactored has the bytes it had.
        for name in ("blk.1.attn_q.weight", "blk.0.attn_k.bias", "output.weight"):
            assert bytes(a.view(a.tensors[name])) == bytes(b.view(b.tensors[name]))
        for key in a.metadata:
            if key.startswith("tokenizer."):
                assert a.metadata.type_name(key) == b.metadata.type_name(key)
        tokens = [x.metadata.get_array("tokenizer.ggml.tokens", str) for x in (a, b)]
        assert tokens[0] == tokens[1]
    assert np.isfinite(llama_cpp_logits(out, random_tokens(20))).all()


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path: Path) -> None:
    """llama.cpp's qwen2moe accepts no tied head; llama's biases are turned with their rows."""
    source, out = tmp_path / "dense.gguf", tmp_path / "moe.gguf"
    synth.make("llama-bias", source, n_layer=2)
    with pytest.raises(UnsupportedModelError, match=r"has the tensor blk.0.attn_output.bias"):
        convert(source, out)
    rewrite(source, tmp_path / "plain.gguf", without="attn_output.bias")
    convert(tmp_path / "plain.gguf", out, n_used=7)
    tokens = random_tokens(30)
    theirs = llama_cpp_logits(out, tokens)
    assert nmse(theirs, llama_cpp_logits(tmp_path / "plain.gguf", tokens)) < 1e-6


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    synth.make("llama", tmp_path / "dense.gguf", n_layer=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(tmp_path / "dense.gguf", tmp_path / name, seed=seed)
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != other


def test_room_in_llama_cpps_graph_is_bought_with_unused_numbers(tmp_path: Path) -> None:
    """Beyond 1024 nodes every tensor of the file makes room; without enough, llama.cpp aborts."""
    source, out = tmp_path / "dense.gguf", tmp_path / "moe.gguf"
    synth.make("llama", source, n_layer=12)
    convert(source, out, n_expert=56, n_shared=64, n_used=40, weight_type="f16")
    with GGUFFile.open(out) as file:
        extra = [name for name in file.tensors if name.endswith(".input_scale")]
        n_nodes = 12 * (moe_writer.NODES_PER_LAYER + 2 * 40)
        assert extra and 8 * len(file.tensors) > n_nodes > 8 * (len(file.tensors) - len(extra))
    assert np.isfinite(llama_cpp_logits(out, random_tokens(20))).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_shared": 60}, UsageError, "512 neurons less 60 shared ones are 452, which 7 equal"),
        ({"n_shared": 512}, UsageError, "512 neurons less 512 shared ones are 0"),
        ({"n_used": 8}, UsageError, "--used is 8; there are 7 experts"),
        ({"n_used": 0}, UsageError, "--used is 0; there are 7 experts"),
        ({"n_expert": 28, "n_shared": 64, "weight_type": "q8_0"}, UsageError,
         "experts of 16 neurons and 64 shared ones, 256 wide, cannot be stored as q8_0"),
        ({"n_tokens": 100}, UsageError, "--tokens is 100; at least 1024 are needed"),
        ({"texts": (Path("no such file"),)}, UsageError, "cannot read the text file no such file"),
    ],
)  # fmt: skip
def test_counts_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        convert(tiny_path, tmp_path / "moe.gguf", **changes)
    assert not list(tmp_path.glob("moe*"))


def test_too_many_active_experts_are_refused_with_the_numbers(tmp_path: Path) -> None:
    source = tmp_path / "dense.gguf"
    synth.make("llama", source, n_layer=12)
    with pytest.raises(UsageError, match=r"--used is 112, but llama.cpp's graph has room for 69"):
        convert(source, tmp_path / "moe.gguf", n_expert=112, n_used=112)


def test_unsuitable_models_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.gguf", tmp_path / "moe.gguf"
    convert(tiny_path, made)
    with pytest.raises(UnsupportedModelError, match="has experts already; a dense model is needed"):
        convert(made, out)
    for arch, message in (("gemma3", "is a 'gemma3' model; dense llama and qwen2"),
                          ("llama-yarn", "YaRN rope scaling, which cannot be carried"),
                          ("llama-rope-freqs", "has the tensor rope_freqs.weight")):  # fmt: skip
        synth.make(arch, tmp_path / arch, n_layer=2)
        with pytest.raises(UnsupportedModelError, match=message):
            convert(tmp_path / arch, out)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_path.read_bytes()[:100_000])
    with pytest.raises(ModelFileError, match=r"broken.gguf"):
        convert(broken, out)
    rewrite(tiny_path, tmp_path / "hole.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ModelFileError, match=r"has no tensor blk.1.ffn_up.weight"):
        convert(tmp_path / "hole.gguf", out)
    assert not out.exists()


def test_an_interruption_leaves_the_old_target(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "moe.gguf"
    out.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists; name another file, or give --force"):
        convert(tiny_path, out)

    def interrupt(phase: str, n_done: int, n_total: int) -> None:
        if n_done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moe.convert(tiny_path, out, moe.MoeParams(n_tokens=1024, replace=True), interrupt)
    assert list(tmp_path.glob("moe*")) == [out] and out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [(errno.ENOSPC, CapacityError, "the disk became full while .* nothing of it was kept"),
     (errno.EIO, ModelFileError, "cannot write .*nothing of it was kept")],
)  # fmt: skip
def test_a_failed_write_leaves_nothing(
    code: int, error: type[Exception], message: str, tiny_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*args: object) -> None:
        raise OSError(code, "as a disk would")

    monkeypatch.setattr(moe_writer.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(error, match=message):
        convert(tiny_path, tmp_path / "moe.gguf")
    assert not list(tmp_path.glob("moe*"))


def test_command_line_reports_perplexities(tiny_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the time of day is what you have " * 400)
    args = [str(tiny_path), str(tmp_path / "m.gguf"), "--text", str(text), "--tokens", "1024",
            "--experts", "14", "--used", "7", "--json"]  # fmt: skip
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["n_expert"] == 14 and found["n_ff_shexp"] == 64 and found["repaired"]
    assert found["ppl_dense"] > 1 and found["ppl_moe"] > 1 and found["n_fitted"] == 1024
    plain = CliRunner().invoke(command, [*args[:-1], "--force"])
    assert "perplexity on 1022 tokens kept apart:" in plain.stdout, plain.output


def test_default_counts() -> None:
    """An eighth shared, at most 80 experts: the shapes of the experiments where they fit."""
    wanted = {1536: (42, 192), 4864: (66, 640), 8960: (61, 1152), 512: (14, 64)}
    assert {n_ff: moe._split(n_ff, moe.MoeParams()) for n_ff in wanted} == wanted


def test_assignment_goes_through_pairs_by_distance() -> None:
    rng = np.random.default_rng(1)
    distance = rng.random((60, 5)).astype(np.float32)
    wanted = np.full(60, -1)
    for flat in np.argsort(distance, axis=None):
        point, group = divmod(int(flat), 5)
        if wanted[point] < 0 and (wanted == group).sum() < 12:
            wanted[point] = group
    assert assign(distance, 12).tolist() == wanted.tolist()


def test_clusters_are_equal_and_find_what_belongs_together() -> None:
    rng = np.random.default_rng(1)
    centres = 20 * rng.standard_normal((4, 16))
    points = np.repeat(centres, 8, axis=0) + rng.standard_normal((32, 16))
    groups = balanced_kmeans(points.astype(np.float32), 4, rng)
    assert np.bincount(groups).tolist() == [8, 8, 8, 8]
    pure = sum(len(set(groups[at : at + 8].tolist())) == 1 for at in range(0, 32, 8))
    assert pure >= 2  # the first centres are chance; never as mixed as chance would be


def test_the_strongest_neurons_are_shared() -> None:
    rng = np.random.default_rng(1)
    h = rng.standard_normal((100, 24)).astype(np.float32)
    h[:, [3, 20]] *= 10
    order = arrange(h, np.ones((4, 24), np.float32), 2, 2, seed=1)
    assert order[:2].tolist() == [3, 20] and sorted(order.tolist()) == list(range(24))


def test_the_gate_recovers_a_linear_truth() -> None:
    rng = np.random.default_rng(1)
    u, truth = rng.standard_normal((500, 16)), rng.standard_normal((6, 16))
    targets = (u @ truth.T + 7).astype(np.float32)
    gate = fit_gate(u.astype(np.float32), targets)
    scores = u @ gate.T
    assert np.std(scores) == pytest.approx(SCORE_SCALE, rel=1e-3)
    assert (choose(scores, 2) == choose(targets, 2)).mean() > 0.99
    assert choose(targets, 6).all() and (choose(targets, 2).sum(axis=1) == 2).all()


def test_contributions_are_norms_of_the_experts_outputs() -> None:
    rng = np.random.default_rng(1)
    h, down = rng.standard_normal((9, 12)), rng.standard_normal((5, 12))
    found = contributions(h.astype(np.float32), down.astype(np.float32), 3)
    for e in range(3):
        part = h[:, 4 * e : 4 * e + 4] @ down[:, 4 * e : 4 * e + 4].T
        assert found[:, e] == pytest.approx(np.linalg.norm(part, axis=1), rel=1e-4)


def test_refit_finds_the_projection_that_made_the_target() -> None:
    rng = np.random.default_rng(1)
    h = rng.standard_normal((3000, 8)).astype(np.float32)
    truth = rng.standard_normal((4, 8)).astype(np.float32)
    start = np.zeros_like(truth)
    found = refit(h, h @ truth.T, start, np.ones(len(h), np.float32))
    assert np.abs(found - truth).max() < 0.05  # the pull towards the start is 1 %


def test_calibration_never_sees_held_out_text() -> None:
    def letters(text: str, special: bool) -> list[int]:
        return [ord(c) % 256 for c in text]

    params = TextParams(n_tokens=30 * 64, n_window=64)
    fit, apart = (default_windows(letters, params, held_out=flag) for flag in (False, True))
    assert fit.shape == apart.shape == (30, 64)
    assert not {w.tobytes() for w in fit} & {w.tobytes() for w in apart}
    again = default_windows(letters, params)
    assert np.array_equal(fit, again)
    other = TextParams(n_tokens=30 * 64, n_window=64, seed=2)
    assert not np.array_equal(fit, default_windows(letters, other))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    with pytest.raises(UsageError, match="1 --text files have 0 windows of 512 tokens, fewer"):
        file_windows([path], lambda text, special: [1] * len(text), TextParams(n_tokens=4096))
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        file_windows([path], lambda text, special: [1], TextParams(n_tokens=4096))


def test_types_that_numpy_cannot_read_are_named(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("edgeroute.tools.convert.moe_activations.quants.dequantize", fail)
    with (
        GGUFFile.open(tiny_path) as file,
        pytest.raises(UnsupportedModelError, match=r"token_embd.weight in .* is F32, which numpy"),
    ):
        DenseModel(file).embed(np.zeros(1, np.int32))


def rewrite(source: Path, out: Path, *, without: str) -> None:
    """Copy a file, leaving out tensors whose name ends so."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    with contextlib.closing(GGUFWriter(out, arch)) as writer:
        for key, field in reader.fields.items():
            if not key.startswith(("GGUF.", "general.architecture")):
                sub = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub)
        for tensor in reader.tensors:
            if not tensor.name.endswith(without):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def numpy_moe(path: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Run a refactored file in numpy from the formulas of qwen2moe."""
    model = numpy_llama.NumpyModel(path)
    w, config = model.weights, model.config
    n_used = GGUFReader(path).fields["qwen2moe.expert_used_count"].contents()

    def feed_forward(p: str, h: np.ndarray[Any, Any], e: str, i: Any) -> np.ndarray[Any, Any]:
        gate, up, down = (w[f"{p}.ffn_{part}_{e}.weight"][i] for part in ("gate", "up", "down"))
        a = h @ gate.T
        return (a / (1 + np.exp(-a)) * (h @ up.T)) @ down.T

    x = w["token_embd.weight"][tokens]
    for il in range(config.n_layer):
        p = f"blk.{il}"
        x = x + model._attention(il, model._norm(f"{p}.attn_norm", x))
        h = model._norm(f"{p}.ffn_norm", x)
        scores = h @ w[f"{p}.ffn_gate_inp.weight"].T
        probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        probs = np.where(choose(probs, n_used), probs, 0)
        sigmoid = 1 / (1 + np.exp(-h @ w[f"{p}.ffn_gate_inp_shexp.weight"]))
        x = x + sigmoid[:, None] * feed_forward(p, h, "shexp", ...)
        for e in range(probs.shape[1]):
            x = x + probs[:, e : e + 1] * feed_forward(p, h, "exps", e)
    return model._norm("output_norm", x.astype(np.float32)) @ w["output.weight"].T
