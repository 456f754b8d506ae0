"""One decode pass over a token of a request and the guesses behind it."""

import time
from typing import TYPE_CHECKING

from edgeroute.models.forward import Piece
from edgeroute.request import Request, sequence_of
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.sequence import CLASS_SINGLE

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
    sequence = sequence_of(request)
    tokens = [sequence.tokens[-1], *draft.tokens]
    pieces = [
        Piece(tokens=(token,), pos=sequence.n_past + i, region=sequence.region,
              lora=request.lora) for i, token in enumerate(tokens)
    ]  # fmt: skip
    stalled_s, began = scheduler.stalled_s(), time.perf_counter()
    logits = scheduler.run_pass(pieces, [request])
    if logits is None:
        return
    pass_s = time.perf_counter() - began
    stalled_s = scheduler.stalled_s() - stalled_s
    scheduler.n_decode_steps += 1
    scheduler.n_decode_tokens += 1
    judged = _verify(scheduler, (request, speculation, draft), logits)
    speculation.learn(draft, judged, (pass_s, pass_s - stalled_s))


def _verify(
    scheduler: "Scheduler", what: "tuple[Request, Speculation, Draft]", logits: "Logits"
) -> tuple[int, int]:
    """Draw tokens until one is not the drafted one, or the answer ends.

    Returns:
        Drafted tokens that were compared with a drawn one, and those that were equal.
    """
    request, speculation, draft = what
    sequence, guesses = sequence_of(request), draft.tokens
    speculation.begin(request, draft)
    for i in range(len(guesses) + 1):
        sequence.n_past += 1
        sequence.classes.append(CLASS_SINGLE)
        scheduler.sample(request, logits[i])
        if request.sequence is None:
            return i, i
        if i == len(guesses) or sequence.tokens[-1] != guesses[i]:
            return min(i + 1, len(guesses)), i
        speculation.accept(request)
    raise AssertionError("the loop ends by itself")
