"""`edgeroute rpc-server`: lend this machine's device to another one."""

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from edgeroute.runtime.rpc_engine import EngineParams
    from edgeroute.runtime.rpc_front import RpcFront

LENT_RATIO: Final = 0.9
"""Share of the free memory that is lent when no --memory says how much."""
_EPILOG = """\b
Examples:
  edgeroute rpc-server
  edgeroute rpc-server --host 192.168.1.20 --memory 6GiB
  edgeroute rpc-server --device cuda0 --port 50053
Then, on the machine that has the model:
  edgeroute generate "Why is the sky blue?" --device rpc:192.168.1.20:50052

\b
Trust: the connection has no password and no encryption, and ggml reads what clients send. Who
can reach the port can use the device, read what other clients' models compute, and perhaps more.
Lend to machines that you trust, on a network that you trust. Over any other, listen on loopback
and tunnel, on the machine that has the model:
  ssh -N -L 50052:127.0.0.1:50052 user@this-machine
  edgeroute generate "..." --device rpc:127.0.0.1:50052
"""


@click.command("rpc-server", epilog=_EPILOG)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Address to listen on.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=50052, show_default=True,
              metavar="N", help="Port; 0 is any free one.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, metavar="NAME",
              help="Device to lend: cpu, gpu, or ggml's name for it.")  # fmt: skip
@click.option("--memory", metavar="BYTES", help="Memory to lend, such as 6GiB; buffers beyond it "
              "are refused. ggml takes as much again as the largest piece that a client sends.  "
              "[default: what is free now, less a tenth]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N",
              help="Threads to compute with, on a processor.  [default: all cores]")  # fmt: skip
@click.option("--cache", metavar="DIR", help="Keep large weights here, so that a client does not "
              "send them again.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True,
              help="Print one JSON object when clients are taken.")  # fmt: skip
def command(
    host: str, port: int, device: str, memory: str | None, threads: int | None,
    cache: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Lend this machine's device to another machine's edgeroute.

    It serves one client at a time, by ggml's RPC protocol, and survives what a client does: its
    computation runs in a process of its own, begun again at need. Ctrl-C ends it.
    """
    from edgeroute.runtime.rpc_engine import EngineParams, RpcEngine
    from edgeroute.runtime.rpc_front import Lent, RpcFront
    from edgeroute.runtime.rpc_link import is_private

    limit = None if memory is None else parse_bytes(memory)
    if limit is None and device == "cpu":  # ggml counts other programs' memory as free
        limit = _free_bytes()
    params = EngineParams(device=device, n_threads=threads or _cores(), cache=_folder(cache))
    with _listen(host, port) as listener, RpcEngine(params) as engine:
        lent = Lent(memory_bytes=limit)
        with RpcFront(listener, engine, lent, lambda text: click.echo(text, err=True)) as front:
            address = f"{host}:{listener.getsockname()[1]}"
            if host == "0.0.0.0" or not is_private(host):
                _warn(address)
            _tell(front, params, address, as_json)
            front.serve()


def _free_bytes() -> int:
    from edgeroute.runtime import machine

    return int(LENT_RATIO * machine.memory().available_bytes)


def _cores() -> int:
    from edgeroute.runtime import machine

    return machine.usable_cores()


def _folder(cache: str | None) -> str | None:
    """Make the folder for weights.

    Raises:
        UsageError: it cannot be made.
    """
    if cache is not None:
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {cache}: {error.strerror}") from error
    return cache


def _listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        return socket.create_server((host, port), backlog=16)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}; choose another by "
                         "--host or --port; port 0 is any free one") from error  # fmt: skip


def _tell(front: "RpcFront", params: "EngineParams", address: str, as_json: bool) -> None:
    """Say what is lent, and how to use it."""
    n_bytes = front.memory_bytes()
    if as_json:
        told = {"address": address, "device": params.device, "memory_bytes": n_bytes,
                "threads": params.n_threads}  # fmt: skip
        click.echo(json.dumps(told))
        return
    click.echo(f"lending {params.device} at {address}: {format_bytes(n_bytes)} of memory, "
               f"{params.n_threads} thread{'' if params.n_threads == 1 else 's'}, one client at "
               "a time")  # fmt: skip
    click.echo(f'try: edgeroute generate "Why is the sky blue?" --device rpc:{address}')


def _warn(address: str) -> None:
    host, _, port = address.rpartition(":")
    click.echo(
        f"WARNING: {host} is neither loopback nor of a private network, and the connection has "
        "no password and no encryption: whoever reaches this port uses the device and reads what "
        "it computes. Listen on 127.0.0.1 and tunnel instead, on the machine that has the "
        f"model:\n  ssh -N -L {port}:127.0.0.1:{port} user@this-machine", err=True,
    )  # fmt: skip
