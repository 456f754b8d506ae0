"""Composes a model whose experts do not all fit: what stays, what is paged, what it takes."""

import contextlib
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import psutil

from edgeroute.config import RunParams
from edgeroute.models.base import Model, MoeHparams, MoeModel
from edgeroute.models.carry import Carry
from edgeroute.models.paged_pairs import MAX_PAIRS
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_profile import DiskProfile
from edgeroute.offload.expert_copies import ExpertCopies
from edgeroute.offload.expert_pool import (
    ExpertLayer,
    PoolPlan,
    in_sidecar,
    plan_pools,
    spares_reads,
)
from edgeroute.offload.expert_store import ExpertParams, ExpertStore
from edgeroute.offload.sidecar import read_sidecar, sidecar_path
from edgeroute.offload.throttle import ThrottledDisk, profile, throttled
from edgeroute.offload.trace import TraceMeta, TraceRecorder, TraceWriter
from edgeroute.offload.transfer import Transfer
from edgeroute.paging_copies import copies_bytes, open_copies
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, ModelFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB, format_bytes, parse_bytes
from edgeroute.runtime.weights import ResidentWeights, TensorSpec, Weights

STAGING_MIN_BYTES, STAGING_PAGES = 8 * MIB, 12
MIN_IO_THREADS = 2
"""One reads while another copies what it read into its slot."""
VOCABULARY_RATIO = 6
"""Bytes that libllama's vocabulary takes in memory, over those of the file's header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPlan:
    """A model with experts, split: `fixed` ledger entries, and what is left for slots."""

    pools: tuple[PoolPlan, ...]
    fixed: dict[str, int]
    staging_bytes: int
    slots_bytes: int
    copies_bytes: int = 0
    """For slots of copies in fewer bits, beside `slots_bytes`."""
    overlaps: bool = True
    """Whether experts may be computed while others of their layer are read."""

    def wants(self) -> dict[str, int]:
        """Return ledger entries by owner."""
        copies = {"expert copies": self.copies_bytes} if self.copies_bytes else {}
        return self.fixed | {"expert slots": self.slots_bytes} | copies


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSource:
    """A model with experts that is being opened.

    `beside_bytes` of this process belong to what has ledger entries already. `program_bytes`
    stand in for this process, for a plan that is not about it. `proven` names the levers whose
    settings a proof has chosen.
    """

    file: GGUFFile
    device: Device
    model: MoeModel
    params: RunParams
    beside_bytes: int = 0
    program_bytes: int | None = None
    proven: Collection[str] = ()

    @property
    def moe(self) -> MoeHparams:
        """Its counts."""
        assert self.model.hparams.moe is not None
        return self.model.hparams.moe

    def layers(self) -> list[ExpertLayer]:
        """List the layers that have experts."""
        model, tensors = self.model, self.file.tensors
        return [
            ExpertLayer(il, tuple(tensors[name] for name in model.expert_tensors(il)))
            for il in range(model.hparams.n_layer)
            if model.is_moe(il)
        ]

    def other_specs(self) -> list[TensorSpec]:
        """List all weights but the experts."""
        model = self.model
        paged = {name for il in range(model.hparams.n_layer) for name in model.expert_tensors(il)}
        return [spec for spec in model.specs() if spec.name not in paged]

    def other_weights(self) -> ResidentWeights:
        """Describe all weights but the experts; token embeddings are rows read on demand."""
        return ResidentWeights(self.file, self.device, self.other_specs(), rows_on_demand=True)


def moe_source(file: GGUFFile, device: Device, model: Model, params: RunParams) -> MoeSource:
    """Take a model that has experts; all that do can be paged."""
    if model.hparams.moe is None or not isinstance(model, MoeModel):
        raise TypeError(f"{model.hparams.arch} has no experts to page")
    return MoeSource(file=file, device=device, model=model, params=params)


def plan_paged(source: MoeSource, fixed: dict[str, int], budget: int) -> PagedPlan:
    """Divide a budget between what must stay and slots for experts.

    Args:
        source: the model.
        fixed: ledger entries of the other weights, KV cache and compute buffer.
        budget: bytes for all of it, this process as it is now included.

    Raises:
        CapacityError: even the experts of one token do not fit; names the smallest budget.
    """
    pools = tuple(plan_pools(source.layers(), source.moe.n_expert))
    staging = staging_bytes(pools)
    fixed = fixed | {
        "expert compute": compute_bytes(source),
        "expert staging": staging,
        "program and vocabulary": program_bytes(source),
    }
    left = budget - sum(fixed.values())
    one = sum(pool.slot_bytes for pool in pools)
    least = source.moe.n_expert_used * one
    copies, at_least = copies_bytes(left, one, least) if source.params.degrade_misses else (0, 0)
    left -= copies
    if left < least:
        smallest = sum(fixed.values()) + least + at_least
        parts = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in fixed.items())
        raise CapacityError(
            f"{parts} and the experts of one token, {format_bytes(least)}, are over the budget of "
            f"{format_bytes(budget)}; raise the memory budget to at least "
            f"{math.ceil(100 * smallest / 2**30) / 100:.2f} GiB, or lower n_ctx or n_ubatch",
            smallest,
        )
    most = sum(pool.all_bytes for pool in pools)
    return PagedPlan(pools=pools, fixed=fixed, staging_bytes=staging, slots_bytes=min(left, most),
                     copies_bytes=copies)  # fmt: skip


def staging_bytes(pools: Sequence[PoolPlan]) -> int:
    """Return the bytes through which reads go that cannot end in a slot."""
    return max(STAGING_MIN_BYTES, STAGING_PAGES * max(pool.page_bytes for pool in pools))


def compute_bytes(source: MoeSource) -> int:
    """Return the bytes that computing experts apart takes, with what layers hand on."""
    n_embd, n_ubatch = source.model.hparams.n_embd, source.params.n_ubatch
    return pairs_bytes(source, max(MAX_PAIRS, n_ubatch)) + Carry.plan_bytes(
        n_embd, source.moe, n_ubatch
    )


def pairs_bytes(source: MoeSource, n_pairs: int) -> int:
    """Return the bytes of a graph that computes pairs of token and expert."""
    return n_pairs * 4 * (2 * source.model.hparams.n_embd + 3 * source.moe.n_ff_exp)


def program_bytes(source: MoeSource) -> int:
    """Return the bytes of this process as it is now, and of the vocabulary to be loaded."""
    rss = source.program_bytes
    if rss is None:
        rss = max(0, psutil.Process().memory_info().rss - source.beside_bytes)
    return rss + VOCABULARY_RATIO * source.file.data_offset


def open_disk(
    own: contextlib.ExitStack, file: GGUFFile, *, direct: bool = True
) -> DiskFile | ThrottledDisk:
    """Open a model's file for reads by offset, past the page cache if `direct`; `own` closes it.

    Raises:
        ModelFileError: it was changed since its header was read.
    """
    disk = throttled(DiskFile.open(file.path, direct=direct))
    own.callback(disk.close)
    if not file.is_same(disk.identity):
        raise ModelFileError(f"{file.path} was changed while it was opened; open it again")
    return disk


class PagesFile(NamedTuple):
    """The open file that experts are read from, how it is best read, and the plans of pools.

    `sidecar` says what is made of one: `used`, `none` is there, `off`, `no fewer reads` than
    from the model, or `refused`, for a reason.
    """

    disk: DiskFile | ThrottledDisk
    reads: DiskProfile
    pools: Sequence[PoolPlan]
    sidecar: str
    refused: str | None = None


def open_pages(
    own: contextlib.ExitStack, source: MoeSource, pools: Sequence[PoolPlan]
) -> PagesFile:
    """Open the sidecar of a model, or the model where there is none of use; `own` closes it.

    Raises:
        ModelFileError: the model was changed since its header was read.
    """
    file, params = source.file, source.params
    direct = params.direct_io is not False
    disk = open_disk(own, file, direct=direct)
    path = sidecar_path(file.path)
    if params.sidecar == "off" or not os.path.lexists(path):
        state = "off" if params.sidecar == "off" else "none"
        return PagesFile(disk, best_reads(disk, params), pools, state)
    with contextlib.ExitStack() as trying:
        try:
            beside = throttled(DiskFile.open(path, direct=direct))
            trying.callback(beside.close)
            moved = in_sidecar(pools, read_sidecar(beside, disk, file))
            reads = best_reads(beside, params)
        except ModelFileError as error:
            why = f"{error}; experts are read from the model itself"
            return PagesFile(disk, best_reads(disk, params), pools, "refused", why)
        if params.sidecar == "auto" and not spares_reads(moved, reads.read_bytes):
            return PagesFile(disk, best_reads(disk, params), pools, "no fewer reads")
        own.push(trying.pop_all())
    return PagesFile(beside, reads, moved, "used")


def best_reads(disk: DiskFile | ThrottledDisk, params: RunParams) -> DiskProfile:
    """Return how a file is read: as the settings say, else as is best for its disk.

    Raises:
        ModelFileError: a read failed while it was measured.
    """
    best = profile(disk)
    return replace(
        best, n_threads=params.io_threads or max(MIN_IO_THREADS, best.n_threads),
        read_bytes=best.read_bytes if params.read_bytes is None else parse_bytes(params.read_bytes),
    )  # fmt: skip


def open_store(
    own: contextlib.ExitStack, source: MoeSource, base: Weights, plan: PagedPlan
) -> ExpertStore:
    """Open the disk, start the I/O threads and reserve the slots; `own` frees them.

    Raises:
        CapacityError: the device has too little memory.
        ModelFileError: the file was changed since its header was read.
    """
    store = make_store(own, source, base, plan)
    store.recorder = recorder(own, source, plan.pools)
    if store.recorder.writes:
        store.begin_log()
        own.callback(store.end_log)
    return store


def make_store(
    own: contextlib.ExitStack, source: MoeSource, base: Weights, plan: PagedPlan
) -> ExpertStore:
    """Open a store that records nothing: see `open_store`. Its slots are on `source.device`."""
    params = source.params
    pages = open_pages(own, source, plan.pools)
    reads, disks = pages.reads, [pages.disk]
    copies = None
    if plan.copies_bytes:
        direct = params.direct_io is not False
        copies = open_copies(own, source.file, source.layers(), direct=direct)
        disks.append(copies.disk)
    transfer = own.enter_context(
        Transfer(disks, reads.n_threads, reads.read_bytes, plan.staging_bytes)
    )
    named = params.prefetch not in ("auto", "off")
    predictor = {"auto": "gate", "off": "none"}.get(params.prefetch, params.prefetch)
    store = ExpertStore(base, source.device, pages.pools, transfer, ExpertParams(
        slots_bytes=plan.slots_bytes, n_expert_used=source.moe.n_expert_used,
        policy=params.policy, prefetch=predictor,
        forced=named and params.levers == "asked", begins_on=named and "prefetch" in source.proven,
        overlap=plan.overlaps and params.overlap != "off", watched=params.levers == "proven",
        overlap_forced=plan.overlaps and params.overlap == "on" and params.levers == "asked",
        pages_from=pages.disk.path, sidecar=pages.sidecar, refused=pages.refused,
    ))  # fmt: skip
    own.callback(store.close)
    if copies is not None:
        store.copies = own.enter_context(
            ExpertCopies(store, source.device, copies.pools, transfer, plan.copies_bytes)
        )
    return store


def trace_meta(source: MoeSource, pools: Sequence[PoolPlan]) -> TraceMeta:
    """Describe the routes of a model."""
    moe = source.moe
    return TraceMeta(
        model=source.file.path.name, n_layer=source.model.hparams.n_layer,
        n_expert=moe.n_expert, n_expert_used=moe.n_expert_used,
        page_bytes=max(pool.page_bytes for pool in pools),
        layers=tuple(sorted(layer.il for pool in pools for layer in pool.layers)),
    )  # fmt: skip


def recorder(
    own: contextlib.ExitStack, source: MoeSource, pools: Sequence[PoolPlan]
) -> TraceRecorder:
    """Keep the latest routes in memory, and all of them in a file if one was asked for.

    Raises:
        UsageError: the file cannot be written.
    """
    meta, path = trace_meta(source, pools), source.params.trace
    try:
        writer = None if path is None else own.enter_context(TraceWriter(path, meta))
    except OSError as error:
        raise UsageError(
            f"cannot write the trace {path}: {error.strerror}; record to another file"
        ) from error
    return TraceRecorder(meta, writer=writer)
