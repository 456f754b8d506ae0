"""ggml's RPC server in a process of its own: what ends it ends one client, not the server.

ggml's server checks bounds of what clients send, but ends its process on some of it, and cannot
leave a computation. So it runs as a child, which is ended and begun again at need.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime import rpc_frames as frames
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import EdgerouteError, LibraryError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.ggml.lib import REMEDY
from edgeroute.runtime.rpc_wire import Wire, WireLostError

START_S: Final = 20.0
HELLO_S: Final = 1.0
"""How long it may take to let go of its last client; then it is ended and begun again."""
_TRIES: Final = 3
_SAID_WHY: Final = 3
"""Exit code of a child that wrote the reason to its standard error."""
_CHILD = "from edgeroute.runtime.rpc_engine import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParams:
    """What the child lends: a device by ggml's name or kind; `cache` is a folder for weights."""

    device: str = "cpu"
    n_threads: int = 1
    cache: str | None = None


class RpcEngine(Closing):
    """The child, and connections to it, one at a time. One thread uses it; any may close it."""

    def __init__(self, params: EngineParams) -> None:
        """Begin it.

        Raises:
            LibraryError: it ended at once: no such device, or this build of ggml has no RPC.
        """
        self._params = params
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._closed = False
        self._begin()

    @property
    def pid(self) -> int:
        """The child's process number; 0 where there is none."""
        return 0 if self._process is None else self._process.pid

    def connect(self) -> Wire:
        """Return a new connection that has said HELLO; the one before must be closed.

        Raises:
            LibraryError: it cannot be begun again.
        """
        for _ in range(_TRIES):
            sock = self._reach(START_S)
            if sock is not None:
                wire = Wire(sock, HELLO_S)
                try:
                    wire.send(frames.request(frames.HELLO, bytes(frames.CAPS_BYTES)))
                    wire.read(frames.SIZE.size + 4 + frames.CAPS_BYTES)
                    wire.patience_s = None
                    return wire
                except WireLostError:  # it computes still, for a client that left, or has crashed
                    wire.close()
            self._end()
            self._begin()
        raise LibraryError("ggml's RPC server does not answer on loopback; see its process")

    def why_ended(self) -> str:
        """Say how the child ended, if it did."""
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process is not None and (code := process.wait(0.5)):
                return f"ggml ended with {'signal' if code < 0 else 'code'} {abs(code)}"
        return "ggml refused a request"

    def close(self) -> None:
        """End the child; safe to call twice, from any thread."""
        self._closed = True
        self._end()

    def _begin(self) -> None:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self._port = free.getsockname()[1]
        params = self._params
        # Its own path first, as ours: started anywhere, no file there may shadow a module.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                                    "GGML_NO_BACKTRACE": "1"}  # fmt: skip
        arguments = [str(self._port), params.device, str(params.n_threads), params.cache or ""]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, *arguments], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to answer
        )  # fmt: skip
        if self._closed:
            self._end()

    def _reach(self, timeout_s: float) -> socket.socket | None:
        """Connect as soon as it listens.

        Returns:
            None where it ended, or does not listen in time.

        Raises:
            LibraryError: it ended and said why.
        """
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and (process := self._process) is not None:
            with contextlib.suppress(OSError):
                return socket.create_connection(("127.0.0.1", self._port), timeout=1)
            if process.poll() is not None:
                said = b"" if process.stderr is None else process.stderr.read(4096)
                if process.returncode == _SAID_WHY:
                    raise LibraryError(said.decode(errors="replace").strip())
                return None
            time.sleep(0.01)
        return None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stderr):
                if pipe is not None:
                    pipe.close()


def main() -> None:
    """Serve until the parent ends: the child's whole life."""
    from edgeroute.runtime.device import Device  # not the parent's: it computes nothing

    threading.Thread(target=_end_with_parent, daemon=True).start()
    port, name, n_threads, cache = sys.argv[1:5]
    try:
        with Device.open(name) as device:
            pointer = device.info.pointer
        start = _start_function()
    except EdgerouteError as error:
        sys.stderr.write(str(error))
        sys.stderr.flush()
        os._exit(_SAID_WHY)
    start(f"127.0.0.1:{port}".encode(), cache.encode() or None, int(n_threads), 1,
          (ctypes.c_void_p * 1)(pointer))  # fmt: skip


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, whatever it computes."""
    while os.read(0, 64):
        continue
    os._exit(0)


def _start_function() -> Callable[..., object]:
    """Find ggml's server, which serves one client after the other and does not return.

    Raises:
        LibraryError: this build of ggml has no RPC.
    """
    reg = ggml().ggml_backend_reg_by_name(b"RPC")
    address = None if reg is None else ggml().ggml_backend_reg_get_proc_address(
        reg, b"ggml_backend_rpc_start_server"
    )  # fmt: skip
    if address is None:
        raise LibraryError(f"this ggml is built without RPC, so that it cannot serve; {REMEDY}")
    # Source: ggml-rpc.h: endpoint, folder of the cache, threads, number of devices, devices
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t,
                            ctypes.c_size_t, ctypes.c_void_p)(address)  # fmt: skip
