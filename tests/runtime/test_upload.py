"""Uploads: what was sent is there before a graph reads it, however late the device copies."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import DeviceLostError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.tensor import F32, Descriptors, get_bytes, new_tensor, place_all
from edgeroute.runtime.upload import Uploader
from tests.device import fake_backend as fakes
from tests.device.fake_backend import Fake

N = 1 << 18  # values of the tensor, 1 MiB
STAGING = 4 << 16  # four buffers of the least size: the tensor goes round the ring four times
CONFIGS = {
    "queued": Fake(),
    "one queue": Fake(second=False),
    "plain host memory": Fake(pinned=False),
    "no pinned memory left": Fake(pinned_bytes=0),
    "some pinned memory left": Fake(pinned_bytes=1 << 16),
    "no event left": Fake(n_events=3),
    "no events": Fake(events=False),
    "synchronous": Fake(asynchronous=False),
    "neither": Fake(asynchronous=False, events=False, pinned=False),
    "integrated": Fake(kind="igpu"),
    "host pointers": Fake(host_pointers=True),
}
STAGED = ("queued", "one queue", "plain host memory", "no pinned memory left",
          "some pinned memory left")  # fmt: skip


@dataclass
class Lab:
    """A tensor on a fake device, and a graph there that doubles it."""

    fake: "fakes.FakeDevice"
    device: Device
    tensor: Tensor
    doubled: Tensor
    graph: int

    def read(self, tensor: Tensor) -> np.ndarray:
        found = np.empty(N, np.float32)
        get_bytes(tensor, found)
        return found


@contextlib.contextmanager
def make_lab(config: "fakes.Fake") -> Iterator[Lab]:
    with fakes.fake_device(config) as fake, Device.open("fake0") as device:
        g, descriptors = ggml(), Descriptors(8, 8)
        tensor = new_tensor(descriptors, F32, (N,), "tensor")
        doubled = g.ggml_scale(descriptors.ctx, tensor, 2.0)
        graph = g.ggml_new_graph_custom(descriptors.ctx, 8, False)
        g.ggml_build_forward_expand(graph, doubled)
        buffer = place_all([tensor, doubled], device)
        yield Lab(fake, device, tensor, doubled, graph)
        buffer.free()
        descriptors.free()
    assert not fake.n_live and not fake.n_instances and not fake.n_live_events
    assert not fake.misuse


def send_in_pieces(uploader: Uploader, tensor: Tensor, values: np.ndarray) -> None:
    """Send from one place in memory, which is overwritten after each piece."""
    raw, at = values.view(np.uint8), 0
    for n_bytes in (4, 100, 1 << 16, 70000, 200000, raw.nbytes):
        piece = raw[at : at + n_bytes].copy()
        uploader.send(tensor, at, memoryview(piece))
        piece[:] = 0
        at += piece.nbytes


VALUES = np.random.default_rng(9).random(N, np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_sent_is_there_after_finish(name: str) -> None:
    with make_lab(CONFIGS[name]) as lab, Uploader(lab.device, STAGING) as uploader:
        send_in_pieces(uploader, lab.tensor, VALUES)
        assert (uploader.staging_bytes > 0) == (name in STAGED)
        assert uploader.staging_bytes <= STAGING
        assert uploader.pinned == (name in ("queued", "one queue"))
        uploader.finish()
        assert np.array_equal(lab.read(lab.tensor), VALUES)
        assert uploader.n_bytes == VALUES.nbytes
        assert uploader.seconds > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_sees_what_was_sent_before_it(name: str) -> None:
    """Without a wait of the host's in between, and again with other bytes."""
    with make_lab(CONFIGS[name]) as lab, Uploader(lab.device, STAGING) as uploader:
        for values in (VALUES, VALUES[::-1].copy()):
            send_in_pieces(uploader, lab.tensor, values)
            assert lab.device.compute(lab.graph)
            assert np.array_equal(lab.read(lab.doubled), 2 * values)
        waited = name in STAGED and name != "one queue"
        assert (lab.fake.n_waits > 0) == waited


def test_the_host_goes_on_while_the_device_copies() -> None:
    """What fits the ring is only queued: the fake copies when somebody waits."""
    with make_lab(Fake()) as lab, Uploader(lab.device, STAGING) as uploader:
        uploader.send(lab.tensor, 0, memoryview(VALUES[:1000]))
        assert np.isnan(lab.read(lab.tensor)[:1000]).all()
        uploader.finish()
        assert np.array_equal(lab.read(lab.tensor)[:1000], VALUES[:1000])


@pytest.mark.parametrize(
    "wait",
    ["ggml_backend_event_wait", "ggml_backend_event_synchronize", "ggml_backend_event_record"],
)
def test_a_missing_wait_shows_as_wrong_bytes(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: the fake is as late as a device may be."""
    with make_lab(Fake()) as lab, Uploader(lab.device, STAGING) as uploader:
        monkeypatch.setattr(ggml(), wait, lambda *_: None)
        send_in_pieces(uploader, lab.tensor, VALUES)
        lab.device.compute(lab.graph)
        assert not np.array_equal(lab.read(lab.doubled), 2 * VALUES)
        monkeypatch.undo()
        lab.fake.misuse.clear()


def test_a_missing_synchronize_shows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_lab(Fake()) as lab, Uploader(lab.device, STAGING) as uploader:
        uploader.send(lab.tensor, 0, memoryview(VALUES[:1000]))
        monkeypatch.setattr(ggml(), "ggml_backend_synchronize", lambda _: None)
        uploader.finish()
        assert not np.array_equal(lab.read(lab.tensor)[:1000], VALUES[:1000])
        monkeypatch.undo()


def test_staging_memory_too_small_for_its_events_is_not_used() -> None:
    for n_bytes in (0, STAGING - 1):
        with make_lab(Fake()) as lab, Uploader(lab.device, n_bytes) as uploader:
            assert uploader.staging_bytes == 0
            uploader.send(lab.tensor, 0, memoryview(VALUES))
            assert np.array_equal(lab.read(lab.tensor), VALUES)


def test_closing_waits_for_what_is_on_its_way() -> None:
    with make_lab(Fake()) as lab:
        uploader = Uploader(lab.device, STAGING)
        uploader.send(lab.tensor, 0, memoryview(VALUES))
        uploader.send(lab.tensor, 0, memoryview(b""))
        uploader.close()
        uploader.close()
        assert np.array_equal(lab.read(lab.tensor), VALUES)


def test_a_lost_device_is_an_error_of_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise DeviceLostError("device rpc:there:1 is gone")

    with make_lab(Fake()) as lab, Uploader(lab.device, STAGING) as uploader:
        uploader.send(lab.tensor, 0, memoryview(VALUES))
        monkeypatch.setattr(lab.device, "link", SimpleNamespace(check=gone, close=lambda: None))
        with pytest.raises(DeviceLostError, match="there:1"):
            uploader.finish()
        monkeypatch.undo()


def test_a_device_of_another_process_has_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml's RPC client sends everything in order: a second instance would gain nothing."""
    link = SimpleNamespace(check=lambda: None, close=lambda: None)
    with make_lab(Fake()) as lab:
        monkeypatch.setattr(lab.device, "link", link)
        with Uploader(lab.device, STAGING) as uploader:
            assert lab.fake.n_instances == 1
            send_in_pieces(uploader, lab.tensor, VALUES)
            assert lab.device.compute(lab.graph)
            assert np.array_equal(lab.read(lab.doubled), 2 * VALUES)
        monkeypatch.undo()


def test_the_processor_needs_no_staging() -> None:
    with Device.open("cpu") as device, Uploader(device) as uploader:
        assert device.info.unified and uploader.staging_bytes == 0
