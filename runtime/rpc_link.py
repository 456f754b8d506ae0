"""Devices on other machines, or in other processes: ggml's RPC backend behind one address.

ggml ends our process when a server goes away in mid-answer, so its client never talks to the
network itself: see `RpcLink`.
"""

import ctypes
import ipaddress
import re
import socket
from typing import Final, Self

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import DeviceLostError, LibraryError, UsageError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.ggml.lib import REMEDY

PREFIX: Final = "rpc:"
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9_.-]{1,253}):(?P<port>[0-9]{1,5})")


def parse_address(text: str) -> tuple[str, int]:
    """Split `rpc:host:port`, or `host:port`.

    Raises:
        UsageError: it is no address.
    """
    found = _ADDRESS.fullmatch(text.removeprefix(PREFIX))
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        raise UsageError(f"{text!r} is no address of a device; give rpc:host:port, for example "
                         "rpc:192.168.1.20:50052")  # fmt: skip
    return found["host"], int(found["port"])


def is_private(host: str) -> bool:
    """Whether a host is loopback or of a private network, as far as its address tells."""
    try:
        found = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError:
        return False
    return found.is_private or found.is_loopback or found.is_link_local


class RpcLink(Closing):
    """A connection to one RPC server, shared by all who name the same address.

    Attributes:
        address: what the user named, `host:port`.
        endpoint: what ggml is told.
        lost: why the server is gone; None while it answers. Whatever ggml read since is void.
    """

    def __init__(self, address: str) -> None:
        self.address = self.endpoint = address
        self.lost: str | None = None

    @classmethod
    def open(cls, text: str) -> Self:
        """Connect.

        Raises:
            UsageError: `text` is no address.
            DeviceLostError: nobody answers there, or not in this version of the protocol.
        """
        host, port = parse_address(text)
        address = f"{host}:{port}"
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            raise DeviceLostError(
                f"device rpc:{address} does not answer: {error}; start one there with "
                f"`edgeroute rpc-server --host {host} --port {port}`"
            ) from error
        return cls(address)

    def devices(self) -> list[int]:
        """Return ggml's pointers of the devices behind the address.

        Raises:
            LibraryError: this build of ggml has no RPC.
            DeviceLostError: the server is gone, or has no device.
        """
        reg = ggml().ggml_backend_reg_by_name(b"RPC")
        address = None if reg is None else ggml().ggml_backend_reg_get_proc_address(
            reg, b"ggml_backend_rpc_add_server"
        )  # fmt: skip
        if address is None:
            raise LibraryError(f"this ggml is built without RPC, for device rpc:{self.address}; "
                               f"{REMEDY}")  # fmt: skip
        add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
        server = add(self.endpoint.encode())
        self.check()
        if server is None:
            raise DeviceLostError(f"the server at rpc:{self.address} offers no device")
        n = ggml().ggml_backend_reg_dev_count(server)
        return [ggml().ggml_backend_reg_dev_get(server, i) for i in range(n)]

    def check(self) -> None:
        """Raise DeviceLostError where the server is gone."""
        if self.lost is not None:
            raise DeviceLostError(f"device rpc:{self.address} is gone: {self.lost}")

    def close(self) -> None:
        """End the connection with its last user; safe to call twice."""
