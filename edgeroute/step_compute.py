"""Passes of the two models for an answer in steps, and what they take."""

import time
from typing import TYPE_CHECKING, Final

from edgeroute.models.forward import Piece
from edgeroute.request import Request, stoppable
from edgeroute.step_reader import Compute, Follower, Logits, Reader, StepModel

if TYPE_CHECKING:
    from edgeroute.scheduler import Scheduler

BRIEF: Final = 8
"""Tokens of a pass that is over before a cancel could stop it within."""


def main_compute(scheduler: "Scheduler", model: StepModel, request: Request) -> Compute:
    """Return what runs pieces on the model that an answer belongs to."""

    def compute(piece: Piece, hidden: bool) -> Logits | None:
        began = time.perf_counter()
        spans = model.forward.headless() if hidden else None
        logits = scheduler.compute(request, piece, spans)
        _spent(request, piece, time.perf_counter() - began)
        return logits

    return compute


def other_compute(scheduler: "Scheduler", model: StepModel, request: Request) -> Compute:
    """Return what runs pieces on the model beside it, with as many threads."""
    forward, device = model.forward, model.forward.device

    def compute(piece: Piece, hidden: bool) -> Logits | None:
        device.set_threads(scheduler.threads.n_threads)
        began = time.perf_counter()
        spans = forward.headless() if hidden else None
        if len(piece.tokens) <= BRIEF:
            logits = forward.run([piece], spans, borrow=True)
        else:
            with stoppable([request], device):
                logits = forward.run([piece], spans, borrow=True)
        seconds = time.perf_counter() - began
        _spent(request, piece, seconds)
        if scheduler.energy is not None:
            scheduler.energy.passed([piece], [request], seconds)
        if logits is not None:
            model.cost.observe(len(piece.tokens), seconds)
            if len(piece.tokens) == 1:
                scheduler.threads.observe(-1, seconds)
        return logits

    return compute


def open_follower(
    scheduler: "Scheduler", model: StepModel, request: Request, *, same: bool
) -> Follower | None:
    """Give a request its cells in the model beside the one that its answer belongs to.

    Args:
        scheduler: counts what passes take.
        model: the one beside.
        request: whose answer.
        same: whether both models have one vocabulary.

    Returns:
        None while others hold those cells.
    """
    prompt = list(request.prompt_ids if same else request.other_prompt_ids)
    n_cells = request.n_cells if same else len(prompt) + 2 * request.max_tokens
    n_cells = min(n_cells, model.forward.kv.n_cells)
    held = request.small_held
    key, row = (None, None) if held is None else (held.key, held.row)
    sequence = model.prefix.open(prompt, n_cells, request.prefix, adapter=key)
    if sequence is None:
        return None
    compute = other_compute(scheduler, model, request)
    return Follower(Reader(model, sequence, len(prompt), compute, row), same=same)


def _spent(request: Request, piece: Piece, seconds: float) -> None:
    if piece.pos < len(request.prompt_ids):
        request.prefill_s += seconds
