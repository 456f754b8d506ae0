"""How fast a planned model would be: on this machine, or on a device of which figures are known."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgeroute.config import RunParams
from edgeroute.loaded import less_reserve
from edgeroute.models import store
from edgeroute.offload.trace import read_trace
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.forecast import experience
from edgeroute.tools.forecast.calibrate import CalibrateParams, calibrate
from edgeroute.tools.forecast.devices import find_device
from edgeroute.tools.forecast.forecast import Ask, forecast
from edgeroute.tools.forecast.hits import hit_model
from edgeroute.tools.forecast.model_cost import ModelCost, model_cost
from edgeroute.tools.forecast.plan import ModelPlan, plan_file
from edgeroute.tools.forecast.records import Forecast, HitModel, Speeds
from edgeroute.tools.forecast.scale import speeds_of
from edgeroute.tools.forecast.storage import LEAST_FILE_BYTES

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """The machine that a forecast is for.

    Attributes:
        device: name of a device, or a TOML file of one; None is this machine.
        mode: one of its power modes.
        trace: routes of the model, from which hit rates are replayed.
        hits: hit rates that are there already, in place of a trace.
        fresh: measure this machine again, whatever is remembered of it.
        n_prompt: tokens of the prompt whose first token is forecast.
    """

    device: str | None = None
    mode: str | None = None
    trace: Path | None = None
    hits: HitModel | None = None
    fresh: bool = False
    n_prompt: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """A plan, the machine that it is for, and what that would do."""

    plan: ModelPlan
    speeds: Speeds
    forecast: Forecast


def foresee(file: GGUFFile, params: RunParams, where: Where, progress: Progress) -> Foreseen:
    """Plan a model by its header and forecast its speeds.

    Args:
        file: its header is enough.
        params: settings; without a budget, what the machine has free, less a reserve.
        where: the machine.
        progress: told of what takes a second or more.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        UsageError: there is no such device or mode, or the trace is of another model.
        OSError: the disk could not be measured.
    """
    cost = model_cost(file, params)
    speeds = _here(file, params, cost, where.fresh, progress)
    if where.device is not None:
        speeds = speeds_of(find_device(where.device), speeds, where.mode)
        params = _fitted(params, speeds)
    elif where.mode is not None:
        raise UsageError(f"a power mode ({where.mode!r}) is one of a device; name it by --device")
    plan = plan_file(file, params)
    ask = Ask(n_prompt=where.n_prompt, n_past=where.n_prompt, n_ubatch=params.n_ubatch)
    found = forecast(plan, cost, speeds, where.hits or _hits(cost, where.trace), ask)
    if where.device is None:
        found = _as_seen(found, file.path, params)
    return Foreseen(plan=plan, speeds=speeds, forecast=found)


def _as_seen(found: Forecast, path: Path, params: RunParams) -> Forecast:
    """Correct a forecast for this machine by what answers of the model had here."""
    if found.decode_tok_s is None:
        return found
    seen = experience.seen(path, params, found.decode_tok_s.likely)
    if seen is None:
        return found
    told = (f"decode as {seen.n} answers here had it: {seen.ratio:.2f} of what its products and "
            "layers take by themselves")  # fmt: skip
    return replace(found, decode_tok_s=experience.corrected(found.decode_tok_s, seen),
                   notes=(*found.notes, told))  # fmt: skip


def _here(
    file: GGUFFile, params: RunParams, cost: ModelCost, fresh: bool, progress: Progress
) -> Speeds:
    """What this machine reaches, with the disk that the model lies on, or would."""
    path = file.path if file.path.is_file() else _largest_installed()
    if path is not None and path.stat().st_size < LEAST_FILE_BYTES:
        path = None
    types = sorted(cost.weight_types)
    return calibrate(params.threads, CalibrateParams(types=types, path=path, fresh=fresh), progress)


def _largest_installed() -> Path | None:
    """A file on the disk that models are pulled to."""
    if not store.models_folder().is_dir():
        return None
    found = [(model.n_bytes, model.path) for model in store.installed()]
    return max(found)[1] if found else None


def _fitted(params: RunParams, speeds: Speeds) -> RunParams:
    """Settings as on the device: its memory, its cores."""
    memory = params.memory
    if memory is None:
        memory = less_reserve(speeds.available_bytes)
    return replace(params, memory=memory, threads=params.threads or speeds.threads)


def _hits(cost: ModelCost, trace: Path | None) -> HitModel | None:
    if cost.pages is None:
        if trace is not None:
            raise UsageError(f"{cost.name} has no experts, so a trace says nothing of it")
        return None
    return hit_model(None if trace is None else read_trace(trace), cost.pages, cost.arch)
