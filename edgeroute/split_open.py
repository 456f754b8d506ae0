"""Opens a model whose layers are on several devices, and accounts for it on each of them."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgeroute.adapters import slots_bytes
from edgeroute.depth import Depth
from edgeroute.devices_open import Devices
from edgeroute.memory_plan import MemoryPlan, kv_shape, logits_bytes, plan_parts
from edgeroute.models.split import SplitForward, homes_of
from edgeroute.placing import Source, SplitPlan, layers_on
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_group import DeviceGroup
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.ledger import COMPUTE_BUFFER, Ledger
from edgeroute.runtime.placed_weights import PlacedWeights
from edgeroute.runtime.placement import Placement

WEIGHTS, KV_CACHE, SLOTS = "weights", "KV cache", "adapter slots"
STANDINS, STREAM, SMALL = "stand-ins", "layer stream", "small model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A model on its devices, and the accounts of these by name; `plan` is of the processor."""

    plan: MemoryPlan
    kv: KvCache
    forward: SplitForward
    ledgers: dict[str, Ledger]


def open_split(
    own: contextlib.ExitStack, source: Source, devices: Devices, split: SplitPlan, ledger: Ledger
) -> Split:
    """Enter what a model takes on every device, and place it there; `own` frees it.

    The caller closes the forward, and enters what compute buffers and adapters really take.

    Raises:
        CapacityError: a device has too little memory; nothing stays allocated.
        DeviceLostError: a device went away meanwhile.
    """
    placement, homes = split.placement, homes_of(split.placement)
    rows = source.rows(placement)
    if source.depth is not None:
        source.depth.place(homes)
    weights = own.enter_context(PlacedWeights(
        source.file, source.model.specs(), homes, repack_experts=source.params.repack_experts
    ))  # fmt: skip
    wants = _wants(source, placement, weights, rows)
    plan = _host_plan(source, split, weights, wants)
    on_the_way = {STREAM: 2 * source.stream_bytes + wants.get(placement.cpu, {}).get(STREAM, 0)}
    ledger.reserve(plan.wants() | on_the_way)
    ledgers = {placement.cpu.info.name: ledger}
    for room in split.rooms:
        name = room.device.info.name
        ledgers[name] = account = Ledger(room.budget_bytes + room.held_bytes, name)
        if room.held_bytes:
            account.reserve({SMALL: room.held_bytes})
        if mine := wants.get(room.device):
            account.reserve(mine)
            if room.device.info.unified:
                ledger.reserve({f"on {name}, which shares this memory": account.used_bytes})
    weights.load()
    kv = KvCache(rows, kv_shape(source.hparams, source.params, source.n_repeat), source.n_cells)
    own.callback(kv.close)
    assert isinstance(devices.face, DeviceGroup)
    devices.face.note(f"layers {placement.of_layer}, head {placement.of_head}")
    forward = SplitForward(source.model, devices.face, placement, weights, kv)
    forward.grown = _booking(ledgers)
    return Split(plan=plan, kv=kv, forward=forward, ledgers=ledgers)


def _wants(
    source: Source, placement: Placement, weights: PlacedWeights, rows: Sequence[Device]
) -> dict[Device, dict[str, int]]:
    """List ledger entries of every device that computes; alignment of keys is theirs."""
    found = {}
    targets = () if source.adapters is None else source.adapters.targets
    homes = homes_of(placement)
    with contextlib.closing(source.weights_on(placement.cpu)) as all_of:
        plan = plan_parts(source.hparams, all_of, source.params, (source.depth, source.adapters))
    logits = logits_bytes(source.hparams, source.params)
    for device in placement.devices:
        _, head = layers_on(placement, device)
        entries = {
            WEIGHTS: weights.bytes_on(device),
            KV_CACHE: source.row_bytes() * rows.count(device),
            COMPUTE_BUFFER: plan.compute_bytes - logits * (not head),
            STREAM: source.stream_bytes,
        }
        mine = [each for each in targets if homes(f"{each.name}.weight")[0] is device]
        if source.adapters is not None and mine:
            adapters = source.adapters
            entries[SLOTS] = slots_bytes(mine, adapters.rank, adapters.n_slots)
        if isinstance(source.depth, Depth) and isinstance(source.depth.standins, PlacedWeights):
            entries[STANDINS] = source.depth.standins.bytes_on(device)
        found[device] = {owner: n_bytes for owner, n_bytes in entries.items() if n_bytes}
    return found


def _host_plan(
    source: Source, split: SplitPlan, weights: PlacedWeights, wants: Mapping[Device, dict[str, int]]
) -> MemoryPlan:
    """Plan what this process takes: the processor's layers, and embeddings on their way."""
    cpu = split.placement.cpu
    mine = wants.get(cpu, {})
    own = weights.on[cpu].plan
    sessions = plan_parts(source.hparams, weights.on[cpu], source.params, (source.depth, None))
    return MemoryPlan(
        weights=replace(own, repacked=weights.plan.repacked), kv_bytes=mine.get(KV_CACHE, 0),
        compute_bytes=mine.get(COMPUTE_BUFFER, 0) + source.stream_bytes,
        adapter_bytes=mine.get(SLOTS, 0), standin_bytes=mine.get(STANDINS, 0),
        session_bytes=sessions.session_bytes,
    )  # fmt: skip


def _booking(ledgers: Mapping[str, Ledger]) -> Callable[[Device, int], None]:
    """Return what enters a device's compute buffer; this process's is entered with its passes."""

    def book(device: Device, n_bytes: int) -> None:
        if not device.is_cpu:
            ledgers[device.info.name].replace(COMPUTE_BUFFER, n_bytes)

    return book
