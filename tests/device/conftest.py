"""Fixtures: a device of another process, whose memory is not ours."""

from collections.abc import Iterator

import pytest

from edgeroute.runtime.device import Device, devices
from edgeroute.runtime.ggml.api import ggml
from edgeroute.tools.bench.rpc_servers import RpcServer, rpc_server


@pytest.fixture(scope="session")
def rpc() -> Iterator[RpcServer]:
    """A server that lives as long as the tests. It takes one client at a time: close Runtimes."""
    devices()
    if ggml().ggml_backend_reg_by_name(b"RPC") is None:
        pytest.skip("this ggml is built without RPC; install llama-cpp-python with "
                    'CMAKE_ARGS="-DGGML_RPC=ON"')  # fmt: skip
    with rpc_server() as server:
        yield server


@pytest.fixture
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor compute with the kernels of the device, which repacks no weight."""
    monkeypatch.setattr(Device, "_find_extra_buffer_types", lambda *_: ())
