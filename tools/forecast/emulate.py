"""Run a model here as on a device, as far as that can be done, and say which part that is.

The kernel limits memory, a model of the device's drive delays the pager's reads, and no more
threads compute than it has cores. How fast a core or a memory is cannot be imitated: that part
is computed afterwards from the two machines' speeds. The kernel's own throttle of disks knows no
read size and no latency, so that it does not replace the model; where it may be set it holds what
the pager does not read to the drive's best rate.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from edgeroute.offload.throttle import Point, Throttle, slowed
from edgeroute.runtime import machine
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench.limit import MemoryLimit
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.forecast.read_limit import ReadLimit
from edgeroute.tools.forecast.records import DeviceProfile, Speeds, StoragePoint
from edgeroute.tools.forecast.scale import reference

How = Literal["emulated", "computed", "not possible"]

PROMPT: Final = (
    "Explain step by step how a small robot with one camera finds its way through a flat, "
    "and what it does when a door is closed."
)
WARM_PROMPT: Final = (
    "Write a short letter to the people who keep a weather station on a mountain, and ask them "
    "what they measured last winter."
)
_SAME_RATIO: Final = 1.05
"""A resource that is no more than so much less here than there need not be slowed."""
_SLACK: Final = 1.1
"""The kernel counts in slices of time: it must not delay what the model lets through."""
_COUNTED: Final = ("hits", "misses", "demand_bytes", "prefetch_bytes", "stall_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """How one resource of the device was brought about, in a word and a sentence."""

    how: How
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationPlan:
    """What a run sets: a memory limit, a drive's points, threads; None leaves it as it is."""

    limit_bytes: int | None
    points: tuple[Point, ...] | None
    threads: int
    resources: Mapping[str, Resource]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulateParams:
    """What is run.

    Attributes:
        n_tokens: to decode and count.
        n_ctx: cells.
        prompt: what is answered and measured.
        warm_prompt: what is answered before: the caches are filled, and by something else.
        settings: further settings of the Runtime.
    """

    n_tokens: int = 48
    n_ctx: int = 512
    prompt: str = PROMPT
    warm_prompt: str = WARM_PROMPT
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """What was measured, and what follows for the device. Seconds, bytes, tokens per second.

    `decode_tok_s` was measured with what is emulated. `computed_tok_s` replaces the time that
    was not spent waiting for pages by what the device's memory and cores need; None where the
    speeds are not known.
    """

    device: str
    resources: Mapping[str, Resource]
    n_tokens: int
    decode_tok_s: float
    prefill_tok_s: float | None
    ttft_s: float
    hit_ratio: float | None
    read_bytes_token: float
    stall_s_token: float
    peak_bytes: int | None
    computed_tok_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON types."""
        return asdict(self)


def plan_emulation(
    device: DeviceProfile, *, memory_bytes: int, cores: int, storage: Sequence[StoragePoint]
) -> EmulationPlan:
    """Decide what of a device can be imitated on a machine.

    Args:
        device: to imitate.
        memory_bytes: that this process could use here.
        cores: that it may compute on.
        storage: what the disk gives here; empty if unknown, which then counts as fast enough.
    """
    limit, memory = _memory(device, memory_bytes)
    points, drive = _storage(device, storage)
    threads = min(cores, device.cores)
    if device.processor == "gpu":
        compute = Resource(how="computed", note="its GPU is not here; the CPU computes")
    elif cores >= device.cores:
        compute = Resource(how="emulated", note=f"{threads} threads of the {cores} cores here")
    else:
        note = f"it has {device.cores} cores, and {cores} are here"
        compute = Resource(how="not possible", note=note)
    speed = Resource(how="computed", note="how fast its memory and its cores are")
    return EmulationPlan(
        limit_bytes=limit, points=points, threads=threads,
        resources={"memory": memory, "storage": drive, "cores": compute, "speed": speed},
    )  # fmt: skip


def _memory(device: DeviceProfile, here: int) -> tuple[int | None, Resource]:
    free = device.memory_bytes - device.system_bytes
    if free > here:
        note = f"it leaves {format_bytes(free)} and this machine {format_bytes(here)}"
        return None, Resource(how="not possible", note=note)
    note = f"a control group of {format_bytes(free)}, what its system leaves"
    return free, Resource(how="emulated", note=note)


def _storage(
    device: DeviceProfile, here: Sequence[StoragePoint]
) -> tuple[tuple[Point, ...] | None, Resource]:
    points = tuple(Point(p.read_bytes, p.depth, p.bytes_s) for p in device.storage)
    theirs = Throttle(points)
    best = theirs.best_reads()
    rate = theirs.bytes_s(best.read_bytes, best.n_threads)
    if here:
        ours = Throttle([Point(p.read_bytes, p.depth, p.bytes_s) for p in here])
        # Read there as here: with the reads that suit each disk.
        mine = ours.best_reads().bytes_s
        if rate > _SAME_RATIO * mine:
            note = f"it gives {format_bytes(rate)}/s, the disk here {format_bytes(mine)}/s"
            return None, Resource(how="not possible", note=note)
    note = f"the pager's reads wait as a model of its drive does, {format_bytes(rate)}/s at best"
    return points, Resource(how="emulated", note=note)


def emulate(
    path: str | Path, device: DeviceProfile, params: EmulateParams | None = None,
    *, here: Speeds | None = None, there: Speeds | None = None,
) -> Emulation:  # fmt: skip
    """Run a model as on a device, in a process of its own.

    Args:
        path: the model.
        device: to imitate.
        params: what to run.
        here: this machine's speeds; with `there`, of the device, the rest is computed.
        there: see `speeds_of`.

    Raises:
        EdgerouteError: the model cannot be run so, for one because the kernel ended it.
    """
    params = params or EmulateParams()
    plan = plan_emulation(
        device, memory_bytes=machine.memory().available_bytes, cores=machine.usable_cores(),
        storage=() if here is None else here.storage,
    )  # fmt: skip
    settings = {"n_ctx": params.n_ctx, "threads": plan.threads} | dict(params.settings)
    work = (str(path), settings, plan.points)
    asked = (params.warm_prompt, params.prompt, params.n_tokens)
    with contextlib.ExitStack() as own:
        limit, plan = _limit(own, plan, settings)
        reads, plan = _limit_reads(own, plan, Path(path))
        factory: tuple[Any, ...] = (EmulatedRuntime, *work)
        if reads is not None:
            factory = reads.factory(*factory)
        if limit is None:
            worker = own.enter_context(Worker(*factory))
            found, peak = worker.call("answer", *asked), None
        else:
            with limit.explaining("the run under the device's memory"):
                worker = own.enter_context(Worker(*limit.factory(*factory)))
                found = worker.call("answer", *asked)
            peak = limit.peak_bytes
    return _result(device, plan, found, peak=peak, ratio=_speed_ratio(here, there))


def _limit(
    own: contextlib.ExitStack, plan: EmulationPlan, settings: dict[str, object]
) -> tuple[MemoryLimit | None, EmulationPlan]:
    """Make the control group; where none may be made, only the Runtime's budget is set."""
    if plan.limit_bytes is None:
        return None, plan
    try:
        return own.enter_context(MemoryLimit(plan.limit_bytes)), plan
    except UsageError as error:
        settings.setdefault("memory", plan.limit_bytes)
        note = f"only as the budget of the Runtime: {error}"
        resources = {**plan.resources, "memory": Resource(how="not possible", note=note)}
        return None, EmulationPlan(limit_bytes=None, points=plan.points, threads=plan.threads,
                                   resources=resources)  # fmt: skip


def _limit_reads(
    own: contextlib.ExitStack, plan: EmulationPlan, path: Path
) -> tuple[ReadLimit | None, EmulationPlan]:
    """Hold all reads to the drive's best rate where the kernel lets us, and say which it is."""
    if plan.points is None:
        return None, plan
    drive = plan.resources["storage"]
    try:
        rate = _SLACK * Throttle(plan.points).best_reads().bytes_s
        limit = own.enter_context(ReadLimit(path, rate))
    except UsageError as error:
        limit, told = None, f"other reads, of what stays in memory, are not slowed: {error}"
    else:
        told = f"the kernel (blkio) holds all reads to {format_bytes(rate)}/s"
    note = f"{drive.note}; {told}"
    resources = {**plan.resources, "storage": replace(drive, note=note)}
    return limit, replace(plan, resources=resources)


class EmulatedRuntime:
    """A Runtime whose pager reads from a slowed disk; lives in a worker."""

    def __init__(
        self, path: str, settings: Mapping[str, Any], points: Sequence[Point] | None
    ) -> None:
        from edgeroute.engine import Runtime  # only after joining the control group

        with contextlib.ExitStack() as own:
            if points is not None:
                own.enter_context(slowed(Throttle(points)))
            self._runtime = own.enter_context(Runtime(path, **settings))
            self._own = own.pop_all()

    def answer(self, warm_prompt: str, prompt: str, n_tokens: int) -> dict[str, Any]:
        """Answer two prompts; return the second answer's figures."""
        self._generate(warm_prompt, n_tokens)
        before = self._paging()
        figures = self._generate(prompt, n_tokens)
        counted = {key: value - before.get(key, 0.0) for key, value in self._paging().items()}
        return figures | {"decode": counted}

    def _generate(self, prompt: str, n_tokens: int) -> dict[str, Any]:
        done = self._runtime.generate(
            prompt, max_tokens=n_tokens, temperature=0.0, seed=1, prefix="off"
        )
        return done.stats.to_dict()

    def _paging(self) -> dict[str, float]:
        experts = self._runtime.stats().get("experts")
        decode = experts.get("decode", {}) if isinstance(experts, Mapping) else {}
        return {key: float(decode[key]) for key in _COUNTED if key in decode}

    def close(self) -> None:
        """Free everything."""
        self._own.close()


def _speed_ratio(here: Speeds | None, there: Speeds | None) -> float | None:
    """Return how many times faster the device goes through weights than this machine does."""
    if here is None or there is None:
        return None
    return reference(there.weight_bytes_s) / reference(here.weight_bytes_s)


def _result(
    device: DeviceProfile, plan: EmulationPlan, found: Mapping[str, Any],
    *, peak: int | None, ratio: float | None,
) -> Emulation:  # fmt: skip
    decode: Mapping[str, float] = found["decode"]
    n_tokens = max(1, found["n_generated"] - 1)
    per_token_s = 1 / found["decode_tok_s"] if found["decode_tok_s"] else 0.0
    stall_s = min(per_token_s, decode.get("stall_s", 0.0) / n_tokens)
    asked = decode.get("hits", 0.0) + decode.get("misses", 0.0)
    computed = None
    if ratio is not None and per_token_s:
        computed = 1 / (stall_s + (per_token_s - stall_s) / ratio)
    return Emulation(
        device=device.name, resources=plan.resources, n_tokens=n_tokens,
        decode_tok_s=found["decode_tok_s"] or 0.0, prefill_tok_s=found["prefill_tok_s"],
        ttft_s=found["ttft_s"], hit_ratio=decode["hits"] / asked if asked else None,
        read_bytes_token=(decode.get("demand_bytes", 0.0) + decode.get("prefetch_bytes", 0.0))
        / n_tokens,
        stall_s_token=stall_s, peak_bytes=peak, computed_tok_s=computed,
    )  # fmt: skip
