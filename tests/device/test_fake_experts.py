"""Experts on a device that does everything as late as it may: uploads, events, computed away.

A wait that is missing between an upload and the graph that reads it changes the answer here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeroute
from edgeroute.runtime.errors import CapacityError, ComputeError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.upload import Uploader
from edgeroute.tools.synth import make
from tests.device import fake_backend as fakes
from tests.device.fake_backend import Fake

CASES = {
    "queued": (Fake(), "off"),
    "queued, some away": (Fake(), "on"),
    "queued, as measured": (Fake(), "auto"),
    "one queue": (Fake(second=False), "off"),
    "plain host memory": (Fake(pinned=False), "off"),
    "no event left": (Fake(n_events=0), "off"),
    "synchronous": (Fake(asynchronous=False, events=False, pinned=False), "off"),
    "synchronous, some away": (Fake(asynchronous=False, events=False, pinned=False), "on"),
    "integrated": (Fake(kind="igpu"), "off"),
    "host pointers": (Fake(host_pointers=True), "off"),
}
IN_PART = "24MiB"  # the model has 28 MiB, and its resident part leaves room for a quarter
SETTINGS: dict[str, Any] = {
    "threads": 1, "n_ctx": 256, "n_ubatch": 64, "repack_experts": False, "prefetch": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("experts") / "tiny-qwen3moe.gguf"
    make("qwen3moe", path)
    yield path
    path.unlink()


def answer(path: Path, device: str, **more: Any) -> tuple[object, ...]:
    with edgeroute.Runtime(path, device=device, **SETTINGS, **more) as runtime:
        found = runtime.generate("a few words, twice: a few words", max_tokens=24, temperature=0,
                                 logprobs=3)  # fmt: skip
        if device != "cpu":
            assert found.stats.experts is not None, "not paged"
        return found.token_ids, found.logprobs


@pytest.fixture(scope="module")
def expected(model: Path) -> tuple[object, ...]:
    return answer(model, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_paged_experts_have_the_bits_of_the_processor(
    name: str, model: Path, expected: tuple[object, ...]
) -> None:
    config, host_experts = CASES[name]
    with fakes.fake_device(config) as fake:
        more = {"device_memory": IN_PART, "host_experts": host_experts}
        assert answer(model, "fake0", **more) == expected
        assert fake.n_computed > 24 and not fake.misuse
        assert not fake.n_live and not fake.n_instances and not fake.n_live_events


def test_a_missing_wait_is_seen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: what is not there yet is no number."""
    with fakes.fake_device() as fake:
        monkeypatch.setattr(ggml(), "ggml_backend_event_wait", lambda *_: None)
        monkeypatch.setattr(Uploader, "finish", lambda _: None)
        with pytest.raises(ComputeError, match="not numbers"):
            answer(model, "fake0", device_memory=IN_PART, host_experts="off")
        assert not fake.n_live


def test_no_allocation_that_fails_leaves_anything_behind(model: Path) -> None:
    n = 0
    while True:
        with fakes.fake_device(Fake(fail_at=n)) as fake:
            try:
                answer(model, "fake0", device_memory=IN_PART, host_experts="off")
            except CapacityError as error:
                assert "fake0" in str(error), n
            assert not fake.n_live and not fake.n_instances and not fake.n_live_events, n
            if fake.n_allocated <= n:
                break
        n += 1
    assert n >= 4  # resident weights, KV cells, slots, the compute buffer
