"""Run a mixture of experts whose experts are not all there: a graph per layer, leases between.

A stage ends where a router has chosen: the host reads the numbers, has the experts leased,
and the next stage begins with them. The operations and their order are those of
`Model.layer`, so that the logits are the same bits as with everything resident.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import MoeModel
from edgeroute.models.blocks import output_norm
from edgeroute.models.carry import Carry, Choice
from edgeroute.models.forward import Piece, shape_of
from edgeroute.models.misses import DoingWithout
from edgeroute.models.moe import THRESHOLDS, n_ranked
from edgeroute.models.paged_pairs import MAX_PAIRS, PairsForward, apart_from
from edgeroute.models.pruning import n_described
from edgeroute.models.steps import build_attn
from edgeroute.runtime.batch_shape import BatchShape, Span
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.depth import Step, Steps
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.experts import ExpertPager, MissRule
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.tensor import I32, set_bytes, shape

MAX_INLINE_TOKENS = 16
"""Up to here a layer's experts are held all at once, if there is room; beyond, in turn."""
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


class PagedForward(PairsForward):
    """A model on one device, its experts behind a pager.

    Not thread-safe: one thread owns it. Lifetime: close it before `kv` and `pager`.
    """

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
        self._moe = model.hparams.moe
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
        self.host = None
        self.copies = None

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
        if self.copies is not None:
            self.copies.begin()
        try:
            return self._run(pieces, batch, parts, borrow)
        finally:
            if self.copies is not None:
                self.copies.end()
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
        if self._thins:  # tokens compute 1 to k experts inline, or from copies: a graph each
            n_kept += 2 * self._moe.n_expert_used
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
            low: Sequence[int] = ()
            if without is not None:
                here = self._pager.here(il)
                choice = without.choose(stage.until, choice, here)
                if self.copies is not None:
                    low = without.degrade(stage.until, choice, here, self.copies.max_at_once(il))
            guesses = None
            if guessed is not None:
                guesses = self._carry.read_guess(n, **self._ranked(guessed))
            self._pager.chose(il, apart_from(choice, low).computed(), guesses)
            done, slots = self._hold(il, choice, low, inline)
            if not done:
                return None
        if graph is None or not batch.n_out:
            return np.empty((0, self.model.hparams.n_vocab), np.float32)
        return self.logits(graph, batch, borrow)

    def _ranked(self, step: Step) -> _Ranked:
        """Say how a step's choice is read."""
        ranked = n_ranked(self._moe, step.expert_rule, step.expert_value)
        return {"ranked": ranked, "thinned": step.expert_rule in THRESHOLDS}

    # graphs

    def _stage(self, stage: Stage, batch: BatchShape) -> Graph:
        return self._find_or_build(stage, batch, self._build_stage, ends=stage.until is None)

    def _build_stage(self, stage: Stage, batch: BatchShape) -> Graph:
        model, until = self.model, stage.until
        ends = until is None and stage.narrow
        span = Span(stage.dense, embed=stage.before is None, output=ends, plan=stage.plan)
        b = self.builder(span, batch, n_described(stage.dense) + 2)
        x = self._begin(b) if stage.before is None else self._combine(b, stage)
        x = self.pass_layers(b, stage.dense, x, narrow=ends)
        if ends:
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
