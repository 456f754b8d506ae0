"""Devices on other machines, or in other processes: ggml's RPC backend behind one address.

ggml ends our process when a server goes away in mid-answer, so its client never talks to the
network itself: see `rpc_relay`.
"""

import ctypes
import ipaddress
import re
import socket
import threading
import time
from typing import Final, Self

from edgeroute.runtime import rpc_frames as frames
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import RPC_PREFIX
from edgeroute.runtime.errors import DeviceLostError, LibraryError, UsageError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.ggml.lib import REMEDY
from edgeroute.runtime.rpc_frames import FrameError
from edgeroute.runtime.rpc_relay import LinkStats, Relay
from edgeroute.runtime.rpc_throttle import Bucket
from edgeroute.runtime.rpc_wire import Wire, WireLostError

CONNECT_S: Final = 5.0
ANSWER_S: Final = 120.0
"""How long a server may take for one answer: what it was asked to compute before is part of it."""
BUSY_S: Final = 1.0
"""How long a server is asked again that has a client: the one before us may be leaving."""
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9_.-]{1,253}):(?P<port>[0-9]{1,5})")


def parse_address(text: str) -> tuple[str, int]:
    """Split `rpc:host:port`, or `host:port`.

    Raises:
        UsageError: it is no address.
    """
    found = _ADDRESS.fullmatch(text.removeprefix(RPC_PREFIX))
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        raise UsageError(f"{text!r} is no address of a device; give rpc:host:port, for example "
                         "rpc:192.168.1.20:50052")  # fmt: skip
    return found["host"], int(found["port"])


def is_private(host: str) -> bool:
    """Whether a host is loopback or of a private network, as far as its address tells."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        try:
            found = ipaddress.ip_address(socket.gethostbyname(host))
        except OSError:
            return False
    return found.is_private or found.is_loopback or found.is_link_local


class _Connection:
    """One server, and how many use it."""

    def __init__(self, host: str, port: int, answer_s: float, throttle: Bucket | None) -> None:
        wire, n_devices, keeps = _greet(host, port, throttle)
        wire.patience_s = answer_s
        self.peer = str(wire.sock.getpeername()[0])
        self.relay = Relay(wire, n_devices, throttle, keeps)
        self.n_users = 0


_connections: dict[str, _Connection] = {}
_lock = threading.Lock()


class RpcLink(Closing):
    """A connection to one RPC server, shared by all in this process who name the same address.

    Attributes:
        address: what the user named, `host:port`.
        endpoint: what ggml is told.
        loopback_or_private: whether nobody outside this network can listen; see `is_private`.
    """

    def __init__(self, address: str, connection: _Connection) -> None:
        self.address = address
        self.endpoint = connection.relay.endpoint
        self.loopback_or_private = is_private(connection.peer)
        self._connection = connection
        self._open = True

    @classmethod
    def open(cls, text: str, *, answer_s: float = ANSWER_S, throttle: Bucket | None = None) -> Self:
        """Connect, or share the connection that this process has.

        Args:
            answer_s: how long one answer may take before the server counts as lost.
            throttle: a slower link to imitate; without it, what EDGEROUTE_RPC_THROTTLE names.

        Raises:
            UsageError: `text` is no address.
            DeviceLostError: nobody answers there, it has a client, or another version.
        """
        host, port = parse_address(text)
        address = f"{host}:{port}"
        with _lock:
            found = _connections.get(address)
            if found is None or found.relay.lost is not None:
                # A lost one serves those who still hold it, and ends with them.
                found = _Connection(host, port, answer_s, throttle or Bucket.from_environment())
                _connections[address] = found
            found.n_users += 1
        return cls(address, found)

    @property
    def lost(self) -> str | None:
        """Why the server is gone; None while it answers. Whatever ggml read since is void."""
        return self._connection.relay.lost

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
        if (lost := self.lost) is not None:
            raise DeviceLostError(f"device rpc:{self.address} is gone: {lost}")

    def stats(self) -> LinkStats:
        """Return what went over the connection, of all who share it."""
        return self._connection.relay.stats()

    def close(self) -> None:
        """End the connection with its last user; safe to call twice."""
        with _lock:
            if not self._open:
                return
            self._open = False
            self._connection.n_users -= 1
            if self._connection.n_users:
                return
            if _connections.get(self.address) is self._connection:
                del _connections[self.address]
        self._connection.relay.close()


def _greet(host: str, port: int, throttle: Bucket | None) -> tuple[Wire, int, bool]:
    """Connect, and return the connection, how many devices there are, and whether it keeps graphs.

    Raises:
        DeviceLostError: nobody answers there, it has a client, or another version.
    """
    address = f"{host}:{port}"
    until = time.monotonic() + BUSY_S
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=CONNECT_S)
        except OSError as error:
            raise DeviceLostError(
                f"device rpc:{address} does not answer: {error.strerror or error}; start one "
                f"there with `edgeroute rpc-server --host {host} --port {port}`"
            ) from error
        wire = Wire(sock, CONNECT_S, throttle)
        try:
            return wire, *_handshake(wire, address)
        except BaseException as error:
            wire.close()
            if not isinstance(error, _BusyError) or time.monotonic() >= until:
                raise
        time.sleep(0.05)


class _BusyError(DeviceLostError):
    """The server has a client."""


def _handshake(wire: Wire, address: str) -> tuple[int, bool]:
    """Agree on the version, and return how many devices there are, and whether it keeps graphs."""
    try:
        wire.send(frames.request(frames.HELLO, bytes(frames.CAPS_BYTES)))
        version, keeps = frames.check_hello(_read_answer(wire, frames.HELLO))
        if version != frames.VERSION:
            found, wanted = (".".join(map(str, each)) for each in (version, frames.VERSION))
            raise DeviceLostError(
                f"device rpc:{address} speaks version {found} of ggml's RPC protocol, this "
                f"machine {wanted}; install the same edgeroute on both"
            )
        wire.send(frames.request(frames.DEVICE_COUNT))
        (n_devices,) = frames.U32.unpack(_read_answer(wire, frames.DEVICE_COUNT))
    except WireLostError as error:
        raise DeviceLostError(
            f"device rpc:{address} does not answer a HELLO: {error}; it is no RPC server, or busy "
            "with another client: it takes one at a time"
        ) from error
    except FrameError as error:
        if str(error) == frames.BUSY.decode():
            raise _BusyError(
                f"device rpc:{address} is {error}; it takes one at a time: end the other, or "
                "start a second server on another port"
            ) from error
        raise DeviceLostError(
            f"device rpc:{address} is no server of ggml's RPC protocol: {error}"
        ) from error
    if not 0 < n_devices <= frames.MOST_DEVICES:
        raise DeviceLostError(f"the server at rpc:{address} offers {n_devices} devices; between "
                              f"1 and {frames.MOST_DEVICES} can be used")  # fmt: skip
    return int(n_devices), keeps


def _read_answer(wire: Wire, command: int) -> bytes:
    wanted = frames.COMMANDS[command]
    assert wanted.answer_bytes is not None
    (n_bytes,) = frames.SIZE.unpack(wire.read(frames.SIZE.size))
    if n_bytes != wanted.answer_bytes:
        raise FrameError(f"{wanted.name} answered with {n_bytes} bytes, not {wanted.answer_bytes}")
    return bytes(wire.read(n_bytes))
