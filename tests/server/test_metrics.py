"""What `/metrics` tells, and that its labels and its counters behave."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import httpx2
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

import edgeroute
from edgeroute.pulse import Pulse
from edgeroute.server.errors import ApiError
from edgeroute.server.metrics import Metrics, routes
from edgeroute.server.metrics_engine import FIGURES, Kept, readings
from edgeroute.server.records import Job, ModelFacts, Models, ServerParams, Services
from edgeroute.skippers.steps import StepPart
from edgeroute.stats import Generation, GenerationStats
from tests.server.asgi import Ask, answer
from tests.server.lab import OneModel, serving

EXPERTS = {"hits": 5, "late": 1, "misses": 4, "evictions": 3, "prefetch_issued": 7,
           "prefetch_useful": 2, "prefetch_wasted": 5, "demand_bytes": 4000,
           "prefetch_bytes": 700, "stall_s": 0.25, "hit_ratio": 0.5}  # fmt: skip
FULL: Mapping[str, object] = {
    "memory": {"weights": 100, "KV cache": 50}, "budget_bytes": 1000, "kv_cells": 64,
    "kv_free_cells": 60, "kv_kept_cells": 3, "reused_cells": 9, "running": 1, "waiting": 2,
    "finished": 5, "decode_steps": 10, "mean_batch": 1.5, "graphs_built": 4, "threads": 1,
    "threads_max": 2, "thread_changes": 3, "load_s": 0.5,
    "losses": {"lost": 2, "opened": 1, "continued": 3, "failed": 1, "down": True},
    "experts": {"policy": "lru", "n_slots": 8, "n_pages": 32, "slots_bytes": 800,
                "decode": EXPERTS, "prefill": EXPERTS},
    "layers": {"resident": 3, "streamed": 5, "bytes": 3000, "stall_s": 0.5},
    "adapters": {"known": 4, "resident": ["a", "b"], "slots": 8, "free_slots": 6, "hits": 2,
                 "misses": 3, "loads": 3, "evictions": 1, "loaded_bytes": 900, "load_s": 0.1,
                 "errors": 0, "auto": {"n_chosen": 6, "n_bypassed": 1, "n_forced": 2,
                                       "n_learned": 3, "adapters": {"secret": {}}}},
    "steps": {"read": {"small": 70, "large": 30}, "passes": {"small": 60, "large": 5}},
    "speculation": {"on": True, "drafted": 20, "accepted": 15, "draft_s": 0.2},
    "sessions": {"saved": 1, "failed": 2, "restored": 3, "refused": 4, "restored_tokens": 50,
                 "read_bytes": 60, "written_bytes": 70, "last_error": None},
    "energy": {"joules": 12.0, "joules_per_token": 0.5, "source": "estimate", "estimated": True,
               "scope": "x", "measured": {"rapl": 8.0}, "modelled": {"estimate": 4.0}},
}  # fmt: skip


class Faked:
    """A Runtime of which only the statistics are asked."""

    def __init__(self, **more: object) -> None:
        self.told = dict(FULL) | more

    def stats(self) -> dict[str, object]:
        return dict(self.told)

    def pulse(self) -> Pulse:
        return Pulse(busy=True, idle_s=1.5, doing="a prompt")


class FakeModels:
    """Configured models, of which some are open."""

    def __init__(self, **runtimes: Faked | None) -> None:
        self.runtimes = runtimes

    @property
    def names(self) -> Sequence[str]:
        return list(self.runtimes)

    def facts(self, name: str) -> ModelFacts:
        if name not in self.runtimes:
            raise ApiError(404, "none")
        state = "closed" if self.runtimes[name] is None else "open"
        return ModelFacts(name=name, state=state, created=1, n_ctx=1, n_bytes=77,
                          adapters=("sql", "poetry"))  # fmt: skip

    def peek(self, name: str) -> Faked | None:
        return self.runtimes[name]

    def snapshot(self) -> Mapping[str, object]:
        return {"budget_bytes": 1000, "used_bytes": 77, "models": []}


def made(**runtimes: Faked | None) -> tuple[Metrics, FakeModels]:
    models = FakeModels(**(runtimes or {"base": None}))
    return Metrics(cast(Models, models)), models


def told(metrics: Metrics) -> Callable[..., float | None]:
    """Return what looks a sample up."""
    metrics.engines.refresh()

    def value(name: str, **labels: str) -> float | None:
        metrics.settle()
        return metrics.registry.get_sample_value(name, labels)

    return value


def generation(**more: Any) -> Generation:
    adapter = more.pop("adapter", None)
    stats = GenerationStats(**({
        "n_prompt": 10, "n_cached": 4, "n_generated": 6, "queue_s": 0.3, "prefill_s": 0.1,
        "ttft_s": 0.5, "decode_s": 1.0, "memory_bytes": 1, "threads": 1,
    } | more))  # fmt: skip
    return Generation(id="g", text="", token_ids=(), finish_reason="stop", stats=stats,
                      adapter=adapter)  # fmt: skip


def job(model: str = "base", **more: Any) -> Job:
    return Job(**({
        "id": "r", "endpoint": "chat", "model": model, "created": 100.0, "started": 100.5,
        "ended": 103.0, "n_prompt": 10, "n_generated": 6, "status": 200,
    } | more))  # fmt: skip


def run(metrics: Metrics, one: Job) -> None:
    metrics.began(one)
    metrics.token(one, 1, 0.8)
    metrics.token(one, 2, 0.2)
    metrics.ended(one)


def test_a_request_is_counted_and_timed() -> None:
    metrics, _ = made()
    one = job(generations=[generation()])
    metrics.began(one)
    value = told(metrics)
    assert value("edgeroute_requests_in_flight", endpoint="chat", model="base") == 1
    metrics.token(one, 1, 0.8)
    metrics.token(one, 2, 0.2)
    assert value("edgeroute_generated_tokens_total", model="base") == 3  # as they come
    metrics.ended(one)
    both = {"endpoint": "chat", "model": "base"}
    assert value("edgeroute_requests_in_flight", **both) == 0
    assert value("edgeroute_requests_total", status="200", **both) == 1
    assert value("edgeroute_request_seconds_sum", **both) == 3.0
    assert value("edgeroute_ttft_seconds_sum", **both) == 0.8
    assert value("edgeroute_token_seconds_count", model="base") == 2
    assert value("edgeroute_token_seconds_sum", model="base") == pytest.approx(0.2)
    assert value("edgeroute_queue_seconds_sum", model="base") == pytest.approx(0.8)
    assert value("edgeroute_prompt_tokens_total", model="base", source="cached") == 4
    assert value("edgeroute_prompt_tokens_total", model="base", source="computed") == 6
    assert value("edgeroute_generated_tokens_total", model="base") == 6


def test_an_embedding_has_a_prompt_and_no_answers() -> None:
    metrics, _ = made()
    one = job(endpoint="embeddings", n_generated=0)
    metrics.began(one)
    metrics.ended(one)
    value = told(metrics)
    assert value("edgeroute_prompt_tokens_total", model="base", source="computed") == 10
    assert value("edgeroute_ttft_seconds_count", endpoint="embeddings", model="base") is None


def test_one_that_was_never_started_has_no_queue() -> None:
    metrics, _ = made()
    run(metrics, job(started=None, status=429))
    assert told(metrics)("edgeroute_queue_seconds_count", model="base") is None


def test_models_that_nobody_configured_share_one_label() -> None:
    metrics, _ = made()
    for i in range(50):
        run(metrics, job(model=f"no-such-{i}", status=404))
    run(metrics, job(model="base:sql"))
    value = told(metrics)
    both = {"endpoint": "chat"}
    assert value("edgeroute_requests_total", model="unknown", status="404", **both) == 50
    assert value("edgeroute_requests_total", model="base", status="200", **both) == 1
    families = {f.name: f for f in metrics.registry.collect()}
    assert len(families["edgeroute_requests"].samples) == 4  # two, and when they were made


def test_adapters_that_nobody_configured_share_labels_too() -> None:
    metrics, _ = made()
    for name in (None, "sql", "sql:0.5+poetry:0.5", "who"):
        run(metrics, job(generations=[generation(adapter=name)]))
    value = told(metrics)
    for label in ("none", "sql", "mixed", "unknown"):
        found = value("edgeroute_adapter_answers_total", model="base", adapter=label)
        assert found == 1, label


def test_steps_and_layers_are_counted_by_token() -> None:
    metrics, _ = made()
    parts = (
        StepPart(index=0, model="small", n_tokens=4),
        StepPart(index=1, model="large", n_tokens=2),
    )
    depth = {"plan": "p", "layers_run": 20, "layers_total": 24, "compute": 0.8, "kl": 0.1}
    run(metrics, job(generations=[generation(steps=parts, depth=depth)]))
    value = told(metrics)
    assert value("edgeroute_step_tokens_total", model="base", writer="small") == 4
    assert value("edgeroute_step_tokens_total", model="base", writer="large") == 2
    assert value("edgeroute_depth_layers_total", model="base", outcome="run") == 120
    assert value("edgeroute_depth_layers_total", model="base", outcome="skipped") == 24


def test_refusals_are_counted_by_status() -> None:
    metrics, _ = made()
    for status in (401, 401, 413):
        metrics.answered(status, 0.1)
    assert told(metrics)("edgeroute_http_answers_total", status="401") == 2


def test_every_figure_of_an_engine_is_told() -> None:
    for figure in FIGURES:
        assert readings(figure, FULL), figure.name
        assert not readings(figure, {}), figure.name
        assert figure.told.endswith(".")
        for labels in readings(figure, FULL):
            assert [name for name, _ in labels] == figure.label_names, figure.name


def test_figures_are_where_they_should_be() -> None:
    metrics, _ = made(base=Faked())
    value = told(metrics)
    base = {"model": "base"}
    assert value("edgeroute_memory_bytes", owner="weights", **base) == 100
    assert value("edgeroute_kv_cells", state="free", **base) == 60
    both = base | {"phase": "decode"}
    assert value("edgeroute_expert_requests_total", result="misses", **both) == 4
    assert value("edgeroute_expert_prefetches_total", outcome="useful", **both) == 2
    assert value("edgeroute_expert_stall_seconds_total", **both) == 0.25
    assert value("edgeroute_disk_read_bytes_total", kind="experts", **base) == 2 * 4700
    assert value("edgeroute_disk_read_bytes_total", kind="layers", **base) == 3000
    assert value("edgeroute_adapters", state="resident", **base) == 2
    assert value("edgeroute_adapter_decisions_total", kind="forced", **base) == 2
    assert value("edgeroute_step_read_tokens_total", writer="small", **base) == 70
    assert value("edgeroute_model_state", state="open", **base) == 1
    assert value("edgeroute_model_bytes", **base) == 77
    assert value("edgeroute_engine_silent_seconds", **base) == 1.5
    assert value("edgeroute_server_budget_bytes") == 1000
    joules = "edgeroute_energy_joules_total"
    assert value(joules, estimated="false", source="rapl", **base) == 8
    assert value(joules, estimated="true", source="estimate", **base) == 4
    assert value("edgeroute_energy_joules_per_token", **base) == 0.5
    assert value("edgeroute_server_lost_bytes") is None  # not every fleet tells


def test_counters_go_on_where_a_model_is_opened_again() -> None:
    metrics, models = made(base=Faked())
    assert told(metrics)("edgeroute_decode_steps_total", model="base") == 10
    models.runtimes["base"] = None
    value = told(metrics)
    assert value("edgeroute_decode_steps_total", model="base") == 10
    assert value("edgeroute_threads", model="base") is None  # a closed model has no gauges
    assert value("edgeroute_model_bytes", model="base") == 0
    models.runtimes["base"] = Faked(decode_steps=12)  # more than before, and yet begun anew
    assert told(metrics)("edgeroute_decode_steps_total", model="base") == 22
    models.runtimes["base"].told["decode_steps"] = 15
    assert told(metrics)("edgeroute_decode_steps_total", model="base") == 25


def test_a_counter_never_sinks() -> None:
    kept, runtime = Kept(), Faked()
    for value in (5.0, 3.0, 6.0):
        kept.take(cast(edgeroute.Runtime, runtime), {("n", ()): value})
        assert kept.totals()[("n", ())] >= 5.0
    assert kept.totals()[("n", ())] == 6.0


def test_owners_of_memory_are_bounded() -> None:
    metrics, _ = made(base=Faked(memory={f"owner {i}": 1 for i in range(500)}))
    metrics.engines.refresh()
    families = {f.name: f for f in metrics.registry.collect()}
    assert len(families["edgeroute_memory_bytes"].samples) == 64


def _services(metrics: Metrics, models: object) -> Services:
    return Services(params=ServerParams(), models=cast(Models, models), observers=(metrics,))


@pytest.mark.parametrize(
    "accept",
    ["", "text/plain", "application/openmetrics-text", "application/openmetrics-text; version=x",
     "text/plain; version=1.0.0; escaping=allow-utf-8", "\x00,;==;version=1e999"],
)  # fmt: skip
def test_it_is_served_in_both_formats_and_parses(accept: str) -> None:
    """The library's own choice of a format fails on some Accept headers."""
    metrics, models = made(base=Faked(), other=None)
    run(metrics, job(generations=[generation()]))
    (route,) = routes(_services(metrics, models), metrics)
    reply = answer(route, Ask(path="/metrics", headers=[("accept", accept)]))
    assert reply.status == 200
    text = reply.body.decode()
    newer = accept.startswith("application/openmetrics-text")
    assert reply["content-type"].startswith("application/openmetrics" if newer else "text/plain")
    families = {family.name: family for family in (parse_open if newer else parse)(text)}
    assert "_created" not in text
    for family in families.values():
        if family.name.startswith("edgeroute_"):
            assert family.documentation.endswith("."), family.name
    assert families["edgeroute_requests"].samples[0].value == 1


def test_a_real_engine_is_read_while_it_answers(tiny: edgeroute.Runtime) -> None:
    models = OneModel(tiny)
    metrics = Metrics(models)
    services = _services(metrics, models)
    with serving(services, routes(services, metrics)) as base:
        before = httpx2.get(base + "/metrics").text
        tiny.generate("a b c", max_tokens=8, temperature=0.0)
        after = httpx2.get(base + "/metrics").text
    found = {family.name: family for family in parse(after)}
    assert found["edgeroute_decode_steps"].samples[0].value >= 7
    assert found["edgeroute_engine_finished"].samples[0].value == 1
    assert {s.labels["model"] for s in found["edgeroute_memory_bytes"].samples} == {"base"}
    assert sum(s.value for s in found["edgeroute_memory_bytes"].samples) > 0
    assert "edgeroute_engine_finished_total" in before


def test_many_scrapes_at_once(tiny: edgeroute.Runtime) -> None:
    models = OneModel(tiny)
    metrics = Metrics(models)
    (route,) = routes(_services(metrics, models), metrics)

    async def several() -> list[bytes]:
        replies = await asyncio.gather(*(Ask(path="/metrics")(route) for _ in range(20)))
        return [reply.body for reply in replies]

    assert all(b"edgeroute_kv_cells" in body for body in asyncio.run(several()))
