"""What predictors of the next layer's experts would have named right, replayed on a trace."""

from collections.abc import Callable, Iterator
from typing import Final

from edgeroute.offload.prefetch import Eam, Frequency, Predictor, RandomGuess
from edgeroute.offload.replay import Recall, replay_predictor
from edgeroute.offload.trace import Trace, sequences
from edgeroute.tools.profile.records import PredictorRow


class Popularity(Frequency):
    """How often each expert was chosen so far, nothing fading: the prior to beat."""

    name = "popularity"
    decay = 1.0


PREDICTORS: Final[tuple[tuple[Callable[[int, int], Predictor], tuple[int, ...]], ...]] = (
    (Eam, (1, 2)), (Frequency, (1, 2)), (Popularity, (1, 2)), (RandomGuess, (1,)),
)  # fmt: skip
"""Those that need no more than routes, and how many guesses per layer they get, in units of the
experts that a token uses there. The gate's own prediction needs hidden states."""


def predictor_rows(trace: Trace) -> Iterator[PredictorRow]:
    """Replay each predictor over all sequences of a trace, in order, learning as it goes.

    Bytes are of all that it names, as if nothing were resident: the most that it could read.
    """
    meta = trace.meta
    n_token = sum(not step.prefill for step in trace.steps)
    if not n_token or len(meta.layers) < 2:
        return
    for make, ratios in PREDICTORS:
        for ratio in ratios:
            n_guess = min(meta.n_expert, ratio * meta.n_expert_used)
            predictor = make(meta.n_layer, meta.n_expert)
            found = _recall(trace, predictor, n_guess)
            wrong = found.n_predicted - found.n_right
            yield PredictorRow(
                name=predictor.name, n_guess=n_guess, recall=found.recall,
                precision=found.precision,
                bytes_token=found.n_predicted * meta.page_bytes / n_token,
                wasted_bytes_token=wrong * meta.page_bytes / n_token,
            )  # fmt: skip


def _recall(trace: Trace, predictor: Predictor, n_guess: int) -> Recall:
    needed = predicted = right = 0
    for _, part in sequences(trace):
        if all(step.prefill for step in part.steps):
            continue
        found = replay_predictor(part, predictor, n_guess)
        needed, predicted = needed + found.n_needed, predicted + found.n_predicted
        right += found.n_right
        predictor.end_sequence()
    return Recall(n_needed=needed, n_predicted=predicted, n_right=right)
