"""What a model takes when it is open, found before anything of it is loaded."""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgeroute.adapters import AdapterPlan, plan_adapters
from edgeroute.config import RunParams
from edgeroute.depth import DepthSource, NoDepth, open_depth
from edgeroute.loaded import MemoryPlan, plan_parts
from edgeroute.memory_plan import resident_weights
from edgeroute.models.registry import describe
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import format_bytes
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.small import small_file, small_params

LONG_REQUESTS: Final = 4
"""Requests of the whole context that a server's model has cells for, if that is cheap."""
MAX_ROOM_SHARE: Final = 8
"""One part in so many of the budget may go into cells for more than one of them."""
MAX_CELLS: Final = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfModel:
    """A model that a shelf may open.

    Attributes:
        name: as callers and messages call it.
        path: its file.
        memory: bytes that it may take, the rest of it being paged; None: all of it in memory, or
            the whole budget where that is less. With a library of adapters they are all set
            aside, for adapters that come later.
        params: settings of its Runtime, but for `memory`. A folder of `adapters` may be empty, or
            not be there yet.
    """

    name: str
    path: Path
    memory: int | None = None
    params: RunParams

    def settings(self) -> RunParams:
        """Return what its Runtime is opened with now: without folders that hold no adapter yet."""
        adapters = self.params.adapters
        if adapters is None:
            return self.params
        held = tuple(each for each in adapters if not _is_empty(Path(each)))
        return dataclasses.replace(self.params, adapters=held)

    def arguments(self) -> dict[str, Any]:
        """Return the same as keyword arguments of a Runtime, but for its memory."""
        params = self.settings()
        names = [each.name for each in dataclasses.fields(params) if each.name != "memory"]
        return {name: getattr(params, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfPlan:
    """What a model takes of a budget, and with all of it in memory; its adapters' names."""

    n_bytes: int
    whole_bytes: int
    adapters: tuple[str, ...]


def plan_model(model: ShelfModel, budget: int, owner: str) -> ShelfPlan:
    """Find from headers what a model takes, whole, and give it that or what it may have.

    Args:
        model: which, with its settings: a small model, adapters and stand-ins count.
        budget: bytes for all models.
        owner: whose budget that is, for messages.

    Raises:
        CapacityError: it wants more than the budget.
        ModelFileError, UnsupportedModelError: a file cannot be used.
        AdapterFileError, DepthFileError: what goes with it cannot be used.
    """
    if model.memory is not None and model.memory > budget:
        raise CapacityError(
            f"the model {model.name!r} wants {format_bytes(model.memory)}, over the {owner}'s "
            f"{format_bytes(budget)}; lower models.{model.name}.memory, or raise the {owner}'s",
            model.memory,
        )
    params, may_have = model.settings(), budget if model.memory is None else model.memory
    whole = 0
    if params.small is not None:
        whole = _plan(small_file(params), small_params(params), may_have)[0].total_bytes
    plan, adapters = _plan(model.path, params, may_have)
    whole += plan.total_bytes
    set_aside = model.memory is not None and params.adapters is not None
    return ShelfPlan(
        n_bytes=may_have if set_aside else min(whole, may_have), whole_bytes=whole,
        adapters=() if adapters is None else tuple(file.name for file in adapters.files),
    )  # fmt: skip


def with_room(model: ShelfModel, budget: int, owner: str) -> ShelfModel:
    """Give a model that fits cells for several long requests at once, where nobody said how many.

    A request reserves cells up to its `max_tokens`, which is the whole context where a chat does
    not say: with cells for one of them, the next ones would wait.

    Args:
        model, budget, owner: as `plan_model`.

    Raises:
        EdgerouteError: as `plan_model`.
    """
    if model.params.n_kv is not None:
        return model
    base = plan_model(model, budget, owner)
    may_have = budget if model.memory is None else model.memory
    most = min(may_have, base.whole_bytes + budget // MAX_ROOM_SHARE)
    for n in range(LONG_REQUESTS, 1, -1):
        n_kv = n * model.params.n_ctx
        if n_kv > MAX_CELLS:
            continue
        roomy = dataclasses.replace(model, params=dataclasses.replace(model.params, n_kv=n_kv))
        if plan_model(roomy, budget, owner).whole_bytes <= most:
            return roomy
    return model


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _plan(path: Path, params: RunParams, budget: int) -> tuple[MemoryPlan, AdapterPlan | None]:
    """Plan one file with all of its weights in memory."""
    with contextlib.ExitStack() as own:
        file = own.enter_context(GGUFFile.open(path))
        model = describe(file)
        # Whatever it runs on: when that is lost, it goes on in this machine's memory.
        device = own.enter_context(Device.open("cpu"))
        depth: DepthSource | NoDepth | None = None
        if params.depth != "full":
            depth = open_depth(own, file, model.hparams, device, params)
        adapters = None
        if params.adapters is not None:
            adapters = plan_adapters(path, model, params, budget)
        source = None if depth is None or isinstance(depth, NoDepth) else depth

        def parts(weights: ResidentWeights) -> MemoryPlan:
            return plan_parts(model.hparams, weights, params, (source, adapters))

        weights, _ = resident_weights(
            file, device, model, params, lambda some: parts(some).total_bytes, budget
        )
        own.callback(weights.close)
        return parts(weights), adapters
