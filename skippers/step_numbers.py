"""Reading what a policy learned from plain JSON types that nobody vouches for."""

from collections.abc import Mapping, Set
from typing import Final

from edgeroute.runtime.errors import UsageError

MAX_NUMBER: Final = 1e6
"""Above any weight, entropy, length or count of a policy; below any overflow."""


def check_keys(given: Mapping[str, object], keys: Set[str]) -> None:
    """Refuse what has other keys than these.

    Raises:
        UsageError: a key is missing or unknown.
    """
    if set(given) != keys:
        odd = sorted(str(key)[:40] for key in keys ^ set(given))
        raise broken(f"has keys missing or too many: {', '.join(odd[:8])}")


def check_spec(given: Mapping[str, object], spec: str) -> None:
    """Refuse what was learned by another policy.

    Raises:
        UsageError: its `spec` is not this one.
    """
    if given["spec"] != spec:
        raise broken(f"is of another policy than {spec!r}")


def number(value: object, key: str, low: float, high: float) -> float:
    """Return a number within bounds.

    Raises:
        UsageError: it is none.
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not low <= value <= high:  # type: ignore[operator]
        raise broken(f"has {_show(value)} in {key}; numbers from {low:g} to {high:g} are wanted")
    return float(value)  # type: ignore[arg-type]


def whole(value: object, key: str, high: int) -> int:
    """Return a whole number from 1.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise broken(f"has {_show(value)} for {key}; a whole number from 1 to {high} is wanted")
    return value


def numbers(
    value: object, key: str, n: int, low: float = -MAX_NUMBER, high: float = MAX_NUMBER
) -> list[float]:
    """Return a list of so many numbers within bounds.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(value, list) or len(value) != n:
        raise broken(f"needs a list of {n} numbers for {key}")
    return [number(each, key, low, high) for each in value]


def broken(what: str) -> UsageError:
    """Return the error for something that is wrong."""
    return UsageError(
        f"what a step policy learned {what}; leave it out, or calibrate the pair again by "
        "`edgeroute calibrate --steps SMALL LARGE`"
    )


def _show(value: object) -> str:
    """Print a number that is no whole screen; of all else its kind."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64):
        return repr(value)
    return f"a value of type {type(value).__name__}"
