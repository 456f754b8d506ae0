"""Whose a loopback connection is: anybody on this machine can reach a loopback port."""

import os
import socket
import sys
from pathlib import Path

_TABLE = Path("/proc/self/net/tcp")


def is_strangers(sock: socket.socket) -> bool:
    """Whether another user's process is at the other end of a loopback connection.

    Only Linux tells; elsewhere, and where it does not tell, nobody counts as a stranger.
    """
    if sys.platform != "linux":
        return False
    try:
        text = _TABLE.read_text(encoding="ascii", errors="replace")
        found = owner(text, sock.getpeername()[1], sock.getsockname()[1])
    except OSError:
        return False
    return found is not None and found != os.geteuid()


def owner(table: str, port: int, to_port: int) -> int | None:
    """Find the user of the socket that connects two IPv4 loopback ports, from its side.

    Source: proc_pid_net of the Linux manual: sl, local_address, rem_address, st, queues, timers,
    retrnsmt, uid; addresses are hexadecimal, of the machine's byte order.
    """
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or not fields[7].isdecimal():
            continue
        ends = [f":{each:04X}" for each in (port, to_port)]
        if fields[1].endswith(ends[0]) and fields[2].endswith(ends[1]):
            return int(fields[7])
    return None
