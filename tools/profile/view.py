"""A profile as read back: records again, each field's type and size checked.

The figures may come from a file that anybody wrote, so nothing of it is drawn unchecked. A
section that is missing or null is left out; one that is malformed is refused by name.
"""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.forecast.records import Forecast
from edgeroute.tools.profile.records import (
    FORMAT,
    VERSION,
    Advice,
    HitRates,
    Live,
    Locality,
    PredictorRow,
    Reuse,
    Skew,
    Subject,
)

_MAX_ITEMS = 100_000
_MAX_TEXT = 2_000
_MAX_NUMBER = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What of a profile is there; see `records.Profile`."""

    subject: Subject | None = None
    live: Live | None = None
    hits: HitRates | None = None
    reuse: Reuse | None = None
    locality: Locality | None = None
    skew: Skew | None = None
    predictors: tuple[PredictorRow, ...] | None = None
    advice: tuple[Advice, ...] | None = None
    forecasts: Mapping[str, Forecast] | None = None
    notes: tuple[str, ...] | None = None

    @property
    def main_advice(self) -> Advice | None:
        """The advice between the least that does and the most that still helps."""
        advice = sorted(self.advice or (), key=lambda one: one.n_slots)
        return advice[len(advice) // 2] if advice else None

    @property
    def page_bytes(self) -> int:
        """Bytes of one expert; 0 where that is not known."""
        return self.subject.page_bytes if self.subject else 0

    @property
    def n_page(self) -> int:
        """All experts of all layers; 0 where that is not known."""
        return self.subject.n_page if self.subject else 0


def view_of(profile: Mapping[str, Any]) -> View:
    """Read `Profile.to_dict()`, or what JSON made of it.

    Raises:
        UsageError: it is no profile, of a later version, or a field of it is malformed.
    """
    if profile.get("format") != FORMAT:
        raise UsageError(
            f"this is no profile: its format is {str(profile.get('format'))[:60]!r}, not "
            f"{FORMAT!r}; `edgeroute profile MODEL --json` writes one"
        )
    version = _integer(profile.get("version"), "version")
    if not 1 <= version <= VERSION:
        raise UsageError(
            f"the profile is of version {version}; this edgeroute reads up to {VERSION}"
        )
    view: View = _read(View, profile, "")
    return view


def _read(kind: Any, value: object, where: str) -> Any:
    """Return `value` as the type `kind`, which is one that the records use."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [one for one in arguments if one is not type(None)]
        return None if value is None else _read(inner[0], value, where)
    if is_dataclass(kind):
        return _record(kind, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, " or ".join(map(str, arguments)), value)
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(arguments, value, where)
    return _SIMPLE[kind](value, where)


def _record(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    hints, given = get_type_hints(kind), {}
    for one in fields(kind):
        name = f"{where}.{one.name}" if where else one.name
        if one.name in value:
            given[one.name] = _read(hints[one.name], value[one.name], name)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise UsageError(f"the profile lacks {name}; record it again")
    return kind(**given)


def _tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong(where, "a list", value)
    if len(value) > _MAX_ITEMS:
        raise UsageError(f"{where} of the profile has {len(value)} items, more than {_MAX_ITEMS}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise _wrong(where, f"a list of {len(arguments)}", value)
    pairs = zip(arguments, value, strict=True)
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _mapping(arguments: tuple[Any, ...], value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    if len(value) > _MAX_ITEMS:
        raise UsageError(f"{where} of the profile has {len(value)} keys, more than {_MAX_ITEMS}")
    found = {}
    for key, item in value.items():
        inner = f"{where}[{str(key)[:40]!r}]"
        if arguments[0] is int and isinstance(key, str) and key.isdecimal() and len(key) < 19:
            key = int(key)  # JSON has no other keys than text
        found[_read(arguments[0], key, inner)] = _read(arguments[1], item, inner)
    return found


def _integer(value: object, where: str) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        whole = int(value)
        if abs(whole) < _MAX_NUMBER:
            return whole
    raise _wrong(where, "a whole number below 2^63", value)


def _float(value: object, where: str) -> float:
    """Infinities and numbers that no figure has become NaN, which is not drawn."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _wrong(where, "a number", value)
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if abs(found) < _MAX_NUMBER else math.nan


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "text", value)
    return value[:_MAX_TEXT]


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


_SIMPLE = {int: _integer, float: _float, str: _text, bool: _flag}


def _wrong(where: str, wanted: str, value: object) -> UsageError:
    """Say what is wrong with a field; the value shortened, and without a huge int's digits."""
    shown = type(value).__name__ if isinstance(value, int) else repr(value)[:60]
    return UsageError(f"{where} of the profile must be {wanted}, got {shown}")
