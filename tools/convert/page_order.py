"""The order of a sidecar's pages by a trace: experts that are chosen together lie together.

In each layer the pages become a path in which neighbours are chosen by the same tokens often, by
taking the heaviest pairs first; missing neighbours are then one read, as far as a read is long
enough. What an order is worth is counted on misses, of a part of the trace that it was not made
from: the routes run through the page tables of the run that recorded it. Weighing pairs by misses
instead was tried and is worse: there are too few to learn from.
Source of the idea: mbolt's order of co-activated experts; of the path, the greedy heuristic for
tours.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_profile import profile
from edgeroute.offload.eviction import PoolShape
from edgeroute.offload.eviction_registry import make_policy
from edgeroute.offload.load_plan import Extent
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.routes import routes_of
from edgeroute.offload.sidecar import Sidecar, SidecarHeader
from edgeroute.offload.trace import PoolState, Trace, TraceMeta, pages_of, read_trace
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile, TensorInfo
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.convert.pack import expert_layers, lay_out, packed_layout
from edgeroute.tools.convert.page_reads import Extents, ReadCount, count_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """An order of pages, and the reads that it spares.

    Attributes:
        pages: those that were ever chosen, in order.
        n_missing: pages missing in the second half of the decoded tokens, `n_tokens`, on which
            is counted what an order by the steps before would have spared.
        model, file, ordered: reads of them from the model, from a sidecar in the model's order,
            and from one in that order.
        read_bytes: the longest read.
    """

    pages: list[int]
    n_missing: int
    n_tokens: int
    model: ReadCount
    file: ReadCount
    ordered: ReadCount
    read_bytes: int

    def to_dict(self) -> dict[str, object]:
        """Return all figures but the order as plain JSON types."""
        found = asdict(self)
        del found["pages"]
        return found

    def to_text(self) -> str:
        """Say what the order is worth."""
        n = self.n_tokens
        text = (
            f"reads per decoded token, on the half of the trace that the order was not made from: "
            f"{self.model.n_reads / n:.1f} from the model, {self.file.n_reads / n:.1f} from pages "
            f"in its order, {self.ordered.n_reads / n:.1f} in this one; "
            f"{self.n_missing / n:.1f} pages, {format_bytes(self.ordered.read_bytes / n)}, in "
            f"reads of up to {format_bytes(self.read_bytes)}"
        )
        if self.ordered.n_reads < self.file.n_reads:
            return text
        return f"{text}: the order spares nothing on this disk"


def order_by(trace_path: Path, model: Path, read_bytes: int | None = None) -> Ordered:
    """Order a model's pages by a trace of it.

    Args:
        trace_path: routes that were recorded while its experts were paged.
        model: a GGUF file.
        read_bytes: the longest read; None is what is best for the model's disk.

    Raises:
        UsageError: it is no trace, of another model, or says nothing of what was missing.
        ModelFileError: the model cannot be read.
    """
    trace = read_trace(trace_path)
    with DiskFile.open(model) as disk, GGUFFile.open(model) as file:
        layers = expert_layers(file)
        found = lay_out(file, disk, packed_layout(file))
        n_expert = found.n_expert
        sizes = {il: sum(i.nbytes // n_expert for i in infos) for il, infos in layers.items()}
        check_trace(trace.meta, model.name, sizes, n_expert)
        decoded = [i for i, step in enumerate(trace.steps) if not step.prefill]
        half = decoded[len(decoded) // 2] if len(decoded) > 1 else 0
        second = missed(trace, half)
        longest = read_bytes or profile(disk).read_bytes

        before = replace(trace, steps=trace.steps[:half], marks=(), paging=(), live=())
        learned = order_of(chosen(before))

        def reads(extents: Extents) -> ReadCount:
            return count_reads(second, extents, disk, longest)

        return Ordered(
            pages=order_of(chosen(trace)), read_bytes=longest,
            n_missing=sum(map(len, second)), n_tokens=len(decoded) - len(decoded) // 2,
            model=reads(_apart(layers, n_expert)), file=reads(_packed(found)),
            ordered=reads(_packed(lay_out(file, disk, packed_layout(file, learned)))),
        )  # fmt: skip


def _apart(layers: Mapping[int, Sequence[TensorInfo]], n_expert: int) -> Extents:
    """Where the parts of a page lie in a GGUF."""

    def extents(page: int) -> list[Extent]:
        il, expert = divmod(page, n_expert)
        sizes = [info.nbytes // n_expert for info in layers[il]]
        return [
            Extent(0, info.offset + expert * nbytes, nbytes, part)
            for part, (info, nbytes) in enumerate(zip(layers[il], sizes, strict=True))
        ]

    return extents


def _packed(header: SidecarHeader) -> Extents:
    """Where they lie in a sidecar."""
    sidecar = Sidecar(header)

    def extents(page: int) -> list[Extent]:
        parts = header.layers[page // header.n_expert]
        return sidecar.extents(0, page, [part.tensor for part in parts])

    return extents


def check_trace(meta: TraceMeta, name: str, sizes: Mapping[int, int], n_expert: int) -> None:
    """Refuse a trace of another model.

    Args:
        meta: the trace's.
        name: of the model.
        sizes: bytes of a page by layer, of the layers that have experts.
        n_expert: in each of them.

    Raises:
        UsageError: its layers, experts or pages are others.
    """
    ours = (tuple(sorted(sizes)), n_expert, max(sizes.values()))
    theirs = (meta.layers, meta.n_expert, meta.page_bytes)
    if ours != theirs:
        raise UsageError(
            f"the trace is of {meta.model[:80]!r}, {len(theirs[0])} layers of {theirs[1]} experts "
            f"of {theirs[2]} bytes, and {name} has {len(ours[0])} of {ours[1]} of {ours[2]}; "
            "record one of this model with --trace"
        )


def missed(trace: Trace, first: int) -> list[list[int]]:
    """Find what layers find missing in decode steps, in the run's own slots: lease after lease.

    Args:
        trace: with the pools that it was recorded from.
        first: the step from which on leases are kept.

    Raises:
        UsageError: it has no pools, so that nobody knows what was in memory, or not two decode
            steps.
        CapacityError: a token needs more pages than there are slots.
    """
    if not trace.pools:
        raise UsageError("the trace says nothing of what was in memory; record it from a model "
                         "whose experts are paged, with --memory and --trace")  # fmt: skip
    n_decoded = sum(not step.prefill for step in trace.steps)
    if n_decoded < 2:
        raise UsageError(f"an order is judged by decoded tokens; this trace has {n_decoded}, and "
                         "needs 2 at least")  # fmt: skip
    n_expert = trace.meta.n_expert
    tables = [(_table(state, n_expert), state.layers) for state in trace.pools[-1].pools]
    table_of = {il: table for table, layers in tables for il in layers}
    found = []
    for number, step in enumerate(trace.steps):
        if step.prefill:
            continue
        for table, _ in tables:
            table.begin_step(False)
        for il, ids in step.parts():
            missing = _missing(table_of[il], pages_of(il, ids.tolist(), n_expert))
            if missing and number >= first:
                found.append(missing)
    return found


def chosen(trace: Trace) -> Iterator[list[int]]:
    """Yield the pages that each token chose in each layer, of prompts too.

    Raises:
        TraceError: a layer's experts are not whole tokens.
    """
    n_expert = trace.meta.n_expert
    for routes in routes_of(trace):
        for il, rows in routes.ids.items():
            yield from (pages_of(il, row, n_expert) for row in rows.tolist())


def _missing(table: PageTable, wanted: list[int]) -> list[int]:
    """Ask for pages as a lease does; return those that were not there."""
    missing = [one.page for one in table.acquire(wanted)[1]]
    for page in missing:
        table.loaded(page)
    table.release(wanted)
    return missing


def _table(state: PoolState, n_expert: int) -> PageTable:
    pages = [il * n_expert + e for il in sorted(state.layers) for e in range(n_expert)]
    shape = PoolShape(pages=pages, n_expert=n_expert, page_bytes=state.page_bytes)
    return PageTable(state.n_slots, make_policy(state.policy, shape, state.n_slots), shape)


def order_of(groups: Iterable[Sequence[int]]) -> list[int]:
    """Put pages that come in the same groups side by side; those in none are left out.

    Groups are of one layer each, so paths are too. They follow each other, the one that is used
    most first.
    """
    together: Counter[tuple[int, int]] = Counter()
    alone: Counter[int] = Counter()
    for pages in groups:
        together.update(combinations(sorted(pages), 2))
        alone.update(pages)
    paths = {page: [page] for page in alone}
    for (one, other), _ in sorted(together.items(), key=lambda item: (-item[1], item[0])):
        first, second = paths[one], paths[other]
        if first is second or not _is_end(first, one) or not _is_end(second, other):
            continue
        if first[-1] != one:
            first.reverse()
        if second[0] != other:
            second.reverse()
        first += second
        for page in second:
            paths[page] = first
    distinct = {id(path): path for path in paths.values()}.values()
    falling = sorted(distinct, key=lambda path: (-sum(alone[page] for page in path), path))
    return [page for path in falling for page in path]


def _is_end(path: Sequence[int], page: int) -> bool:
    return page in (path[0], path[-1])
