"""A model ready to run: file, vocabulary, device, weights and KV pool, under one ledger."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from edgeroute.config import RunParams
from edgeroute.lever_choice import choose_levers
from edgeroute.models.base import Hparams, Model
from edgeroute.models.forward import Forward
from edgeroute.models.registry import describe
from edgeroute.opening import Opening
from edgeroute.runtime import machine
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.kv_cache import KvCache, KvShape, round_cells
from edgeroute.runtime.ledger import COMPUTE_BUFFER, Ledger
from edgeroute.runtime.tensor import BF16, F16, F32
from edgeroute.runtime.units import MIB, parse_bytes
from edgeroute.runtime.weights import ResidentWeights, WeightsPlan

if TYPE_CHECKING:
    from edgeroute.adapters import AdapterPlan, Adapters
    from edgeroute.depth import DepthSource, NoDepth
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.offload.layer_store import LayerStore

MAX_BATCH, MAX_BATCH_REPACKED, MAX_BATCH_FLOAT = 16, 3, 1
"""Sequences in one pass by default: see RunParams.max_batch."""
FLOATS = frozenset({F32, F16, BF16})
"""Types whose products with two rows ggml tiles. Source: ggml-cpu/llamafile."""
MAX_DRAFT = 64
"""Tokens of a small model's steps that are checked in one pass; logits of all are held at once."""
RESERVE_RATIO, RESERVE_MIN_BYTES = 0.05, 256 * MIB
"""Of the memory available, what stays for everything else when no budget is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, known before anything is allocated."""

    weights: WeightsPlan
    kv_bytes: int
    compute_bytes: int
    adapter_bytes: int = 0
    standin_bytes: int = 0
    session_bytes: int = 0

    def wants(self) -> dict[str, int]:
        """Return ledger entries by owner."""
        found = {
            "weights (mapped file)": self.weights.mapped_bytes,
            "weights (repacked or copied)": self.weights.copied_bytes,
            "KV cache": self.kv_bytes,
            COMPUTE_BUFFER: self.compute_bytes,
            "adapter slots": self.adapter_bytes,
            "stand-ins": self.standin_bytes,
            "session staging": self.session_bytes,
        }
        return {owner: n_bytes for owner, n_bytes in found.items() if n_bytes}

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.wants().values())


def budget_bytes(params: RunParams) -> int:
    """Return the budget given, or the memory really available less a reserve."""
    if params.memory is not None:
        return parse_bytes(params.memory)
    return less_reserve(machine.memory().available_bytes)


def less_reserve(free_bytes: int) -> int:
    """Return what may be used of memory that is free, when no budget is given."""
    return max(0, free_bytes - max(RESERVE_MIN_BYTES, int(RESERVE_RATIO * free_bytes)))


def kv_shape(hparams: Hparams, params: RunParams, n_repeat: int = 0) -> KvShape:
    """Return what one KV cell of this model holds, with `n_repeat` passes beyond its layers."""
    return KvShape(
        n_layer=hparams.n_layer, n_embd_k_gqa=hparams.n_embd_k_gqa,
        n_embd_v_gqa=hparams.n_embd_v_gqa, n_embd_head=hparams.n_embd_head_k,
        n_embd_head_v=hparams.n_embd_head_v, v_in_k=hparams.v_in_k, kv_type=params.kv_type,
        n_repeat=n_repeat,
    )  # fmt: skip


def plan_memory(
    hparams: Hparams, weights: ResidentWeights, params: RunParams, n_repeat: int = 0
) -> MemoryPlan:
    """Plan a model's bytes from its header and the settings.

    The compute buffer is an upper estimate: activations that live at once, the mask, logits.
    """
    n_kv = round_cells(params.n_kv or params.n_ctx)
    n_ubatch = min(params.n_ubatch, n_kv)
    per_token = 4 * (_n_values_ff(hparams) + 8 * hparams.n_embd) + 2 * round_cells(params.n_ctx)
    n_out = params.max_batch or MAX_BATCH
    if params.steps_on and params.small is not None:
        n_out = max(n_out, MAX_DRAFT + 1)
    logits = 4 * hparams.n_vocab * n_out
    return MemoryPlan(
        weights=weights.plan,
        kv_bytes=n_kv * kv_shape(hparams, params, n_repeat).bytes_per_cell,
        compute_bytes=n_ubatch * per_token + logits,
    )


def plan_parts(
    hparams: Hparams, weights: ResidentWeights, params: RunParams,
    parts: "tuple[DepthSource | None, AdapterPlan | None]",
) -> MemoryPlan:  # fmt: skip
    """Plan a model's bytes, with those of what runs beside it: a depth plan, adapters, sessions."""
    depth, adapters = parts
    n_repeat = 0 if depth is None else depth.n_repeats
    plan = plan_memory(hparams, weights, params, n_repeat)
    if depth is not None:
        plan = dataclasses.replace(plan, standin_bytes=depth.n_bytes)
    if params.sessions is not None:
        from edgeroute.session_work import staging_bytes

        shape = kv_shape(hparams, params, n_repeat)
        plan = dataclasses.replace(plan, session_bytes=staging_bytes(shape))
    if adapters is None:
        return plan
    more = adapters.compute_bytes(min(params.n_ubatch, round_cells(params.n_kv or params.n_ctx)))
    return dataclasses.replace(
        plan, adapter_bytes=adapters.n_bytes, compute_bytes=plan.compute_bytes + more
    )


def _n_values_ff(hparams: Hparams) -> int:
    """Bound the values of one token that live at once in a feed-forward: in, gated, out."""
    moe = hparams.moe
    if moe is None:
        return 3 * hparams.n_ff
    per_expert = max(3 * moe.n_ff_exp, moe.n_ff_exp + 2 * hparams.n_embd)
    return max(3 * hparams.n_ff, 3 * moe.n_ff_shexp, moe.n_expert_used * per_expert)


class LoadedModel:
    """Everything one model owns, freed in reverse order by `close`.

    `params` are its settings, proofs of levers applied.

    Made, used and closed by the engine thread. An `opening` of the same path is taken over;
    `wake` is called from other threads when something that was waited for has arrived.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        CapacityError: it does not fit; nothing stays allocated.
    """

    def __init__(
        self, path: Path, params: RunParams, opening: Opening | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        began = time.perf_counter()
        self._wake = wake
        self._owned = contextlib.ExitStack()
        try:
            self._load(self._owned.enter_context(opening or Opening(path)), params)
        except BaseException:
            self._owned.close()
            raise
        self.load_s = time.perf_counter() - began

    def _load(self, opening: Opening, params: RunParams) -> None:
        self.file = opening.file
        self.levers = choose_levers(opening.file, params, budget_bytes(params))
        params = self.params = self.levers.params
        self.small = self._load_small(opening, params)
        self._load_weights(params)  # while the vocabulary is being read
        self.tokenizer = opening.tokenizer
        self._book_compute()

    def _book_compute(self) -> None:
        """Enter what the compute buffers really take instead of what was planned."""
        self.ledger.replace(COMPUTE_BUFFER, self.forward.graphs.n_bytes)

    def _load_small(self, opening: Opening, params: RunParams) -> "LoadedModel | None":
        """Open the small model first: what it takes is not there for this one."""
        self._beside_bytes = 0
        if params.small is None:
            return None
        from edgeroute.small import open_small

        process = psutil.Process()
        before = process.memory_info().rss
        small = self._owned.enter_context(contextlib.closing(open_small(opening, params)))
        self._beside_bytes = max(0, process.memory_info().rss - before)
        return small

    def _load_weights(self, params: RunParams) -> None:
        """Plan, enter in the ledger, then place weights, KV pool and compute buffer."""
        own = self._owned
        self.model: Model = describe(self.file)
        self.device = own.enter_context(Device.open(params.device))
        self.experts: ExpertStore | None = None
        self.layers: LayerStore | None = None
        self.adapters: Adapters | None = None
        self.ledger = Ledger(budget_bytes(params))
        if self.small is not None:
            from edgeroute.small import small_entries

            self.ledger.reserve(small_entries(self.small))
        self._adapter_plan = self._plan_adapters(params)
        self.depth, self.no_depth = self._plan_depth(params)
        weights = ResidentWeights(
            self.file, self.device, self.model.specs(), repack_experts=params.repack_experts
        )
        own.callback(weights.close)
        self.plan = self._plan(weights, params)
        if self.plan.total_bytes > self.ledger.free_bytes:
            self._load_in_part(params)
            return
        self.ledger.reserve(self.plan.wants())
        weights.load()
        self._make_pool(params)
        self.forward: Forward = Forward(self.model, self.device, weights, self.kv)
        self._reserve_compute(params)

    def _plan_adapters(self, params: RunParams) -> "AdapterPlan | None":
        if params.adapters is None:
            return None
        # A model without adapters should not wait for its import.
        from edgeroute.adapters import plan_adapters

        return plan_adapters(self.file.path, self.model, params, self.ledger.budget_bytes)

    def _plan_depth(self, params: RunParams) -> "tuple[DepthSource | None, NoDepth | None]":
        if params.depth == "full":
            return None, None
        # A model that runs whole should not wait for its import.
        from edgeroute.depth import NoDepth, open_depth

        found = open_depth(self._owned, self.file, self.model.hparams, self.device, params)
        return (None, found) if isinstance(found, NoDepth) else (found, None)

    @property
    def _n_repeat(self) -> int:
        return 0 if self.depth is None else self.depth.n_repeats

    def _plan(self, weights: ResidentWeights, params: RunParams) -> MemoryPlan:
        return plan_parts(self.model.hparams, weights, params, (self.depth, self._adapter_plan))

    def _load_in_part(self, params: RunParams) -> None:
        """Keep a part in memory and page the rest.

        Raises:
            CapacityError: that does not fit either; it names the smaller of the budgets that
                the whole and the part would need.
        """
        whole, small = self.plan, sum(self._small_bytes().values())
        try:
            (self._load_paged if self.model.hparams.moe else self._load_layered)(params)
        except CapacityError as error:
            least = error.smallest_bytes
            if least is not None and least >= whole.total_bytes + small:
                self.ledger.reserve(whole.wants())
            raise

    def _load_paged(self, params: RunParams) -> None:
        """Place all but the experts, and make slots for as many of those as the budget holds."""
        # Models that fit need none of this, and should not wait for its import.
        from edgeroute.models.paged import PagedForward
        from edgeroute.paging import moe_source, open_store, plan_paged

        own = self._owned
        source = moe_source(self.file, self.device, self.model, params)
        source = dataclasses.replace(source, beside_bytes=self._beside_bytes)
        base = source.other_weights()
        own.callback(base.close)
        self.plan = self._plan(base, params)
        small = self._small_bytes()
        paged = plan_paged(source, self.plan.wants() | small, self.ledger.budget_bytes)
        wants = paged.wants()
        self.ledger.reserve({owner: n for owner, n in wants.items() if owner not in small})
        base.load()
        self._make_pool(params)
        self.experts = open_store(own, source, base, paged)
        self.forward = forward = PagedForward(
            source.model, self.device, self.experts, self.kv, params.n_ubatch
        )
        self.ledger.release("expert compute")
        self.ledger.reserve({"expert compute": forward.carry_bytes})
        self._reserve_compute(params)

    def _load_layered(self, params: RunParams) -> None:
        """Place as many layers as the budget holds, and rooms for the others to go through."""
        from edgeroute.paging_layers import LayerSource, open_layers, plan_layers

        own = self._owned
        source = LayerSource(file=self.file, device=self.device, model=self.model, params=params,
                             beside_bytes=self._beside_bytes)  # fmt: skip
        with contextlib.closing(source.base(source.units())) as small:
            fixed = self._plan(small, params).wants()
        layered = plan_layers(source, fixed | self._small_bytes(), self.ledger.budget_bytes)
        base = source.base(layered.streamed)
        own.callback(base.close)
        self.plan = self._plan(base, params)
        self.ledger.reserve(self.plan.wants() | layered.entries)
        base.load()
        self._make_pool(params)
        self.layers, self.forward = open_layers(own, source, base, layered, self.kv)
        self._reserve_compute(params)

    def _small_bytes(self) -> dict[str, int]:
        """Return what the small model has taken, as one part of what is planned."""
        return {} if self.small is None else {"the small model": self.ledger.used_bytes}

    def _make_pool(self, params: RunParams) -> None:
        shape = kv_shape(self.model.hparams, params, self._n_repeat)
        self.kv = KvCache(self.device, shape, params.n_kv or params.n_ctx)
        self._owned.callback(self.kv.close)

    def _reserve_compute(self, params: RunParams) -> None:
        self._owned.callback(self.forward.close)
        if self.depth is not None:
            self.depth.load(self.forward)
        if self._adapter_plan is not None:
            from edgeroute.adapters import Adapters, Host

            host = Host(self._wake, self.encode)
            self.adapters = self._owned.enter_context(
                Adapters(self.forward, self.ledger, self._adapter_plan, host)
            )
        checks = params.steps_on and params.small is not None
        n_tokens = min(params.n_ubatch, self.kv.n_cells)
        n_out = min(n_tokens, MAX_DRAFT + 1) if checks else 1
        self.forward.reserve(n_tokens, params.n_ctx, n_out)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids as a plain prompt is: control tokens in it are text."""
        return self.tokenizer.encode(text, add_special=True, parse_special=False)

    @property
    def max_batch(self) -> int:
        """Sequences that decode in one pass without changing each other's bits.

        Routers of experts are left out: their models promise less, see README.
        """
        tensors = self.file.tensors
        for spec in self.model.specs():
            info = tensors.get(spec.source or spec.name)
            matrix = spec.use == "mul_mat" and len(spec.ne) == 2 and "ffn_gate_inp" not in spec.name
            if matrix and info is not None and info.type in FLOATS:
                return MAX_BATCH_FLOAT
        return MAX_BATCH_REPACKED if self.plan.weights.repacked else MAX_BATCH

    @property
    def longest_draft(self) -> int:
        """Tokens that a pass may verify beside the next with the bits of one token each."""
        return self.max_batch - 1

    def why_no_drafts(self, speculate: str) -> str | None:
        """Say why no tokens are drafted where RunParams.speculate is this; None if some are.

        Nothing is drafted unasked where a pass over k tokens costs k passes, and nothing at all
        where an answer could have other bits than without.
        """
        if speculate == "off":
            return "it is switched off"
        if self.model.hparams.moe is not None:
            return "with experts, several tokens in a pass may differ in their last bits"
        if self.longest_draft < 1:
            return "with float weights, several tokens in a pass differ in their last bits"
        if speculate == "auto" and self.layers is None:
            return "all weights are in memory, where a pass over k tokens costs about k passes"
        return None

    def before_close(self, action: Callable[[], None]) -> None:
        """Have something done before anything is freed."""
        self._owned.callback(action)

    def close(self) -> None:
        """Free everything; safe to call twice."""
        self._owned.close()
