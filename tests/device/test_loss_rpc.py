"""Servers that are killed, stopped and started again while a model is on them."""

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime, recovery
from edgeroute.offload import adapter_store
from edgeroute.runtime import rpc_link
from edgeroute.runtime.device import Device, devices
from edgeroute.runtime.errors import DeviceLostError, EdgerouteError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.rpc_link import RpcLink
from edgeroute.tools.bench.rpc_servers import RpcServer, rpc_server
from tests.device.loss_lab import (
    LONG,
    SETTINGS,
    WAIT_S,
    Restarts,
    in_background,
    nowhere_else,
    outcome,
    restarts,
    until,
)
from tests.edgeroute.adapter_lab import make as make_adapter

__all__ = ["nowhere_else", "restarts"]

pytestmark = pytest.mark.usefixtures("same_kernels")

PROMPT = [40 + i % 50 for i in range(150)]


@pytest.fixture(autouse=True)
def _rpc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    devices()
    if ggml().ggml_backend_reg_by_name(b"RPC") is None:
        pytest.skip("this ggml is built without RPC")
    monkeypatch.setattr(recovery, "RECONNECT_S", 0.0)
    yield
    assert not rpc_link._connections, "a connection was left open"
    # A relay ends once ggml has let go of it, which nobody waits for.
    until(lambda: not [each for each in threading.enumerate() if "rpc" in each.name])


@pytest.fixture
def plain(tiny_path: Path, same_kernels: None) -> Iterator[Runtime]:
    """The same model where nothing is lost."""
    with Runtime(tiny_path, **SETTINGS) as found:
        yield found


def ids(runtime: Runtime, **options: Any) -> tuple[int, ...]:
    return runtime.generate(prompt_ids=PROMPT, **LONG | options).token_ids


class At:
    """Does something once, before the n-th computation on a device of a server from now on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.n_left = 0
        self.action: Callable[[], object] = lambda: None
        compute = Device.compute

        def watched(device: Device, graph: int) -> bool:
            if device.link is not None:
                self.n_left -= 1
                if self.n_left == 0:
                    self.action()
            return compute(device, graph)

        patch.setattr(Device, "compute", watched)

    def __call__(self, n: int, action: Callable[[], object]) -> None:
        self.n_left, self.action = n, action


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    return At(monkeypatch)


@contextlib.contextmanager
def restarted(server: RpcServer) -> Iterator[RpcServer]:
    """Start a server where another was."""
    with rpc_server(options=("--port", str(server.port))) as found:
        yield found


def test_killed_while_many_answer(
    tiny_path: Path, tmp_path: Path, at: At, restarts: Restarts
) -> None:
    """All go on on the processor, and the adapter too."""
    adapter = make_adapter(tmp_path / "one", tiny_path, seed=1)
    settings = SETTINGS | {"adapters": [str(adapter)], "adapter_state": "off"}
    prompts = [[50 + i] * 150 for i in range(4)]
    chosen = [None, "one", None, None]
    with rpc_server() as server, Runtime(tiny_path, device=server.name, **settings) as runtime:
        assert server.name in str(runtime.stats()["device"])
        at(25, server.kill)
        streams = [
            runtime.stream(prompt_ids=prompts[i], adapter=chosen[i], **LONG) for i in range(3)
        ]
        thread, embedded = in_background(lambda: runtime.embed([PROMPT]).vectors)
        later = asyncio.run(asyncio.wait_for(
            runtime.agenerate(prompt_ids=prompts[3], **LONG), WAIT_S
        ))  # fmt: skip
        found = [*(outcome(each) for each in streams), later]
        thread.join(WAIT_S)
        assert embedded[0].shape[0] == 1
        told = found[0].stats.continued
        assert server.name in told[0] and "device cpu, which may be slower" in told[0]
        stats: Any = runtime.stats()
        assert stats["losses"]["continued"] >= 3 and not stats["losses"]["failed"]
        assert told[0] in stats["warnings"][-1]
        again = [ids(runtime), ids(runtime, adapter="one")]
    with Runtime(tiny_path, **settings) as runtime:
        pairs = zip(prompts, chosen, strict=True)
        wanted = [restarts.answer(runtime, each, adapter=name) for each, name in pairs]
        assert [each.token_ids for each in found] == wanted
        assert again == [ids(runtime), ids(runtime, adapter="one")]


def test_killed_while_an_adapter_is_loaded(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "one", tiny_path, seed=1)
    settings = SETTINGS | {"adapters": [str(adapter)], "adapter_state": "off"}
    with Runtime(tiny_path, **settings) as runtime:
        wanted = ids(runtime, adapter="one")
    with rpc_server() as server, Runtime(tiny_path, device=server.name, **settings) as runtime:
        load, n = adapter_store.load_into, []

        def cut(*args: Any) -> Any:
            if not n:
                server.kill()
            n.append(args)
            return load(*args)

        monkeypatch.setattr(adapter_store, "load_into", cut)
        assert ids(runtime, adapter="one") == wanted and len(n) == 2
        assert runtime.stats()["losses"]


def test_back_on_the_same_port(
    tiny_path: Path, plain: Runtime, restarts: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was started again is used again, and one that says nothing is gone too."""
    monkeypatch.setattr(RpcLink, "open", functools.partial(RpcLink.open, answer_s=1.0))
    with rpc_server() as server, Runtime(tiny_path, device=server.name, **SETTINGS) as runtime:
        assert ids(runtime) == ids(plain)
        server.kill()
        with restarted(server) as second:
            assert ids(runtime) == ids(plain)
            assert server.name in str(runtime.stats()["device"])
            if not hasattr(signal, "SIGSTOP"):
                return
            restarts.clear()
            stream = runtime.stream(prompt_ids=PROMPT, **LONG)
            next(stream)
            monkeypatch.setattr(rpc_link, "CONNECT_S", 0.3)
            second.process.send_signal(signal.SIGSTOP)
            found = outcome(stream)
            assert found.token_ids == restarts.answer(plain, PROMPT)
            assert "cpu" in found.stats.continued[0]
        losses: Any = runtime.stats()["losses"]
        assert losses["lost"] == losses["opened"] == 2


def test_killed_with_nowhere_to_go(
    tiny_path: Path, at: At, nowhere_else: None, plain: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-prompt: all hear which device it was, and a later request finds it back."""
    monkeypatch.setattr(recovery, "AGAIN_S", 0.0)
    with rpc_server() as server, Runtime(tiny_path, device=server.name, **SETTINGS) as runtime:
        at(2, server.kill)
        streams = [runtime.stream(prompt_ids=PROMPT, **LONG) for _ in range(3)]
        for each in streams:
            error = outcome(each)
            assert isinstance(error, DeviceLostError) and server.name in str(error)
        with pytest.raises(DeviceLostError, match=server.name):
            asyncio.run(asyncio.wait_for(runtime.agenerate(prompt_ids=PROMPT, **LONG), WAIT_S))
        with restarted(server):
            assert ids(runtime) == ids(plain)
            runtime.close()


def test_killed_while_a_model_is_loaded(
    tiny_path: Path, plain: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = KvCache.__init__
    with rpc_server() as server:

        def cut(*args: Any) -> None:
            server.kill()
            make(*args)

        with monkeypatch.context() as patch, pytest.raises(DeviceLostError, match=server.name):
            patch.setattr(KvCache, "__init__", cut)
            Runtime(tiny_path, device=server.name, **SETTINGS)
        assert not rpc_link._connections
        with pytest.raises(DeviceLostError, match=server.name):
            Runtime(tiny_path, device=server.name, **SETTINGS)
        with restarted(server), Runtime(tiny_path, device=server.name, **SETTINGS) as runtime:
            assert ids(runtime) == ids(plain)


def test_closed_right_after_a_kill(tiny_path: Path, at: At) -> None:
    with rpc_server() as server, Runtime(tiny_path, device=server.name, **SETTINGS) as runtime:
        killed = threading.Event()
        at(12, lambda: (server.kill(), killed.set()))
        stream = runtime.stream(prompt_ids=PROMPT, **LONG)
        assert killed.wait(WAIT_S)
        runtime.close()
        found = outcome(stream)
        assert isinstance(found, EdgerouteError) or found.finish_reason == "length"


def test_one_of_two(tiny_path: Path, at: At, plain: Runtime, restarts: Restarts) -> None:
    """Layers on two servers: with one killed, the other keeps its own."""
    with rpc_server() as first, rpc_server() as second:
        names = f"{first.name},{second.name}"
        with Runtime(tiny_path, device=names, **SETTINGS) as runtime:
            at(12, second.kill)
            found = runtime.generate(prompt_ids=PROMPT, **LONG)
            assert found.token_ids == restarts.answer(plain, PROMPT)
            (told,) = found.stats.continued or ("",)
            assert f"device {second.name} is gone" in told
            assert f"again with device {first.name}, which may be slower" in told
            assert first.name in str(runtime.stats()["device"])
            restarts.clear()
            at(20, first.kill)
            stream = runtime.stream(prompt_ids=PROMPT, **LONG)
            assert outcome(stream).token_ids == restarts.answer(plain, PROMPT)
            until(lambda: not runtime.pulse().busy)
