"""gpt-oss: llama.cpp's bits with the types its files have, and the formulas of its model card."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgeroute.tools import synth
from tests.reference import family_checks as checks
from tests.reference.numpy_families import NumpyGptOss

SPEC = synth.ARCHITECTURES["gpt-oss"]
REAL = replace(SPEC, weight_type="Q8_0", expert_type="MXFP4")


@pytest.mark.parametrize("weight_type", ["F32", "Q8_0", "Q4_0"])
def test_mxfp4_experts_have_llama_cpps_bits(weight_type: str, tmp_path: Path) -> None:
    """test_parity has the same with experts of the other types."""
    checks.check_identical(replace(REAL, weight_type=weight_type), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_base_swa": 10000.0},  # windowed layers may rotate by another base
        {"rope_scaling": None},
        {"rope_scaling": "linear", "rope_factor": 4.0},
        {"rope_factor": 1.95, "n_layer": 2},  # undone and applied again, 1 lacks a bit here
        {"sliding_window": 1, "n_layer": 2},
        {"n_expert_used": 1, "n_layer": 2},
        {"n_expert": 4, "n_expert_used": 4, "n_layer": 1, "tied": False},
    ],
    ids=str,
)
def test_variants_have_llama_cpps_bits(change: dict[str, object], tmp_path: Path) -> None:
    checks.check_identical(replace(SPEC, weight_type="F32", **change), tmp_path, n_single=40)


def test_q8_0_cache_has_llama_cpps_bits(tmp_path: Path) -> None:
    checks.check_identical(REAL, tmp_path, kv_type="q8_0")


def test_a_long_context_has_llama_cpps_bits(tmp_path: Path) -> None:
    checks.check_long_context(REAL, tmp_path)


@pytest.mark.parametrize("rope_factor", [4.0, 32.0])
def test_numpy_agrees(rope_factor: float, tmp_path: Path) -> None:
    """Sinks, windows, the clamped activation and every bias, from other code."""
    spec = replace(SPEC, n_layer=1, rope_factor=rope_factor)
    checks.check_formulas(spec, NumpyGptOss, tmp_path)
