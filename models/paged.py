"""Run a mixture of experts whose experts are not all there: a graph per layer, leases between.

A stage ends where a router has chosen: the host reads the numbers, has the experts leased,
and the next stage begins with them. The operations and their order are those of
`Model.layer`, so that the logits are the same bits as with everything resident.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import MoeHparams, MoeModel
from edgeroute.models.blocks import output_norm
from edgeroute.models.carry import Carry, Choice
from edgeroute.models.forward import Forward, Piece, shape_of
from edgeroute.models.host_experts import HostExperts
from edgeroute.models.misses import DoingWithout
from edgeroute.models.moe import THRESHOLDS, n_ranked
from edgeroute.models.pruning import n_described
from edgeroute.models.steps import build_attn, build_step
from edgeroute.runtime.depth import Step, Steps
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.experts import ExpertPager, Leased, MissRule
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import BatchShape, Builder, Graph, Span
from edgeroute.runtime.kv_cache import KvCache, round_cells
from edgeroute.runtime.tensor import F32, I32, I64, host_view, set_bytes, shape

MAX_PAIRS = 2048
"""Pairs of token and expert that are computed in one graph; bounds its memory."""
MAX_INLINE_TOKENS = 16
"""Up to here a layer's experts are held all at once, if there is room; beyond, in turn."""
MOST_RUNS = 3
"""Runs of rows that are written one by one; more of them go in one block, with their numbers."""
SHAPES_KEPT = 4
PAIR_COUNTS_KEPT = 8
"""Numbers of pairs, per layer, whose graphs are kept: some experts of a token, then the others."""


class Stage(NamedTuple):
    """What lies between two choices of experts.

    `before` is the step whose chosen experts begin the stage, None at the embedding; `inline`
    whether they are computed in it, or in graphs of their own before; `dense` are steps that
    choose no experts; `until` is the step whose router ends it, None at the head. `guessed` is
    the step whose router is asked ahead of its time. `narrow_before` and `narrow` say whether
    `before` and the stage's end see only the tokens whose logits are wanted; the last stage of
    a pass that wants none, but all hidden states, ends with the output norm. `k` is the most
    experts of `before` that a token computes inline, or of a packed choice; 0 is for as many as
    it ranks. `rated` keeps how the router that ends the stage rates all experts.
    """

    before: Step | None
    inline: bool
    dense: Steps
    until: Step | None
    guessed: Step | None
    narrow_before: bool
    narrow: bool
    plan: str
    k: int = 0
    rated: bool = False

    @property
    def gathers(self) -> bool:
        """Whether outputs are gathered, since tokens may have computed fewer than they rank."""
        return not self.inline and not self.k and self.before is not None and (
            self.before.expert_rule in THRESHOLDS
        )  # fmt: skip


class _Ranked(TypedDict):
    """How a step's choice is read: see `Carry.read_choice`."""

    ranked: int
    thinned: bool


class PagedForward(Forward):
    """A model on one device, its experts behind a pager.

    Not thread-safe: one thread owns it. Lifetime: close it before `kv` and `pager`.
    """

    model: MoeModel

    def __init__(
        self, model: MoeModel, device: Device, pager: ExpertPager, kv: KvCache, n_tokens: int,
        misses: MissRule | None = None,
    ) -> None:  # fmt: skip
        """Allocate what layers hand on, for batches of up to `n_tokens`.

        `misses` says which missing experts a token does without while it decodes.

        Raises:
            CapacityError: no memory for it.
        """
        super().__init__(model, device, pager, kv)
        assert model.hparams.moe is not None
        self._moe: MoeHparams = model.hparams.moe
        self._pager = pager
        self._parts = _parts(model, self.whole[0])
        self._parts_of: dict[Span, list[Stage]] = {}
        self._thins = misses is not None
        self._raise_kept(len(self._parts))
        self._carry = Carry(device, model.hparams.n_embd, self._moe, n_tokens,
                            rated=misses is not None and misses.reads_scores)  # fmt: skip
        self._without = None if misses is None else DoingWithout(
            misses, self._carry, self._moe, model.routing
        )  # fmt: skip
        self.host: HostExperts | None = None
        """Computes what the pager names away; there must be one where it does."""

    @property
    def carry_bytes(self) -> int:
        """Bytes of what layers hand on."""
        return self._carry.n_bytes

    def reserve(self, n_tokens: int, n_kv: int, n_out: int = 1) -> None:
        """Size the compute buffer for `n_tokens` that see `n_kv` cells, and `n_out` logits."""
        batch = shape_of(n_tokens, round_cells(n_kv), n_out=n_out)._replace(lora=self.widest_lora)
        for part in self._parts:
            self._stage(part._replace(inline=False, guessed=None), batch)
        n_pairs = min(MAX_PAIRS, n_tokens * self._moe.n_expert_used)
        il = next(part.until.il for part in self._parts if part.until is not None)
        with self.graphs.passing(self._pairs_graph(il, n_pairs)):
            pass
        self.graphs.clear()

    def run(
        self, pieces: Sequence[Piece], spans: Sequence[Span] | None = None, *, borrow: bool = False
    ) -> npt.NDArray[np.float32] | None:
        """Compute a batch, as `Forward.run` does; `spans` is None, one whole pass, or `normed`.

        Raises:
            ModelFileError: an expert cannot be read.
        """
        parts = self._parts if spans is None else self._cut(spans)
        batch = self.shape(pieces)
        if batch.n_tokens > self._carry.n_tokens:
            raise ComputeError(
                f"a batch of {batch.n_tokens} tokens is over the {self._carry.n_tokens} that "
                "this model was opened for"
            )
        self._pager.begin(prefill=batch.n_tokens > len(pieces))
        try:
            return self._run(pieces, batch, parts, borrow)
        finally:
            self._pager.end()

    def close(self) -> None:
        """Free graphs and buffers; safe to call twice."""
        super().close()
        self._carry.close()

    def _cut(self, spans: Sequence[Span]) -> list[Stage]:
        """Cut a pass where its routers choose.

        Raises:
            ComputeError: it is not one whole pass.
        """
        if len(spans) != 1 or not (spans[0].embed and (spans[0].output or spans[0].norm)):
            raise ComputeError("a model whose experts are paged computes whole passes only")
        parts = self._parts_of.get(spans[0])
        if parts is None:
            if len(self._parts_of) >= SHAPES_KEPT:
                self._parts_of.clear()
            parts = self._parts_of[spans[0]] = _parts(self.model, spans[0])
            if any(step.expert_rule in THRESHOLDS for step in spans[0].steps):
                self._thins = True
                self._raise_kept(len(parts))
        return parts

    def _raise_kept(self, n_parts: int) -> None:
        """Keep as many graphs as passes of so many parts need."""
        n_kept = 2 * SHAPES_KEPT + PAIR_COUNTS_KEPT
        if self._thins:  # tokens compute 1 to k experts inline, each number in its own graph
            n_kept += self._moe.n_expert_used
        self.graphs.max_graphs = max(self.graphs.max_graphs, n_kept * n_parts)

    def _run(
        self, pieces: Sequence[Piece], batch: BatchShape, parts: Sequence[Stage], borrow: bool
    ) -> npt.NDArray[np.float32] | None:
        inline = batch.n_tokens <= MAX_INLINE_TOKENS
        without = self._without if batch.n_tokens == len(pieces) else None
        slots: list[int] | None = None
        graph: Graph | None = None
        choice = Choice(np.empty(0, np.int32), [], 0)
        for part in parts:
            guessed = part.guessed if self._pager.wants_guess else None
            stage = part._replace(
                inline=slots is not None, guessed=guessed,
                rated=without is not None and without.reads_ratings(part.until),
                k=choice.k if slots is not None or choice.packed else 0,
            )  # fmt: skip
            graph = self._stage(stage, batch)
            self._fill(graph, pieces, batch)
            if slots is not None:
                set_bytes(graph.inputs.more["slots"], np.array(slots, np.int32))
            elif stage.gathers:
                set_bytes(graph.inputs.more["outs"], choice.rows(self._moe.n_expert_used))
            if not self.device.compute(graph.pointer):
                return None
            if stage.until is None:
                break
            n, il = _columns(stage.narrow, batch), stage.until.il
            if not n:  # the last layer of a batch that wants no logits: its keys are written
                break
            choice = self._carry.read_choice(n, **self._ranked(stage.until))
            if without is not None:
                choice = without.choose(stage.until, choice, self._pager.here(il))
            guesses = None
            if guessed is not None:
                guesses = self._carry.read_guess(n, **self._ranked(guessed))
            self._pager.chose(il, choice.computed(), guesses)
            done, slots = self._hold(il, choice, inline)
            if not done:
                return None
        if graph is None or not batch.n_out:
            return np.empty((0, self.model.hparams.n_vocab), np.float32)
        return self.logits(graph, batch, borrow)

    def _ranked(self, step: Step) -> _Ranked:
        """Say how a step's choice is read."""
        ranked = n_ranked(self._moe, step.expert_rule, step.expert_value)
        return {"ranked": ranked, "thinned": step.expert_rule in THRESHOLDS}

    # leases

    def _hold(self, il: int, choice: Choice, inline: bool) -> tuple[bool, list[int] | None]:
        """Have the chosen experts computed, or held for the next stage to compute.

        Returns:
            False if that was stopped; and the slot of each choice where they are held.
        """
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

    def _kept_graph(self, il: int, n_pairs: int) -> Graph:
        key = il, n_pairs
        return self.graphs.find(key) or self.graphs.add(key, self._pairs_graph(il, n_pairs))

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

    # graphs

    def _stage(self, stage: Stage, batch: BatchShape) -> Graph:
        key = (stage, batch)
        graph = self.graphs.find(key)
        if graph is None:
            graph = self.graphs.add(key, self._build_stage(stage, batch))
            if stage.until is None and batch.n_out:
                ne = (batch.n_out, self.model.hparams.n_vocab)
                graph.host_output = host_view(graph.output, ne)
        return graph

    def _build_stage(self, stage: Stage, batch: BatchShape) -> Graph:
        model, until = self.model, stage.until
        ends = until is None and stage.narrow
        span = Span(stage.dense, embed=stage.before is None, output=ends, plan=stage.plan)
        b = self._builder(span, batch, n_described(stage.dense) + 2)
        x = self._begin(b) if stage.before is None else self._combine(b, stage)
        for i, step in enumerate(stage.dense):
            last = until is None and stage.narrow and i == len(stage.dense) - 1
            x = build_step(b, model, step, x, last=last)
        if until is None and stage.narrow:
            return b.finish(model.head(b, b.select_outputs(x)))
        if until is None:
            x = output_norm(b, x, model.hparams.norm_rms_eps)
            return b.finish(b.g.ggml_cpy(b.ctx, x, self._stream_view(b)))
        x = build_attn(b, model, until, x, last=stage.narrow)
        h = model.ffn_input(b, until.il, x)
        n = _columns(stage.narrow, batch)
        if not n:
            return b.finish(x)
        if stage.rated:
            ratings = model.rate(b, until.il, h)
            self._carry.keep_ratings(b, ratings)
            ids, weights = model.pick(b, ratings)
        else:
            ids, weights = model.route(b, until.il, h)
        carry = self._carry.views(b, n, shape(ids)[0])
        if stage.guessed is not None:
            self._guess(b, stage.guessed, h)
        b.keep(x, carry.x)
        b.keep(h, carry.h)
        b.keep(weights, carry.weights)
        return b.finish(b.g.ggml_cpy(b.ctx, ids, carry.ids))

    def _guess(self, b: Builder, step: Step, h: Tensor) -> None:
        """Ask the next step's router ahead of its time."""
        b.expert_rule, b.expert_value = step.expert_rule, step.expert_value
        ids, weights = self.model.route(b, step.il, h)
        carry = self._carry.views(b, shape(h)[1], shape(ids)[0])
        b.keep(ids, carry.guess)
        if step.expert_rule in THRESHOLDS:
            b.keep(weights, carry.guess_weights)

    def _combine(self, b: Builder, stage: Stage) -> Tensor:
        """Begin a stage with what the one before left: the residual stream after its experts."""
        assert stage.before is not None
        il, ranked = stage.before.il, self._ranked(stage.before)["ranked"]
        k = stage.k or ranked
        carry = self._carry.views(b, _columns(stage.narrow_before, b.batch), ranked, k)
        outs, (n_embd, n, _, _) = carry.outs, shape(carry.h)
        if stage.inline:
            slots = b.more("slots", I32, k, n)
            h = b.g.ggml_reshape_3d(b.ctx, carry.h, n_embd, 1, n)
            outs = self.model.experts(b, il, h, carry.ids, slots)
        elif stage.gathers:
            rows = b.g.ggml_get_rows(b.ctx, carry.rows, b.more("outs", I32, k * n))
            outs = b.g.ggml_reshape_3d(b.ctx, rows, n_embd, k, n)
        return b.add(self.model.combine(b, il, carry.h, outs, carry.weights), carry.x)

    def _pairs_graph(self, il: int, n_pairs: int) -> Graph:
        """Build experts' outputs for pairs of token and expert, written to rows of the carry."""
        batch = shape_of(1, round_cells(1), n_out=1)
        b = self._builder(Span((), embed=False, output=False), batch, 0)
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
        b = self._builder(Span((), embed=False, output=False), batch, 0)
        outs = self._carry.views(b, self._carry.n_tokens, 1).rows
        block = b.more("block", F32, self.model.hparams.n_embd, n_pairs)
        rows = b.more("rows", I64, n_pairs)
        return b.finish(b.g.ggml_set_rows(b.ctx, outs, block, rows))


def _columns(narrow: bool, batch: BatchShape) -> int:
    """Count the tokens that a stage's end sees."""
    return batch.n_out if narrow else batch.n_tokens


def _parts(model: MoeModel, span: Span) -> list[Stage]:
    """Cut a whole pass where its routers choose."""
    found: list[Stage] = []
    before: Step | None = None
    dense: list[Step] = []
    n = len(span.steps)
    routes = [model.is_moe(step.il) and step.ffn == "run" for step in span.steps]
    for i, step in enumerate(span.steps):
        if not routes[i]:
            dense.append(step)
            continue
        follows = i + 1 < n and routes[i + 1] and span.steps[i + 1].il == step.il + 1
        guessed = span.steps[i + 1] if follows else None
        found.append(Stage(before, True, tuple(dense), step, guessed, narrow_before=False,
                           narrow=span.output and i == n - 1, plan=span.plan))  # fmt: skip
        before, dense = step, []
    narrow_before = bool(found) and found[-1].narrow
    return [*found, Stage(before, True, tuple(dense), None, None, narrow_before=narrow_before,
                          narrow=span.output, plan=span.plan)]  # fmt: skip
