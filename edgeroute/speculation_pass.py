"""One decode pass over a token of a request and the guesses behind it."""

import time
from typing import TYPE_CHECKING

from edgeroute.drafters import piece_of
from edgeroute.request import Request, sequence_of
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.sequence import CLASS_SINGLE
from edgeroute.skippers.guesses import ROOT, next_guess, outcome

if TYPE_CHECKING:
    from edgeroute.passes import Logits
    from edgeroute.scheduler import Scheduler
    from edgeroute.speculation import Draft, Speculation


def speculate(scheduler: "Scheduler", request: Request, speculation: "Speculation") -> None:
    """Compute a token of a request and the guesses behind it; keep what it would have drawn."""
    try:
        draft = speculation.draft(request)
    except EdgerouteError as error:
        scheduler.fail(request, error)
        return
    if request.interrupted():
        return  # the next round lets it go; what was drafted lies behind its cells
    guesses = draft.guesses
    pieces = [piece_of(request, guesses, at) for at in range(ROOT, len(guesses))]
    stalled_s, began = scheduler.stalled_s(), time.perf_counter()
    logits = scheduler.run_pass(pieces, [request])
    if logits is None:
        return
    pass_s = time.perf_counter() - began
    stalled_s = scheduler.stalled_s() - stalled_s
    scheduler.n_decode_steps += 1
    scheduler.n_decode_tokens += 1
    right = _verify(scheduler, (request, speculation, draft), logits)
    speculation.learn(draft, right, (pass_s, pass_s - stalled_s))


def _verify(
    scheduler: "Scheduler", what: "tuple[Request, Speculation, Draft]", logits: "Logits"
) -> list[bool | None]:
    """Draw tokens until nobody guessed one, or the answer ends; see `guesses.outcome`."""
    request, speculation, draft = what
    sequence, guesses = sequence_of(request), draft.guesses
    speculation.begin(request, draft)
    first, kept = sequence.n_past + 1, list[int]()
    at: int | None = ROOT
    while at is not None:
        if at != ROOT:
            speculation.accept(request)
            kept.append(at)
            if first + at != sequence.n_past:  # others were guessed for its place, too
                scheduler.forward.move(sequence.region, first + at, sequence.n_past)
        sequence.n_past += 1
        sequence.classes.append(CLASS_SINGLE)
        scheduler.sample(request, logits[at + 1])
        if request.sequence is None:
            return outcome(guesses, kept, ended=True)
        at = next_guess(guesses, at, sequence.tokens[-1])
    return outcome(guesses, kept, ended=False)
