"""What a model takes in memory, by part, from its header and the settings alone."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeroute.config import RunParams
from edgeroute.models.base import Hparams, Model
from edgeroute.runtime import machine
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvShape
from edgeroute.runtime.ledger import COMPUTE_BUFFER
from edgeroute.runtime.plain_weights import TILED
from edgeroute.runtime.units import MIB, format_bytes, parse_bytes
from edgeroute.runtime.weights import ResidentWeights, WeightsPlan

if TYPE_CHECKING:
    from edgeroute.adapters import AdapterPlan
    from edgeroute.depth import DepthSource

MAX_BATCH = 16
"""Sequences in one pass by default, at most: see RunParams.max_batch."""
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


def resident_weights(
    file: GGUFFile, device: Device, model: Model, params: RunParams,
    needs: Callable[[ResidentWeights], int], free_bytes: int,
) -> tuple[ResidentWeights, str]:  # fmt: skip
    """Plan for all weights in memory: in both layouts if that is asked for and fits.

    Args:
        file, device, model, params: what is to be loaded, where and how.
        needs: tells the bytes that a model takes with these weights.
        free_bytes: that there are.

    Returns:
        The weights, which the caller closes, and why they are not in both layouts; empty if they
        are, or nobody asked.
    """
    make = functools.partial(
        ResidentWeights, file, device, model.specs(), repack_experts=params.repack_experts
    )
    if not params.plain_prompts:
        return make(), ""
    weights = make(also_plain=TILED)
    why = "no matrix is repacked that tiles would be quicker for"
    if weights.plain:
        needed = needs(weights)
        if needed <= free_bytes:
            return weights, ""
        why = f"both layouts need {format_bytes(needed)}, there are {format_bytes(free_bytes)}"
    weights.close()
    return make(), f"plain_prompts does nothing here: {why}"


def plan_memory(
    hparams: Hparams, weights: ResidentWeights, params: RunParams, n_repeat: int = 0
) -> MemoryPlan:
    """Plan a model's bytes from its header and the settings.

    The compute buffer is an upper estimate: activations that live at once, the mask, logits.
    """
    n_kv = round_cells(params.n_kv or params.n_ctx)
    n_ubatch = min(params.n_ubatch, n_kv)
    per_token = 4 * (_n_values_ff(hparams) + 8 * hparams.n_embd) + 2 * round_cells(params.n_ctx)
    return MemoryPlan(
        weights=weights.plan,
        kv_bytes=n_kv * kv_shape(hparams, params, n_repeat).bytes_per_cell,
        compute_bytes=n_ubatch * per_token + logits_bytes(hparams, params),
    )


def logits_bytes(hparams: Hparams, params: RunParams) -> int:
    """Return what the logits of one pass take in the compute buffer, at most."""
    n_out = params.max_batch or MAX_BATCH
    if params.steps_on and params.small is not None:
        n_out = max(n_out, MAX_DRAFT + 1)
    return 4 * hparams.n_vocab * n_out


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
