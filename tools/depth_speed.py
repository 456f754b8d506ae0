"""How much faster a depth plan decodes than the full model, in alternating pairs."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.models.forward import Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import Steps, all_run
from edgeroute.runtime.errors import ComputeError
from edgeroute.tools.depth_probe import Probe

N_PROMPT: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds per token of the full model and of a plan, pair by pair."""

    full_s: tuple[float, ...]
    plan_s: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Median over pairs of the plan's speed over the full model's."""
        return statistics.median(a / b for a, b in zip(self.full_s, self.plan_s, strict=True))

    @property
    def saved(self) -> float:
        """Share of the time per token that the plan saves, of the median pair."""
        return 1.0 - 1.0 / self.gain

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the pairs' gains; the gain itself of one pair."""
        gains = [a / b for a, b in zip(self.full_s, self.plan_s, strict=True)]
        if len(gains) < 2:
            return gains[0], gains[0]
        found = statistics.quantiles(gains, n=4, method="inclusive")
        return found[0], found[2]


def measure_speed(
    probe: Probe,
    steps: Steps,
    plan: str,
    text: Sequence[int],
    *,
    n_tokens: int = 24,
    n_pairs: int = 3,
) -> Speed:
    """Decode with and without a plan in turn; which comes first changes from pair to pair.

    The same tokens are fed to both, so that the times are of equal work.

    Args:
        probe: the model.
        steps: what the plan computes.
        plan: names its stand-ins.
        text: token ids, N_PROMPT + n_tokens at least, that are read.
        n_tokens: decoded in each half of a pair.
        n_pairs: how many pairs count, after one that does not.
    """
    spans = {False: probe.spans(all_run(range(probe.n_layer))), True: probe.spans(steps, plan)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(n_pairs + 1):
        for planned in (pair % 2 == 0, pair % 2 == 1):
            seconds = _decode(probe, spans[planned], text[: N_PROMPT + n_tokens])
            if pair:
                times[planned].append(seconds)
    return Speed(full_s=tuple(times[False]), plan_s=tuple(times[True]))


def _decode(probe: Probe, spans: tuple[Span, ...], text: Sequence[int]) -> float:
    """Read a prompt, then feed token by token; return the median seconds per token."""
    seconds = []
    prompt, rest = list(text[:N_PROMPT]), text[N_PROMPT:]
    pieces = [Piece(tokens=prompt, pos=0, region=probe.region)]
    pieces += [Piece(tokens=[token], pos=N_PROMPT + i, region=probe.region)
               for i, token in enumerate(rest)]  # fmt: skip
    for piece in pieces:
        began = time.perf_counter()
        if probe.run([piece], spans, borrow=True) is None:
            raise ComputeError("the computation was stopped")
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
