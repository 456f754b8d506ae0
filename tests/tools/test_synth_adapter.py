"""Synthetic adapters: reproducible, of the wanted size, as PEFT names them, loaded by llama.cpp."""

import json
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.models.adapter_file import BaseShapes, base_shapes, open_adapter
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth, synth_adapter
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf, make_peft


def shapes_of(path: Path) -> BaseShapes:
    with GGUFFile.open(path) as file:
        return base_shapes(describe(file))


def test_same_seed_same_bytes(tiny_path: Path, tmp_path: Path) -> None:
    base = shapes_of(tiny_path)
    found = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_peft(tmp_path / name, base, AdapterSpec(seed=seed))
        make_gguf(tmp_path / f"{name}.gguf", base, AdapterSpec(seed=seed))
        peft = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        found.append((peft, (tmp_path / f"{name}.gguf").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]


@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 16.0, False), (16, 4.0, True)])
def test_the_product_has_the_wanted_deviation(
    rank: int, alpha: float, rslora: bool, tiny_path: Path, tmp_path: Path
) -> None:
    spec = AdapterSpec(rank=rank, alpha=alpha, use_rslora=rslora, delta=0.05)
    make_peft(tmp_path / "a", shapes_of(tiny_path), spec)
    for tensor, a, b in open_adapter(tmp_path / "a", shapes_of(tiny_path)).read():
        delta = tensor.scale * (b.astype(np.float32) @ a.astype(np.float32))
        assert delta.std() * tensor.n_in**0.5 == pytest.approx(0.05, rel=0.2)


def test_routers_are_left_alone_unless_named(tmp_path: Path) -> None:
    synth.make("qwen3moe", tmp_path / "m.gguf")
    base = shapes_of(tmp_path / "m.gguf")
    make_peft(tmp_path / "a", base, AdapterSpec())
    names = {tensor.name.split(".")[2] for tensor in open_adapter(tmp_path / "a", base).tensors}
    assert names == {"attn_q", "attn_k", "attn_v", "attn_output"}
    with pytest.raises(UsageError, match="no linear layers named"):
        make_peft(tmp_path / "b", base, AdapterSpec(targets=("ffn_up",)))
    assert not (tmp_path / "b").exists()


def test_names_and_settings_are_peft_s(tiny_path: Path, tmp_path: Path) -> None:
    spec = AdapterSpec(targets=("attn_q", "ffn_down"), use_rslora=True)
    make_peft(tmp_path / "a", shapes_of(tiny_path), spec)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["r"] == 8 and config["lora_alpha"] == 16.0 and config["use_rslora"] is True
    raw = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    assert b'"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"' in raw
    assert b'"base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"' in raw


def test_alphas_that_no_gguf_can_hold(tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="GGUF adapters have one alpha, but this one needs 2"):
        make_gguf(tmp_path / "a", shapes_of(tiny_path), AdapterSpec(alphas={"q_proj": 1.0}))


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", "F32"), ("llama", "F16"), ("llama", "BF16"), ("gemma3", "F32"), ("qwen3moe", "F16")],
)
def test_llama_cpp_loads_it(arch: str, kind: str, tmp_path: Path) -> None:
    """And it changes what the model computes."""
    model, adapter = tmp_path / "m.gguf", tmp_path / "a.gguf"
    synth.make(arch, model, n_layer=2)
    make_gguf(adapter, shapes_of(model), AdapterSpec(kind=kind))
    logits = []
    for lora in (None, str(adapter)):
        llama = llama_cpp.Llama(
            str(model), n_ctx=64, n_threads=1, verbose=False, logits_all=True, lora_path=lora
        )
        try:
            llama.eval([5, 6, 7])
            logits.append(np.array(llama.scores[:3]))
        finally:
            llama.close()
    error = np.square(logits[1] - logits[0]).mean() / np.square(logits[0]).mean()
    assert 1e-5 < error < 0.5


def test_command_line_writes_both_formats(tiny_path: Path, tmp_path: Path) -> None:
    base = shapes_of(tiny_path)
    for out in ("robot", "robot.gguf"):
        args = [str(tiny_path), str(tmp_path / out), "--rank", "4", "--type", "F16"]
        result = CliRunner().invoke(synth_adapter.main, args)
        assert result.exit_code == 0, result.output
        assert "for llama, rank 4, alpha 16, F16, seed 1" in result.output
        assert {tensor.scale for tensor in open_adapter(tmp_path / out, base).tensors} == {4.0}
