"""`/metrics` for Prometheus: what was asked, how long it took, and what the engines did for it.

Labels have few values: names of configured models and of their adapters, and else `unknown`.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edgeroute.server.metrics_engine import EngineMetrics
from edgeroute.server.records import Job, Models, Services
from edgeroute.stats import Generation

UNKNOWN, NONE, MIXED = "unknown", "none", "mixed"
ANSWER_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
FIRST_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
TOKEN_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1, 2.5,
)  # fmt: skip
QUEUE_BUCKETS: Final = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
MAX_COUNTED: Final = 64
"""Tokens of one piece that the histogram of tokens counts one by one."""
MAX_NOTED: Final = 64
"""Pieces of an answer that are noted before they are counted."""


class _Tokens:
    """Tokens of a request under way, noted as they come and counted now and then.

    What is done for every token is done between two passes of a model, with cold caches.
    """

    def __init__(self, counter: Counter, times: Histogram) -> None:
        self.n = 0
        self._counter, self._times = counter, times
        self._n_noted = 0
        self._noted: list[tuple[int, float]] = []

    def note(self, n_tokens: int, seconds: float | None) -> None:
        """Note tokens that came together; None where it is not told after what."""
        self.n += n_tokens
        self._n_noted += n_tokens
        if seconds is not None and n_tokens > 0:
            self._noted.append((n_tokens, seconds))
            if len(self._noted) >= MAX_NOTED:
                self.settle()

    def settle(self) -> None:
        """Count what was noted."""
        self._counter.inc(self._n_noted)
        for n_tokens, seconds in self._noted:
            for _ in range(min(n_tokens, MAX_COUNTED)):
                self._times.observe(seconds / n_tokens)
        self._n_noted = 0
        self._noted.clear()


class Metrics:
    """Counts requests. An Observer; with `answered` it also hears of what the guards refuse.

    Args:
        models: whose names labels may have, and whose engines are asked.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self.registry = CollectorRegistry()
        self.engines = EngineMetrics(models)
        self.registry.register(self.engines)
        ProcessCollector(registry=self.registry)
        self._tokens: dict[int, _Tokens] = {}  # of requests under way, by identity
        self._make_counters()
        self._make_histograms()

    def _make_counters(self) -> None:
        counter = partial(Counter, registry=self.registry)
        self._answers = counter(
            "edgeroute_http_answers", "Answers of every kind, refusals included; 499: the client "
            "left before.", ["status"])  # fmt: skip
        self._requests = counter(
            "edgeroute_requests", "Requests that computed or waited to, by how they ended; 499: "
            "the client left.", ["endpoint", "model", "status"])  # fmt: skip
        self._in_flight = Gauge(
            "edgeroute_requests_in_flight", "Requests that compute or wait to.",
            ["endpoint", "model"], registry=self.registry)  # fmt: skip
        self._prompt = counter(
            "edgeroute_prompt_tokens", "Tokens of prompts: computed, or cached, which were not "
            "computed again.", ["model", "source"])  # fmt: skip
        self._generated = counter("edgeroute_generated_tokens", "Tokens of answers.", ["model"])
        self._adapters = counter(
            "edgeroute_adapter_answers", "Answers by the adapter that served them.",
            ["model", "adapter"])  # fmt: skip
        self._steps = counter(
            "edgeroute_step_tokens", "Tokens of answers in steps by who wrote them.",
            ["model", "writer"])  # fmt: skip
        self._layers = counter(
            "edgeroute_depth_layers", "Layers of answers under a depth plan, one for each token "
            "of the answer: run or skipped.", ["model", "outcome"])  # fmt: skip

    def _make_histograms(self) -> None:
        histogram = partial(Histogram, registry=self.registry)
        self._seconds = histogram(
            "edgeroute_request_seconds", "From a request to the end of its answer.",
            ["endpoint", "model"], buckets=ANSWER_BUCKETS)  # fmt: skip
        self._queue = histogram(
            "edgeroute_queue_seconds", "From a request to its first computation: for its model "
            "to be opened, for cells, for others.", ["model"], buckets=QUEUE_BUCKETS)  # fmt: skip
        self._ttft = histogram(
            "edgeroute_ttft_seconds", "From a request to the first token of its answer.",
            ["endpoint", "model"], buckets=FIRST_BUCKETS)  # fmt: skip
        self._token = histogram(
            "edgeroute_token_seconds", "Between two tokens of an answer.", ["model"],
            buckets=TOKEN_BUCKETS)  # fmt: skip

    # of guards

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer of any kind."""
        self._answers.labels(str(status)).inc()

    # of requests that compute

    def began(self, job: Job) -> None:
        """Count a request in."""
        self._in_flight.labels(job.endpoint, self._model(job)).inc()

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Count tokens that came together."""
        tokens = self._tokens.get(id(job))
        if tokens is None:
            model = self._model(job)
            self._ttft.labels(job.endpoint, model).observe(seconds)
            tokens = _Tokens(self._generated.labels(model), self._token.labels(model))
            self._tokens[id(job)] = tokens
            tokens.note(n_tokens, None)
        else:
            tokens.note(n_tokens, seconds)

    def settle(self) -> None:
        """Count what requests under way have noted; to be called before the registry is read."""
        for tokens in self._tokens.values():
            tokens.settle()

    def ended(self, job: Job) -> None:
        """Count a request out, with all that its answers cost."""
        model = self._model(job)
        tokens = self._tokens.pop(id(job), None)
        if tokens is not None:
            tokens.settle()
        self._in_flight.labels(job.endpoint, model).dec()
        self._requests.labels(job.endpoint, model, str(job.status or UNKNOWN)).inc()
        ended = job.created if job.ended is None else job.ended
        self._seconds.labels(job.endpoint, model).observe(ended - job.created)
        queued = [answer.stats.queue_s for answer in job.generations]
        if job.started is not None:
            wait_s = job.started - job.created + min(queued, default=0.0)
            self._queue.labels(model).observe(wait_s)
        n_cached = sum(answer.stats.n_cached for answer in job.generations)
        n_prompt = sum(answer.stats.n_prompt for answer in job.generations) or job.n_prompt
        self._prompt.labels(model, "cached").inc(n_cached)
        self._prompt.labels(model, "computed").inc(max(0, n_prompt - n_cached))
        n_counted = 0 if tokens is None else tokens.n
        self._generated.labels(model).inc(max(0, job.n_generated - n_counted))
        for answer in job.generations:
            self._adapters.labels(model, self._adapter(model, answer.adapter)).inc()
            self._decided(model, answer)

    def _decided(self, model: str, answer: Generation) -> None:
        for part in answer.stats.steps or ():
            self._steps.labels(model, part.model).inc(part.n_tokens)
        depth = answer.stats.depth or {}
        n_run, n_all = depth.get("layers_run"), depth.get("layers_total")
        if isinstance(n_run, int | float) and isinstance(n_all, int | float):
            n_tokens = answer.stats.n_generated
            self._layers.labels(model, "run").inc(n_run * n_tokens)
            self._layers.labels(model, "skipped").inc(max(0.0, n_all - n_run) * n_tokens)

    def _model(self, job: Job) -> str:
        names = self._models.names
        base = job.model.partition(":")[0]
        return job.model if job.model in names else base if base in names else UNKNOWN

    def _adapter(self, model: str, adapter: str | None) -> str:
        if adapter is None or model == UNKNOWN:
            return NONE if adapter is None else UNKNOWN
        if adapter in self._models.facts(model).adapters:
            return adapter
        return MIXED if ":" in adapter else UNKNOWN


class _Tidy(Collector):
    """A registry without the times at which its counters were made: a series more for each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def routes(services: Services, metrics: Metrics) -> list[BaseRoute]:
    """Return the route that Prometheus asks."""

    async def show(request: Request) -> Response:
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            kind, write = openmetrics.CONTENT_TYPE_LATEST, partial(openmetrics.generate_latest)
        else:
            kind, write = CONTENT_TYPE_PLAIN_0_0_4, partial(generate_latest)
        metrics.engines.refresh()
        metrics.settle()
        text = await asyncio.to_thread(write, _Tidy(metrics.registry))
        return Response(text, headers={"content-type": kind})

    return [Route("/metrics", show)]
