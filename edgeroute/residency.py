"""Which weights are in memory right now, for whoever looks from another thread."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.offload.device_tier import DeviceTier
    from edgeroute.offload.expert_pool import ExpertPool
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.offload.layer_store import LayerStore


def residency(loaded: "LoadedModel") -> dict[str, object] | None:
    """Return what is where, as plain JSON types; None where everything always stays.

    All of it comes from copies that are made at once, one per table: what the engine does
    meanwhile cannot break it, though two tables may be a moment apart.
    """
    found: dict[str, object] = {}
    if loaded.experts is not None:
        found["experts"] = _experts(loaded.experts)
    if loaded.layers is not None:
        found["layers"] = _layers(loaded.layers, loaded.model.hparams.n_layer)
    if loaded.adapters is not None:
        store = loaded.adapters.store
        found["adapters"] = {"known": store.names, "resident": store.resident}
    return found or None


def _experts(store: "ExpertStore | DeviceTier") -> dict[str, object]:
    """Tell which experts are in slots, by layer; `device` tells it of a tier above.

    `layers` has pairs of a layer's number and a bitmap in hexadecimal digits, the lowest bit
    of its number being expert 0. `leased` of them, and of those on their way, are in use.
    """
    tiers = {name: _slots(pools) for name, pools in store.tiers.items()}
    return tiers.pop("dram") | tiers


def _slots(pools: "Sequence[ExpertPool]") -> dict[str, object]:
    bits: dict[int, int] = {}
    n_expert = n_slots = n_leased = 0
    for pool in pools:
        plan = pool.plan
        n_expert = plan.n_expert
        bits |= dict.fromkeys((layer.il for layer in plan.layers), 0)
        for page in pool.table.resident():
            il, expert = divmod(page, n_expert)
            bits[il] |= 1 << expert
        n_slots += pool.table.n_slots
        n_leased += pool.table.n_pinned
    n_digits = -(-n_expert // 4)
    return {
        "n_layer": len(bits),
        "n_expert": n_expert,
        "n_slots": n_slots,
        "resident": sum(each.bit_count() for each in bits.values()),
        "leased": n_leased,
        "layers": [[il, f"{bits[il]:0{n_digits}x}"] for il in sorted(bits)],
    }


def _layers(store: "LayerStore", n_layer: int) -> dict[str, object]:
    """Tell which layers stay; number `n_layer` is the head."""
    streamed = store.streamed
    units = range(n_layer + 1)
    return {
        "n_layer": n_layer,
        "resident": [unit for unit in units if unit not in streamed],
        "streamed": sorted(streamed),
        "rooms": [unit for unit in store.in_rooms() if unit is not None],
    }
