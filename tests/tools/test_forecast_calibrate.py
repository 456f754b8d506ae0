"""Calibration: measured once, remembered, and never believed beyond what it can be."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from edgeroute.config import RunParams
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.forecast import calibrate as subject
from edgeroute.tools.forecast import kernels, tiny_model
from edgeroute.tools.forecast.calibrate import CalibrateParams, calibrate, fingerprint, kept
from edgeroute.tools.forecast.fixed_costs import FixedCosts
from edgeroute.tools.forecast.predicted import predicted_tok_s
from edgeroute.tools.forecast.records import StoragePoint
from edgeroute.tools.forecast.storage import StorageSpeed


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache file, in a folder of the test's own."""
    path = tmp_path / "cache" / "speeds.json"
    monkeypatch.setattr(subject, "cache_path", lambda name: path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of next to nothing."""
    path = tmp_path / "tiny.gguf"
    tiny_model.write_tiny(tiny_model.TinyShape(n_layer=2), path)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, by stand-ins that take no time."""
    found: list[str] = []

    def note(name: str, value: Any) -> Any:
        found.append(name)
        return value

    fixed = FixedCosts(token_s=1e-4, layer_s=1e-5, expert_layer_s=3e-5, paged_layer_s=1e-4)
    storage = StorageSpeed(
        points=(StoragePoint(read_bytes=1 << 20, depth=1, bytes_s=1e9),), overlap_ratio=0.5
    )
    monkeypatch.setattr(subject, "decode_bytes_s", lambda *args: note("product", 2e10))
    monkeypatch.setattr(subject, "prefill_flops_s", lambda *args: note("prompt", 1e11))
    monkeypatch.setattr(subject, "measure_attention", lambda *args: note("attention", 1e10))
    monkeypatch.setattr(subject, "measure_fixed", lambda threads: note("fixed", fixed))
    monkeypatch.setattr(subject, "measure_storage", lambda *args, **more: note("disk", storage))
    return found


def test_it_is_measured_once(store: Path, model: Path, measured: list[str]) -> None:
    params = CalibrateParams(types=("Q8_0",), path=model)
    first = calibrate(1, params)
    assert {"product", "prompt", "attention", "fixed", "disk"} <= set(measured)
    measured.clear()
    again = calibrate(1, params)
    assert measured == []
    assert again.weight_bytes_s == first.weight_bytes_s
    assert {"Q8_0", "Q8_0/512", "Q8_0:slots/512"} < set(first.weight_bytes_s)
    assert (again.storage, again.overlap_ratio) == (first.storage, 0.5)
    assert again.paged_layer_s == pytest.approx(9e-5)  # more than a dense layer
    calibrate(1, CalibrateParams(types=("Q8_0", "F16"), path=model))
    assert set(measured) == {"product", "prompt"}
    measured.clear()
    calibrate(1, CalibrateParams(types=("Q8_0",), path=model, fresh_disk=True))
    assert measured == ["disk"]
    calibrate(1, CalibrateParams(types=("Q8_0",), path=model, fresh=True))
    assert "fixed" in measured


def test_other_threads_are_another_machine(store: Path, model: Path, measured: list[str]) -> None:
    calibrate(1, CalibrateParams(types=("Q8_0",), path=model))
    assert kept(1, model) is not None
    assert kept(2, model) is None
    assert fingerprint(1) != fingerprint(2)


def _damaged(entry: dict[str, Any], how: str) -> dict[str, Any]:
    if how == "old":
        return entry | {"measured": int(time.time()) - subject.VALID_S - 9}
    if how == "old and busy":
        return entry | {"measured": int(time.time()) - subject.VALID_BUSY_S - 9, "others": 1.5}
    if how == "from the future":
        return entry | {"measured": int(time.time()) + 999}
    if how == "not a number":
        return entry | {"attention": float("nan")}
    if how == "negative":
        return entry | {"rates": {"Q8_0": [-1.0, 1.0]}}
    if how == "a text":
        return entry | {"fixed": "quick"}
    return entry | {"disks": {key: {"points": [[1, 2]], "overlap_ratio": 0.5}
                              for key in entry["disks"]}}  # fmt: skip


@pytest.mark.parametrize(
    "how",
    ["old", "old and busy", "from the future", "not a number", "negative", "a text", "points"],
)
def test_a_bad_note_is_not_believed(
    store: Path, model: Path, measured: list[str], how: str
) -> None:
    calibrate(1, CalibrateParams(types=("Q8_0",), path=model))
    found = json.loads(store.read_text())
    key = fingerprint(1)
    found["entries"][key] = _damaged(found["entries"][key], how)
    store.write_text(json.dumps(found))
    assert kept(1, model) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 9, "entries": {}}', "[" * 99999])
def test_a_file_that_is_none_is_measured_anew(
    store: Path, model: Path, measured: list[str], text: str
) -> None:
    store.parent.mkdir(exist_ok=True)
    store.write_text(text)
    assert kept(1) is None
    calibrate(1, CalibrateParams(types=("Q8_0",), path=model))
    assert kept(1) is not None


def test_unknown_types_are_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="Q9_Z"):
        calibrate(1, CalibrateParams(types=("Q9_Z",)))


def test_a_prediction_needs_a_calibration(store: Path, model: Path, measured: list[str]) -> None:
    params = RunParams(threads=1, n_ctx=64)
    assert predicted_tok_s(model, params) is None
    calibrate(1, CalibrateParams(types=("Q8_0",), path=model))
    found = predicted_tok_s(model, params)
    assert found is not None and found.low < found.likely < found.high
    assert predicted_tok_s(model.with_name("none.gguf"), params) is None


def test_products_and_attention_are_really_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little to compute: no figure is looked at, only that every form can be."""
    monkeypatch.setattr(kernels, "N_IN", 256)
    monkeypatch.setattr(kernels, "N_OUT", 64)
    monkeypatch.setattr(kernels, "N_OUT_EXPERT", 64)
    monkeypatch.setattr(kernels, "N_PROMPT", 8)
    monkeypatch.setattr(kernels, "WORKING_BYTES", 1 << 16)
    with Device.open("cpu") as device:
        device.set_threads(1)
        for form, n_in in itertools.product(kernels.FORMS, (256, 512)):
            kernel = kernels.Kernel("Q4_K", form, n_in)
            assert kernels.decode_bytes_s(device, kernel, 0.0) > 0
            assert kernels.prefill_flops_s(device, kernel) > 0
        assert kernels.measure_attention(device, 0.0) > 0
