"""RPC servers on this machine, as processes of their own: devices whose memory is not ours."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from edgeroute.runtime.errors import LibraryError
from edgeroute.runtime.rpc_throttle import VARIABLE

_START = "from edgeroute.cli import main; main()"


@dataclass(slots=True)
class RpcServer:
    """A running `edgeroute rpc-server`; `name` is what `device=` takes."""

    process: subprocess.Popen[bytes]
    port: int
    memory_bytes: int

    @property
    def name(self) -> str:
        """What `device=` takes."""
        return f"rpc:127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it as a crash would: nothing is said to anybody."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def rpc_server(
    memory: int | None = None, *, threads: int = 1, options: tuple[str, ...] = ()
) -> Iterator[RpcServer]:
    """Run a server with one CPU device until the block ends.

    Args:
        memory: bytes that it lends; None is nearly all that is free.
        threads: that it computes with.
        options: of `edgeroute rpc-server`, beyond these.

    Raises:
        LibraryError: it ended at once; the message is what it said.
    """
    arguments = ["rpc-server", "--port", "0", "--threads", str(threads), "--json", *options]
    if memory is not None:
        arguments += ["--memory", str(memory)]
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            told = json.loads(line)
            port = int(told["address"].rpartition(":")[2])
        except (ValueError, KeyError) as error:
            raise LibraryError(f"no RPC server could be started: {line.decode()}") from error
        yield RpcServer(process, port, told["memory_bytes"])
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def slow_links(bytes_s: int, latency_ms: float = 0.0) -> Iterator[None]:
    """Slow the links that this process opens within to so many bytes a second each way."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = f"{bytes_s},{latency_ms:g}ms"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
