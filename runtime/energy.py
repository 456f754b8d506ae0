"""Joules from the best counter that this machine has, else by a stated model.

In this order: RAPL; a Jetson's power rails; the battery that the machine runs on; the model of
`energy_model`. What computes on an NVIDIA GPU gets NVML's counter beside that, which covers the
GPU alone. macOS and Windows tell nobody but an administrator: there it is the model.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.energy_model import EnergyModel, Estimate, Used, disk_bytes, model_here
from edgeroute.runtime.energy_sensors import Nvml, Rapl

RAILS: Final = ("sys/bus/i2c/drivers/ina3221", "sys/bus/i2c/drivers/ina3221x")
NO_SAMPLING: Final = "this board measures its power rails, which must be sampled: energy='all' does"


class Counter(Protocol):
    """Joules of a part of the machine.

    `scope` says of which part and of whose work.
    """

    @property
    def source(self) -> str:
        """Its name."""

    @property
    def scope(self) -> str:
        """What it covers."""

    @property
    def estimated(self) -> bool:
        """Whether it is a model's."""

    def joules(self) -> float | None:
        """Return joules since it was opened; None where it cannot be read any more."""

    def close(self) -> None:
        """Free what it holds."""


class EnergyMeter(Closing):
    """Joules since it was opened. One thread reads it; use it as a context manager.

    A counter that stops answering is replaced by the model, and `notes` say so.

    Args:
        main: what counts, of the whole machine or of a processor.
        beside: what counts parts that `main` leaves out.
        estimate: makes what is to replace a counter.
        notes: what a user should know of them.
    """

    def __init__(
        self, main: Counter, beside: tuple[Counter, ...] = (), *,
        estimate: Callable[[], Estimate], notes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._parts: dict[Counter, float] = dict.fromkeys((main, *beside), 0.0)
        self._main = main
        self._estimate = estimate
        self._before = 0.0  # of counters that were replaced
        self.notes = notes

    @classmethod
    def open(
        cls, mode: str = "auto", *, model: EnergyModel | None = None, gpu: int | None = None,
        root: Path = Path("/"), nvml: object = None,
    ) -> "EnergyMeter":  # fmt: skip
        """Find what counts here.

        Args:
            mode: `auto` counters that cost nothing to read, else the model; `all` also those that
                have to be sampled; `estimate` the model alone.
            model: for the estimate; None is one for this kind of machine.
            gpu: index of the GPU that computes, where one does.
            root: where the system's files are.
            nvml: what stands in for the module pynvml.
        """
        model = model or model_here()
        used = Used(read_bytes=functools.partial(disk_bytes, root))
        estimate = functools.partial(Estimate, model, used)
        notes: list[str] = []
        found = None if mode == "estimate" else next(_machine(mode, root, notes), None)
        beside: list[Counter] = []
        if gpu is not None and mode != "estimate":
            graphics = Nvml.open(gpu, nvml)
            (notes if isinstance(graphics, str) else beside).append(graphics)  # type: ignore[arg-type]
        main: Counter = estimate() if found is None else found
        if main.estimated:
            notes.append(model.told)
        return cls(main, tuple(beside), estimate=estimate, notes=tuple(notes))

    @property
    def source(self) -> str:
        """Names of what counts, such as `rapl` or `estimate+nvml`."""
        return "+".join(each.source for each in self._parts)

    @property
    def scope(self) -> str:
        """What the joules cover."""
        return "; ".join(each.scope for each in self._parts)

    @property
    def estimated(self) -> bool:
        """Whether any part is the model's."""
        return any(each.estimated for each in self._parts)

    def joules(self) -> float:
        """Return joules since it was opened; it never sinks."""
        for counter, before in list(self._parts.items()):
            found = counter.joules()
            if found is None:
                self._replace(counter)
            else:
                self._parts[counter] = max(before, found)
        return self._before + sum(self._parts.values())

    def _replace(self, counter: Counter) -> None:
        """Go on without a counter that does not answer any more."""
        counter.close()
        self._before += self._parts.pop(counter)
        told = "it is left out"
        if counter is self._main:
            self._main = estimate = self._estimate()
            self._parts = {self._main: 0.0, **self._parts}
            told = estimate.model.told
        self.notes = (*self.notes, f"{counter.source} does not answer any more; {told}")

    def close(self) -> None:
        """End what samples; safe to call twice."""
        for counter in self._parts:
            counter.close()
        self._parts = {}


def _machine(mode: str, root: Path, notes: list[str]) -> Iterator[Counter]:
    """Yield counters of the whole machine or its processor, the best one first."""
    rapl = Rapl.open(root)
    if isinstance(rapl, Rapl):
        yield rapl
    elif rapl is not None:
        notes.append(rapl)
    # Most machines have neither: their import would be paid for nothing.
    if mode == "all":
        from edgeroute.runtime.energy_power import Tegrastats, open_battery, open_jetson
        from edgeroute.runtime.jetson_stats import open_jetson_stats

        jetson: Counter | None = open_jetson(root)
        if jetson is None and root == Path("/"):
            jetson = Tegrastats.open() or open_jetson_stats()
        if jetson is not None:
            yield jetson
        battery = open_battery(root)
        if battery is not None:
            yield battery
    elif any((root / folder).is_dir() for folder in RAILS):
        notes.append(NO_SAMPLING)
