"""How much faster a depth plan decodes than the full model, in alternating pairs.

And what each sub-block of a token takes: attention has a tenth of a model's weights and up to a
seventh of its time, so that a search by weights leaves out the wrong ones.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.models.forward import Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import Steps, all_run
from edgeroute.runtime.errors import ComputeError
from edgeroute.skippers.static import Costs
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
    n_pairs: int = 7,
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


def measure_times(
    probe: Probe, sizes: Costs, text: Sequence[int], *, n_tokens: int = 24, n_rounds: int = 5
) -> Costs:
    """Measure what a decoded token takes, in nanoseconds, in rounds that count but for the first.

    All attentions are left out, and all feed-forwards: what that spares is shared out among
    them by their bytes.

    Args:
        probe: the model.
        sizes: bytes of each sub-block.
        text: token ids, N_PROMPT + n_tokens at least, that are read.
        n_tokens: decoded in each part of a round.
        n_rounds: how many count.
    """
    full = all_run(range(probe.n_layer))
    bare = [step._replace(ffn="skip") for step in full]
    lists = (full, bare, [step._replace(attn="skip") for step in bare])
    times: list[list[float]] = [[] for _ in lists]
    for i in range(n_rounds + 1):
        for steps, mine in zip(lists, times, strict=True):
            seconds = _decode(probe, probe.spans(steps), text[: N_PROMPT + n_tokens])
            if i:
                mine.append(seconds)
    whole, attn, head = (statistics.median(mine) for mine in times)
    return Costs(attn=_shared_out(attn - head, sizes.attn), head=max(1, round(1e9 * head)),
                 ffn=_shared_out(whole - attn, sizes.ffn))  # fmt: skip


def _shared_out(seconds: float, sizes: Sequence[int]) -> tuple[int, ...]:
    """Share seconds out by size, in nanoseconds; what has a size takes one at least."""
    per_byte = 1e9 * max(seconds, 0.0) / max(1, sum(sizes))
    return tuple(max(1, round(size * per_byte)) if size else 0 for size in sizes)


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
