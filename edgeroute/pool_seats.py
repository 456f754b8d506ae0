"""Where a pool's configurations run: those of one file share one open model where they can.

A profile may say how its model is run: a depth plan, a small model beside it, who writes steps.
Two profiles of one file that differ only so are one model in memory, opened with what either
wants, and every request says which of it is meant.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeroute.config import RunParams
from edgeroute.pool_config import Profile
from edgeroute.runtime.errors import UsageError
from edgeroute.shelf_plan import ShelfModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which model of the shelf answers for a profile, and with what options."""

    place: str
    options: Mapping[str, Any] = field(default_factory=dict)


def seat_all(
    profiles: Sequence[Profile], params: RunParams
) -> tuple[dict[str, Seat], list[ShelfModel]]:
    """Say for every profile where it runs, and which models the shelf needs for that.

    Args:
        profiles: names differ.
        params: what all models share.

    Raises:
        UsageError: a profile's settings cannot be; the message names it.
    """
    seats: dict[str, Seat] = {}
    models: list[ShelfModel] = []
    groups: dict[object, list[Profile]] = {}
    for profile in profiles:
        _checked(profile.name, params, profile.settings)
        groups.setdefault((profile.path, profile.memory), []).append(profile)
    for group in groups.values():
        union = _union(group)
        for owner in group[:1] if union is not None else group:
            settings = owner.settings if union is None else union
            models.append(ShelfModel(
                name=owner.name, path=owner.path, memory=owner.memory,
                params=_checked(owner.name, params, settings),
            ))  # fmt: skip
        for profile in group:
            if union is None:
                seats[profile.name] = Seat(place=profile.name)
            else:
                seats[profile.name] = Seat(
                    place=group[0].name, options=_options(profile.settings, union)
                )
    return seats, models


def _checked(name: str, params: RunParams, settings: Mapping[str, Any]) -> RunParams:
    try:
        return dataclasses.replace(params, **settings)
    except UsageError as error:
        raise UsageError(f"models.{name}: {error}") from error


def _union(group: Sequence[Profile]) -> dict[str, Any] | None:
    """Return settings that serve all profiles of a file; None where they exclude each other."""
    found: dict[str, Any] = {}
    for profile in group:
        own = dict(profile.settings)
        if own.get("depth", "full") == "full":
            own.pop("depth", None)
            own.pop("depth_max_kl", None)
        if own.get("small") is None:
            own.pop("steps", None)
        policy = own.pop("steps", "auto")
        if "small" in own and policy != "off":
            found["steps"] = "auto"
        for key, value in own.items():
            if found.setdefault(key, value) != value:
                return None
    if "small" in found:
        found.setdefault("steps", "off")
    deep = [each for each in group if each.settings.get("depth", "full") != "full"]
    if len({each.settings.get("depth_max_kl") for each in deep}) > 1:
        return None
    return found


def _options(settings: Mapping[str, Any], union: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's options that make of the common model what a profile says."""
    found = {}
    if "depth" in union and settings.get("depth", "full") == "full":
        found["depth"] = "full"
    if union.get("steps", "off") != "off":
        small = settings.get("small") is not None
        found["steps"] = settings.get("steps", "auto") if small else "off"
    return found
