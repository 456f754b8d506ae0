"""A machine on which tiny models stream: what tests of streamed layers set aside."""

from types import SimpleNamespace

import pytest

from edgeroute import paging_layers
from edgeroute.offload.disk_profile import DiskProfile
from edgeroute.runtime.device import Device


def plain_machine(monkeypatch: pytest.MonkeyPatch, **more: int) -> None:
    """Let nothing count but the model, stage little, and keep the file's layout.

    The test runner's own memory is larger than any model here. What is streamed has the file's
    layout, and so must have what it is compared with.

    Args:
        monkeypatch: undoes it.
        more: further numbers of `edgeroute.paging_layers`, such as MIB=1 for refusals in bytes.
    """
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging_layers, "psutil", SimpleNamespace(Process=lambda: process))
    for name, value in {"STAGING_MIN_BYTES": 1, "MOST_READ_BYTES": 1 << 17, **more}.items():
        monkeypatch.setattr(paging_layers, name, value)
    monkeypatch.setattr(Device, "_find_extra_buffer_types", lambda *_: ())
    reads = DiskProfile(read_bytes=1 << 16, n_threads=2)
    monkeypatch.setattr(paging_layers, "profile", lambda disk: reads)
