"""A device behind a real server: what it does when that is killed, full, taken, or back again."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from edgeroute.runtime import rpc_link
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, DeviceLostError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.rpc_link import RpcLink
from edgeroute.runtime.tensor import F32, Descriptors, get_bytes, new_tensor, place_all, set_bytes
from edgeroute.tools.bench.rpc_servers import RpcServer, rpc_server

N = 512
MEMORY = 64 << 20
pytestmark = pytest.mark.skipif(
    ggml().ggml_backend_reg_by_name(b"RPC") is None, reason="this ggml is built without RPC"
)


@pytest.fixture(scope="module")
def server() -> Iterator[RpcServer]:
    with rpc_server(MEMORY) as found:
        yield found


class Product:
    """A matrix on a device that each computation multiplies by itself, row by row scaled."""

    def __init__(self, device: Device, n: int = N, n_times: int = 1) -> None:
        g, self.device = ggml(), device
        self.descriptors = Descriptors(8 + 2 * n_times, 8 + 2 * n_times)
        ctx = self.descriptors.ctx
        self.matrix = new_tensor(self.descriptors, F32, (n, n), "matrix")
        self.result: Tensor = self.matrix
        tensors = [self.matrix]
        for _ in range(n_times):
            self.result = g.ggml_mul_mat(ctx, self.result, self.matrix)
            tensors.append(self.result)
        self.graph = g.ggml_new_graph_custom(ctx, 8 + 2 * n_times, False)
        g.ggml_build_forward_expand(self.graph, self.result)
        self.buffer = place_all(tensors, device)
        self.n = n

    def compute(self) -> np.ndarray:
        """Compute, and read the result."""
        self.device.compute(self.graph)
        found = np.empty((self.n, self.n), np.float32)
        get_bytes(self.result, found)
        self.device.check()
        return found

    def free(self) -> None:
        """Free the buffer and the descriptors."""
        self.buffer.free()
        self.descriptors.free()


def test_graphs_that_the_server_has_compute_the_same_bits_and_see_new_inputs(
    server: RpcServer,
) -> None:
    one = np.random.default_rng(1).standard_normal((N, N)).astype(np.float32)
    two = np.random.default_rng(2).standard_normal((N, N)).astype(np.float32)
    results = []
    for repeat in (False, True):
        with Device.open(server.name) as device:
            assert device.link is not None
            rpc_link._connections[device.link.address].relay.repeat = repeat
            product = Product(device)
            for matrix in (one, one, two, one):  # one graph, and then the same again
                set_bytes(product.matrix, matrix)
                results.append(product.compute())
            other = Product(device, 8)
            set_bytes(other.matrix, np.ones((8, 8), np.float32))
            for _ in range(3):  # two graphs that take turns
                assert np.array_equal(other.compute(), np.full((8, 8), 8, np.float32))
                results.append(product.compute())
            other.free()  # a buffer freed makes ggml forget what it computed last
            results.append(product.compute())
            stats = device.link.stats()
            assert (stats.n_graphs, stats.n_repeated, stats.n_recalled) == (
                (11, 3, 6) if repeat else (11, 0, 0)
            )
            product.free()
    for plain, repeated in zip(results[:8], results[8:], strict=True):
        assert np.array_equal(plain, repeated)
    assert not np.array_equal(results[0], results[2])


def test_a_server_killed_while_it_computes_is_an_error_that_names_it() -> None:
    with rpc_server(MEMORY) as server, Device.open(server.name) as device:
        product = Product(device, n_times=40)
        set_bytes(product.matrix, np.eye(N, dtype=np.float32))
        product.compute()
        threading.Timer(0.05, server.kill).start()
        with pytest.raises(DeviceLostError, match=f"device {server.name} is gone: "):
            while True:
                product.compute()
        with pytest.raises(DeviceLostError, match=server.name):
            device.allocate(1000)
        product.free()


def test_memory_beyond_the_limit_is_refused_and_what_is_freed_comes_back(
    server: RpcServer,
) -> None:
    with Device.open(server.name) as device:
        assert device.info.memory_total_bytes == device.info.memory_free_bytes == MEMORY
        for _ in range(3):
            most = device.allocate(MEMORY)
            with pytest.raises(CapacityError, match=f"{server.name} could not allocate 1 KiB"):
                device.allocate(1024)
            device.check()
            most.free()
    with Device.open(server.name) as device:
        device.allocate(MEMORY).free()


def test_two_devices_of_one_process_share_a_server(server: RpcServer) -> None:
    with Device.open(server.name) as first, Device.open(server.name) as second:
        products = [Product(each, 16) for each in (first, second)]
        for value, each in enumerate(products, 1):
            set_bytes(each.matrix, np.full((16, 16), value, np.float32))
        assert [int(each.compute()[0, 0]) for each in products] == [16, 64]
        products[0].free()
        first.close()
        assert int(products[1].compute()[0, 0]) == 64
        products[1].free()
    with RpcLink.open(server.name) as link:  # it is free for others as soon as both are closed
        link.check()


def test_an_address_can_be_opened_again_after_a_loss() -> None:
    with rpc_server(MEMORY) as server:
        port = server.port
        with Device.open(server.name) as device:
            server.kill()
            with pytest.raises(DeviceLostError):
                Product(device)
    with pytest.raises(DeviceLostError, match=r"does not answer: .*`edgeroute rpc-server"):
        Device.open(f"rpc:127.0.0.1:{port}")
    with (
        rpc_server(MEMORY, options=("--port", str(port))) as server,
        Device.open(server.name) as device,
    ):
        product = Product(device, 16)
        set_bytes(product.matrix, np.ones((16, 16), np.float32))
        assert product.compute()[0, 0] == 16
        product.free()
