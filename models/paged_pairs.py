"""Experts of one layer computed apart from the layers: pairs of token and expert, held or in turn.

Whoever holds an expert's weights for the time being decides where a pair is computed: in slots of
the device, by the processor, or from a copy of fewer bits. Outputs meet in the carry, a row a pair.
"""

import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import MoeHparams, MoeModel
from edgeroute.models.carry import Carry, Choice
from edgeroute.models.copies import CopyPager
from edgeroute.models.forward import Forward, shape_of
from edgeroute.models.host_experts import HostExperts
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.experts import ExpertPager, Leased
from edgeroute.runtime.tensor import F32, I32, I64, set_bytes

MAX_PAIRS: Final = 2048
"""Pairs of token and expert that are computed in one graph; bounds its memory."""
MOST_RUNS: Final = 3
"""Runs of rows that are written one by one; more of them go in one block, with their numbers."""


class _Kept(NamedTuple):
    """Which graph of pairs is kept: of a layer, for so many, of copies or of the experts."""

    il: int
    n_pairs: int
    copied: bool


def apart_from(choice: Choice, low: Sequence[int]) -> Choice:
    """Return the part of a choice that names none of some experts."""
    if not low:
        return choice
    out = np.isin(choice.numbers, np.array(low, np.int32))
    return choice._replace(left_out=out if choice.left_out is None else out | choice.left_out)


class PairsForward(Forward):
    """Computes experts that a pager holds; `PagedForward` has the layers between."""

    model: MoeModel
    _moe: MoeHparams
    _pager: ExpertPager
    _carry: Carry
    host: HostExperts | None
    """Computes what the pager names away; there must be one where it does."""
    copies: CopyPager | None
    """Holds copies of fewer bits, where some misses may be computed from such."""

    def _hold(
        self, il: int, choice: Choice, low: Sequence[int], inline: bool
    ) -> tuple[bool, list[int] | None]:
        """Have the chosen experts computed, or held for the next stage to compute.

        Those in `low` are computed from copies, which are read while the others are held.

        Returns:
            False if that was stopped; and the slot of each choice where they are held.
        """
        if not low:
            return self._hold_all(il, choice, inline)
        assert self.copies is not None, "no copies are here, and some are asked for"
        self.copies.lease(il, low)
        full = apart_from(choice, low)
        done = not full.computed() or self._hold_all(il, full, inline)[0]
        return done and self._compute_copies(il, choice, low), None

    def _hold_all(self, il: int, choice: Choice, inline: bool) -> tuple[bool, list[int] | None]:
        """Have the chosen experts computed or held, none of them from copies."""
        ids = choice.computed()
        experts = list(dict.fromkeys(ids))
        if not inline or len(experts) > self._pager.max_at_once(il):
            return self._take_turns(il, choice), None
        leased = self._pager.lease(il, experts)
        if leased is None:
            return False, None
        if leased.absent or leased.away or choice.left_out is not None:
            slots = dict(zip(experts, leased.slots, strict=True))
            return self._compute_apart(il, choice, slots, leased), None
        if len(experts) == len(ids):
            return True, leased.slots
        slot_of = dict(zip(experts, leased.slots, strict=True))
        return True, [slot_of[expert] for expert in ids]

    def _compute_apart(
        self, il: int, choice: Choice, slots: dict[int, int], leased: Leased
    ) -> bool:
        """Compute the experts that are there while the others arrive, then those.

        What is away the processor computes, while the device computes what is there.
        """
        slot_of = np.zeros(self._moe.n_expert, np.int32)
        slot_of[list(slots)] = list(slots.values())
        late = np.zeros(self._moe.n_expert, np.bool_)
        late[list(leased.absent)] = True
        late[list(leased.away)] = True
        waits = late[choice.numbers]
        here = choice.pairs(~waits)
        if leased.away:
            if not self._compute_away(il, choice, slot_of, leased.away, here):
                return False
            late[list(leased.away)] = False
            waits = late[choice.numbers]
        elif not self._compute_kept(il, choice, slot_of, here):
            return False
        if not leased.absent:
            return True
        return self._pager.arrive() and self._compute_kept(il, choice, slot_of,
                                                           choice.pairs(waits))  # fmt: skip

    def _take_turns(self, il: int, choice: Choice) -> bool:
        """Compute the chosen experts group by group; False if that was stopped."""
        experts, counts = np.unique(np.array(choice.computed()), return_counts=True)
        n_pairs = dict(zip(experts.tolist(), counts.tolist(), strict=True))
        for held in self._pager.in_turn(il, n_pairs, MAX_PAIRS):
            if held is None:
                return False
            slot_of = np.full(self._moe.n_expert, -1, np.int32)
            slot_of[list(held.experts)] = held.slots
            if held.away:
                nothing = np.empty(0, np.intp)
                if not self._compute_away(il, choice, slot_of, held.experts, nothing):
                    return False
                continue
            pairs = choice.pairs(slot_of[choice.numbers] >= 0)
            with self.graphs.passing(self._pairs_graph(il, len(pairs))) as graph:
                done = self._compute_pairs(graph, choice, slot_of, pairs)
            if not done:
                return False
        return True

    def _compute_kept(
        self, il: int, choice: Choice, slot_of: npt.NDArray[np.int32], pairs: npt.NDArray[np.intp]
    ) -> bool:
        """Compute some pairs with a graph that is kept for the next so many."""
        graph = self._kept_graph(il, len(pairs))
        return self._compute_pairs(graph, choice, slot_of, pairs)

    def _compute_copies(self, il: int, choice: Choice, low: Sequence[int]) -> bool:
        """Wait for the copies of some experts, and compute all their pairs from those."""
        assert self.copies is not None
        slot_of = np.full(self._moe.n_expert, -1, np.int32)
        slot_of[list(low)] = self.copies.arrive()
        pairs = choice.pairs(slot_of[choice.numbers] >= 0)
        graph = self._kept_graph(il, len(pairs), copied=True)
        return self._compute_pairs(graph, choice, slot_of, pairs)

    def _kept_graph(self, il: int, n_pairs: int, *, copied: bool = False) -> Graph:
        key = _Kept(il, n_pairs, copied)
        return self.graphs.find(key) or self.graphs.add(
            key, self._pairs_graph(il, n_pairs, copied=copied)
        )

    def _compute_away(
        self, il: int, choice: Choice, slot_of: npt.NDArray[np.int32], away: Sequence[int],
        here: npt.NDArray[np.intp],
    ) -> bool:  # fmt: skip
        """Have the processor compute some experts while the device computes the pairs `here`."""
        host = self.host
        assert host is not None, "a pager names experts away, and nothing computes them"
        wanted = np.zeros(self._moe.n_expert, np.bool_)
        wanted[list(away)] = True
        pairs = choice.pairs(wanted[choice.numbers])
        host.prepare(il, len(pairs))  # what is built once is no cost of computing
        graph = self._kept_graph(il, len(here)) if len(here) else None
        began = time.perf_counter()
        h = self._carry.read_h(len(choice.ids) // choice.k)
        self.device.check()
        if graph is not None:
            self._fill_pairs(graph, choice, slot_of, here)
            self.device.compute_begin(graph.pointer)
        try:
            experts = choice.numbers[pairs]
            outs = host.compute(il, h[pairs // choice.k], experts, slot_of[experts])
        finally:
            ended = time.perf_counter()  # what the device takes longer is no cost of these
            done = graph is None or self.device.compute_end()
        alone_s = time.perf_counter() - ended
        if outs is None or not done or not self._write_rows(pairs, outs):
            return False
        host.book(len(away), len(pairs), time.perf_counter() - began - alone_s)
        return True

    def _write_rows(self, pairs: npt.NDArray[np.intp], outs: npt.NDArray[np.float32]) -> bool:
        """Write outputs of pairs into the carry, with the fewest messages."""
        if self._carry.n_runs(pairs) <= MOST_RUNS:
            self._carry.write_rows(pairs, outs)
            return True
        with self.graphs.passing(self._rows_graph(len(pairs))) as graph:
            set_bytes(graph.inputs.more["block"], outs)
            set_bytes(graph.inputs.more["rows"], pairs.astype(np.int64))
            return self.device.compute(graph.pointer)

    def _compute_pairs(
        self, graph: Graph, choice: Choice, slot_of: npt.NDArray[np.int32],
        pairs: npt.NDArray[np.intp],
    ) -> bool:  # fmt: skip
        """Compute some pairs of token and expert, each into its own row of the carry."""
        self._fill_pairs(graph, choice, slot_of, pairs)
        return self.device.compute(graph.pointer)

    def _fill_pairs(
        self, graph: Graph, choice: Choice, slot_of: npt.NDArray[np.int32],
        pairs: npt.NDArray[np.intp],
    ) -> None:  # fmt: skip
        """Say which pairs a graph computes."""
        more, experts = graph.inputs.more, choice.numbers[pairs]
        set_bytes(more["tokens"], (pairs // choice.k).astype(np.int32))
        set_bytes(more["rows"], pairs.astype(np.int64))
        set_bytes(more["slots"], slot_of[experts])
        if "ids" in more:  # of families whose experts have biases
            set_bytes(more["ids"], experts)

    def _pairs_graph(self, il: int, n_pairs: int, *, copied: bool = False) -> Graph:
        """Build experts' outputs for pairs of token and expert, written to rows of the carry."""
        batch = shape_of(1, round_cells(1), n_out=1)
        b = self.builder(Span((), embed=False, output=False), batch, 0)
        if copied:
            assert self.copies is not None
            b.weights = self.copies
        carry = self._carry.views(b, self._carry.n_tokens, 1)
        tokens, rows = b.more("tokens", I32, n_pairs), b.more("rows", I64, n_pairs)
        slots, ids = b.more("slots", I32, 1, n_pairs), b.more("ids", I32, 1, n_pairs)
        n_embd = self.model.hparams.n_embd
        h = b.g.ggml_get_rows(b.ctx, carry.h, tokens)
        h = b.g.ggml_reshape_3d(b.ctx, h, n_embd, 1, n_pairs)
        outs = self.model.experts(b, il, h, ids, slots)
        flat = b.g.ggml_reshape_2d(b.ctx, outs, n_embd, n_pairs)
        return b.finish(b.g.ggml_set_rows(b.ctx, carry.rows, flat, rows))

    def _rows_graph(self, n_pairs: int) -> Graph:
        """Build what writes given outputs of pairs to rows of the carry."""
        batch = shape_of(1, round_cells(1), n_out=1)
        b = self.builder(Span((), embed=False, output=False), batch, 0)
        outs = self._carry.views(b, self._carry.n_tokens, 1).rows
        block = b.more("block", F32, self.model.hparams.n_embd, n_pairs)
        rows = b.more("rows", I64, n_pairs)
        return b.finish(b.g.ggml_set_rows(b.ctx, outs, block, rows))
