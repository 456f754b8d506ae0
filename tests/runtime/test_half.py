"""Rounding to F16: ggml's instructions and numpy's own agree on every kind of number."""

import numpy as np
import pytest

from edgeroute.runtime import tensor


@pytest.mark.parametrize("by_ggml", [True, False])
def test_halves_are_numpys(by_ggml: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any 32 bits: subnormal, huge, infinite or not a number; and a library without it."""
    if not by_ggml:
        monkeypatch.setattr(tensor, "_half_converter", lambda: None)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_001, dtype=np.uint32)
    edges = np.array([0.0, -0.0, 65504, 65519.99, 65520, 2**-24, 2**-25, np.inf, np.nan])
    values = np.concatenate([bits.view(np.float32), edges.astype(np.float32)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    found = tensor.to_half(values)
    same = found.view(np.uint16) == expected.view(np.uint16)
    assert np.all(same | (np.isnan(found) & np.isnan(expected)))
    assert found.shape == values.shape
