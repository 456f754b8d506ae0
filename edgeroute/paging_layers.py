"""Composes a dense model that does not all fit: which layers stay, which stream, what it takes."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from edgeroute.config import RunParams
from edgeroute.models.base import Model
from edgeroute.models.forward import Forward
from edgeroute.models.layered import LayeredForward
from edgeroute.offload.disk_profile import MOST_READ_BYTES, profile
from edgeroute.offload.layer_store import LayerParams, LayerStore
from edgeroute.offload.transfer import Transfer
from edgeroute.paging import STAGING_MIN_BYTES, VOCABULARY_RATIO, open_disk
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.rooms import Unit, make_unit, room_bytes
from edgeroute.runtime.units import MIB, format_bytes
from edgeroute.runtime.weights import ResidentWeights, check_specs

N_ROOMS = 2
"""One layer is computed while the next is read."""
PARTS_AHEAD = 2
HEAD = "output.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSource:
    """A dense model that is being opened."""

    file: GGUFFile
    device: Device
    model: Model
    params: RunParams

    def units(self) -> list[Unit]:
        """List what may stream: the matrices of each layer, and last those of the head.

        Norms and biases are small and always stay.
        """
        n_layer = self.model.hparams.n_layer
        pairs = check_specs(self.file, self.model.specs())
        found = []
        for il in range(n_layer + 1):
            stem = f"blk.{il}." if il < n_layer else HEAD
            mine = [
                pair for pair in pairs
                if pair[0].use == "mul_mat" and pair[0].name.startswith(stem)
            ]  # fmt: skip
            found.append(make_unit(self.device, il, mine))
        return found

    def base(self, streamed: Sequence[Unit]) -> ResidentWeights:
        """Describe all other weights; token embeddings are rows read on demand."""
        names = {part.name for unit in streamed for part in unit.parts}
        specs = [spec for spec in self.model.specs() if spec.name not in names]
        return ResidentWeights(self.file, self.device, specs, rows_on_demand=True)

    def resident_bytes(self, streamed: Sequence[Unit]) -> int:
        """Bytes of all other weights, if these stream."""
        with contextlib.closing(self.base(streamed)) as base:
            return base.plan.mapped_bytes + base.plan.copied_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Units that stream, in the order of use, and the ledger entries beside the weights."""

    streamed: tuple[Unit, ...]
    n_units: int
    n_rooms: int
    entries: dict[str, int]
    total_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Bytes that every pass over the model reads."""
        return sum(unit.read_bytes for unit in self.streamed)


def plan_layers(
    source: LayerSource, fixed: dict[str, int], budget: int, n_rooms: int = N_ROOMS
) -> LayerPlan:
    """Keep as many layers as a budget holds, and let the others stream.

    Args:
        source: the model.
        fixed: ledger entries of all but the units: small weights, KV cache, compute buffer.
        budget: bytes for all of it, this process as it is now included.
        n_rooms: length of the ring.

    Raises:
        CapacityError: not even a ring of two layers fits; names the smallest budget.
    """
    units = source.units()
    # A head that is also the embedding may be both mapped and repacked: its sum is asked for.
    head = source.resident_bytes(units[:-1]) - source.resident_bytes(units)
    layers = sum(unit.nbytes for unit in units[:-1])
    program = _program_bytes(source.file)
    least: LayerPlan | None = None
    for streamed in _splits(units):
        entries = _entries(source, streamed, n_rooms) | {"program and vocabulary": program}
        gone = layers + head if len(streamed) == len(units) else sum(u.nbytes for u in streamed)
        stays = layers + head - gone
        plan = LayerPlan(
            streamed=streamed, n_units=len(units), n_rooms=n_rooms, entries=entries,
            total_bytes=sum(fixed.values()) + sum(entries.values()) + stays,
        )  # fmt: skip
        if plan.total_bytes <= budget:
            return plan
        if least is None or plan.total_bytes < least.total_bytes:
            least = plan
    assert least is not None
    stays = least.total_bytes - sum(fixed.values()) - sum(least.entries.values())
    taken = fixed | least.entries | {"weights that must stay": stays}
    parts = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in taken.items())
    raise CapacityError(
        f"{parts} are over the budget of {format_bytes(budget)}, though all other weights would "
        f"stream; raise the memory budget to at least {-(-least.total_bytes // MIB)} MiB, or "
        "lower n_ctx or n_ubatch",
        least.total_bytes,
    )


def open_layers(
    own: contextlib.ExitStack, source: LayerSource, base: ResidentWeights, plan: LayerPlan,
    kv: KvCache,
) -> tuple[LayerStore | None, Forward]:  # fmt: skip
    """Open the disk, start the I/O threads and allocate the rooms; `own` frees these.

    Returns:
        The store, and a forward over it for the caller to close; no store where nothing
        streams, because all fits once token embeddings are left to the disk.

    Raises:
        CapacityError: the device has too little memory.
        ModelFileError: the file was changed since its header was read.
    """
    if not plan.streamed:
        return None, Forward(source.model, source.device, base, kv)
    disk = open_disk(own, source.file)
    reads = profile(disk)
    # Repacking takes as long as reading: another thread reads meanwhile.
    repacks = any(part.repacked for unit in plan.streamed for part in unit.parts)
    n_threads = source.params.io_threads or reads.n_threads + repacks
    staging = plan.entries["layer staging"]
    transfer = own.enter_context(Transfer([disk], n_threads, reads.read_bytes, staging))
    store = LayerStore(base, source.device, transfer, LayerParams(
        units=plan.streamed, n_units=plan.n_units, n_rooms=plan.n_rooms
    ))  # fmt: skip
    own.callback(store.close)
    return store, LayeredForward(source.model, source.device, store, kv)


def _splits(units: Sequence[Unit]) -> Iterator[tuple[Unit, ...]]:
    """List what may stream, least first: layers spread evenly; the head only after all layers.

    Between two streamed layers as many others are computed as can be, while the next is read.
    """
    layers = units[:-1]
    for n in range(len(layers) + 1):
        yield tuple(layers[(2 * j + 1) * len(layers) // (2 * n)] for j in range(n))
    yield tuple(units)


def _entries(source: LayerSource, streamed: Sequence[Unit], n_rooms: int) -> dict[str, int]:
    """What streaming takes beside the weights that stay."""
    if not streamed:
        return {}
    hparams = source.model.hparams
    layers = [part for unit in streamed for part in unit.parts if unit.number < hparams.n_layer]
    largest = max(p.info.nbytes for unit in streamed for p in unit.parts)
    # A repacked part is read whole; so one is read while others are written. A head is alone.
    ahead = PARTS_AHEAD * max(part.info.nbytes for part in layers)
    return {
        "layer rooms": min(n_rooms, len(streamed)) * room_bytes(source.device, streamed),
        "layer staging": max(STAGING_MIN_BYTES, largest + ahead + MOST_READ_BYTES),
        "layer stream": 4 * hparams.n_embd * source.params.n_ubatch,
    }


def _program_bytes(file: GGUFFile) -> int:
    """Bytes of this process as it is now, and of the vocabulary that is about to be loaded."""
    return psutil.Process().memory_info().rss + VOCABULARY_RATIO * file.data_offset
