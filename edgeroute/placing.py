"""Decides what of a model goes on which device, and accounts for it there."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeroute.adapters import AdapterPlan, slots_bytes
from edgeroute.config import RunParams
from edgeroute.depth import Depth, DepthSource
from edgeroute.device_support import Probe, unsupported
from edgeroute.devices_open import Devices
from edgeroute.memory_plan import kv_shape, logits_bytes, plan_parts
from edgeroute.models.base import Hparams, Model
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.placement import Placement
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.runtime.weights import ResidentWeights

DEVICE_RESERVE_RATIO = 0.05
"""Of a device's free memory, what stays for its driver and for others."""
EMBEDDING = "token_embd."
_UNKNOWN = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that is being opened, and what runs beside it."""

    file: GGUFFile
    model: Model
    params: RunParams
    depth: DepthSource | None = None
    adapters: AdapterPlan | None = None

    @property
    def hparams(self) -> Hparams:
        """The model's."""
        return self.model.hparams

    @property
    def n_cells(self) -> int:
        """Cells of the KV pool."""
        return round_cells(self.params.n_kv or self.params.n_ctx)

    @property
    def n_ubatch(self) -> int:
        """Tokens of a pass, at most."""
        return min(self.params.n_ubatch, self.n_cells)

    @property
    def n_repeat(self) -> int:
        """Passes beyond the first over any layers."""
        return 0 if self.depth is None else self.depth.n_repeats

    @property
    def stream_bytes(self) -> int:
        """Bytes of what one stretch of layers hands on to the next."""
        return 4 * self.n_ubatch * self.hparams.n_embd

    def probe(self) -> Probe:
        """Return what a device's support and speed are asked with."""
        shape = kv_shape(self.hparams, self.params)
        return Probe(
            file=self.file, model=self.model, kv=shape, n_ubatch=self.n_ubatch,
            adapters=self.adapters is not None,
        )  # fmt: skip

    def row_bytes(self) -> int:
        """Bytes of the keys and values of one pass over one layer."""
        shape = kv_shape(self.hparams, self.params, self.n_repeat)
        return shape.bytes_per_cell // shape.n_rows * self.n_cells

    def weights_on(self, device: Device) -> ResidentWeights:
        """Describe all weights but the embeddings, which are the processor's, on one device."""
        specs = [spec for spec in self.model.specs() if not spec.name.startswith(EMBEDDING)]
        repack = self.params.repack_experts
        return ResidentWeights(self.file, device, specs, repack_experts=repack)

    def rows(self, placement: Placement) -> list[Device]:
        """Return the device of every row of keys and values.

        Raises:
            UsageError: routers decide which layer a further pass is over, and layers are on
                several devices.
        """
        layers = [placement.device(il) for il in range(self.hparams.n_layer)]
        if not self.n_repeat:
            return layers
        if isinstance(self.depth, Depth):
            return layers + [layers[il] for il in self.depth.rows()]
        if len(set(layers)) > 1:
            raise UsageError(
                "depth='routed' may pass a layer again, whose keys have no place where layers are "
                "on several devices; name one device that holds all, or another depth"
            )
        return layers + layers[:1] * self.n_repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a model's parts on one device.

    Attributes:
        layers: of each layer, its keys, adapter slots and stand-ins among it.
        head: of the head, its logits among it.
        fixed: of what any layer needs beside it.
    """

    layers: tuple[int, ...]
    head: int
    fixed: int


def sizes_on(device: Device, source: Source) -> Sizes:
    """Work out what a model's parts would take on a device."""
    n_layer = source.hparams.n_layer
    with contextlib.closing(source.weights_on(device)) as weights:
        of = weights.sizes()
        plan = plan_parts(source.hparams, weights, source.params, (source.depth, source.adapters))
    layers = [source.row_bytes()] * n_layer
    if isinstance(source.depth, Depth):
        for il in source.depth.rows():
            layers[il] += source.row_bytes()
        if isinstance(source.depth.standins, ResidentWeights):
            of |= source.depth.standins.sizes()
    if source.adapters is not None:
        of |= {each.name: slots_bytes([each], source.adapters.rank, source.adapters.n_slots)
               for each in source.adapters.targets}  # fmt: skip
    head = logits_bytes(source.hparams, source.params)
    fixed = plan.compute_bytes - head + source.stream_bytes
    for name, n_bytes in of.items():
        layer = _layer_of(name)
        if layer is not None:
            layers[layer] += n_bytes
        elif name.startswith("output"):
            head += n_bytes
        else:
            fixed += n_bytes
    return Sizes(layers=tuple(layers), head=head, fixed=fixed)


def _layer_of(name: str) -> int | None:
    """Read the layer's number in a tensor's name, a stand-in's or an adapter's."""
    parts = name.rpartition("/")[2].split(".")
    return int(parts[1]) if len(parts) > 1 and parts[0] == "blk" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A device that may take layers: what they take there, and what there is for them.

    `held_bytes` beside the budget are a small model's. `lacking` are layers that it has not all
    operations for, the head being that behind the last.
    """

    device: Device
    sizes: Sizes
    budget_bytes: int
    held_bytes: int = 0
    lacking: frozenset[int] = frozenset()

    def takes(self, layers: Sequence[int], *, head: bool) -> int:
        """Bytes of some layers, with or without the head."""
        if not layers and not head:
            return 0
        mine = sum(self.sizes.layers[il] for il in layers)
        return mine + self.sizes.fixed + self.sizes.head * head

    def n_layers(self, *, head: bool) -> int:
        """Count the layers, each as large as the largest, for which there is room."""
        if head and len(self.sizes.layers) in self.lacking:
            return 0
        left = self.budget_bytes - self.takes((), head=head) - self.sizes.fixed * (not head)
        return max(0, min(len(self.sizes.layers), left // max(self.sizes.layers)))

    def text(self, layers: Sequence[int], *, head: bool) -> str:
        """Say what it would hold, for an error."""
        what = f"{len(layers)} of {len(self.sizes.layers)} layers" + " and the head" * head
        return (f"{self.device.info.name}: {what}, {format_bytes(self.takes(layers, head=head))} "
                f"of {format_bytes(self.budget_bytes)}")  # fmt: skip


def device_budget(device: Device, params: RunParams, held_bytes: int = 0) -> int:
    """Return what may be used of a device's memory, of which `held_bytes` are in use already.

    Raises:
        UsageError: it does not say what it has, and nothing was given.
    """
    free, total = device.memory()
    free += held_bytes
    given = None if params.device_memory is None else parse_bytes(params.device_memory)
    if not total and not free:
        if given is None:
            raise UsageError(f"device {device.info.name} does not say how much memory it has; say "
                             "by device_memory how much may be used of it")  # fmt: skip
        return given
    own = free - int(DEVICE_RESERVE_RATIO * free)
    return own if given is None else min(given, own)


def roomiest(devices: Devices, params: RunParams, held: Mapping[str, int]) -> tuple[Device, int]:
    """Return the accelerator of which most may be used, and how much, `held` among it."""
    budgets = {
        device: device_budget(device, params, held.get(device.info.name, 0))
        for device in devices.accelerators
    }  # fmt: skip
    best = max(budgets, key=lambda device: budgets[device])
    return best, budgets[best]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """Where everything goes, and what may be used of each accelerator."""

    placement: Placement
    rooms: tuple[Room, ...]
    warnings: tuple[str, ...] = ()


def plan_split(
    devices: Devices, source: Source, host_bytes: int, held: Mapping[str, int]
) -> SplitPlan | None:
    """Place a model's layers on devices.

    Args:
        devices: those there are.
        source: the model.
        host_bytes: what is left of the budget of this process.
        held: what is in use already of devices' budgets, by their names.

    Returns:
        None where a model with experts does not fit the accelerators: its experts are paged then.

    Raises:
        CapacityError: a device that was named has no room for one layer, or all of them together
            have none for the model; it gives the numbers of each.
    """
    rooms, warnings = [], []
    for device in devices.accelerators:
        lacking = _lacking(device, source)
        if lacking:
            warnings.append(_warning(device, source, lacking))
        if len(lacking.keys() - {source.hparams.n_layer}) == source.hparams.n_layer:
            continue
        mine = held.get(device.info.name, 0)
        budget = device_budget(device, source.params, mine) - mine
        if device.info.unified:
            budget = min(budget, host_bytes)
        room = Room(device=device, sizes=sizes_on(device, source), budget_bytes=max(0, budget),
                    held_bytes=mine, lacking=frozenset(lacking))  # fmt: skip
        if room.n_layers(head=False):
            rooms.append(room)
        elif source.hparams.moe is not None:
            return None
        elif not devices.chosen:
            raise _too_small(room)
        else:
            warnings.append(f"the processor computes: {_too_small(room)}")
    cpu = Room(device=devices.cpu, sizes=sizes_on(devices.cpu, source), budget_bytes=host_bytes)
    order, counts, head = _share(rooms, cpu, devices, source)
    on_cpu = counts[0] if order[0] is cpu else 0
    if source.hparams.moe is not None and rooms and on_cpu and not devices.cpu_shares:
        return None  # where no device can compute any layer, none can have its experts either
    placement = _placement(order, counts, head, devices.cpu)
    _check_fits(order, placement)
    return SplitPlan(placement=placement, rooms=tuple(rooms), warnings=tuple(warnings))


def _lacking(device: Device, source: Source) -> dict[int, set[str]]:
    """Return the operations that a device lacks, by layer; the head is that behind the last.

    What stands behind an address says yes to everything, so that it is not asked.
    """
    return {} if device.link is not None else unsupported(device, source.probe())


def _warning(device: Device, source: Source, lacking: Mapping[int, set[str]]) -> str:
    operations = ", ".join(sorted(set[str]().union(*lacking.values())))
    n_layer = source.hparams.n_layer
    n, head = len(lacking.keys() - {n_layer}), n_layer in lacking
    return (f"{device.info.name} LACKS OPERATIONS of this model: {operations}; the processor "
            f"computes {n} of the {n_layer} layers for it{', and the head' * head}")  # fmt: skip


def _too_small(room: Room) -> CapacityError:
    least = room.takes((0,), head=False)
    return CapacityError(
        f"device {room.device.info.name} has {format_bytes(room.budget_bytes)} to use, and one "
        f"layer with its keys and a compute buffer takes {format_bytes(least)}; raise "
        "device_memory where it has more, lower n_ctx or n_ubatch, or leave it out of `device`"
    )


def _share(
    rooms: Sequence[Room], cpu: Room, devices: Devices, source: Source
) -> tuple[list[Room], list[int], int]:
    """Share layers out: devices in the order of the pass, how many layers each, and the head's.

    The processor comes first, since it has the embeddings; the head is on the quickest device
    that has room for it beside a layer, which comes last if it is not the processor.
    """
    n_layer = source.hparams.n_layer
    heads = [room for room in rooms if room.n_layers(head=True)]
    least = sum(room.n_layers(head=room in heads) for room in rooms)
    asked = [*rooms, cpu] if devices.cpu_shares else rooms if least > n_layer else []
    speeds = _speeds(asked, source)  # where every device is full anyway, nothing is measured
    heads += [cpu] if devices.cpu_shares else []
    with_head = min(heads, key=lambda room: speeds.get(room.device, _UNKNOWN)[0], default=cpu)
    order = [cpu, *[room for room in rooms if room is not with_head]]
    if with_head is not cpu:
        order.append(with_head)
    most = [room.n_layers(head=room is with_head) for room in order]
    if sum(most[1:]) < n_layer and not devices.cpu_shares:
        counts = _fill(order, n_layer, with_head)
        return order, counts, order.index(with_head)
    if not devices.cpu_shares:
        most[0] = 0
    from edgeroute.device_speed import place_layers

    layer_s, entering_s = zip(*(speeds.get(room.device, _UNKNOWN) for room in order), strict=True)
    placed = place_layers(layer_s, most, n_layer, entering_s)
    return order, [placed.count(i) for i in range(len(order))], order.index(with_head)


def _fill(order: Sequence[Room], n_layer: int, with_head: Room) -> list[int]:
    """Give the last device as many of the last layers as it holds, and so on; the rest the first.

    By the bytes of the layers themselves, of which a file may have larger and smaller ones.
    """
    counts, end = [0] * len(order), n_layer
    for i in reversed(range(1, len(order))):
        room, first = order[i], end
        while first and room.takes(range(first - 1, end), head=room is with_head) <= (
            room.budget_bytes
        ):  # fmt: skip
            first -= 1
        counts[i], end = end - first, first
    counts[0] = end
    return counts


def _speeds(rooms: Sequence[Room], source: Source) -> dict[Device, tuple[float, float]]:
    """Measure each device: seconds of a layer, and those that a pass takes more for going there.

    Only where that decides anything; nothing for devices that were not measured.
    """
    if len(rooms) < 2:
        return {}
    from edgeroute.device_speed import device_speeds

    devices = [room.device for room in rooms]
    found = device_speeds(source.probe(), devices, source.params.threads)
    by_device = {device: found[device.info.name] for device in devices}
    return {device: (each.layer_s, each.entering_s) for device, each in by_device.items()}


def _placement(order: Sequence[Room], counts: Sequence[int], head: int, cpu: Device) -> Placement:
    """Number the devices that have anything; the first of `order` is the processor.

    It also gets the layers that a device cannot compute.
    """
    places = [i for i, n in enumerate(counts) for _ in range(n)]
    places = [0 if il in order[i].lacking else i for il, i in enumerate(places)]
    used = sorted({*places, head})
    of_layer = [used.index(i) for i in places]
    return Placement(
        cpu=cpu, devices=tuple(order[i].device for i in used), of_layer=tuple(of_layer),
        of_head=used.index(head),
    )  # fmt: skip


def _check_fits(order: Sequence[Room], placement: Placement) -> None:
    """Refuse what a device, or the processor, has no room for.

    Raises:
        CapacityError: with the numbers of each.
    """
    parts, fits = [], True
    for room in order:
        layers, head = layers_on(placement, room.device)
        fits &= room.takes(layers, head=head) <= room.budget_bytes
        parts.append(room.text(layers, head=head))
    if not fits:
        raise CapacityError(
            f"the model does not fit its devices and this machine's budget: {'; '.join(parts)}; "
            "raise memory or device_memory, name another device, or lower n_ctx"
        )


def layers_on(placement: Placement, device: Device) -> tuple[list[int], bool]:
    """Return the layers of a device, and whether it has the head."""
    n_layer = len(placement.of_layer)
    mine = [il for il in range(n_layer) if placement.device(il) is device]
    return mine, placement.device(n_layer) is device
