"""The work of `edgeroute profile`: plan, record, analyse, forecast, write."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import click

from edgeroute.commands.plan_forecast import Where, foresee
from edgeroute.commands.progress import steps_on_stderr
from edgeroute.config import RunParams, merge_settings
from edgeroute.models.pull import resolve
from edgeroute.options import Settings
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.forecast.calibrate import kept
from edgeroute.tools.forecast.devices import find_device
from edgeroute.tools.forecast.emulate import EmulateParams, emulate
from edgeroute.tools.forecast.hits import hit_model, with_pace
from edgeroute.tools.forecast.model_cost import model_cost
from edgeroute.tools.forecast.plan import ModelPlan, plan_model
from edgeroute.tools.forecast.records import HitModel, Speeds
from edgeroute.tools.profile.analyse import About, analyse, load
from edgeroute.tools.profile.dense import DenseProfile, dense_profile
from edgeroute.tools.profile.dense import sections as dense_sections
from edgeroute.tools.profile.hits import first_part
from edgeroute.tools.profile.prompts import Prompt
from edgeroute.tools.profile.record import Progress, Recorded, RecordParams, record
from edgeroute.tools.profile.records import Profile
from edgeroute.tools.profile.table import Section, forecast_section, sections

SETTINGS = ("memory", "n_ctx", "threads", "policy", "prefetch")
HERE = "here"
"""What --device calls this machine."""
SHARE, ACTIVE_RATIO = 0.5, 2.0
"""Of a model that would fit: how many of its experts are held while it is recorded, at least, and
in units of those that a token uses."""
MOST_SHARE = 0.75


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What is printed: a profile, or that of a model without experts."""

    profile: Profile | DenseProfile
    interrupted: bool = False
    written: list[str] = field(default_factory=list)

    def sections(self) -> Iterator[Section]:
        """Yield titles and rows, forecasts among them."""
        if isinstance(self.profile, DenseProfile):
            yield from dense_sections(self.profile)
        else:
            yield from sections(self.profile)
        for name, each in self.profile.forecasts.items():
            yield forecast_section(name, each)
        if self.written:
            yield "Written", [("", each) for each in self.written]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON types."""
        return self.profile.to_dict() | {"interrupted": self.interrupted}


def profile_trace(path: Path, model: str | None, given: Mapping[str, Any]) -> Outcome:
    """Analyse a trace that is there.

    Raises:
        TraceError: it is none.
        UsageError: it is not of `model`, or has no decoded token.
    """
    plan = None if model is None else _plan(model, given)
    if plan is not None:
        _check_shape(path, plan)
    with steps_on_stderr() as progress:
        found = analyse(path, _about(plan, path), progress)
    return _finished(Outcome(profile=found), plan, path, given)


def profile_model(model: str, prompts: Sequence[Prompt], given: Mapping[str, Any]) -> Outcome:
    """Run prompts and analyse what was recorded; Ctrl-C ends the run only.

    Raises:
        EdgerouteError: the model cannot be run so; see `record`.
    """
    plan = _plan(model, given)
    if plan.paging is None:
        return _profile_dense(plan, prompts, given)
    memory, notes = _budget(plan, given)
    with tempfile.TemporaryDirectory(prefix="edgeroute-") as folder:
        path: Path = given["trace_out"] or Path(folder) / "routes.trace"
        settings = _settings(given) | ({} if memory is None else {"memory": memory})
        with steps_on_stderr() as progress:
            run = _record(plan, prompts, given, (settings, path), progress)
            notes += _run_notes(run, prompts)
            about = dataclasses.replace(_about(plan, given["trace_out"]), notes=tuple(notes))
            found = analyse(path, about, progress, run)
        outcome = Outcome(profile=found, interrupted=run.interrupted)
        return _finished(outcome, plan, path, given, ran=True)


def _plan(model: str, given: Mapping[str, Any]) -> ModelPlan:
    return plan_model(resolve(model), merge_settings(_settings(given)))


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in SETTINGS if given[name] is not None}


def _record(
    plan: ModelPlan, prompts: Sequence[Prompt], given: Mapping[str, Any],
    how: tuple[dict[str, Any], Path | None], progress: Progress,
) -> Recorded:  # fmt: skip
    settings, path = how
    params = RecordParams(
        tokens=given["tokens"], settings=cast("Settings", settings), trace=path,
        chat=given["chat"],
    )  # fmt: skip
    return record(plan.path, prompts, params, progress)


def _budget(plan: ModelPlan, given: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    """Choose a budget that pages; None where the user's or the machine's does.

    Raises:
        UsageError: the model is too small to be paged.
    """
    paging = plan.paging
    assert paging is not None
    if not plan.is_resident:
        return None, []
    if not paging.helps(plan.memory):
        raise UsageError(
            f"{plan.path.name} is too small to be paged: whole it takes "
            f"{format_bytes(plan.memory.total_bytes)}, with the fewest experts in memory "
            f"{format_bytes(paging.smallest_bytes)}; profile a larger one, or a trace by "
            "--from-trace"
        )
    used = paging.n_expert_used / paging.pools[0].n_expert
    share = min(MOST_SHARE, max(SHARE, ACTIVE_RATIO * used))
    budget = paging.fixed_bytes + int(share * paging.all_bytes)
    budget = max(paging.smallest_bytes, min(budget, plan.memory.total_bytes - 1))
    asked = (
        "the machine's free memory" if given["memory"] is None else f"--memory {given['memory']}"
    )
    return budget, [
        f"the model fits {asked} whole, where nothing is paged and no expert is recorded: it was "
        f"given {format_bytes(budget)}, so that about {share:.0%} of its experts are held"
    ]


def _run_notes(run: Recorded, prompts: Sequence[Prompt]) -> list[str]:
    notes = list(run.warnings)
    if run.interrupted:
        notes.append(f"stopped by Ctrl-C after {run.n_prompt} of {len(prompts)} prompts")
    return notes


def _about(plan: ModelPlan | None, trace: Path | None) -> About:
    name = None if trace is None else str(trace)
    if plan is None or plan.paging is None:
        return About(trace=name)
    paging = plan.paging
    return About(
        arch=plan.hparams.arch, file_bytes=plan.path.stat().st_size, trace=name,
        slot_bytes=paging.all_bytes // paging.n_pages, fixed_bytes=paging.fixed_bytes,
    )  # fmt: skip


def _check_shape(path: Path, plan: ModelPlan) -> None:
    """Refuse a trace of another model.

    Raises:
        TraceError: it is no trace.
        UsageError: it is of another model.
    """
    meta, moe = load(path, most=0)[0].meta, plan.hparams.moe
    ours = (plan.hparams.n_layer, 0 if moe is None else moe.n_expert,
            0 if moe is None else moe.n_expert_used)  # fmt: skip
    theirs = (meta.n_layer, meta.n_expert, meta.n_expert_used)
    if ours != theirs:
        raise UsageError(
            f"{path.name} is of {meta.model[:80]!r}, {theirs[0]} layers with {theirs[2]} of "
            f"{theirs[1]} experts used; {plan.path.name} has {ours[0]}, {ours[2]} of {ours[1]}"
        )


def _profile_dense(plan: ModelPlan, prompts: Sequence[Prompt], given: Mapping[str, Any]) -> Outcome:
    """Run a model without experts: its speed, and what of it streams."""
    unused = [f"--{name.replace('_', '-')}" for name in ("trace_out", "export", "html", "png")
              if given[name] is not None]  # fmt: skip
    if unused:
        raise UsageError(
            f"{plan.path.name} has no experts, so there are no routes to record or draw: leave "
            f"{', '.join(unused)} out"
        )
    with steps_on_stderr() as progress:
        run = _record(plan, prompts, given, (_settings(given), None), progress)
    found = dense_profile(plan.path, plan.hparams, run, tuple(_run_notes(run, prompts)))
    if given["devices"]:
        found = dataclasses.replace(found, forecasts=_forecasts(plan, given, None))
    return Outcome(profile=found, interrupted=run.interrupted)


# what comes after the analysis


def _finished(
    outcome: Outcome, plan: ModelPlan | None, path: Path, given: Mapping[str, Any], *,
    ran: bool = False,
) -> Outcome:  # fmt: skip
    """Add forecasts, and write what is to be written; `ran` if the trace is of this machine."""
    profile = outcome.profile
    assert isinstance(profile, Profile)
    if given["devices"] and plan is not None:
        hits = _hits(plan, path, ran)
        profile = dataclasses.replace(profile, forecasts=_forecasts(plan, given, hits))
        outcome.profile = profile
    outcome.written += _write(profile, path, given)
    return outcome


def _hits(plan: ModelPlan, path: Path, ran: bool) -> HitModel | None:
    """Replay the trace for what a forecast asks of it, once for all devices."""
    with GGUFFile.open(plan.path) as file:
        pages = model_cost(file, plan.params).pages
    if pages is None:
        return None
    trace = load(path)[0]
    found = hit_model(first_part(trace), pages)
    return with_pace(found, trace, pages) if ran else found


def _forecasts(
    plan: ModelPlan, given: Mapping[str, Any], hits: HitModel | None
) -> dict[str, dict[str, Any]]:
    """Forecast on each device; what is measured here is remembered for a month."""
    found = {}
    for name in given["devices"]:
        device = None if name == HERE else name
        where = Where(device=device, mode=None if device is None else given["power_mode"],
                      hits=hits, n_prompt=128)  # fmt: skip
        with GGUFFile.open(plan.path) as file:
            seen = foresee(file, _params(plan, device), where, _say)
        found[name] = asdict(seen.forecast) | {
            "origins": dict(seen.speeds.origins), "machine_notes": list(seen.speeds.notes),
            "hits_origin": None if hits is None else hits.origin,
        }  # fmt: skip
        if device is not None and given["emulate"]:
            found[name]["emulation"] = _emulated(plan, device, seen.speeds, given)
    return found


def _emulated(
    plan: ModelPlan, device: str, there: Speeds, given: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Run the model here as on a device, as far as that can be done; or say why it cannot."""
    _say(f"{plan.path.name} under what {device} has")
    settings = {name: given[name] for name in ("policy", "prefetch") if given[name] is not None}
    params = EmulateParams(
        n_tokens=given["tokens"], n_ctx=plan.params.n_ctx, settings=settings
    )  # fmt: skip
    here = kept(plan.params.threads, plan.path)
    try:
        found = emulate(plan.path, find_device(device), params, here=here, there=there)
    except EdgerouteError as error:  # such as the kernel ending it, which is an answer too
        return {"error": str(error)}
    return found.to_dict()


def _params(plan: ModelPlan, device: str | None) -> RunParams:
    """Settings for a forecast: --memory and --threads are of the run here; a device has its own."""
    if device is None:
        return plan.params
    return dataclasses.replace(plan.params, memory=None, threads=None)


def _say(line: str) -> None:
    click.echo(f"measuring {line}", err=True)


def _write(profile: Profile, trace: Path, given: Mapping[str, Any]) -> Iterator[str]:
    """Write all that was asked for; yield what was written."""
    if given["trace_out"] is not None:
        yield _wrote(given["trace_out"])
    if given["export"] is not None:
        yield _export(trace, given["export"])
    if given["html"] is None and given["png"] is None:
        return
    facts = json.loads(json.dumps(profile.to_dict()))
    if given["html"] is not None:
        from edgeroute.tools.profile.html import render

        with _naming("--html", given["html"]):
            given["html"].write_text(render(facts), encoding="utf-8")
        yield _wrote(given["html"])
    if given["png"] is not None:
        from edgeroute.tools.profile.png import write_png

        with _naming("--png", given["png"]):
            given["png"].mkdir(parents=True, exist_ok=True)
            paths = write_png(facts, given["png"])
        yield f"{given['png']}: {len(paths)} pictures"


def _export(trace: Path, out: Path) -> str:
    from edgeroute.offload.trace_export import export_csv, export_parquet

    with _naming("--export", out):
        (export_parquet if out.suffix == ".parquet" else export_csv)(trace, out)
    return _wrote(out)


def _wrote(path: Path) -> str:
    return f"{path}, {format_bytes(path.stat().st_size)}"


@contextlib.contextmanager
def _naming(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {option} {path}: {error.strerror or error}") from error
