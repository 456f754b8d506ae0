"""gpt-oss and deepseek: what the cache holds, what is refused, and cells of several sequences."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.base import MoeModel
from edgeroute.models.forward import Piece
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvShape
from edgeroute.tools import synth
from tests.models import test_hostile_models as helpers

FAMILIES = ("gpt-oss", "deepseek", "deepseek2", "deepseek2-heads")
Logits = npt.NDArray[np.float32]


def load(path: Path, kv_type: str = "f16") -> LoadedModel:
    return LoadedModel(path, RunParams(n_ctx=512, n_kv=2048, threads=1, kv_type=kv_type))


def random_tokens(n_tokens: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(4, 384, n_tokens)]


def run(loaded: LoadedModel, pieces: list[Piece]) -> Logits:
    logits = loaded.forward.run(pieces)
    assert logits is not None
    return logits


# what a cell holds


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_split_projections_cache_latents_only(kv_type: str, tmp_path: Path) -> None:
    sizes = {}
    for arch in ("deepseek2", "deepseek2-heads"):
        synth.make(arch, tmp_path / arch)
        with closing(load(tmp_path / arch, kv_type)) as loaded:
            kv = loaded.kv
            assert kv.n_bytes == loaded.plan.kv_bytes == kv.n_cells * kv.shape.bytes_per_cell
            assert len(kv.k) == 3 and len(kv.v) == (0 if arch == "deepseek2" else 3)
            assert (kv.k_rotation is None) == (kv_type == "f16" or arch == "deepseek2")
            sizes[arch] = kv.shape.bytes_per_cell
    # A latent of 256 with 64 rotated values, against 4 heads of 192 and of 128.
    assert sizes["deepseek2"] * 4 == sizes["deepseek2-heads"]


def test_value_heads_must_fit_the_cache_type() -> None:
    shape = {"n_layer": 1, "n_embd_k_gqa": 64, "n_embd_v_gqa": 40, "n_embd_head": 64}
    assert KvShape(**shape, n_embd_head_v=40).value_head == 40
    with pytest.raises(UsageError, match="multiple of 32 values, this model has 40"):
        KvShape(**shape, n_embd_head_v=40, kv_type="q8_0")


def test_only_widths_that_can_turn_are_turned() -> None:
    """llama.cpp decides for keys and for values apart."""
    shape = KvShape(n_layer=1, n_embd_k_gqa=192, n_embd_v_gqa=96, n_embd_head=192,
                    n_embd_head_v=96, kv_type="q8_0")  # fmt: skip
    assert shape.rotation_widths == (64, None)
    assert replace(shape, n_embd_head=96, n_embd_head_v=128).rotation_widths == (None, 64)
    assert replace(shape, v_in_k=True).rotation_widths == (None, None)
    assert replace(shape, kv_type="f16").rotation_widths == (None, None)


# several sequences


@pytest.mark.parametrize("arch", FAMILIES)
def test_sequences_share_a_batch_and_see_their_own_cells(arch: str, tmp_path: Path) -> None:
    """To rounding only: the kernel of F32 products, the router's in every file, depends on the
    rows of a batch. Quantised types would make more of it, where an activation rounds otherwise.
    """
    synth.make(arch, tmp_path / "m")
    with closing(load(tmp_path / "m")) as loaded:
        prompts = [random_tokens(n, n) for n in (40, 70, 300)]
        regions = [loaded.kv.allocate(512) for _ in prompts]
        alone = []
        for prompt, region in zip(prompts, regions, strict=True):
            assert region is not None
            run(loaded, [Piece(prompt, 0, region)])
            alone.append(run(loaded, [Piece([9], len(prompt), region)])[0])
        pieces = [
            Piece([9], len(prompt), region)
            for prompt, region in zip(prompts, regions, strict=True)
            if region is not None
        ]
        together = run(loaded, pieces)
    expected = np.stack(alone)
    assert np.sum((together - expected) ** 2) < 1e-5 * np.sum(expected**2)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_copied_cells_give_the_same_bits(arch: str, kv_type: str, tmp_path: Path) -> None:
    synth.make(arch, tmp_path / "m", weight_type="Q4_0")
    with closing(load(tmp_path / "m", kv_type)) as loaded:
        first, second = loaded.kv.allocate(256), loaded.kv.allocate(256)
        assert first is not None and second is not None
        run(loaded, [Piece(random_tokens(90, 1), 0, first)])
        loaded.kv.copy(first, second, 90)
        assert np.array_equal(
            run(loaded, [Piece([9], 90, first)]), run(loaded, [Piece([9], 90, second)])
        )


@pytest.mark.parametrize("arch", FAMILIES)
def test_they_name_their_pages(arch: str, tmp_path: Path) -> None:
    synth.make(arch, tmp_path / "m", n_layer=2)
    with GGUFFile.open(tmp_path / "m") as file:
        model = describe(file)
        assert isinstance(model, MoeModel) and model.hparams.moe is not None
        n_lead = model.hparams.moe.n_layer_dense_lead
        assert [model.is_moe(il) for il in (0, 1)] == [n_lead == 0, True]
        for il in (0, 1):
            names = model.expert_tensors(il)
            assert len(names) == 3 * model.is_moe(il) and set(names) <= set(file.tensors)


# headers


Change = Callable[[GGUFWriter], None]


def refused(
    spec: synth.SynthSpec, folder: Path, patch: pytest.MonkeyPatch, add: Change | None = None
) -> str:
    """Write a file whose header `add` adds to, and return why it is refused."""
    plain = synth._add_hparams

    def changed(spec: synth.SynthSpec, writer: GGUFWriter) -> None:
        plain(spec, writer)
        if add is not None:
            add(writer)

    patch.setattr(synth, "_add_hparams", changed)
    synth.write(spec, folder / "m")
    with GGUFFile.open(folder / "m") as file, pytest.raises(EdgerouteError) as caught:
        describe(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arch", "key", "value", "words"),
    [
        ("deepseek2", "nextn_predict_layers", 1, "layers that predict further tokens"),
        ("deepseek2", "attention.temperature_scale", 0.5, "scales attention by position"),
        ("deepseek2", "expert_gating_func", 3, "expert gating function 3"),
        ("deepseek2", "expert_group_count", 4, "routes its experts in 4 groups"),
        ("deepseek2", "rope.scaling.attn_factor", 1e30, "scales the products of attention"),
        ("gpt-oss", "rope.freq_base_swa", -1.0, "freq_base_swa is -1.0"),
    ],
)
def test_relatives_are_refused(
    arch: str, key: str, value: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(writer: GGUFWriter) -> None:
        kind = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        kind(f"{arch}.{key}", value)  # type: ignore[arg-type]

    assert words in refused(synth.ARCHITECTURES[arch], tmp_path, monkeypatch, add)


DEEPSEEK2 = synth.ARCHITECTURES["deepseek2"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (replace(DEEPSEEK2, n_head_kv=4), "mean 1 of 320 and 256"),
        (replace(DEEPSEEK2, latent=synth.SynthLatent(absorbed=False)), "need as many of each"),
        (replace(DEEPSEEK2, yarn_log_mul=2e3), "YaRN multiplier of 2000"),
        (replace(DEEPSEEK2, rope_factor=1e-4), "rope factor"),
        (replace(DEEPSEEK2, n_expert_shared=0), "expert_shared_count"),
        (replace(DEEPSEEK2, n_expert=0), "has no deepseek2.expert_count"),
        (replace(synth.ARCHITECTURES["gpt-oss"], n_expert=0), "has no gpt-oss.expert_count"),
        (replace(synth.ARCHITECTURES["gpt-oss"], sliding_window=None), "sliding_window"),
    ],
)
def test_headers_that_disagree_are_refused(
    spec: synth.SynthSpec, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spec.rope_factor < 1:  # the original context would not be a number of tokens
        spec = replace(spec, n_ctx=16)
    assert words in refused(spec, tmp_path, monkeypatch)


KEYS = (
    "attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length",
    "attention.key_length_mla", "attention.value_length", "attention.value_length_mla",
    "rope.dimension_count", "attention.head_count", "attention.head_count_kv",
    "leading_dense_block_count", "expert_shared_count", "expert_used_count", "expert_gating_func",
    "attention.sliding_window", "expert_feed_forward_length",
)  # fmt: skip
VALUES = (0, 1, 3, 65536, 2**32 - 1)
FLOAT_KEYS = ("rope.scaling.factor", "rope.scaling.yarn_log_multiplier", "expert_weights_scale")
FLOATS = (-1.0, 1e-40, 1e38, float("nan"))


@pytest.mark.parametrize("arch", ["gpt-oss", "deepseek2"])
def test_hostile_headers_are_refused_or_harmless(arch: str, tmp_path: Path) -> None:
    """In a process of its own: any of these numbers may abort C code that trusts it."""
    folder = tmp_path / "files"
    folder.mkdir()
    synth.make(arch, tmp_path / "m", n_layer=2)
    data = (tmp_path / "m").read_bytes()
    (folder / "000-good.gguf").write_bytes(data)
    kinds = [(KEYS, VALUES, helpers.UINT32, "<I"), (FLOAT_KEYS, FLOATS, helpers.FLOAT32, "<f")]
    for keys, values, kind, code in kinds:
        for key in keys:
            for value in values:
                patched = helpers.patch_key(data, f"{arch}.{key}", kind, struct.pack(code, value))
                if patched is not None:
                    (folder / f"{key}={value}.gguf").write_bytes(patched)
    for tensor in ("blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight", "blk.0.attn_sinks.weight",
                   "blk.1.ffn_up_exps.bias"):  # fmt: skip
        if tensor.encode() in data:
            for kind in (24, 26, 30, 9, 1):
                (folder / f"{tensor}-{kind}.gguf").write_bytes(
                    helpers.patch_type(data, tensor, kind)
                )
    done = subprocess.run(
        [sys.executable, "-c", helpers.RUNNER, str(folder)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died on {lines[-1]['name']}: {done.stderr[-2000:]}"
    results = {line["name"]: line for line in lines if "error" in line}
    assert len(results) == len(list(folder.iterdir())) > 30
    assert results["000-good.gguf"]["error"] == ""
    for line in results.values():
        assert not line["error"] or len(line["message"]) > 20, line
    assert sum(bool(line["error"]) for line in results.values()) > len(results) / 2
