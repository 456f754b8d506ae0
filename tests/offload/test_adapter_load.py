"""Scaling an adapter's halves on their bits equals converting, multiplying and rounding."""

import warnings

import numpy as np
import pytest

from edgeroute.models.adapter_records import LoraTensor
from edgeroute.offload import adapter_load
from edgeroute.offload.adapter_load import _doubled, _scaled
from edgeroute.runtime.errors import CapacityError

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def pair(scale: float) -> LoraTensor:
    return LoraTensor(name="blk.0.attn_q", n_in=8, n_out=8, rank=4, scale=scale)


def by_conversion(values: np.ndarray, scale: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        found: np.ndarray = (values.astype(np.float32) * np.float32(scale)).astype(np.float16)
    return found


def test_every_half_is_doubled_exactly_or_leaves_the_range() -> None:
    found, wanted = _doubled(FINITE), by_conversion(FINITE, 2.0)
    inside = np.isfinite(wanted)
    assert (found[inside].view(np.uint16) == wanted[inside].view(np.uint16)).all()
    assert not np.isfinite(found[~inside]).any() and (~inside).sum() == 2 * 1024


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 64.0, 128.0, 0.5, 3.0, -2.0, 0.0, 1e-9])
def test_any_scale_gives_the_bits_of_a_conversion(scale: float) -> None:
    fits = FINITE[np.isfinite(by_conversion(FINITE, scale))].reshape(-1, 2)
    found = _scaled("a", pair(scale), fits)
    assert found.shape == fits.shape and found.dtype == np.float16
    assert (found.view(np.uint16) == by_conversion(fits, scale).view(np.uint16)).all()


@pytest.mark.parametrize("scale", [2.0, 8.0, 3.0, 1e30])
def test_numbers_scaled_out_of_range_are_refused(scale: float) -> None:
    values = np.array([[1.0, -65504.0]], np.float16)
    with warnings.catch_warnings(), pytest.raises(CapacityError, match=r"'a' scales blk.0.attn_q"):
        warnings.simplefilter("error")
        _scaled("a", pair(scale), values)


def test_more_doublings_than_a_conversion_costs_are_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def count(values: np.ndarray) -> np.ndarray:
        calls.append(1)
        return _doubled(values)

    monkeypatch.setattr(adapter_load, "_doubled", count)
    ones = np.ones((1, 2), np.float16)
    assert (_scaled("a", pair(64.0), ones) == 64).all() and len(calls) == 6
    assert (_scaled("a", pair(128.0), ones) == 128).all() and len(calls) == 6
