"""What a Runtime holds and has done, read while its engine thread goes on."""

from typing import TYPE_CHECKING

from edgeroute.lever_guard import lever_stats, why_no_drafts

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.offload.device_tier import DeviceTier
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.scheduler import Scheduler


def warnings_of(loaded: "LoadedModel") -> list[str]:
    """Return what a user of a model should know before its answers are trusted or waited for."""
    found = list(loaded.warnings)
    if loaded.devices.accelerators:
        # A model on the processor should not wait for this import.
        from edgeroute.device_choice import warning_of

        told = (warning_of(device, loaded.file, loaded.params.kv_type)
                for device in loaded.devices.accelerators)  # fmt: skip
        found += [each for each in told if each is not None]
    if loaded.misses is not None:
        from edgeroute.misses import warning_of as idle_of

        found += [each for each in (idle_of(loaded),) if each is not None]
    if loaded.experts is not None and (cliff := loaded.experts.stats().get("warning")):
        found.append(str(cliff))
    return found


def devices_stats(loaded: "LoadedModel") -> dict[str, dict[str, object]]:
    """Return what is used of the memory of each device, by its name, as plain JSON types.

    `layers` are those that it computes; experts may be on other devices, see `experts`.
    """
    forward, n_layer = loaded.forward, loaded.model.hparams.n_layer
    on = [forward.device_of(f"blk.{il}.").info.name for il in range(n_layer)]
    found: dict[str, dict[str, object]] = {}
    for name, ledger in loaded.ledgers.items():
        found[name] = {
            "budget_bytes": ledger.budget_bytes,
            "used_bytes": ledger.used_bytes,
            "entries": {entry.owner: entry.n_bytes for entry in ledger.entries()},
            "layers": [il for il, at in enumerate(on) if at == name],
        }
    return found


def experts_stats(loaded: "LoadedModel", store: "ExpertStore | DeviceTier") -> dict[str, object]:
    """Return what paged experts cost, and what tokens did without, as plain JSON types."""
    found = store.stats()
    if loaded.misses is not None:
        # Models that compute all their experts should not wait for its import.
        from edgeroute.misses import miss_stats

        found["done_without"] = miss_stats(loaded.misses, store)
    return found


def drafts_stats(loaded: "LoadedModel", scheduler: "Scheduler") -> dict[str, object]:
    """Return what drafts have brought, or why there are none, as plain JSON types."""
    if scheduler.speculation is None:
        return {"on": False, "why": why_no_drafts(loaded, loaded.params.speculate)}
    return scheduler.speculation.stats()


def runtime_stats(
    loaded: "LoadedModel", scheduler: "Scheduler", *, n_queued: int
) -> dict[str, object]:
    """Return all figures as plain JSON types.

    Args:
        loaded: the model.
        scheduler: what runs on it.
        speculate: the setting of that name.
        n_queued: requests that the engine thread has not taken yet.
    """
    steps = scheduler.n_decode_steps
    entries = loaded.ledger.entries()
    plan = loaded.depth or loaded.no_depth
    depth = {} if plan is None else {"depth": plan.stats()}
    experts = {} if loaded.experts is None else {"experts": experts_stats(loaded, loaded.experts)}
    layers = {} if loaded.layers is None else {"layers": loaded.layers.stats()}
    adapters = {} if loaded.adapters is None else {"adapters": loaded.adapters.stats()}
    routing = {} if scheduler.steps is None else {"steps": scheduler.steps.stats()}
    sessions = {} if scheduler.sessions is None else {"sessions": scheduler.sessions.stats()}
    energy = {} if scheduler.energy is None else {"energy": scheduler.energy.stats()}
    drafts = drafts_stats(loaded, scheduler)
    return (
        {
            "model": str(loaded.file.path),
            "arch": loaded.model.hparams.arch,
            "device": loaded.device.info.name,
            "warnings": warnings_of(loaded),
            "load_s": round(loaded.load_s, 6),
            "memory": {entry.owner: entry.n_bytes for entry in entries},
            "memory_bytes": sum(entry.n_bytes for entry in entries),
            "budget_bytes": loaded.ledger.budget_bytes,
            "devices": devices_stats(loaded),
            "kv_cells": loaded.kv.n_cells,
            "kv_free_cells": loaded.kv.n_free_cells,
            "kv_kept_cells": scheduler.prefix.n_kept_cells,
            "reused_cells": scheduler.prefix.n_reused_cells,
            "running": scheduler.n_running,
            "waiting": scheduler.n_waiting + n_queued,
            "finished": scheduler.n_finished,
            "embedded": scheduler.n_embedded,
            "prompt_passes": scheduler.prompts.n_passes,
            "prompt_batches": scheduler.prompts.n_batches,
            "decode_steps": steps,
            "mean_batch": round(scheduler.n_decode_tokens / steps, 3) if steps else 0.0,
            "graphs_built": loaded.forward.graphs.n_built,
            "threads": scheduler.threads.n_threads,
            "threads_max": scheduler.threads.n_max,
            "thread_changes": scheduler.threads.n_changes,
        }
        | experts
        | layers
        | adapters
        | {"speculation": drafts, "levers": lever_stats(loaded, scheduler)}
        | depth
        | routing
        | sessions
        | energy
    )
