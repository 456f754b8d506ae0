"""What open models tell of themselves, as metrics: a table of where each figure is in `stats`."""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edgeroute.engine import Runtime
from edgeroute.server.records import ModelFacts, Models

Kind = Literal["gauge", "counter"]
Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]
PHASES: Final = ("decode", "prefill")
SERVER: Final = {
    "budget_bytes": "Bytes that all models together may take.",
    "used_bytes": "Bytes that they take.",
    "lost_bytes": "Bytes of engines and openings that hang and were given up.",
    "n_hung": "Engines and openings that hang and were given up.",
}
"""What is told of all models together, by key of `Models.snapshot`."""
MAX_OWNERS: Final = 64
"""Owners of memory of one model that get a label of their own."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one number of a metric is.

    Attributes:
        path: keys, from the top of `stats`; `*` stands for every key of a mapping, or for the
            length of a list, and its key becomes the label `each`.
        labels: fixed ones.
    """

    path: tuple[str, ...]
    labels: Labels = ()
    each: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric.

    Attributes:
        name: without the ending `_total`, which counters get.
        told: its help text.
        places: of its numbers.
    """

    name: str
    kind: Kind
    told: str
    places: tuple[Place, ...]

    @property
    def label_names(self) -> list[str]:
        """Names of its labels beside the model's."""
        first = self.places[0]
        return [name for name, _ in first.labels] + ([first.each] if first.each else [])


def _one(name: str, kind: Kind, told: str, *path: str) -> Figure:
    return Figure(name, kind, told, (Place(path),))


def _several(name: str, kind: Kind, told: str, label: str, **paths: tuple[str, ...]) -> Figure:
    places = tuple(Place(path, ((label, value),)) for value, path in paths.items())
    return Figure(name, kind, told, places)


def _phases(name: str, told: str, *keys: str, label: str = "") -> Figure:
    """Return a counter of the experts: by phase, and by what it counts if that has a label."""
    return Figure(name, "counter", told, tuple(
        Place(("experts", phase, key),
              (("phase", phase), *(((label, key.removeprefix("prefetch_")),) if label else ())))
        for phase in PHASES for key in keys
    ))  # fmt: skip


OPENED: Final = _one("edgeroute_device_reopenings", "counter",
                     "Times that the model was opened again because a device was lost.",
                     "losses", "opened")  # fmt: skip
FIGURES: Final = (
    Figure("edgeroute_memory_bytes", "gauge",
           "Bytes entered in the model's ledger, by what holds them.",
           (Place(("memory", "*"), (), "owner"),)),
    _one("edgeroute_memory_budget_bytes", "gauge",
         "Bytes that the model's ledger may hold.", "budget_bytes"),
    _several("edgeroute_kv_cells", "gauge",
             "Cells of the KV cache, one a token: all, free, and kept for later prompts.",
             "state", all=("kv_cells",), free=("kv_free_cells",), kept=("kv_kept_cells",)),
    _one("edgeroute_kv_reused_cells", "counter",
         "Tokens of prompts that were not computed again.", "reused_cells"),
    _several("edgeroute_engine_requests", "gauge",
             "Requests that the engine decodes, and that wait for it.",
             "state", running=("running",), waiting=("waiting",)),
    _one("edgeroute_engine_finished", "counter", "Requests that the engine ended.", "finished"),
    _one("edgeroute_decode_steps", "counter",
         "Passes of the model that gave each running answer its next tokens.", "decode_steps"),
    _one("edgeroute_decode_batch_mean", "gauge",
         "Tokens that such a pass computed on average since the model was opened.", "mean_batch"),
    _one("edgeroute_threads", "gauge", "Threads that compute now.", "threads"),
    _one("edgeroute_threads_max", "gauge", "Threads that may compute.", "threads_max"),
    _one("edgeroute_thread_changes", "counter",
         "Times that the number of threads was changed.", "thread_changes"),
    _one("edgeroute_graphs_built", "counter",
         "Graphs built; in steady use they are reused.", "graphs_built"),
    _one("edgeroute_model_load_seconds", "gauge", "What opening the model took.", "load_s"),
    # devices that were lost
    _one("edgeroute_device_losses", "counter",
         "Devices that were lost while the model was on them.", "losses", "lost"),
    OPENED,
    _several("edgeroute_device_loss_requests", "counter",
             "Requests under way or waiting then: that went on, and that ended because of it.",
             "outcome", continued=("losses", "continued"), failed=("losses", "failed")),
    _one("edgeroute_model_down", "gauge",
         "1 while nothing could be opened in place of a lost device.", "losses", "down"),
    # experts in slots
    _phases("edgeroute_expert_requests",
            "Experts that were asked for: resident (hits), on their way (late), or not (misses).",
            "hits", "late", "misses", label="result"),
    _phases("edgeroute_expert_evictions", "Experts that left their slot.", "evictions"),
    _phases("edgeroute_expert_demand_bytes",
            "Bytes read because an expert was needed at once.", "demand_bytes"),
    _phases("edgeroute_expert_prefetch_bytes",
            "Bytes read because an expert was expected.", "prefetch_bytes"),
    _phases("edgeroute_expert_prefetches",
            "Experts read ahead: issued, and of these useful or wasted.",
            "prefetch_issued", "prefetch_useful", "prefetch_wasted", label="outcome"),
    _phases("edgeroute_expert_stall_seconds",
            "Time that computing waited for experts.", "stall_s"),
    _several("edgeroute_expert_pages", "gauge",
             "Experts of the model (all), and slots that hold some of them.",
             "state", all=("experts", "n_pages"), slots=("experts", "n_slots")),
    _one("edgeroute_expert_slots_bytes", "gauge",
         "Bytes of the slots.", "experts", "slots_bytes"),
    # layers that stream
    _several("edgeroute_layers", "gauge",
             "Layers that stay in memory, and that are read for every pass; the head is one.",
             "state", resident=("layers", "resident"), streamed=("layers", "streamed")),
    _one("edgeroute_layer_stall_seconds", "counter",
         "Time that computing waited for layers.", "layers", "stall_s"),
    # adapters
    _several("edgeroute_adapters", "gauge", "Adapters that there are, and that are in memory.",
             "state", known=("adapters", "known"), resident=("adapters", "resident", "*")),
    _several("edgeroute_adapter_slots", "gauge", "Slots for adapters: all, and free ones.",
             "state", all=("adapters", "slots"), free=("adapters", "free_slots")),
    _several("edgeroute_adapter_requests", "counter",
             "Adapters that were asked for: in memory (hits), or not (misses).",
             "result", hits=("adapters", "hits"), misses=("adapters", "misses")),
    _one("edgeroute_adapter_loads", "counter", "Adapters that were read.", "adapters", "loads"),
    _one("edgeroute_adapter_load_seconds", "counter",
         "Time that reading them took.", "adapters", "load_s"),
    _one("edgeroute_adapter_load_errors", "counter",
         "Adapters that could not be read.", "adapters", "errors"),
    _one("edgeroute_adapter_evictions", "counter",
         "Adapters that left their slots.", "adapters", "evictions"),
    _several("edgeroute_adapter_decisions", "counter",
             "Requests with adapter=auto: chosen by what was learned, left to the base model, or "
             "forced to explore; and learned, answers whose feedback came.",
             "kind", chosen=("adapters", "auto", "n_chosen"),
             bypassed=("adapters", "auto", "n_bypassed"),
             forced=("adapters", "auto", "n_forced"), learned=("adapters", "auto", "n_learned")),
    # two models
    Figure("edgeroute_step_read_tokens", "counter",
           "Tokens that each model of a pair evaluated, catching up included.",
           (Place(("steps", "read", "*"), (), "writer"),)),
    Figure("edgeroute_step_passes", "counter", "Passes of each model of a pair.",
           (Place(("steps", "passes", "*"), (), "writer"),)),
    # the disk
    Figure("edgeroute_disk_read_bytes", "counter",
           "Bytes read from disk while answering, by what they are.",
           (*(Place(("experts", phase, key), (("kind", "experts"),))
              for phase in PHASES for key in ("demand_bytes", "prefetch_bytes")),
            Place(("layers", "bytes"), (("kind", "layers"),)),
            Place(("adapters", "loaded_bytes"), (("kind", "adapters"),)),
            Place(("sessions", "read_bytes"), (("kind", "sessions"),)))),
    _several("edgeroute_disk_written_bytes", "counter",
             "Bytes written to disk, by what they are.",
             "kind", sessions=("sessions", "written_bytes")),
    # sessions
    _several("edgeroute_session_events", "counter",
             "Sessions saved, failed to be saved, restored, and refused, whose prompt was then "
             "computed.",
             "kind", saved=("sessions", "saved"), failed=("sessions", "failed"),
             restored=("sessions", "restored"), refused=("sessions", "refused")),
    _one("edgeroute_session_restored_tokens", "counter",
         "Tokens of prompts that were read from disk instead of computed.",
         "sessions", "restored_tokens"),
    # energy
    Figure("edgeroute_energy_joules", "counter",
           "Joules spent while answering, by what told them; estimated: a model stands in for a "
           "counter. A counter of the machine has what other programs used meanwhile, too.",
           (Place(("energy", "measured", "*"), (("estimated", "false"),), "source"),
            Place(("energy", "modelled", "*"), (("estimated", "true"),), "source"))),
    _one("edgeroute_energy_joules_per_token", "gauge",
         "Joules per token of the answers that were finished since the model was opened, their "
         "prompts included.", "energy", "joules_per_token"),
    # drafts
    _several("edgeroute_draft_tokens", "counter",
             "Tokens that were drafted, and those of them that the model accepted.",
             "outcome", drafted=("speculation", "drafted"), accepted=("speculation", "accepted")),
    _one("edgeroute_draft_seconds", "counter",
         "Time that drafting took.", "speculation", "draft_s"),
)  # fmt: skip


def readings(figure: Figure, stats: Mapping[str, object]) -> dict[Labels, float]:
    """Find a metric's numbers; those of the same labels are summed, absent ones left out."""
    found: dict[Labels, float] = {}
    for place in figure.places:
        for labels, value in _find(place, stats):
            found[labels] = found.get(labels, 0.0) + value
    return found


def _find(place: Place, stats: object) -> Iterator[tuple[Labels, float]]:
    for key in place.path:
        if key == "*":
            yield from _each(place, stats)
            return
        if not isinstance(stats, Mapping) or key not in stats:
            return
        stats = stats[key]
    if isinstance(stats, int | float):
        yield place.labels, float(stats)


def _each(place: Place, stats: object) -> Iterator[tuple[Labels, float]]:
    if isinstance(stats, Mapping):
        for name, value in list(stats.items())[:MAX_OWNERS]:
            if isinstance(value, int | float):
                yield (*place.labels, (place.each, str(name))), float(value)
    elif isinstance(stats, list | tuple):
        yield place.labels, float(len(stats))


class Kept:
    """Counters of one model that go on where it is closed and opened again.

    What an engine counted after it was last read and before it was closed is lost.
    """

    def __init__(self) -> None:
        self._runtime: weakref.ref[Runtime] | None = None
        self._n_opened = 0
        self._before: dict[Key, float] = {}
        self._now: dict[Key, float] = {}

    def take(self, runtime: Runtime, counted: Mapping[Key, float], n_opened: int = 0) -> None:
        """Enter what an engine has counted since it was opened.

        Where a device was lost, it opens its model again by itself, `n_opened` times so far: most
        of its counters then begin anew.
        """
        same = self._runtime is not None and self._runtime() is runtime
        if not same:
            self._runtime = weakref.ref(runtime)
            for key, value in self._now.items():
                self._before[key] = self._before.get(key, 0.0) + value
            self._now.clear()
        anew, self._n_opened = n_opened != self._n_opened, n_opened
        for key, value in counted.items():
            if anew and value < (before := self._now.get(key, 0.0)):
                self._before[key] = self._before.get(key, 0.0) + before
                self._now[key] = 0.0
            # A figure that is summed from parts may be read while it changes: it never sinks.
            self._now[key] = max(value, self._now.get(key, 0.0))

    def totals(self) -> dict[Key, float]:
        """Return all counters."""
        keys = self._before.keys() | self._now.keys()
        return {key: self._before.get(key, 0.0) + self._now.get(key, 0.0) for key in sorted(keys)}


class EngineMetrics(Collector):
    """Gives the figures of all models as they were at the last `refresh`."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._kept: dict[str, Kept] = {}
        self._gauges: dict[Key, dict[str, float]] = {}
        self._facts: list[ModelFacts] = []
        self._silent: dict[str, float] = {}
        self._server: Mapping[str, object] = {}

    def refresh(self) -> None:
        """Read all open models; to be called on the event loop."""
        gauges: dict[Key, dict[str, float]] = {}
        self._silent, self._server = {}, self._models.snapshot()
        self._facts = [self._models.facts(name) for name in self._models.names]
        for facts in self._facts:
            runtime = self._models.peek(facts.name) if facts.state == "open" else None
            if runtime is None:
                continue
            stats, pulse = runtime.stats(), runtime.pulse()
            self._silent[facts.name] = pulse.idle_s if pulse.busy else 0.0
            counted: dict[Key, float] = {}
            for figure in FIGURES:
                for labels, value in readings(figure, stats).items():
                    if figure.kind == "counter":
                        counted[figure.name, labels] = value
                    else:
                        gauges.setdefault((figure.name, labels), {})[facts.name] = value
            n_opened = int(readings(OPENED, stats).get((), 0))
            self._kept.setdefault(facts.name, Kept()).take(runtime, counted, n_opened)
        self._gauges = gauges

    def describe(self) -> list[Metric]:
        """Return no names: they are ours alone."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from self._states()
        totals = {name: kept.totals() for name, kept in self._kept.items()}
        for figure in FIGURES:
            names = ["model", *figure.label_names]
            gauge = figure.kind == "gauge"
            family = GaugeMetricFamily if gauge else CounterMetricFamily
            metric = family(figure.name, figure.told, labels=names)
            if gauge:
                for (name, labels), values in self._gauges.items():
                    for model, value in values.items():
                        if name == figure.name:
                            metric.add_metric([model, *(text for _, text in labels)], value)
            for model, counted in totals.items():
                for (name, labels), value in counted.items():
                    if name == figure.name:
                        metric.add_metric([model, *(text for _, text in labels)], value)
            yield metric

    def _states(self) -> Iterator[Metric]:
        yield _gauge(
            "edgeroute_model_state", "1 for the state that a configured model is in.",
            {(each.name, each.state): 1 for each in self._facts}, "model", "state",
        )  # fmt: skip
        yield _gauge(
            "edgeroute_model_bytes", "Bytes of the server's budget that a model takes.",
            {(f.name,): 0 if f.state == "closed" else f.n_bytes for f in self._facts}, "model",
        )  # fmt: skip
        yield _gauge(
            "edgeroute_model_users", "Requests that keep a model open.",
            {(each.name,): each.n_busy for each in self._facts}, "model",
        )  # fmt: skip
        yield _gauge(
            "edgeroute_model_failed", "1 where a model could not be opened the last time.",
            {(each.name,): int(each.failed is not None) for each in self._facts}, "model",
        )  # fmt: skip
        yield _gauge(
            "edgeroute_engine_silent_seconds", "Since an engine that is waited for made progress.",
            {(name,): value for name, value in self._silent.items()}, "model",
        )  # fmt: skip
        for key, told in SERVER.items():
            value = self._server.get(key)
            if isinstance(value, int | float):
                yield _gauge(f"edgeroute_server_{key}", told, {(): value})


def _gauge(name: str, told: str, values: Mapping[tuple[str, ...], float], *labels: str) -> Metric:
    metric = GaugeMetricFamily(name, told, labels=labels)
    for key, value in values.items():
        metric.add_metric(key, value)
    return metric
