"""What the dashboard is told of one open model, picked from its statistics."""

from collections.abc import Mapping
from typing import Any, Final

from edgeroute.engine import Runtime

EXPERT_COUNTS: Final = ("hits", "late", "misses", "demand_bytes", "prefetch_bytes", "stall_s")
MAX_ADAPTERS: Final = 64
"""Names told in a snapshot; the number of all is told beside them."""

Figures = dict[str, Any]


def figures(stats: Mapping[str, Any], before: Figures | None = None) -> Figures:
    """Pick what is shown of a model.

    Args:
        stats: as `Runtime.stats` returns them.
        before: what this returned for the same model a moment ago; tells what is new since.

    Returns:
        Plain JSON types. Groups of a lever that the model does not use are None.
    """
    experts = _experts(stats.get("experts"), None if before is None else before["experts"])
    return {
        "arch": stats["arch"],
        "memory": {
            "budget_bytes": stats["budget_bytes"],
            "used_bytes": stats["memory_bytes"],
            "owners": stats["memory"],
        },
        "kv": {
            "cells": stats["kv_cells"],
            "free": stats["kv_free_cells"],
            "kept": stats["kv_kept_cells"],
            "reused": stats["reused_cells"],
        },
        "running": stats["running"],
        "waiting": stats["waiting"],
        "finished": stats["finished"],
        "decode_steps": stats["decode_steps"],
        "mean_batch": stats["mean_batch"],
        "threads": stats["threads"],
        "threads_max": stats["threads_max"],
        "experts": experts,
        "layers": stats.get("layers"),
        "adapters": _adapters(stats.get("adapters")),
        "depth": _only(
            stats.get("depth"), "plan", "on", "reason", "layers_run", "layers_total", "compute"
        ),
        "steps": _only(stats.get("steps"), "policy", "on", "why", "read", "passes", "costs"),
        "speculation": _only(
            stats.get("speculation"),
            "on",
            "why",
            "source",
            "drafted",
            "accepted",
            "tokens_per_pass",
        ),
    }


def residency(runtime: Runtime) -> Figures | None:
    """Tell which experts and layers are in memory; None where everything always stays.

    Returns:
        `experts` with `n_expert` and `layers`, pairs of a layer's number and a bitmap in
        hexadecimal digits whose lowest bit is expert 0; `layers` with the numbers of those
        that are `resident` and `streamed`. Nothing that changes without a load is in it.
    """
    found: Mapping[str, Any] = runtime.residency() or {}
    told = {
        "experts": _only(found.get("experts"), "n_expert", "layers"),
        "layers": _only(found.get("layers"), "n_layer", "resident", "streamed"),
    }
    return {name: group for name, group in told.items() if group is not None} or None


def _experts(now: Mapping[str, Any] | None, before: Figures | None) -> Figures | None:
    """Sum decode and prefill, and tell the share of hits since the last reading."""
    if now is None:
        return None
    kinds = (now["decode"], now["prefill"])
    found: Figures = {name: sum(kind[name] for kind in kinds) for name in EXPERT_COUNTS}
    found["stall_s"] = round(found["stall_s"], 6)
    asked = found["hits"] + found["late"] + found["misses"]
    found["hit_ratio"] = round(found["hits"] / asked, 4) if asked else None
    found["hit_ratio_now"] = None if before is None else _recent_ratio(found, before)
    for name in ("n_slots", "n_pages", "slots_bytes", "policy", "prefetch", "overlap", "warning"):
        found[name] = now[name]
    return found


def _recent_ratio(now: Figures, before: Figures) -> float | None:
    hits, late, misses = (now[name] - before[name] for name in ("hits", "late", "misses"))
    asked = hits + late + misses
    # A model that was opened anew counts from zero.
    return round(hits / asked, 4) if asked > 0 and min(hits, late, misses) >= 0 else None


def _adapters(now: Mapping[str, Any] | None) -> Figures | None:
    if now is None:
        return None
    resident = list(now["resident"])
    names = ("known", "slots", "free_slots", "hits", "misses", "hit_ratio", "loads", "evictions",
             "loaded_bytes", "load_s")  # fmt: skip
    return {name: now[name] for name in names} | {
        "resident": resident[:MAX_ADAPTERS],
        "n_resident": len(resident),
    }


def _only(group: Mapping[str, Any] | None, *names: str) -> Figures | None:
    return None if group is None else {name: group[name] for name in names if name in group}
