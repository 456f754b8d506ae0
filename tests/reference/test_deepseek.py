"""deepseek and deepseek2: llama.cpp's bits in both forms of latent attention, and the formulas."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgeroute.tools import synth
from tests.reference import family_checks as checks
from tests.reference.numpy_families import NumpyDeepSeek2

DEEPSEEK = synth.ARCHITECTURES["deepseek"]
ABSORBED = replace(synth.ARCHITECTURES["deepseek2"], n_layer=2)
HEADS = replace(synth.ARCHITECTURES["deepseek2-heads"], n_layer=2)
LITE = replace(
    ABSORBED,
    n_layer=26,  # from which llama.cpp knows that queries are not compressed
    n_embd=128,
    n_ff=128,
    n_ff_exp=64,
    latent=synth.SynthLatent(n_lora_q=None, n_lora_kv=128, n_nope=64, n_rot=32, n_head_v=64),
)
LITE_HEADS = replace(
    LITE, n_head_kv=LITE.n_head, latent=replace(LITE.latent or synth.SynthLatent(), absorbed=False)
)


@pytest.mark.parametrize(
    "spec",
    [replace(LITE, weight_type="Q4_0"), replace(LITE_HEADS, weight_type="Q8_0")],
    ids=["absorbed", "heads"],
)
def test_lite_models_have_llama_cpps_bits(spec: synth.SynthSpec, tmp_path: Path) -> None:
    """V2-Lite's form: queries projected at once; test_parity has the compressed ones."""
    checks.check_identical(spec, tmp_path, n_single=12)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None, "yarn_log_mul": 0.0},
        {"rope_scaling": "linear", "yarn_log_mul": 0.0},  # which scales the products, too
        {"yarn_log_mul": 0.0},
        {"yarn_log_mul": 0.1},
        {"rope_factor": 1.95},
        {"rope_factor": 0.5},
        {"sigmoid_gate": True},
        {"sigmoid_gate": True, "weight_type": "Q8_0"},
        {"expert_weights_scale": None, "n_layer_dense_lead": 0, "n_expert_shared": 1},
        {"n_layer_dense_lead": 2},
    ],
    ids=str,
)
def test_variants_have_llama_cpps_bits(change: dict[str, object], tmp_path: Path) -> None:
    checks.check_identical(replace(ABSORBED, **change), tmp_path, n_single=30)


@pytest.mark.parametrize("change", [{"expert_weights_scale": 2.5}, {"weight_type": "Q8_0"}])
def test_the_first_generation_has_llama_cpps_bits(
    change: dict[str, object], tmp_path: Path
) -> None:
    checks.check_identical(replace(DEEPSEEK, **change), tmp_path, n_single=30)


@pytest.mark.parametrize("spec", [ABSORBED, HEADS, DEEPSEEK], ids=["absorbed", "heads", "first"])
def test_q8_0_cache_has_llama_cpps_bits(spec: synth.SynthSpec, tmp_path: Path) -> None:
    """Latents are not turned before they are quantised; keys and values of heads are."""
    checks.check_identical(replace(spec, weight_type="Q4_0"), tmp_path, kv_type="q8_0")


@pytest.mark.parametrize("spec", [ABSORBED, HEADS], ids=["absorbed", "heads"])
def test_a_long_context_has_llama_cpps_bits(spec: synth.SynthSpec, tmp_path: Path) -> None:
    checks.check_long_context(replace(spec, weight_type="Q8_0"), tmp_path)


@pytest.mark.parametrize(
    "spec",
    [ABSORBED, HEADS, replace(ABSORBED, sigmoid_gate=True), replace(ABSORBED, yarn_log_mul=0.1)],
    ids=["absorbed", "heads", "sigmoid", "multiplier"],
)
def test_numpy_agrees(spec: synth.SynthSpec, tmp_path: Path) -> None:
    """Unfolded keys and values of every head, whatever form the file has."""
    one = replace(spec, n_layer=1, n_layer_dense_lead=0)
    checks.check_formulas(one, NumpyDeepSeek2, tmp_path)
