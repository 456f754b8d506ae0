"""Where a remote model is, and whether its key may be sent there."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.errors import UsageError

KEY_ENV: Final = "EDGEROUTE_REMOTE_KEY"
"""The environment variable of the key: the only place where it is looked for."""

DEFAULT_PATH: Final = "/v1"
MAX_REMOTE: Final = 2048
MAX_MODEL: Final = 256
MAX_KEY: Final = 4096

_EXAMPLE = "such as http://192.168.1.5:8080/v1#model-name"
_LOCAL_SUFFIXES = (".local", ".localhost", ".lan", ".internal", ".home.arpa")
# Not `is_private`, which also counts documentation ranges and 0.0.0.0/8 in.
_PRIVATE = tuple(map(ipaddress.ip_network, (
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
    "::1/128", "fc00::/7", "fe80::/10",
)))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteAddress:
    """An OpenAI-compatible endpoint.

    Attributes:
        base: of all its paths, `http://host:port/v1`, without a slash at the end.
        host: `host:port` as messages name it.
        plain: whether what is sent there can be read on the way (http).
        hostname: without the port.
        model: whom to ask there; None: the first that it lists.
    """

    base: str
    host: str
    plain: bool
    hostname: str
    model: str | None


def parse_remote(text: str) -> RemoteAddress:
    """Read the setting `remote`: an address, and after `#` the model's name there.

    An address without a path gets `/v1`.

    Raises:
        UsageError: no such address, or one that holds a password or a query; what could be a
            secret is not repeated in the message.
    """
    import httpx2  # costs start-up, and few need it

    if not isinstance(text, str) or not text.strip() or len(text) > MAX_REMOTE:
        raise UsageError(f"remote must be an address of 1 to {MAX_REMOTE} characters, {_EXAMPLE}")
    address, _, model = text.strip().partition("#")
    if "@" in address or "?" in address:
        raise UsageError(
            "remote has a user name, a password or a query in its address, where keys get into "
            f"logs; set a key by {KEY_ENV} and give only the address, {_EXAMPLE}"
        )
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        raise UsageError(f"remote {address[:200]!r} is no address; give one {_EXAMPLE}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(
            f"remote {address[:200]!r} must begin with http:// or https:// and a host, {_EXAMPLE}"
        )
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise UsageError(f"the port in remote must be from 1 to 65535, got {url.port}")
    if model and (len(model) > MAX_MODEL or not model.isprintable()):
        raise UsageError(
            f"the model's name in remote must be at most {MAX_MODEL} printable characters, "
            f"got {len(model)}: {model[:80]!r}"
        )
    path = url.path.rstrip("/") or DEFAULT_PATH
    return RemoteAddress(
        base=str(url.copy_with(path=path)),
        host=url.netloc.decode("ascii"),
        plain=url.scheme == "http",
        hostname=url.host,
        model=model or None,
    )


def key_for(address: RemoteAddress, env: Mapping[str, str] | None = None) -> str | None:
    """Return the key to send to an endpoint; None where the environment holds none.

    Raises:
        UsageError: it could not be a key, or would be sent in plain text to a public address.
            A name that looks private may still be a public address: see `is_private`.
    """
    key = (os.environ if env is None else env).get(KEY_ENV, "").strip()
    if not key:
        return None
    if len(key) > MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{KEY_ENV} holds no key: one is up to {MAX_KEY} printable ASCII characters without "
            f"spaces, and this has {len(key)} characters (not shown)"
        )
    if address.plain and not _looks_private(address.hostname):
        raise UsageError(
            f"remote {address.host} is a public address by http, where {KEY_ENV} would travel in "
            f"plain text; use https, or unset {KEY_ENV} if the server needs no key"
        )
    return key


def _looks_private(hostname: str) -> bool:
    """Whether a host may be private: an address that is, or a name of a local network."""
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        name = hostname.lower().rstrip(".")
        return "." not in name or name.endswith(_LOCAL_SUFFIXES)
    return is_private(hostname)


def is_private(ip: str) -> bool:
    """Whether an IP address, as text, is of this machine or of a local network."""
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return any(address.version == net.version and address in net for net in _PRIVATE)
