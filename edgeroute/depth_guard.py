"""Scores tokens of answers again with the full model, while nobody waits if that can be.

The full model has no keys of a text that a plan computed, so a sampled token costs a pass over
the text before it, by either model. That is done in pauses, and given up when a request comes.
Where there are no pauses it is done all the same, now and then, also on answers under way: a plan
that breaks its promise must not last for as long as people ask.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeroute.depth import Depth
from edgeroute.models.forward import Forward, Piece
from edgeroute.request import Request
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cells import Region
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sampler import log_softmax

MAX_CONTEXT = 512
"""Tokens before a sampled one that both models read; more would cost more than it tells."""
MAX_SPAN = 64
"""Sampled tokens of one answer lie no further apart, since all logits between are computed."""
OVERDUE = 64
"""Answers without a pause after which one is checked though others wait."""
MAX_TRIES = 3
EARLY_SAMPLES, EARLY_STEP = 64, 4
"""Scored tokens before which a plan is new here; of an answer under a new plan every so many-th
token of the last MAX_SPAN is scored, for little more than one of them."""
EARLY_S, LATE_S = 5.0, 60.0
"""Seconds without a check after which one is made though others wait, of a new plan and later."""
EARLY_SHARE, LATE_SHARE = 0.2, 0.01
"""Of all time, what such checks may take at most."""
SHORT_CONTEXT = 128
"""Tokens before a sampled one that both models read while others wait."""

Logits = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Sample:
    """A text, and places in it whose next token is scored again."""

    tokens: list[int]
    places: list[int]
    n_tried: int = 0


class DepthGuard:
    """Feeds a plan's guard. Not thread-safe: the engine thread owns it, except `interrupt`."""

    def __init__(
        self, depth: Depth, forward: Forward, prefix: PrefixCache, n_ubatch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._depth = depth
        self._forward = forward
        self._prefix = prefix
        self._n_ubatch = n_ubatch
        self._sample: _Sample | None = None
        self._n_unchecked = 0
        self._clock = clock
        self._due: float | None = None
        self.checking = False
        """Whether a check runs that a new request should end by `device.stop_flag`."""

    def note(self, tokens: list[int], n_prompt: int) -> None:
        """Draw places from an answer that was computed under the plan."""
        if self._depth.guard is not None:
            self._n_unchecked += 1
            self._sample = self._draw(tokens, n_prompt, MAX_CONTEXT) or self._sample

    def _draw(self, tokens: list[int], n_prompt: int, n_context: int) -> _Sample | None:
        guard, n = self._depth.guard, len(tokens)
        if guard is None or guard.verdict != "keep":
            return None
        drawn = {i for i in range(max(1, n_prompt), n) if guard.wants()}
        if guard.estimate.n_samples < EARLY_SAMPLES:
            drawn.update(range(max(1, n_prompt, n - MAX_SPAN), n, EARLY_STEP))
        places = sorted(drawn)
        if not places:
            return None
        near = [place for place in places if places[-1] - place < min(MAX_SPAN, n_context)]
        first = max(0, near[-1] - n_context)
        return _Sample(tokens[first : near[-1]], [place - first - 1 for place in near])

    def advance(self, running: Iterable[Request]) -> None:
        """Make a check that should not wait for a pause any longer, if there is one.

        Args:
            running: answers under way.
        """
        guard = self._depth.guard
        if guard is None or guard.verdict != "keep":
            return
        now = self._clock()
        if self._due is None:
            self._due = now + EARLY_S
        if now >= self._due and (sample := self._under_way(running)) is not None:
            self._sample = sample
        elif self._sample is None or (now < self._due and self._n_unchecked < OVERDUE):
            return
        self.check(in_pause=False)
        self._set_due(now)

    def _under_way(self, running: Iterable[Request]) -> _Sample | None:
        """Draw from the longest answer under way; its last token is not scored yet."""
        mine = [each for each in running if each.depth is self._depth and each.sequence]
        if not mine:
            return None
        longest = max(mine, key=lambda request: len(request.token_ids))
        assert longest.sequence is not None
        return self._draw(longest.sequence.tokens, len(longest.prompt_ids), SHORT_CONTEXT)

    def _set_due(self, began: float) -> None:
        """Wait as long as keeps what checks cost a small share of all time."""
        guard, now = self._depth.guard, self._clock()
        early = guard is not None and guard.estimate.n_samples < EARLY_SAMPLES
        wait_s, share = (EARLY_S, EARLY_SHARE) if early else (LATE_S, LATE_SHARE)
        self._due = now + max(wait_s, (now - began) / share)

    def check(self, *, in_pause: bool = True) -> None:
        """Score what was drawn; stopped, it is tried again in the next pause.

        New requests end it in a pause. One that is overdue they wait for.
        """
        sample, guard = self._sample, self._depth.guard
        if sample is None or guard is None or guard.verdict != "keep":
            return
        sequence = self._prefix.open(sample.tokens, len(sample.tokens), "off")
        if sequence is None:  # running requests hold all cells
            return
        sample.n_tried += 1
        try:
            self.checking = in_pause
            found = self._divergences(sample, sequence.region)
        finally:
            self.checking = False
            self._prefix.drop(sequence)
        if found is not None or sample.n_tried >= MAX_TRIES:
            self._sample = None
        if found is not None:
            self._n_unchecked = 0
            if in_pause:
                self._set_due(self._clock())
            for divergence in found:
                guard.observe(divergence)

    def _divergences(self, sample: _Sample, region: Region) -> list[float] | None:
        device = self._forward.device
        device.stop_flag.clear()
        device.watch_stop_flag(True)
        try:
            full = self._logits(sample, region, None)
            mine = None if full is None else self._logits(sample, region, self._depth.spans)
        finally:
            device.watch_stop_flag(False)
        if full is None or mine is None:
            return None
        first = len(sample.tokens) - len(full)
        return [kl_nats(full[at - first], mine[at - first]) for at in sample.places]

    def _logits(
        self, sample: _Sample, region: Region, spans: tuple[Span, ...] | None
    ) -> Logits | None:
        """Compute a text afresh: logits from the first place on, or None if that was stopped."""
        tokens, wanted = sample.tokens, len(sample.tokens) - sample.places[0]
        rows: list[Logits] = []
        for start in range(0, len(tokens), self._n_ubatch):
            part = tokens[start : start + self._n_ubatch]
            n_out = max(0, min(len(part), start + len(part) - (len(tokens) - wanted)))
            piece = Piece(tokens=part, pos=start, region=region, n_out=n_out)
            found = self._forward.run([piece], spans)
            if found is None:
                return None
            rows.append(found)
        return np.concatenate(rows)


def kl_nats(full: Logits, mine: Logits) -> float:
    """Divergence of one distribution from the full model's, from raw logits, each (n_vocab,)."""
    p, q = (log_softmax(each.astype(np.float64)) for each in (full, mine))
    return float(np.sum(np.exp(p) * (p - q)))
