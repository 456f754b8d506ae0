"""What the `model` of a request means: `NAME`, `NAME:ADAPTER`, `NAME:auto`; `base` is the first."""

from collections.abc import Mapping
from typing import NamedTuple

from edgeroute.engine import Runtime
from edgeroute.runtime.errors import UsageError
from edgeroute.server.errors import ApiError
from edgeroute.server.records import ALIAS, Models

Adapter = str | Mapping[str, float]


class Named(NamedTuple):
    """A configured model, and the adapter named behind it."""

    name: str
    adapter: str | None = None

    @property
    def label(self) -> str:
        """As answers name it."""
        return self.name if self.adapter is None else f"{self.name}:{self.adapter}"


def find_model(models: Models, asked: str | None) -> Named:
    """Tell which model is meant; None is the default one.

    Raises:
        ApiError: 404, there is none of that name.
    """
    names = models.names
    if not names:
        raise ApiError(404, "no model is configured", param="model", code="model_not_found")
    if asked is None:
        return Named(names[0])
    # A configured name may have a colon of its own, so that the longest one that fits counts.
    known = {ALIAS: names[0]} | {name: name for name in names}
    for name in sorted(known, key=len, reverse=True):
        if asked == name:
            return Named(known[name])
        adapter = asked.removeprefix(f"{name}:")
        if adapter and adapter != asked:
            return Named(known[name], adapter)
    listed = ", ".join(map(repr, names[:20]))
    raise ApiError(
        404, f"The model {asked!r:.120} does not exist; there are {listed}",
        param="model", code="model_not_found",
    )  # fmt: skip


def choose_adapter(named: Named, asked: Adapter | None) -> Adapter | None:
    """Take the adapter from where it was named.

    Raises:
        ApiError: 400, it was named twice.
    """
    if named.adapter is not None and asked is not None:
        raise ApiError(
            400, "the adapter is named twice: behind the model's name and as edgeroute.adapter; "
            "leave one of them out", param="edgeroute.adapter",
        )  # fmt: skip
    return named.adapter if asked is None else asked


def check_adapter(runtime: Runtime, named: Named, adapter: Adapter | None) -> None:
    """Refuse an adapter that an open model does not have.

    Raises:
        ApiError: 404 where the model's name had it, otherwise 400; with the names there are.
    """
    try:
        runtime.check_adapter(adapter)
    except UsageError as error:
        words = f"{error}; adapters of {named.name!r}: {', '.join(runtime.adapters) or 'none'}"
        if named.adapter is not None:
            raise ApiError(404, words, param="model", code="model_not_found") from None
        raise ApiError(400, words, param="edgeroute.adapter") from None
