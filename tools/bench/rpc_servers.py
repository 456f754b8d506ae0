"""RPC servers on this machine, as processes of their own: devices whose memory is not ours."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

_SERVE = """
import ctypes, sys
from edgeroute.runtime.device import devices
from edgeroute.runtime.ggml.api import ggml
pointer = devices()[-1].pointer
reg = ggml().ggml_backend_reg_by_name(b"RPC")
address = ggml().ggml_backend_reg_get_proc_address(reg, b"ggml_backend_rpc_start_server")
start = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t,
                         ctypes.c_void_p)(address)
start(sys.argv[1].encode(), None, 1, 1, (ctypes.c_void_p * 1)(pointer))
"""


@dataclass(slots=True)
class RpcServer:
    """A running server; `name` is what `device=` takes."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def name(self) -> str:
        return f"rpc:127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def rpc_server() -> Iterator[RpcServer]:
    """Run a server with one CPU device of one thread until the block ends."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.02)
        yield RpcServer(process, port)
    finally:
        process.kill()
        process.wait()
