"""One server for the clients of others, who are told its address and key and nothing else.

They are no dependency of ours: where one is not installed, its tests are skipped. To run all:

    pip install -e '.[dev,clients]' && npm install --no-save openai && pytest -m clients
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.models.pull import resolve
from edgeroute.runtime.errors import CatalogueError
from edgeroute.tools.bench.serve_http import Address
from edgeroute.tools.bench.serve_servers import (
    COMMAND,
    KEY,
    Served,
    ServedModel,
    ServerPlan,
    configuration,
)

MAX_WAITING = 6


def _model() -> Path:
    """A model that knows tools where it is there, else the one that `make test` pulls."""
    try:
        return resolve("qwen2.5-coder-0.5b-instruct")
    except CatalogueError:
        return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """`edgeroute serve` in a process of its own."""
    model = ServedModel(path=_model(), threads=1, n_ctx=2048, n_seq=4)
    server = {"api_key_file": "key", "max_waiting": MAX_WAITING}
    plan = ServerPlan(
        name="edgeroute", command=COMMAND, ready="/health/ready", key=KEY,
        files={"key": KEY, "edgeroute.toml": configuration(model, server, {})},
    )  # fmt: skip
    with Served(plan) as running:
        yield running


@pytest.fixture
def address(served: Served) -> Iterator[Address]:
    """Where it listens; it must be there after each test as well."""
    yield served.address
    assert served.process.poll() is None, served.output()


@pytest.fixture
def url(address: Address) -> str:
    """What clients call the base URL."""
    return f"{address.url}/v1"


@pytest.fixture
def key() -> str:
    return KEY
