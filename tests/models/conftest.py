"""What several tests of models share: a hub and folders of their own, an adapter to spoil."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute.tools.synth_adapter import AdapterSpec, make_peft
from tests.models import hub_server
from tests.models.adapter_hostile_lab import BASE


@pytest.fixture
def isolated_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, token, index or configuration of this machine reaches the test."""
    with hub_server.isolated(tmp_path, monkeypatch):
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A well-behaved hub that the environment points at; tests change its behaviour."""
    with hub_server.serving(hub_server.Behaviour(body=hub_server.BODY)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """An adapter with which nothing is wrong yet."""
    folder = tmp_path / "bad"
    make_peft(folder, BASE, AdapterSpec(rank=2, targets=("attn_q", "attn_v")))
    return folder
