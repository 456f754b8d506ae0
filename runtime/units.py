"""Bytes as people write and read them. Stored as int, printed in binary units."""

import re

from edgeroute.runtime.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTORS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 1000,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 10**12,
}
_TEXT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([a-z]{0,3})")


def parse_bytes(text: str | int) -> int:
    """Read a byte count such as `2GiB`, `1.5 GB`, `512m` or a plain int.

    Raises:
        UsageError: not a number with a known unit, or negative.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise UsageError(f"a byte count must not be negative, got {text}")
        return text
    match = _TEXT.fullmatch(str(text).strip().lower())
    if match is None or match[2] not in _FACTORS:
        raise UsageError(f"cannot read {text!r} as a byte count; write it like 2GiB or 1500MB")
    return int(float(match[1]) * _FACTORS[match[2]])


def format_bytes(n_bytes: int | float) -> str:
    """Print a byte count with three significant digits: `98.4 MiB`, `1.04 GiB`."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 999.5:  # from there on, three digits would print as 1e+03
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
