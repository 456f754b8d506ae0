"""Missing experts that tokens do without, as settings ask: who may, and what came of it."""

from typing import TYPE_CHECKING

from edgeroute.config import RunParams
from edgeroute.models.base import Hparams
from edgeroute.offload.expert_stats import bytes_of
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.misses import MissLevers

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.offload.device_tier import DeviceTier
    from edgeroute.offload.expert_copies import ExpertCopies


def miss_levers(params: RunParams, hparams: Hparams, name: str) -> MissLevers:
    """Make what decides for a model.

    Raises:
        UsageError: `name`, the model, has no experts.
    """
    if hparams.moe is None:
        asked = ", ".join(f"{each}={value:g}" for each, value in params.lossy.items())
        raise UsageError(f"{asked} is for mixtures of experts, and {name} is a dense model; leave "
                         "it out, or take depth= to compute less of a dense one")  # fmt: skip
    return MissLevers(drop_misses=params.drop_misses, prefer_resident=params.prefer_resident,
                      degrade_misses=params.degrade_misses)  # fmt: skip


def warning_of(loaded: "LoadedModel") -> str | None:
    """Say that the settings have nothing to do where all experts are in memory."""
    params = loaded.params
    if params.degrade_misses and loaded.experts is not None and _copies(loaded.experts) is None:
        return ("degrade_misses changes nothing: experts on a device have no copies beside them; "
                "leave it out, or compute with --device cpu")  # fmt: skip
    if not params.lossy or loaded.experts is not None:
        return None
    return (f"{', '.join(loaded.params.lossy)} changes nothing: all experts are in memory, so "
            "none is ever missing")  # fmt: skip


def miss_stats(levers: MissLevers, store: "ExpertStore | DeviceTier") -> dict[str, object]:
    """Return what tokens did without so far, as plain JSON types.

    `dropped` and `replaced` count experts of a token and layer, `saved_experts` those that were
    not read for it, of `saved_bytes`. `degraded` were computed from `copies` of fewer bits.
    """
    copies = _copies(store)
    return {
        "drop_misses": levers.drop_misses, "prefer_resident": levers.prefer_resident,
        "degrade_misses": levers.degrade_misses, "dropped": levers.dropped,
        "replaced": levers.replaced, "degraded": levers.degraded,
        "saved_experts": levers.saved.total(), "saved_bytes": bytes_of(store.pools, levers.saved),
        "copies": None if copies is None else copies.stats(),
    }  # fmt: skip


def _copies(store: "ExpertStore | DeviceTier") -> "ExpertCopies | None":
    return store.copies if isinstance(store, ExpertStore) else None
