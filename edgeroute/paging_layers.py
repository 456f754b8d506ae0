"""Composes a dense model that does not all fit: which layers stay, which stream, what it takes."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from edgeroute.bridges import DRAFTING, Bridge, BridgeFile, open_bridges
from edgeroute.config import RunParams
from edgeroute.models.base import Model
from edgeroute.models.forward import Forward
from edgeroute.models.layered import Crossing, LayeredForward
from edgeroute.offload.disk_profile import MOST_READ_BYTES
from edgeroute.offload.layer_store import LayerParams, LayerStore
from edgeroute.offload.throttle import profile
from edgeroute.offload.transfer import Transfer
from edgeroute.paging import MIN_IO_THREADS, STAGING_MIN_BYTES, VOCABULARY_RATIO, open_disk
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, DepthFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.rooms import Unit, make_unit, mirrors, room_bytes
from edgeroute.runtime.units import MIB, format_bytes, parse_bytes
from edgeroute.runtime.weights import ResidentWeights, check_specs

N_ROOMS = 2
"""One layer is computed while the next is read."""
STAGED_READS = 2
FIRST_KEPT = 2
"""Layers at the beginning that stay where those that stay are to draft."""
HEAD = "output.weight"
BRIDGE = "draft bridge"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSource:
    """A dense model that is being opened.

    `beside_bytes` of this process belong to what has ledger entries already. `program_bytes`
    stand in for this process, for a plan that is not about it.
    """

    file: GGUFFile
    device: Device
    model: Model
    params: RunParams
    beside_bytes: int = 0
    program_bytes: int | None = None

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
            found.append(make_unit(self.device, il, mine, self.file.size_bytes))
        return found

    def base(self, streamed: Sequence[Unit]) -> ResidentWeights:
        """Describe all other weights; token embeddings are rows read on demand.

        Where anything streams, these have the file's layout too: with one set of kernels, logits
        do not depend on which layers a budget happens to hold.
        """
        names = {part.name for unit in streamed for part in unit.parts}
        specs = [spec for spec in self.model.specs() if spec.name not in names]
        return ResidentWeights(
            self.file, self.device, specs, rows_on_demand=True,
            repack_experts=self.params.repack_experts and not streamed,
        )  # fmt: skip

    def resident_bytes(self, streamed: Sequence[Unit]) -> int:
        """Bytes of all other weights, if these stream."""
        with contextlib.closing(self.base(streamed)) as base:
            return base.plan.mapped_bytes + base.plan.copied_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Units that stream and layers that stay, in the order of use; the ledger entries beside them.

    `total_bytes` is all that it takes, the weights that stay among it. `bridge` crosses what
    streams when those that stay draft.
    """

    streamed: tuple[Unit, ...]
    resident: tuple[Unit, ...]
    n_units: int
    n_rooms: int
    entries: dict[str, int]
    total_bytes: int
    bridge: Bridge | None = None

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
        ModelFileError, DepthFileError: the model's drafts file cannot be used.
    """
    bridges = open_bridges(source.file, source.model.hparams, source.params)
    with bridges or contextlib.nullcontext():
        return _plan_layers(source, fixed, budget, n_rooms, bridges)


def _plan_layers(
    source: LayerSource, fixed: dict[str, int], budget: int, n_rooms: int,
    bridges: BridgeFile | None,
) -> LayerPlan:  # fmt: skip
    units = source.units()
    # A head that is also the embedding may be both mapped and repacked: its sum is asked for.
    head = source.resident_bytes(units[:-1]) - source.resident_bytes(units)
    layers = sum(unit.room_bytes for unit in units[:-1])
    program = _program_bytes(source)
    least: LayerPlan | None = None
    for streamed in _splits(units, drafting=source.params.speculate in DRAFTING):
        entries = _entries(source, units, (streamed, n_rooms))
        entries["program and vocabulary"] = program
        bridge = None if bridges is None else bridges.find([unit.number for unit in streamed])
        if bridges is not None and bridge is not None:
            entries[BRIDGE] = bridges.bytes_of(bridge, source.device)
        gone = layers + head if len(streamed) == len(units) else sum(u.room_bytes for u in streamed)
        stays = layers + head - gone
        plan = LayerPlan(
            streamed=streamed, resident=tuple(u for u in units[:-1] if u not in streamed),
            n_units=len(units), n_rooms=n_rooms, entries=entries,
            total_bytes=sum(fixed.values()) + sum(entries.values()) + stays, bridge=bridge,
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
    params = source.params
    disk = open_disk(own, source.file, direct=params.direct_io is not False)
    reads = profile(disk)
    n_threads = params.io_threads or max(MIN_IO_THREADS, reads.n_threads)
    read_bytes = reads.read_bytes if params.read_bytes is None else parse_bytes(params.read_bytes)
    staging = plan.entries["layer staging"]
    transfer = own.enter_context(Transfer([disk], n_threads, read_bytes, staging))
    store = LayerStore(base, source.device, transfer, LayerParams(
        units=plan.streamed, n_units=plan.n_units, n_rooms=plan.n_rooms, resident=plan.resident,
        keeper=_keeper(source, plan.resident), together=params.speculate in DRAFTING,
    ))  # fmt: skip
    own.callback(store.close)
    forward = LayeredForward(source.model, source.device, store, kv)
    if plan.bridge is not None:
        _load_bridge(own, source, plan.bridge, forward)
    return store, forward


def _load_bridge(
    own: contextlib.ExitStack, source: LayerSource, bridge: Bridge, forward: LayeredForward
) -> None:
    """Give a forward the stand-in of a bridge; `own` frees it.

    Raises:
        ModelFileError, DepthFileError: the drafts file has changed meanwhile.
    """
    bridges = open_bridges(source.file, source.model.hparams, source.params)
    found = None if bridges is None else bridges.find(tuple(bridge.block))
    if bridges is None or found is None:
        raise DepthFileError("the drafts file was taken away while the model was opened; try again")
    own.enter_context(bridges)
    weights = bridges.weights(found, source.device)
    own.callback(weights.close)
    weights.load()
    forward.standins = weights
    forward.bridge = Crossing(found.block, found.end, found.spans)


def _splits(units: Sequence[Unit], *, drafting: bool) -> Iterator[tuple[Unit, ...]]:
    """List what may stream, least first; the head only after all layers.

    Layers spread evenly, so that between two streamed ones as many others are computed as can
    be while the next is read. Or, where those that stay are to draft, a block behind the first
    two: of nine layers that stay of 28, the first two and last seven guess twice as well as nine
    spread ones, and reading is slower than computing anyway where drafting pays.
    """
    layers = units[:-1]
    for n in range(len(layers) + 1):
        if drafting:
            first = min(FIRST_KEPT, len(layers) - n)
            yield tuple(layers[first : first + n])
        else:
            yield tuple(layers[(2 * j + 1) * len(layers) // (2 * n)] for j in range(n))
    yield tuple(units)


def _entries(
    source: LayerSource, units: Sequence[Unit], split: tuple[Sequence[Unit], int]
) -> dict[str, int]:
    """What streaming takes beside the weights that stay; a room fits any layer."""
    streamed, n_rooms = split
    if not streamed:
        return {}
    largest = room_bytes([*units[:-1], *streamed])
    return {
        "layer rooms": min(n_rooms, len(streamed)) * largest,
        # Only what does not suit the disk is staged: reads go straight into the rooms.
        "layer staging": max(STAGING_MIN_BYTES, STAGED_READS * MOST_READ_BYTES),
        "layer stream": 4 * source.model.hparams.n_embd * source.params.n_ubatch,
    }


class _FilePages:
    """Layers that stay are the file's own pages, mapped: an `offload.layer_store.Keeper`."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def keep(self, unit: Unit) -> None:
        for stretch in unit.stretches:
            self._file.populate(stretch.offset, stretch.nbytes)

    def let_go(self, unit: Unit) -> None:
        for stretch in unit.stretches:
            self._file.release(stretch.offset, stretch.nbytes)
        if not hasattr(os, "posix_fadvise"):
            return
        with self._file.path.open("rb") as file:  # else the page cache would keep them for us
            for stretch in unit.stretches:
                os.posix_fadvise(file.fileno(), stretch.offset, stretch.nbytes,
                                 os.POSIX_FADV_DONTNEED)  # fmt: skip


def _keeper(source: LayerSource, resident: Sequence[Unit]) -> _FilePages | None:
    """Return what gives layers up under pressure; None where they are not the file's pages.

    Those in a device's own memory stay: that memory is not what the machine runs out of.
    """
    infos = [part.info for unit in resident for part in unit.parts]
    return _FilePages(source.file) if mirrors(source.device, infos) else None


def _program_bytes(source: LayerSource) -> int:
    """Bytes of this process as it is now, and of the vocabulary that is about to be loaded."""
    vocabulary = VOCABULARY_RATIO * source.file.data_offset
    if source.program_bytes is not None:
        return source.program_bytes + vocabulary
    rss = psutil.Process().memory_info().rss
    return max(0, rss + vocabulary - source.beside_bytes)
