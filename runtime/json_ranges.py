"""Integers between two bounds, as a GBNF expression."""

import math
from collections.abc import Mapping

from edgeroute.runtime.errors import GrammarError

N_DIGITS = 16
"""Longest integer that is generated: within 2^53 for nearly all of them."""


def integer_range(limits: Mapping[str, int | float], where: str) -> str:
    """Match the integers that meet JSON schema's numeric limits.

    Raises:
        GrammarError: no integer meets them, or they are not finite.
    """
    if not all(-1e300 < value < 1e300 for value in limits.values()):
        raise GrammarError(f"schema {where}: a numeric limit is not finite, or beyond 1e300")
    most = 10**N_DIGITS - 1
    low = max(
        -most,
        math.ceil(limits.get("minimum", -most)),
        math.floor(limits.get("exclusiveMinimum", -most - 1)) + 1,
    )
    high = min(
        most,
        math.floor(limits.get("maximum", most)),
        math.ceil(limits.get("exclusiveMaximum", most + 1)) - 1,
    )
    if low > high:
        raise GrammarError(f"schema {where}: no integer lies between its limits")
    parts = []
    if low < 0:
        parts.append(f'"-" ({_naturals(max(1, -high), -low)})')
    if high >= 0:
        parts.append(f"({_naturals(max(0, low), high)})")
    return "(" + " | ".join(parts) + ")"


def _naturals(low: int, high: int) -> str:
    """Numbers without leading zeros from low to high, one alternative per digit count."""
    parts = []
    for n in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (n - 1) if n > 1 else 0)
        last = min(high, 10**n - 1)
        parts.append(_same_length(str(first), str(last)))
    return " | ".join(parts)


def _same_length(low: str, high: str) -> str:
    """Digit strings of one length between two others."""
    n = len(low)
    if n == 0:
        return '""'
    if low == "0" * n and high == "9" * n:
        return f"[0-9]{{{n}}}"
    a, b = low[0], high[0]
    if a == b:
        return f'"{a}" ({_same_length(low[1:], high[1:])})' if n > 1 else f'"{a}"'
    if n == 1:
        return f"[{a}-{b}]"
    rest = n - 1
    parts = []
    if low[1:] != "0" * rest:
        parts.append(f'"{a}" ({_same_length(low[1:], "9" * rest)})')
        a = chr(ord(a) + 1)
    tail = ""
    if high[1:] != "9" * rest:
        tail = f'"{b}" ({_same_length("0" * rest, high[1:])})'
        b = chr(ord(b) - 1)
    if a <= b:
        parts.append(f"[{a}-{b}] [0-9]{{{rest}}}")
    return " | ".join([*parts, tail] if tail else parts)
